"""What each token of an answer contributes to the loss, by which its probability is raised or
lowered: one function for each paper, chosen by name.

Each is a function of [R, T] tensors: the ratio rho (of the token, or of its answer), the advantage
A, and the log-probs of now and of when the answer was sampled; what is masked has ratio 1, and 0 in
the other three. It returns the loss of each token and, for the log, by name, which tokens had their
gradient taken or cut, as bool [R, T]. What it can be set to is named after the star, with the
paper's value; a value out of range raises ValueError. sg stops the gradient.

Your own is such a function, too: grpo_loss(..., surrogate=mine), or `--surrogate my_module:mine`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minigrpo.masked import one_of


def clip(
    ratio: Tensor,
    advantage: Tensor,
    logprob: Tensor,
    old_logprob: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)). Beyond the clip a token has no
    gradient. Source: PPO (1707.06347), eq. 7; clip_high from DAPO (2503.14476).

    Args:
        clip_low, clip_high: how far rho may fall and rise, 0 or more.
        dual_clip: where A < 0, the loss is at most -dual_clip A (1912.09729); above 1 + clip_high.
            None: off.
    """
    if min(clip_low, clip_high) < 0:
        raise ValueError(
            f"clip_low and clip_high must be 0 or more, got {clip_low} and {clip_high}"
        )
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(
            f"dual_clip must lie above 1 + clip_high = {1 + clip_high}, got {dual_clip}"
        )
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    taken = {
        "clip_high": (ratio > 1 + clip_high) & (advantage > 0),
        "clip_low": (ratio < 1 - clip_low) & (advantage < 0),
    }
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
        taken["clip_dual"] = (ratio > dual_clip) & (advantage < 0)
    return loss, taken


def cispo(
    ratio: Tensor,
    advantage: Tensor,
    logprob: Tensor,
    old_logprob: Tensor,
    *,
    cispo_cap: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(min(rho, cispo_cap)) A logp: every token keeps its gradient, of a weight that is bounded.
    Source: MiniMax-M1 (2506.13585), eq. 4 and 5.

    Args:
        cispo_cap: the largest weight, above 0.
    """
    if cispo_cap <= 0:
        raise ValueError(f"cispo_cap must be above 0, got {cispo_cap}")
    weight = ratio.clamp(max=cispo_cap).detach()
    return -weight * advantage * logprob, {"clip_high": ratio > cispo_cap}


def dppo(
    ratio: Tensor,
    advantage: Tensor,
    logprob: Tensor,
    old_logprob: Tensor,
    *,
    dppo_delta: float = 0.2,
    dppo_cap: float = 20.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-M sg(min(rho, dppo_cap)) A logp, where M is 0 once the token's probability has moved by more
    than dppo_delta where A wants it. A ratio is large for any rare token; the probability says by
    how much the policy changed (binary total variation). Source: DPPO (2602.04879).

    Args:
        dppo_delta: how far the probability may move, 0..1.
        dppo_cap: the largest weight, above 0.
    """
    if not 0 <= dppo_delta <= 1 or dppo_cap <= 0:
        raise ValueError(
            "dppo_delta is a difference of probabilities, 0..1, and dppo_cap above 0, got"
            f" {dppo_delta} and {dppo_cap}"
        )
    moved = logprob.detach().exp() - old_logprob.exp()
    taken = {
        "clip_high": (moved > dppo_delta) & (advantage > 0),
        "clip_low": (moved < -dppo_delta) & (advantage < 0),
    }
    weight = ratio.clamp(max=dppo_cap).detach()
    loss = -weight * advantage * logprob
    return torch.where(taken["clip_high"] | taken["clip_low"], 0.0, loss), taken


def sapo(
    ratio: Tensor,
    advantage: Tensor,
    logprob: Tensor,
    old_logprob: Tensor,
    *,
    sapo_tau_up: float = 1.0,
    sapo_tau_down: float = 1.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-4 / tau sigmoid(tau (rho - 1)) A: a gate instead of a clip. Its slope is 1 at rho = 1 and
    falls on both sides, the faster the larger tau. Source: SAPO (2511.20347), eq. 5 and 6.

    Args:
        sapo_tau_up, sapo_tau_down: tau where A > 0 and elsewhere, above 0.
    """
    if min(sapo_tau_up, sapo_tau_down) <= 0:
        raise ValueError(
            f"sapo_tau_up and sapo_tau_down must be above 0, got {sapo_tau_up} and {sapo_tau_down}"
        )
    up, down = advantage.new_tensor(sapo_tau_up), advantage.new_tensor(sapo_tau_down)
    tau = torch.where(advantage > 0, up, down)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage, {}


SURROGATES: dict[str, Callable] = {f.__name__: f for f in (clip, cispo, dppo, sapo)}
OF_SINGLE_TOKENS = (cispo, dppo)


def surrogate_settings(surrogate: str | Callable) -> dict[str, Any]:
    """What a surrogate can be set to, with its defaults. ValueError for an unknown name."""
    parameters = inspect.signature(surrogate_function(surrogate)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def surrogate_function(surrogate: str | Callable) -> Callable:
    if callable(surrogate):
        return surrogate
    one_of("surrogate", surrogate, tuple(SURROGATES))
    return SURROGATES[surrogate]
