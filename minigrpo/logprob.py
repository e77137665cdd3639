"""Log-probs of given tokens straight from hidden states, one tile of logits at a time.

Full logits of N tokens are N x V floats: 13.9 GiB for 8,192 tokens at Qwen3-VL's V = 151,936,
counting the copies that log_softmax and its backward make. Here a tile of rows is projected,
reduced in place and freed; the backward pass projects it again.
"""

import torch
from torch import Tensor

__all__ = ["linear_logprob"]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    tile: int = 512,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target], with exact gradients for hidden and
    weight; a frozen weight gets none.

    Args:
        hidden: [N, d], fp32, bf16 or float64.
        weight: [V, d], the output embedding.
        target: [N] int64 in 0..V-1.
        temperature: above 0.
        tile: rows of logits in memory at a time, forward and backward (two copies with the
        entropy). Of 128, 256 and 512, 512 was the fastest on a CPU at V = 16,384 and 151,936:
        smaller tiles read the weights too often.
        entropy: also return it.

    Returns: the log-prob [N] in nats, in fp32 (float64 stays float64); with `entropy` a pair of the
    log-prob and the entropy [N] in nats.

    Raises: ValueError for other shapes, and for a temperature of 0 or less.
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or target.shape != hidden.shape[:1]
    ):
        raise ValueError(
            "linear_logprob needs hidden [N, d], weight [V, d] and target [N], got"
            f" {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"linear_logprob needs a temperature above 0, got {temperature}")
    logprob, entropies = _LinearLogprob.apply(hidden, weight, target, temperature, tile, entropy)
    return (logprob, entropies) if entropy else logprob


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, tile, entropy):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprob = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        normaliser = torch.empty_like(logprob)
        entropies = torch.zeros_like(logprob) if entropy else None
        for rows in _tiles(len(hidden), tile):
            logits = _logits(hidden[rows], weight, temperature, exact)  # (tile, V)
            chosen, largest = logits.gather(1, target[rows, None])[:, 0], logits.amax(-1)
            share = torch.sub(logits, largest[:, None], out=None if entropy else logits).exp_()
            total = share.sum(-1)
            normaliser[rows] = largest + total.log()
            logprob[rows] = chosen - normaliser[rows]
            if entropies is not None:  # H = -sum p log p = logZ - sum p logit
                entropies[rows] = normaliser[rows] - share.mul_(logits).sum(-1) / total
            del logits, share  # or they would stay while the next tile is made
        ctx.save_for_backward(hidden, weight, target, normaliser, entropies)
        ctx.settings = temperature, tile, exact
        # an entropy that is only logged comes back as None, and costs nothing
        ctx.set_materialize_grads(False)
        return logprob, entropies

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, target, normaliser, entropies = ctx.saved_tensors
        temperature, tile, exact = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over tiles, so in fp32: a bf16 sum would lose what late tiles add.
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        g = torch.zeros_like(normaliser) if grad_logprob is None else grad_logprob
        for rows in _tiles(len(hidden), tile):
            log_p = _logits(hidden[rows], weight, temperature, exact).sub_(normaliser[rows, None])
            if grad_entropy is None:  # d logprob / d logit = onehot - p
                grad = log_p.exp_().mul_(-g[rows, None])
            else:  # and d H / d logit = -p (log p + H)
                p = log_p.exp()
                grad = log_p.add_(entropies[rows, None]).mul_(-grad_entropy[rows, None])
                grad = grad.sub_(g[rows, None]).mul_(p)
            grad.scatter_add_(1, target[rows, None], g[rows, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad @ weight).div_(temperature)
            if grad_weight is not None:
                if weight.dtype == exact:
                    grad_weight.addmm_(grad.T, hidden[rows], alpha=1 / temperature)
                else:
                    grad_weight.add_(grad.T @ hidden[rows], alpha=1 / temperature)
            del log_p, grad
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _tiles(rows: int, tile: int):
    return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ weight.T).to(dtype)
    return logits if temperature == 1 else logits.div_(temperature)
