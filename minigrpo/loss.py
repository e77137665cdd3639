"""The loss of GRPO and its common variants, as pure functions of tensors; top to bottom as the
papers have it.

B prompts, G answers each, R = B G rows, T answer tokens. A is the advantage, rho = exp(logp -
logp_old) the ratio, m the mask, |o| the tokens of an answer, sg stops the gradient. Log-probs and
KL are in nats. Masks are bool or 0/1 of any dtype. Masked places are never read: a NaN there
changes neither loss nor gradient. Everything is computed in fp32 or better, whatever comes in.
Wrong shapes and settings that contradict each other raise ValueError.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minigrpo.choices import AGGREGATIONS, ESTIMATORS, RATIO_LEVELS, SCALES, SURROGATES

# What each paper sets of `grpo_loss`, as in grpo_loss(..., **PRESETS["dapo"]). Dr. GRPO and RLOO
# want max_tokens as well, and other advantages: group_advantages(rewards, scale="none"), and with
# leave_one_out=True for RLOO.
PRESETS: dict[str, dict] = {
    "radvlm": dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.01),  # 2512.10691
    # 2402.03300
    "grpo": dict(clip_low=0.2, clip_high=0.2, kl_coef=0.04, aggregation="sequence-mean"),
    "dapo": dict(clip_low=0.2, clip_high=0.28),  # 2503.14476
    "dr_grpo": dict(clip_low=0.2, clip_high=0.2, aggregation="constant"),  # 2503.20783
    # 2507.18071
    "gspo": dict(
        clip_low=3e-4, clip_high=4e-4, ratio_level="sequence", aggregation="sequence-mean"
    ),
    "cispo": dict(surrogate="cispo", cispo_cap=5.0),  # MiniMax-M1, 2506.13585
    "rloo": dict(clip_low=0.2, clip_high=0.2, aggregation="constant"),  # 2402.14740
}


def soft_overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """What is added to the reward of a long answer (DAPO 2503.14476, eq. 13): 0 up to max_tokens -
    buffer tokens, from there linear to -1 at max_tokens.

    lengths in tokens, of any shape -> fp32 of that shape in -1..0. 1 <= buffer <= max_tokens.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer must lie in 1..max_tokens = {max_tokens}, got {buffer}")
    return ((max_tokens - buffer - _exact(lengths)) / buffer).clamp(-1, 0)


def overlong_filter(mask: Tensor, finished: Tensor) -> Tensor:
    """Takes answers that were cut off out of the loss whole (DAPO, section 3.4); they still count
    in their group's mean.

    mask [R, T], finished [R] (ended by itself) -> bool mask [R, T].
    """
    if mask.dim() != 2 or finished.shape != mask.shape[:1]:
        raise ValueError(
            f"finished must be [R] for mask [R, T], got {tuple(finished.shape)} and"
            f" {tuple(mask.shape)}"
        )
    return mask.bool() & finished.bool()[:, None]


