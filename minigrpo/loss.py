"""The loss of GRPO and its common variants, as pure functions of tensors.

B prompts, G answers each, R = B G rows, T answer tokens. A is the advantage, rho = exp(logp - logp_old) the ratio,
m the mask, |o| the tokens of an answer. Masked places are never read: a NaN there changes neither loss nor gradient.
Everything is computed in fp32 or better, whatever comes in.
"""

import torch
from torch import Tensor

LEVELS, KINDS, SCALES = ("token", "sequence"), ("clip", "cispo"), ("group", "batch", "none")
ESTIMATORS, AGGREGATIONS = ("k1", "k2", "k3"), ("token-mean", "sequence-mean", "constant")


def group_advantages(rewards: Tensor, *, scale: str = "group", leave_one_out: bool = False, eps: float = 1e-6,
                     valid: Tensor | None = None) -> Tensor:
    """A = (r - mean) / (std + eps) within each group (DeepSeekMath 2402.03300, eq. 2; std with n - 1).

    rewards [B, G] -> [B, G]. `scale`: "group" divides by the group's std, "batch" by the std of all valid rewards
    (2508.08221), "none" not at all (Dr. GRPO, 2503.20783). `leave_one_out` multiplies by n / (n - 1) before scaling
    (RLOO, 2402.14740). Answers outside `valid` [B, G] get 0 and enter neither mean nor std. Equal rewards give exactly 0.
    """
    _one_of("scale", scale, SCALES)
    if rewards.dim() != 2 or (valid is not None and valid.shape != rewards.shape):
        raise ValueError(f"group_advantages needs rewards [B, G] and valid of the same shape, got {tuple(rewards.shape)}"
                         f" and {None if valid is None else tuple(valid.shape)}")
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    r = torch.where(valid, _exact(rewards), 0.0)
    n = valid.sum(1, keepdim=True)  # (B, 1)
    centred = torch.where(valid, r - r.sum(1, keepdim=True) / n.clamp(min=1), 0.0)
    # The mean of equal floats may miss them by an ulp, which a tiny std would blow up to any size.
    low = r.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = r.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    centred = torch.where(high > low, centred, 0.0)
    advantage = centred
    if leave_one_out:
        advantage = centred * (n / (n - 1).clamp(min=1))
    if scale == "group":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        advantage = advantage / (std + eps)
    elif scale == "batch":
        every = r[valid]
        std = every.std() if every.numel() > 1 else every.new_zeros(())
        advantage = advantage / (std + eps)
    return advantage


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, estimator: str = "k3", ratio: Tensor | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference) (Schulman, "Approximating KL divergence"), [R, T] -> [R, T].

    k1 = logp - logp_ref; k2 = (logp - logp_ref)^2 / 2; k3 = exp(d) - d - 1 with d = logp_ref - logp (DeepSeekMath, eq. 4).
    With `ratio` [R, T] the estimate is multiplied by it (DeepSeek-V3.2, 2512.02556). Range: k2 and k3 are >= 0.
    """
    _one_of("estimator", estimator, ESTIMATORS)
    _same_shape(logprob=logprob, ref_logprob=ref_logprob)
    d = _exact(ref_logprob) - _exact(logprob)
    kl = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: d.expm1() - d}[estimator]()
    return kl if ratio is None else ratio * kl


def policy_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float = 0.2,
                clip_high: float = 0.28, dual_clip: float | None = None, level: str = "token", kind: str = "clip",
                cispo_cap: float = 5.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss [R, T], 0 where masked, and its statistics; logprob, old_logprob, mask [R, T], advantage [R].

    clip (PPO 1707.06347, eq. 7; clip_high from DAPO 2503.14476): max(-A rho, -A clip(rho, 1 - low, 1 + high)), and with
    `dual_clip` c, where A < 0, at most -c A (1912.09729). level "sequence" (GSPO 2507.18071): rho is the geometric mean
    of the answer's ratios. kind "cispo" (MiniMax-M1 2506.13585): -sg(min(rho, cispo_cap)) A logp.
    """
    _one_of("level", level, LEVELS)
    _one_of("kind", kind, KINDS)
    if level == "sequence" and kind == "cispo":
        raise ValueError('level="sequence" and kind="cispo" contradict each other: CISPO weighs single tokens')
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(f"dual_clip must lie above 1 + clip_high = {1 + clip_high}, got {dual_clip}")
    _same_shape(logprob=logprob, old_logprob=old_logprob, mask=mask)
    if advantage.shape != logprob.shape[:1]:
        raise ValueError(f"advantage must be [R] for logprob [R, T], got {tuple(advantage.shape)} and {tuple(logprob.shape)}")
    mask = mask.bool()
    logp = torch.where(mask, _exact(logprob), 0.0)
    log_ratio = logp - torch.where(mask, _exact(old_logprob), 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp().expand_as(logp)  # rho
    a = _exact(advantage)[:, None]
    if kind == "cispo":
        loss = -ratio.clamp(max=cispo_cap).detach() * a * logp
        above, below = ratio > cispo_cap, torch.zeros_like(mask)
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = torch.maximum(-a * ratio, -a * clipped)
        above, below = (ratio > 1 + clip_high) & (a > 0), (ratio < 1 - clip_low) & (a < 0)
    stats = {"clip_high": _masked_mean(above, mask), "clip_low": _masked_mean(below, mask)}
    if kind == "clip" and dual_clip is not None:
        stats["clip_dual"] = _masked_mean((ratio > dual_clip) & (a < 0), mask)
        loss = torch.where(a < 0, torch.minimum(loss, -dual_clip * a), loss)
    stats["ratio_deviation"] = _masked_mean((ratio - 1).abs(), mask)
    return torch.where(mask, loss, 0.0), stats


def aggregate(per_token: Tensor, mask: Tensor, *, how: str = "token-mean", denominator: float | Tensor | None = None,
              max_tokens: int | None = None) -> Tensor:
    """Per-token loss [R, T] -> scalar.

    "token-mean" (DAPO 2503.14476): sum m l / sum m. "sequence-mean" (DeepSeekMath, eq. 3): mean over answers of
    sum m l / |o|. "constant" (Dr. GRPO 2503.20783): sum m l / (R max_tokens). `denominator` replaces the count that is
    divided by (tokens; answers; R max_tokens), so that micro-batches and ranks can share the global one.
    """
    _one_of("how", how, AGGREGATIONS)
    _same_shape(per_token=per_token, mask=mask)
    if how == "constant" and max_tokens is None and denominator is None:
        raise ValueError('how="constant" needs max_tokens')
    mask = mask.bool()
    per_token = torch.where(mask, _exact(per_token), 0.0)
    tokens = mask.sum(1)  # (R,)
    if how == "sequence-mean":
        total, count = (per_token.sum(1) / tokens.clamp(min=1)).sum(), (tokens > 0).sum()
    else:
        total, count = per_token.sum(), tokens.sum() if how == "token-mean" else len(mask) * (max_tokens or 0)
    count = torch.as_tensor(count if denominator is None else denominator, dtype=total.dtype, device=total.device)
    return total / count.clamp(min=torch.finfo(total.dtype).tiny)


def grpo_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, *, ref_logprob: Tensor | None = None,
              kl_coef: float = 0.0, kl_estimator: str = "k3", clip_low: float = 0.2, clip_high: float = 0.28,
              dual_clip: float | None = None, level: str = "token", kind: str = "clip", cispo_cap: float = 5.0,
              kl_ratio: bool = False, rollout_logprob: Tensor | None = None, rollout_cap: float = 2.0,
              how: str = "token-mean", denominator: float | Tensor | None = None, max_tokens: int | None = None,
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """aggregate(policy_loss + kl_coef * KL): (scalar, statistics as scalars without gradient).

    RadVLM-GRPO (2512.10691) sets clip 0.2 / 0.28, dual_clip 3, k3 with kl_coef 0.01, token-mean. With `rollout_logprob`
    the policy term is weighted by sg(min(exp(old - rollout), rollout_cap)), for a sampler that differs from the scorer.
    """
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob")
    loss, stats = policy_loss(logprob, old_logprob, advantage, mask, clip_low=clip_low, clip_high=clip_high,
                              dual_clip=dual_clip, level=level, kind=kind, cispo_cap=cispo_cap)
    mask = mask.bool()
    logp, old = (torch.where(mask, _exact(x), 0.0) for x in (logprob, old_logprob))
    if rollout_logprob is not None:
        _same_shape(logprob=logprob, rollout_logprob=rollout_logprob)
        sampled = torch.where(mask, _exact(rollout_logprob), 0.0)
        loss = loss * (old - sampled).exp().clamp(max=rollout_cap).detach()
    if ref_logprob is not None:
        _same_shape(logprob=logprob, ref_logprob=ref_logprob)
        ref = torch.where(mask, _exact(ref_logprob), 0.0)
        kl = kl_penalty(logp, ref, kl_estimator, ratio=(logp - old).exp() if kl_ratio else None)
        stats["kl"] = _masked_mean(kl, mask)
        if kl_coef:
            loss = loss + kl_coef * kl
    scalar = aggregate(loss, mask, how=how, denominator=denominator, max_tokens=max_tokens)
    return scalar, {name: value.detach() for name, value in stats.items()}


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    x = _exact(x.detach())
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _same_shape(**tensors: Tensor) -> None:
    if len({t.shape for t in tensors.values()}) > 1:
        raise ValueError("these must have one shape: " + ", ".join(f"{k} {tuple(t.shape)}" for k, t in tensors.items()))
