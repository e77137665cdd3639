"""What each answer is worth beside the others of its group, as pure functions of tensors.

B prompts, G answers each; r is a reward, A the advantage. Wrong shapes, masks that hold anything
but 0 and 1, and settings that contradict each other raise ValueError; what is no tensor raises
TypeError. A sum over other processes comes in from outside, as `total=`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minigrpo.choices import SCALES, Scale
from minigrpo.masked import as_bool, check_tensors, exact, one_of, unmasked


def soft_overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """What is added to the reward of a long answer: 0 up to max_tokens - buffer tokens, from there
    linear to -1 at max_tokens. Source: DAPO (2503.14476), eq. 13.

    Args:
        lengths: of the answers in tokens, of any shape and dtype.
        max_tokens: the longest answer.
        buffer: tokens before it in which the penalty grows, 1..max_tokens.

    Returns: the penalty, fp32, of the shape of `lengths`, in -1..0.

    Raises: ValueError for a buffer out of range.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer must lie in 1..max_tokens = {max_tokens}, got {buffer}")
    return ((max_tokens - buffer - exact(lengths)) / buffer).clamp(-1, 0)


def group_advantages(
    rewards: Tensor,
    *,
    scale: Scale = "group",
    leave_one_out: bool = False,
    lengths: Tensor | None = None,
    eps: float = 1e-6,
    valid: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """A = (r - mean) / (std + eps) within each group, the std with n - 1. Source: DeepSeekMath
    (2402.03300), section 4.1.2.

    Args:
        rewards: [B, G], any real numbers.
        scale: "group" divides by the group's std; "batch" by the std of all valid rewards
            (2508.08221); "mean" by the group's mean, of rewards of 0 or more, without eps, and
            gives 0 where it is 0 (MaxRL, 2602.02710); "none" by nothing (Dr. GRPO, 2503.20783).
        leave_one_out: compare with the mean of the others, a factor n / (n - 1) before scaling
            (RLOO, 2402.14740).
        lengths: [B, G], of the answers in tokens: compare with the mean that they weigh,
            sum l r / sum l, under which the gradient varies least (OPO, 2505.23585, with scale
            "none").
        eps: added to the std.
        valid: [B, G], 0 where an answer could not be scored: it gets A = 0, and enters neither mean
            nor std.
        total: for scale "batch", the sum of a tensor over all processes. Without it, the batch is
            that of this process.

    Returns: A [B, G], in fp32 or better. Equal rewards give exactly 0, and so does a group with
        fewer than two valid answers.

    Raises: ValueError for other shapes or choices, TypeError for what is no tensor.
    """
    one_of("scale", scale, SCALES)
    check_tensors(rewards=rewards)
    if valid is not None:
        valid = as_bool("valid", valid)
    for name, x in (("valid", valid), ("lengths", lengths)):
        shape = None if x is None else tuple(x.shape)
        if rewards.dim() != 2 or not rewards.shape[1] or shape not in (None, tuple(rewards.shape)):
            raise ValueError(
                f"group_advantages needs rewards [B, G] and {name} of the same shape, got"
                f" {tuple(rewards.shape)} and {shape}"
            )
    if leave_one_out and lengths is not None:
        raise ValueError("leave_one_out and lengths are two baselines: choose one")
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    r = unmasked(rewards, valid)
    n = valid.sum(1, keepdim=True)  # (B, 1)
    # The mean of equal floats may miss them by an ulp, which a tiny std would blow up to any size.
    lowest = r.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    highest = r.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    mean = r.sum(1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(valid & ~(lowest >= highest), r - mean, 0.0)
    advantage = centred
    if leave_one_out:
        advantage = centred * n / (n - 1).clamp(min=1)
    elif lengths is not None:
        weight = unmasked(lengths, valid)
        weighed = (weight * centred).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        advantage = torch.where(valid, centred - weighed, 0.0)
    if scale == "none":
        return advantage
    if scale == "mean":
        if (r < 0).any():
            raise ValueError(
                f'scale="mean" divides by the mean of rewards of 0 or more, got {r.min().item():g}'
            )
        return advantage / torch.where(mean == 0, 1.0, mean)  # where it is 0, so is A
    if scale == "group":
        squares, count = centred.square().sum(1, keepdim=True), n
    else:
        squares, count = _squares_of_all(r, valid, total)
    return advantage / (_std(squares, count) + eps)


def decoupled_advantages(
    rewards: Tensor,
    weights: Tensor,
    *,
    eps: float = 1e-6,
    valid: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """For a mix of rewards: each is compared within its group by itself, and only then are they
    weighed, so that one with small differences counts as much as one with large ones. Source: GDPO
    (2601.05242), eq. 4 to 6.

    Args:
        rewards: [K, B, G], K rewards of each answer.
        weights: [K], or [K, B] where prompts have mixes of their own.
        eps: added to each std.
        valid: [K, B, G], 0 where that reward is missing.
        total: the sum of a tensor over all processes, as for `group_advantages`.

    Returns: A [B, G] = (S - mean S) / (std S + eps) over the batch, with S = sum_k w_k
        group_advantages(r_k); 0 for an answer without any reward.

    Raises: ValueError for other shapes, TypeError for what is no tensor.
    """
    check_tensors(rewards=rewards, weights=weights)
    if rewards.dim() != 3 or weights.shape not in (rewards.shape[:1], rewards.shape[:2]):
        raise ValueError(
            "decoupled_advantages needs rewards [K, B, G] and weights [K] or [K, B], got"
            f" {tuple(rewards.shape)} and {tuple(weights.shape)}"
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    alone = [group_advantages(r, eps=eps, valid=v) for r, v in zip(rewards, valid, strict=True)]
    mixed = (weights.view(*weights.shape, *[1] * (3 - weights.dim())) * torch.stack(alone)).sum(0)
    scored = as_bool("valid", valid).any(0)
    count = total(scored.sum())
    centred = torch.where(scored, mixed - total(mixed.sum()) / count.clamp(min=1), 0.0)
    return centred / (_std(*_squares_of_all(mixed, scored, total)) + eps)


def _squares_of_all(
    x: Tensor, valid: Tensor, total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared deviations of the valid x from their mean, summed over all processes, and how many
    they are.
    """
    count = total(valid.sum())
    mean = total(torch.where(valid, x, 0.0).sum()) / count.clamp(min=1)
    return total(torch.where(valid, x - mean, 0.0).square().sum()), count


def _std(squares: Tensor, count: Tensor) -> Tensor:
    """1 where it is 0: so is A there, whatever eps."""
    variance = squares / (count - 1).clamp(min=1)
    return torch.where(variance == 0, 1.0, variance).sqrt()