def group_advantages(
    rewards: Tensor,
    *,
    scale: str = "group",
    leave_one_out: bool = False,
    eps: float = 1e-6,
    valid: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """A = (r - mean) / (std + eps) within each group (DeepSeekMath 2402.03300, section 4.1.2; std
    with n - 1).

    rewards [B, G] -> [B, G]. `scale`: "group" divides by the group's std; "batch" by the std of all
    valid rewards (2508.08221), of this process, or of all whose sums `total` adds up; "none" not at
    all (Dr. GRPO, 2503.20783). `leave_one_out` multiplies by n / (n - 1) before scaling (RLOO,
    2402.14740). Answers outside `valid` [B, G] get 0 and enter neither mean nor std. Equal rewards
    give exactly 0, and so does a group with fewer than two valid answers.
    """
    _one_of("scale", scale, SCALES)
    if (
        rewards.dim() != 2
        or not rewards.shape[1]
        or (valid is not None and valid.shape != rewards.shape)
    ):
        raise ValueError(
            "group_advantages needs rewards [B, G] and valid of the same shape, got"
            f" {tuple(rewards.shape)} and {None if valid is None else tuple(valid.shape)}"
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
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
    logprob: Tensor, ref_logprob: Tensor, estimator: str = "k3", ratio: Tensor | None = None
) -> Tensor:
    """Per-token estimate of KL(policy || reference) (Schulman, "Approximating KL divergence"), [R,
    T] -> [R, T].

    k1 = logp - logp_ref; k2 = (logp - logp_ref)^2 / 2; k3 = exp(d) - d - 1 with d = logp_ref - logp
    (DeepSeekMath, eq. 4). With `ratio` [R, T] the estimate is multiplied by it, and the gradient
    flows through both (DeepSeek-V3.2, 2512.02556). k2 and k3 are >= 0. What each does as a loss, in
    expectation: tests/test_kl.py.
    """
    _one_of("estimator", estimator, ESTIMATORS)
    _same_shape(
        logprob=logprob, ref_logprob=ref_logprob, **({} if ratio is None else {"ratio": ratio})
    )
    d = _exact(ref_logprob) - _exact(logprob)
    if estimator == "k1":
        kl = -d
    elif estimator == "k2":
        kl = d.square() / 2
    else:
        kl = d.expm1() - d
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
    ratio_level: str = "token",
    surrogate: str = "clip",
    cispo_cap: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss [R, T], 0 where masked, and its statistics; logprob, old_logprob, mask [R, T],
    advantage [R].

    clip (PPO 1707.06347, eq. 7; clip_high from DAPO 2503.14476): max(-A rho, -A clip(rho, 1 - low,
    1 + high)), and with `dual_clip` c, where A < 0, at most -c A (1912.09729). ratio_level
    "sequence" (GSPO 2507.18071): rho is the geometric mean of the answer's ratios, at every token
    of it. surrogate "cispo" (MiniMax-M1 2506.13585): -sg(min(rho, cispo_cap)) A logp, and the clips
    are not used. The gradient reaches logprob alone.

    Statistics, scalars without gradient over the tokens of the mask: "clip_high", "clip_low",
    "clip_dual", the shares whose gradient each clip took ("clip_high" with cispo: whose weight the
    cap cut; the others are then absent, as is "clip_dual" without dual_clip), and
    "ratio_deviation", the mean of |rho - 1|.
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
    if logprob.dim() != 2 or advantage.shape != logprob.shape[:1]:
        raise ValueError(
            f"advantage must be [R] for logprob [R, T], got {tuple(advantage.shape)} and"
            f" {tuple(logprob.shape)}"
        )
    mask = mask.bool()
    logp = _unmasked(logprob, mask)
    log_ratio = logp - _unmasked(old_logprob.detach(), mask)
    if ratio_level == "sequence":
        log_ratio = (
            log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ).expand_as(logp)
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
    mask: Tensor, *, aggregation: str = "token-mean", max_tokens: int | None = None
) -> Tensor:
    """What `aggregate` divides by for mask [R, T], a scalar: tokens; rows that have a token; or R
    max_tokens.

    It adds up: over the micro-batches of an update, and over ranks.
    """
    _one_of("aggregation", aggregation, AGGREGATIONS)
    if mask.dim() != 2:
        raise ValueError(f"mask must be [R, T], got {tuple(mask.shape)}")
    if aggregation == "token-mean":
        return mask.bool().sum()
    if aggregation == "sequence-mean":
        return mask.bool().any(1).sum()
    if max_tokens is None or max_tokens < 1:
        raise ValueError(f'aggregation="constant" needs max_tokens of 1 or more, got {max_tokens}')
    return torch.tensor(len(mask) * max_tokens, device=mask.device)


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    *,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Per-token loss [R, T] -> scalar.

    "token-mean" (DAPO 2503.14476, eq. 8): sum m l / sum m. "sequence-mean" (DeepSeekMath, eq. 3):
    mean over answers of sum m l / |o|. "constant" (Dr. GRPO 2503.20783): sum m l / (R max_tokens).
    `denominator` replaces the count that is divided by (`denominator_of`), so that micro-batches
    and ranks can share the global one. An all-empty mask gives 0.
    """
    _one_of("aggregation", aggregation, AGGREGATIONS)
    _same_shape(per_token=per_token, mask=mask)
    if denominator is None:
        denominator = denominator_of(mask, aggregation=aggregation, max_tokens=max_tokens)
    mask, per_token = mask.bool(), _exact(per_token)
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
    kl_estimator: str = "k3",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    surrogate: str = "clip",
    cispo_cap: float = 5.0,
    kl_ratio: bool = False,
    rollout_logprob: Tensor | None = None,
    rollout_cap: float = 2.0,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """aggregate(policy_loss + kl_coef * kl_penalty): (scalar, statistics as scalars without
    gradient).

    RadVLM-GRPO (2512.10691) sets clip 0.2 / 0.28, dual_clip 3, k3 with kl_coef 0.01, token-mean.
    All log-probs are [R, T]. `kl_ratio` multiplies each token's KL by that token's own ratio,
    exp(logp - logp_old), as DeepSeek-V3.2 writes it (2512.02556). It is the token's also at
    ratio_level "sequence", where the policy term has the answer's; TRL and Liger take the answer's
    for both. `rollout_logprob`, the sampler's own where it differs from the scorer that gave
    old_logprob, weighs the policy term by sg(min(exp(old - rollout), rollout_cap)), as V-trace does
    (1802.01561). Statistics: those of `policy_loss`; "kl", nats per token, with ref_logprob (also
    where kl_coef is 0); "rollout_weight", the mean of those weights, with rollout_logprob.
    """
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob")
    more = {"ref_logprob": ref_logprob, "rollout_logprob": rollout_logprob}
    _same_shape(
        logprob=logprob,
        old_logprob=old_logprob,
        mask=mask,
        **{k: x for k, x in more.items() if x is not None},
    )
    mask = mask.bool()
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


def _same_shape(**tensors: Tensor) -> None:
    if len({t.shape for t in tensors.values()}) > 1:
        raise ValueError(
            "these must have one shape: "
            + ", ".join(f"{k} {tuple(t.shape)}" for k, t in tensors.items())
        )
