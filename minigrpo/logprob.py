"""Log-probs of chosen tokens straight from hidden states, one tile of logits at a time.

Full logits of N tokens are N x V floats: 13.9 GiB for 8,192 tokens at Qwen3-VL's V = 151,936, counting the copies that
log_softmax and its backward make. Here a tile of rows is projected, reduced and dropped; backward projects it again.
"""

import torch
from torch import Tensor


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0, tile: int = 512,
                   entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target], in fp32 (float64 stays float64), in nats.

    hidden [N, d], weight [V, d], target [N] integers in 0..V-1 -> log-prob [N], or (log-prob [N], entropy [N]).
    Gradients for hidden and weight are exact, those of a frozen weight are never computed, and at most `tile` rows
    of logits exist at any time, forward and backward.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise ValueError(f"linear_logprob needs hidden [N, d], weight [V, d] and target [N], got {tuple(hidden.shape)}, "
                         f"{tuple(weight.shape)} and {tuple(target.shape)}")
    if temperature <= 0:
        raise ValueError(f"linear_logprob needs a temperature above 0, got {temperature}")
    logprob, entropies = _LinearLogprob.apply(hidden, weight, target, temperature, tile, entropy)
    return (logprob, entropies) if entropy else logprob


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, tile, entropy):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprob = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        normaliser, entropies = torch.empty_like(logprob), torch.zeros_like(logprob)
        for rows in _tiles(len(hidden), tile):
            logits = _logits(hidden[rows], weight, temperature, exact)  # (tile, V)
            normaliser[rows] = logits.logsumexp(-1)
            logprob[rows] = logits.gather(1, target[rows, None])[:, 0] - normaliser[rows]
            if entropy:  # H = -sum p log p = logZ - sum p logit
                probability = (logits - normaliser[rows, None]).exp_()
                entropies[rows] = normaliser[rows] - (probability * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, target, normaliser, entropies)
        ctx.settings = temperature, tile, entropy, exact
        return logprob, entropies

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, target, normaliser, entropies = ctx.saved_tensors
        temperature, tile, entropy, exact = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over tiles, so in fp32: a bf16 sum would lose what late tiles add.
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        for rows in _tiles(len(hidden), tile):
            log_p = _logits(hidden[rows], weight, temperature, exact) - normaliser[rows, None]
            p = log_p.exp()
            grad = p * -grad_logprob[rows, None]  # d logprob / d logit = onehot - p
            grad.scatter_add_(1, target[rows, None], grad_logprob[rows, None])
            if entropy:  # d H / d logit = -p (log p + H)
                grad -= grad_entropy[rows, None] * p * (log_p + entropies[rows, None])
            grad = (grad / temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden[rows]).to(exact)
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _tiles(rows: int, tile: int):
    return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    return (hidden @ weight.T).to(dtype) / temperature
