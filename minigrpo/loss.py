"""The loss of GRPO and its common variants, as pure functions of tensors; top to bottom as the
papers have it.

B prompts, G answers each, R = B G rows, T answer tokens. A is the advantage, rho = exp(logp -
logp_old) the ratio, m the mask, |o| the tokens of an answer, sg stops the gradient. Log-probs and
KL are in nats. Masks are bool, or 0 and 1 in any dtype. Masked places are never read: a NaN there
changes neither loss nor gradient. Everything is computed in fp32 or better, whatever comes in.

Every function is pure and knows one process: a sum over others comes in from outside, as `total=`
or `denominator=`. Wrong shapes, masks that hold anything but 0 and 1, and settings that contradict
each other raise ValueError; what is no tensor raises TypeError.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minigrpo.choices import (
    AGGREGATIONS,
    ESTIMATORS,
    RATIO_LEVELS,
    SCALES,
    SURROGATES,
    Aggregation,
    Estimator,
    RatioLevel,
    Scale,
    Surrogate,
)

__all__ = [
    "PRESETS",
    "aggregate",
    "denominator_of",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "overlong_filter",
    "policy_loss",
    "soft_overlong_penalty",
]

# What each paper sets of `grpo_loss`, as in grpo_loss(..., **PRESETS["dapo"]). Dr. GRPO and RLOO
# want max_tokens as well, and other advantages: group_advantages(rewards, scale="none"), and with
# leave_one_out=True for RLOO.
PRESETS: dict[str, dict] = {
    # 2512.10691
    "radvlm": dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.01),
    # 2402.03300
    "grpo": dict(clip_low=0.2, clip_high=0.2, kl_coef=0.04, aggregation="sequence-mean"),
    # 2503.14476
    "dapo": dict(clip_low=0.2, clip_high=0.28),
    # 2503.20783
    "dr_grpo": dict(clip_low=0.2, clip_high=0.2, aggregation="constant"),
    # 2507.18071
    "gspo": dict(
        clip_low=3e-4, clip_high=4e-4, ratio_level="sequence", aggregation="sequence-mean"
    ),
    # MiniMax-M1, 2506.13585
    "cispo": dict(surrogate="cispo", cispo_cap=5.0),
    # 2402.14740
    "rloo": dict(clip_low=0.2, clip_high=0.2, aggregation="constant"),
}


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
    return ((max_tokens - buffer - _exact(lengths)) / buffer).clamp(-1, 0)


def overlong_filter(mask: Tensor, finished: Tensor) -> Tensor:
    """Take answers that were cut off out of the loss. They still count in their group's mean.
    Source: DAPO (2503.14476), section 3.4.

    Args:
        mask: [R, T], 1 on the tokens of the answers.
        finished: [R], 1 where an answer ended by itself.

    Returns: the mask [R, T] as bool, without the rows that were cut off.

    Raises: ValueError for other shapes or values, TypeError for what is no tensor.
    """
    mask, finished = _as_bool("mask", mask), _as_bool("finished", finished)
    if mask.dim() != 2 or finished.shape != mask.shape[:1]:
        raise ValueError(
            f"finished must be [R] for mask [R, T], got {tuple(finished.shape)} and"
            f" {tuple(mask.shape)}"
        )
    return mask & finished[:, None]


def group_advantages(
    rewards: Tensor,
    *,
    scale: Scale = "group",
    leave_one_out: bool = False,
    eps: float = 1e-6,
    valid: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """A = (r - mean) / (std + eps) within each group, the std with n - 1. Source: DeepSeekMath
    (2402.03300), section 4.1.2.

    Args:
        rewards: [B, G], any real numbers.
        scale: "group" divides by the group's std; "batch" by the std of all valid rewards
            (2508.08221); "none" by nothing (Dr. GRPO, 2503.20783).
        leave_one_out: compare with the mean of the others, a factor n / (n - 1) before scaling
            (RLOO, 2402.14740).
        eps: added to the std.
        valid: [B, G], 0 where an answer could not be scored: it gets A = 0, and enters neither mean
            nor std.
        total: for scale "batch", the sum of a tensor over all processes. Without it, the batch is
            that of this process.

    Returns: A [B, G], in fp32 or better. Equal rewards give exactly 0, and so does a group with
        fewer than two valid answers.

    Raises: ValueError for other shapes or choices, TypeError for what is no tensor.
    """
    _one_of("scale", scale, SCALES)
    _tensors(rewards=rewards)
    if valid is not None:
        valid = _as_bool("valid", valid)
    shape = None if valid is None else tuple(valid.shape)
    if rewards.dim() != 2 or not rewards.shape[1] or shape not in (None, tuple(rewards.shape)):
        raise ValueError(
            "group_advantages needs rewards [B, G] and valid of the same shape, got"
            f" {tuple(rewards.shape)} and {shape}"
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    r = _unmasked(rewards, valid)
    n = valid.sum(1, keepdim=True)  # (B, 1)
    # The mean of equal floats may miss them by an ulp, which a tiny std would blow up to any size.
    lowest = r.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    highest = r.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    centred = torch.where(
        valid & ~(lowest >= highest), r - r.sum(1, keepdim=True) / n.clamp(min=1), 0.0
    )
    advantage = centred * n / (n - 1).clamp(min=1) if leave_one_out else centred
    if scale == "none":
        return advantage
    if scale == "group":
        squares, count = centred.square().sum(1, keepdim=True), n
    else:
        count = total(valid.sum())
        mean = total(r.sum()) / count.clamp(min=1)
        squares = total(torch.where(valid, r - mean, 0.0).square().sum())
    variance = squares / (count - 1).clamp(min=1)
    std = torch.where(variance == 0, 1.0, variance).sqrt()  # where it is 0, so is A, whatever eps
    return advantage / (std + eps)


def kl_penalty(
    logprob: Tensor, ref_logprob: Tensor, estimator: Estimator = "k3", ratio: Tensor | None = None
) -> Tensor:
    """Per-token estimate of KL(policy || reference). Source: Schulman, "Approximating KL
    divergence"; k3 in DeepSeekMath (2402.03300), eq. 4.

    With d = logp_ref - logp: k1 = -d; k2 = d^2 / 2, at least 0; k3 = exp(d) - d - 1, at least 0.
    Which way each pulls as a loss stands beside its line, for answers of the policy itself;
    tests/test_kl.py has all of it by enumeration.

    Args:
        logprob, ref_logprob: [R, T] in nats.
        estimator: "k1", "k2" or "k3".
        ratio: [R, T], multiplies the estimate, and the gradient flows through both (DeepSeek-V3.2,
            2512.02556): then k1 and k3 have the value and the gradient of KL(policy || reference),
            also for answers of an older policy.

    Returns: the estimate [R, T] in nats, in fp32 or better.

    Raises: ValueError for other shapes or choices, TypeError for what is no tensor.
    """
    _one_of("estimator", estimator, ESTIMATORS)
    _same_shape({"ratio": ratio}, logprob=logprob, ref_logprob=ref_logprob)
    d = _exact(ref_logprob) - _exact(logprob)
    if estimator == "k1":
        kl = -d  # mean gradient 0: it holds nothing
    elif estimator == "k2":
        kl = d.square() / 2  # that of KL(policy || reference)
    else:
        kl = d.expm1() - d  # that of KL(reference || policy), on the logits policy - reference
    return kl if ratio is None else _exact(ratio) * kl


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    ratio_level: RatioLevel = "token",
    surrogate: Surrogate = "clip",
    cispo_cap: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)). Source: PPO
    (1707.06347), eq. 7; clip_high from DAPO (2503.14476).

    Args:
        logprob: [R, T] in nats, of the policy; alone has a gradient.
        old_logprob: [R, T] in nats, of the policy that sampled.
        advantage: [R], one for each answer.
        mask: [R, T], 1 on the tokens of the answers.
        clip_low, clip_high: how far rho may fall and rise, 0 or more.
        dual_clip: where A < 0, the loss is at most -dual_clip A (1912.09729); above 1 + clip_high.
            None: off.
        ratio_level: "token", or "sequence": rho is the geometric mean of the answer's ratios, at
            every token of it (GSPO, 2507.18071).
        surrogate: "clip", or "cispo": -sg(min(rho, cispo_cap)) A logp, without the clips
            (MiniMax-M1, 2506.13585).
        cispo_cap: the largest weight of "cispo".

    Returns: the loss [R, T], 0 where masked, and statistics, scalars without gradient over the
        tokens of the mask: "clip_high", "clip_low", "clip_dual", the shares whose gradient each
        clip took, and "ratio_deviation", the mean of |rho - 1|. With "cispo" "clip_high" is the
        share whose weight the cap cut, and the other two are absent, as is "clip_dual" without
        dual_clip.

    Raises: ValueError for other shapes, values or choices, TypeError for what is no tensor.
    """
    _one_of("ratio_level", ratio_level, RATIO_LEVELS)
    _one_of("surrogate", surrogate, SURROGATES)
    if ratio_level == "sequence" and surrogate == "cispo":
        raise ValueError(
            'ratio_level="sequence" and surrogate="cispo" contradict each other: CISPO weighs'
            " single tokens"
        )
    if min(clip_low, clip_high) < 0:
        raise ValueError(
            f"clip_low and clip_high must be 0 or more, got {clip_low} and {clip_high}"
        )
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(
            f"dual_clip must lie above 1 + clip_high = {1 + clip_high}, got {dual_clip}"
        )
    _same_shape(logprob=logprob, old_logprob=old_logprob, mask=mask)
    _tensors(advantage=advantage)
    if logprob.dim() != 2 or advantage.shape != logprob.shape[:1]:
        raise ValueError(
            f"advantage must be [R] for logprob [R, T], got {tuple(advantage.shape)} and"
            f" {tuple(logprob.shape)}"
        )
    mask = _as_bool("mask", mask)
    logp = _unmasked(logprob, mask)
    log_ratio = logp - _unmasked(old_logprob.detach(), mask)
    if ratio_level == "sequence":
        tokens = mask.sum(1, keepdim=True).clamp(min=1)  # (R, 1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / tokens).expand_as(logp)
    ratio = _finite_exp(log_ratio)  # rho
    a = _unmasked(advantage.detach()[:, None].expand_as(logp), mask)
    if surrogate == "cispo":
        loss = -ratio.clamp(max=cispo_cap).detach() * a * logp
        stats = {"clip_high": _masked_mean(ratio > cispo_cap, mask)}
    else:
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_low, 1 + clip_high))
        stats = {
            "clip_high": _masked_mean((ratio > 1 + clip_high) & (a > 0), mask),
            "clip_low": _masked_mean((ratio < 1 - clip_low) & (a < 0), mask),
        }
        if dual_clip is not None:
            loss = torch.where(a < 0, torch.minimum(loss, -dual_clip * a), loss)
            stats["clip_dual"] = _masked_mean((ratio > dual_clip) & (a < 0), mask)
    stats["ratio_deviation"] = _masked_mean((ratio - 1).abs(), mask)
    return torch.where(mask, loss, 0.0), stats


