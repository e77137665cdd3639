"""The loss of GRPO and its common variants, as pure functions of tensors. What an answer is worth
beside its group is in advantages.py, what each surrogate makes of it in surrogates.py.

B prompts, G answers each, R = B G rows, T answer tokens. A is the advantage, rho = exp(logp -
logp_old) the ratio, m the mask, |o| the tokens of an answer, sg stops the gradient. Log-probs and
KL are in nats. Masks are bool, or 0 and 1 in any dtype. Masked places are never read: a NaN there
changes neither loss nor gradient. Everything is computed in fp32 or better, whatever comes in.

Every function is pure and knows one process: a sum over others comes in from outside, as `total=`
or `denominator=`. Wrong shapes, masks that hold anything but 0 and 1, and settings that contradict
each other raise ValueError; what is no tensor raises TypeError.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minigrpo.advantages import decoupled_advantages, group_advantages, soft_overlong_penalty
from minigrpo.choices import (
    AGGREGATIONS,
    ESTIMATORS,
    OUTSIDES,
    RATIO_LEVELS,
    Aggregation,
    Estimator,
    Outside,
    RatioLevel,
)
from minigrpo.masked import (
    as_bool,
    check_tensors,
    exact,
    finite_exp,
    masked_mean,
    one_of,
    same_shape,
    unmasked,
)
from minigrpo.surrogates import OF_SINGLE_TOKENS, surrogate_function, surrogate_settings

__all__ = [
    "PRESETS",
    "aggregate",
    "decoupled_advantages",
    "denominator_of",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "next_entropy_coef",
    "off_policy_rows",
    "overlong_filter",
    "policy_loss",
    "rollout_weights",
    "soft_overlong_penalty",
]

# What each paper sets of `grpo_loss`, as in grpo_loss(..., **PRESETS["dapo"]). Dr. GRPO and RLOO
# want max_tokens as well, and other advantages: group_advantages(rewards, scale="none"), and with
# leave_one_out=True for RLOO. IcePop and MIS want the sampler's log-probs as rollout_logprob.
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
    # 2602.04879
    "dppo": dict(surrogate="dppo", dppo_delta=0.2),
    # 2511.20347
    "sapo": dict(
        surrogate="sapo", sapo_tau_up=1.0, sapo_tau_down=1.05, aggregation="sequence-mean"
    ),
    # 2510.18855
    "icepop": dict(
        clip_low=0.2, clip_high=0.28, rollout_floor=0.5, rollout_cap=2.0, rollout_outside="drop"
    ),
    # 2512.02556
    "deepseek-v3.2": dict(
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.01,
        kl_ratio=True,
        off_policy_delta=0.1,
        aggregation="sequence-mean",
    ),
}


def overlong_filter(mask: Tensor, finished: Tensor) -> Tensor:
    """Take answers that were cut off out of the loss. They still count in their group's mean.
    Source: DAPO (2503.14476), section 3.4.

    Args:
        mask: [R, T], 1 on the tokens of the answers.
        finished: [R], 1 where an answer ended by itself.

    Returns: the mask [R, T] as bool, without the rows that were cut off.

    Raises: ValueError for other shapes or values, TypeError for what is no tensor.
    """
    mask, finished = as_bool("mask", mask), as_bool("finished", finished)
    if mask.dim() != 2 or finished.shape != mask.shape[:1]:
        raise ValueError(
            f"finished must be [R] for mask [R, T], got {tuple(finished.shape)} and"
            f" {tuple(mask.shape)}"
        )
    return mask & finished[:, None]


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
    one_of("estimator", estimator, ESTIMATORS)
    same_shape({"ratio": ratio}, logprob=logprob, ref_logprob=ref_logprob)
    d = exact(ref_logprob) - exact(logprob)
    if estimator == "k1":
        kl = -d  # mean gradient 0: it holds nothing
    elif estimator == "k2":
        kl = d.square() / 2  # that of KL(policy || reference)
    else:
        kl = d.expm1() - d  # that of KL(reference || policy), on the logits policy - reference
    return kl if ratio is None else exact(ratio) * kl


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    surrogate: str | Callable = "clip",
    ratio_level: RatioLevel = "token",
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token, by the surrogate that is chosen.

    Args:
        logprob: [R, T] in nats, of the policy; alone has a gradient.
        old_logprob: [R, T] in nats, of the policy that sampled.
        advantage: [R], one for each answer.
        mask: [R, T], 1 on the tokens of the answers.
        surrogate: a name of `SURROGATES`: "clip", "cispo", "dppo", "sapo"; or a function like
            theirs, surrogate(ratio, advantage, logprob, old_logprob, **settings) of [R, T] tensors,
            which returns the loss [R, T], or it and {name: [R, T] for the log}.
        ratio_level: "token", or "sequence": rho is the geometric mean of the answer's ratios, at
            every token of it (GSPO, 2507.18071).
        settings: of the surrogate; see there.

    Returns: the loss [R, T], 0 where masked, and statistics, scalars without gradient over the
        tokens of the mask: for each name that the surrogate gave the share of tokens ("clip_high",
        "clip_low", "clip_dual": whose gradient each clip took; of "cispo" "clip_high" is the share
        whose weight the cap cut), and "ratio_deviation", the mean of |rho - 1|.

    Raises: ValueError for other shapes, values, choices or settings, TypeError for what is no
        tensor.
    """
    one_of("ratio_level", ratio_level, RATIO_LEVELS)
    function, known = surrogate_function(surrogate), surrogate_settings(surrogate)
    if ratio_level == "sequence" and function in OF_SINGLE_TOKENS:
        raise ValueError(
            f'ratio_level="sequence" and surrogate="{surrogate}" contradict each other: it weighs'
            " single tokens"
        )
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(
            f'surrogate "{function.__name__}" has no setting {", ".join(unknown)}; it has'
            f" {', '.join(known) or 'none'}"
        )
    same_shape(logprob=logprob, old_logprob=old_logprob, mask=mask)
    check_tensors(advantage=advantage)
    if logprob.dim() != 2 or advantage.shape != logprob.shape[:1]:
        raise ValueError(
            f"advantage must be [R] for logprob [R, T], got {tuple(advantage.shape)} and"
            f" {tuple(logprob.shape)}"
        )
    mask = as_bool("mask", mask)
    logp, old = unmasked(logprob, mask), unmasked(old_logprob.detach(), mask)
    log_ratio = logp - old
    if ratio_level == "sequence":
        tokens = mask.sum(1, keepdim=True).clamp(min=1)  # (R, 1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / tokens).expand_as(logp)
    ratio = finite_exp(log_ratio)  # rho
    a = unmasked(advantage.detach()[:, None].expand_as(logp), mask)
    result = function(ratio, a, logp, old, **settings)
    loss, taken = result if isinstance(result, tuple) else (result, {})
    same_shape(logprob=logp, **{"the surrogate's loss": loss})
    stats = {name: masked_mean(of_tokens, mask) for name, of_tokens in taken.items()}
    stats["ratio_deviation"] = masked_mean((ratio - 1).abs(), mask)
    return torch.where(mask, loss, 0.0), stats


# ---- answers of another policy than the old one --------------------------------------------------


def rollout_weights(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    mask: Tensor,
    *,
    level: RatioLevel = "token",
    floor: float = 0.0,
    cap: float = 2.0,
    outside: Outside = "cut",
) -> tuple[Tensor, Tensor]:
    """What the policy term of each token is weighed by where the sampler is not quite the scorer:
    w = exp(old - rollout). Source: V-trace (1802.01561) cuts w at cap; IcePop (2510.18855) drops
    tokens whose w lies outside 0.5..2.

    Args:
        old_logprob, rollout_logprob: [R, T] in nats, of the scorer and of the sampler.
        mask: [R, T] bool.
        level: "token", or "sequence": the product over the answer's tokens, at every token of it.
        floor, cap: between which w may lie, 0 <= floor < cap.
        outside: "cut" w to the nearer of the two, or "drop": w = 0.

    Returns: w [R, T] without gradient, and a bool [R, T], where w lay outside.

    Raises: ValueError for other choices or bounds.
    """
    one_of("rollout_level", level, RATIO_LEVELS)
    one_of("rollout_outside", outside, OUTSIDES)
    if not 0 <= floor < cap:
        raise ValueError(
            f"rollout_floor and rollout_cap must be 0 <= floor < cap, got {floor} and {cap}"
        )
    log_weight = unmasked(old_logprob.detach(), mask) - unmasked(rollout_logprob.detach(), mask)
    if level == "sequence":
        log_weight = log_weight.sum(1, keepdim=True).expand_as(log_weight)
    weight = finite_exp(log_weight)
    beyond = (weight < floor) | (weight > cap)
    return weight.clamp(floor, cap) if outside == "cut" else weight.masked_fill(beyond, 0.0), beyond