def denominator_of(
    mask: Tensor, *, aggregation: Aggregation = "token-mean", max_tokens: int | None = None
) -> Tensor:
    """What `aggregate` divides by. It adds up over the micro-batches of an update and over ranks:
    with the sum as their `denominator`, the loss does not depend on how the batch is cut.

    Args:
        mask: [R, T], 1 on the tokens of the answers.
        aggregation: "token-mean", "sequence-mean" or "constant".
        max_tokens: the longest answer, for "constant".

    Returns: a scalar: the tokens; the rows that have a token; or R max_tokens.

    Raises: ValueError for other shapes, values or choices, TypeError for what is no tensor.
    """
    _one_of("aggregation", aggregation, AGGREGATIONS)
    mask = _as_bool("mask", mask)
    if mask.dim() != 2:
        raise ValueError(f"mask must be [R, T], got {tuple(mask.shape)}")
    if aggregation == "token-mean":
        return mask.sum()
    if aggregation == "sequence-mean":
        return mask.any(1).sum()
    if max_tokens is None or max_tokens < 1:
        raise ValueError(f'aggregation="constant" needs max_tokens of 1 or more, got {max_tokens}')
    return torch.tensor(len(mask) * max_tokens, device=mask.device)


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    *,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """The loss of all tokens as one number.

    Args:
        per_token: [R, T], the loss of each token.
        mask: [R, T], 1 on the tokens of the answers.
        aggregation: "token-mean", sum m l / sum m (DAPO 2503.14476, eq. 8); "sequence-mean", the
            mean over answers of sum m l / |o| (DeepSeekMath 2402.03300, eq. 3); "constant",
            sum m l / (R max_tokens) (Dr. GRPO, 2503.20783).
        denominator: what to divide by instead of `denominator_of(mask)`, where micro-batches or
            ranks share one.
        max_tokens: the longest answer, for "constant".

    Returns: a scalar; 0 where the mask is empty.

    Raises: ValueError for other shapes, values or choices, TypeError for what is no tensor.
    """
    _one_of("aggregation", aggregation, AGGREGATIONS)
    _same_shape(per_token=per_token, mask=mask)
    if denominator is None:
        denominator = denominator_of(mask, aggregation=aggregation, max_tokens=max_tokens)
    mask, per_token = _as_bool("mask", mask), _exact(per_token)
    count = torch.as_tensor(denominator, dtype=per_token.dtype)
    if per_token.dim() != 2 or count.dim():
        raise ValueError(
            "per_token must be [R, T] and denominator one number, "
            f"got {tuple(per_token.shape)} and {tuple(count.shape)}"
        )
    summed = _unmasked(per_token, mask).sum(1)  # (R,)
    total = (summed / mask.sum(1).clamp(min=1) if aggregation == "sequence-mean" else summed).sum()
    return total / count.clamp(min=torch.finfo(count.dtype).tiny)