def off_policy_rows(
    logprob: Tensor, sampled_logprob: Tensor, advantage: Tensor, mask: Tensor, delta: float
) -> Tensor:
    """Bad answers that the policy has left far behind: A < 0 and mean over their tokens of
    sampled - logp above delta. What they teach is noise. Source: DeepSeek-V3.2 (2512.02556), eq. 9.

    Args:
        logprob, sampled_logprob: [R, T] in nats, of the policy and of what sampled.
        advantage: [R].
        mask: [R, T] bool.
        delta: nats per token, 0 or more.

    Returns: a bool [R].

    Raises: ValueError for a delta below 0.
    """
    if delta < 0:
        raise ValueError(f"off_policy_delta must be 0 or more, got {delta}")
    drift = unmasked(sampled_logprob, mask) - unmasked(logprob.detach(), mask)
    return (advantage < 0) & (drift.sum(1) / mask.sum(1).clamp(min=1) > delta)


def next_entropy_coef(coef: float, entropy: float, target: float, step: float = 0.005) -> float:
    """The adaptive weight of an entropy bonus: it rises by `step` while the entropy is at the
    target or below, and falls above it. Source: Skywork-OR1 (2505.22312), section 3.2.5, where it
    is 0 at once above the target.

    Args:
        coef: what it was, 0 or more.
        entropy, target: in nats per token.
        step: by which it moves.

    Returns: what it is next, 0 or more.
    """
    return max(0.0, coef + step if entropy <= target else coef - step)