def grpo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k3",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    ratio_level: RatioLevel = "token",
    surrogate: Surrogate = "clip",
    cispo_cap: float = 5.0,
    kl_ratio: bool = False,
    rollout_logprob: Tensor | None = None,
    rollout_cap: float = 2.0,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """aggregate(policy_loss + kl_coef kl_penalty). Source: DeepSeekMath (2402.03300), eq. 3; the
    settings of each paper are in `PRESETS`.

    At the first update after sampling, rho is 1 and the advantages of a group add up to 0, so the
    loss is 0 or nearly. Its gradient is not.

    Args:
        logprob, old_logprob, advantage, mask: as for `policy_loss`.
        ref_logprob: [R, T] in nats, of the reference; where it is given, the KL is logged, also
            with kl_coef 0.
        kl_coef: weight of the KL.
        kl_estimator: as for `kl_penalty`.
        clip_low, clip_high, dual_clip, ratio_level, surrogate, cispo_cap: as for `policy_loss`.
        kl_ratio: multiply each token's KL by that token's ratio exp(logp - logp_old)
            (DeepSeek-V3.2, 2512.02556). It is the token's also at ratio_level "sequence"; TRL and
            Liger take the answer's there.
        rollout_logprob: [R, T] in nats, the sampler's own, where it differs from the scorer that
            gave old_logprob. The policy term is weighed by sg(min(exp(old - rollout),
            rollout_cap)), as in V-trace (1802.01561).
        rollout_cap: the largest such weight.
        aggregation, denominator, max_tokens: as for `aggregate`.

    Returns: the loss, a scalar, and statistics, scalars without gradient: those of `policy_loss`;
        "kl" in nats per token, with ref_logprob; "rollout_weight", the mean of those weights, with
        rollout_logprob.

    Raises: ValueError for other shapes, values or choices, TypeError for what is no tensor.
    """
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob")
    optional = {"ref_logprob": ref_logprob, "rollout_logprob": rollout_logprob}
    _same_shape(optional, logprob=logprob, old_logprob=old_logprob, mask=mask)
    mask = _as_bool("mask", mask)
    logp, old = _unmasked(logprob, mask), _unmasked(old_logprob.detach(), mask)
    loss, stats = policy_loss(
        logp,
        old,
        advantage,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        surrogate=surrogate,
        cispo_cap=cispo_cap,
    )
    if rollout_logprob is not None:
        weight = (old - _unmasked(rollout_logprob.detach(), mask)).exp().clamp(max=rollout_cap)
        loss = weight * loss
        stats["rollout_weight"] = _masked_mean(weight, mask)
    if ref_logprob is not None:
        ratio = _finite_exp(logp - old) if kl_ratio else None
        kl = kl_penalty(logp, _unmasked(ref_logprob.detach(), mask), kl_estimator, ratio)
        stats["kl"] = _masked_mean(kl, mask)
        if kl_coef:
            loss = loss + kl_coef * kl
    return (
        aggregate(
            loss, mask, aggregation=aggregation, denominator=denominator, max_tokens=max_tokens
        ),
        stats,
    )


def _exact(x: Tensor) -> Tensor:
    """fp32, or float64 where x has it: sums over thousands of bf16 tokens would lose the last
    ones.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unmasked(x: Tensor, mask: Tensor) -> Tensor:
    """x in `_exact` where the mask is set, 0 elsewhere: unlike x * mask, this lets no NaN through,
    forward or backward.
    """
    return torch.where(mask, _exact(x), 0.0)


def _finite_exp(x: Tensor) -> Tensor:
    """exp, kept finite: an infinite ratio times an advantage or a slope of 0 would be NaN."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 1).exp()


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """For statistics: without gradient, 0 for an empty mask."""
    return _unmasked(x.detach(), mask).sum() / mask.sum().clamp(min=1)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _tensors(**values: Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _as_bool(name: str, mask: Tensor) -> Tensor:
    """Only a mask that is not bool already is looked at: on a GPU, looking waits for it."""
    _tensors(**{name: mask})
    if mask.dtype == torch.bool:
        return mask
    other = mask[(mask != 0) & (mask != 1)]
    if len(other):
        raise ValueError(f"{name} must hold 0 and 1 alone, got {other[0].item():g}")
    return mask.bool()


def _same_shape(optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """`optional` ones may be None."""
    given = tensors | {k: x for k, x in (optional or {}).items() if x is not None}
    _tensors(**given)
    if len({x.shape for x in given.values()}) > 1:
        shapes = ", ".join(f"{k} {tuple(x.shape)}" for k, x in given.items())
        raise ValueError(f"these must have one shape, [R, T]: {shapes}")