# ---- the whole loss ------------------------------------------------------------------------------


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
    one_of("aggregation", aggregation, AGGREGATIONS)
    mask = as_bool("mask", mask)
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
    one_of("aggregation", aggregation, AGGREGATIONS)
    same_shape(per_token=per_token, mask=mask)
    if denominator is None:
        denominator = denominator_of(mask, aggregation=aggregation, max_tokens=max_tokens)
    mask, per_token = as_bool("mask", mask), exact(per_token)
    count = torch.as_tensor(denominator, dtype=per_token.dtype)
    if per_token.dim() != 2 or count.dim():
        raise ValueError(
            "per_token must be [R, T] and denominator one number, "
            f"got {tuple(per_token.shape)} and {tuple(count.shape)}"
        )
    summed = unmasked(per_token, mask).sum(1)  # (R,)
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
    kl_ratio: bool = False,
    surrogate: str | Callable = "clip",
    ratio_level: RatioLevel = "token",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_logprob: Tensor | None = None,
    rollout_level: RatioLevel = "token",
    rollout_floor: float = 0.0,
    rollout_cap: float = 2.0,
    rollout_outside: Outside = "cut",
    off_policy_delta: float | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    max_tokens: int | None = None,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """aggregate(policy_loss + kl_coef kl_penalty - entropy_coef entropy). Source: DeepSeekMath
    (2402.03300), eq. 3; the settings of each paper are in `PRESETS`.

    At the first update after sampling, rho is 1 and the advantages of a group add up to 0, so the
    loss is 0 or nearly. Its gradient is not.

    Args:
        logprob, old_logprob, advantage, mask: as for `policy_loss`.
        ref_logprob: [R, T] in nats, of the reference; where it is given, the KL is logged, also
            with kl_coef 0.
        kl_coef: weight of the KL.
        kl_estimator: as for `kl_penalty`.
        kl_ratio: multiply each token's KL by that token's ratio exp(logp - logp_old)
            (DeepSeek-V3.2, 2512.02556). It is the token's also at ratio_level "sequence", where TRL
            and Liger take the answer's: with the token's alone is the estimate unbiased.
        surrogate, ratio_level: as for `policy_loss`.
        entropy: [R, T] in nats, of the policy's next token, with its gradient.
        entropy_coef: weight of the entropy, which the loss then raises; see `next_entropy_coef`.
        rollout_logprob: [R, T] in nats, the sampler's own, where it differs from the scorer that
            gave old_logprob. The policy term is weighed by `rollout_weights`.
        rollout_level, rollout_floor, rollout_cap, rollout_outside: level, floor, cap and outside of
            `rollout_weights`.
        off_policy_delta: in nats: the policy term of `off_policy_rows` is 0. None: off.
        aggregation, denominator, max_tokens: as for `aggregate`.
        settings: of the surrogate, as clip_low=0.2, clip_high=0.28, dual_clip=None of "clip".

    Returns: the loss, a scalar, and statistics, scalars without gradient: those of `policy_loss`;
        "kl" in nats per token, with ref_logprob; "rollout_weight", the mean of those weights, and
        "rollout_outside", the share that lay outside the bounds, with rollout_logprob;
        "off_policy", the share of tokens in such rows, with off_policy_delta.

    Raises: ValueError for other shapes, values or choices, TypeError for what is no tensor.
    """
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob")
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy")
    same_shape(
        {"ref_logprob": ref_logprob, "rollout_logprob": rollout_logprob, "entropy": entropy},
        logprob=logprob,
        old_logprob=old_logprob,
        mask=mask,
    )
    mask = as_bool("mask", mask)
    logp, old = unmasked(logprob, mask), unmasked(old_logprob.detach(), mask)
    loss, stats = policy_loss(
        logp, old, advantage, mask, surrogate=surrogate, ratio_level=ratio_level, **settings
    )
    if rollout_logprob is not None:
        weight, beyond = rollout_weights(
            old,
            rollout_logprob,
            mask,
            level=rollout_level,
            floor=rollout_floor,
            cap=rollout_cap,
            outside=rollout_outside,
        )
        loss = weight * loss
        stats["rollout_weight"] = masked_mean(weight, mask)
        stats["rollout_outside"] = masked_mean(beyond, mask)
    if off_policy_delta is not None:
        sampled = old if rollout_logprob is None else rollout_logprob.detach()
        dropped = off_policy_rows(logp, sampled, advantage, mask, off_policy_delta)[:, None]
        loss = loss.masked_fill(dropped, 0.0)
        stats["off_policy"] = masked_mean(dropped.expand_as(mask), mask)
    if ref_logprob is not None:
        ratio = finite_exp(logp - old) if kl_ratio else None
        kl = kl_penalty(logp, unmasked(ref_logprob.detach(), mask), kl_estimator, ratio)
        stats["kl"] = masked_mean(kl, mask)
        if kl_coef:
            loss = loss + kl_coef * kl
    if entropy is not None and entropy_coef:
        loss = loss - entropy_coef * unmasked(entropy, mask)
    return (
        aggregate(
            loss, mask, aggregation=aggregation, denominator=denominator, max_tokens=max_tokens
        ),
        stats,
    )
