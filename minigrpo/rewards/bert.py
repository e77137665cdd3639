"""Runs texts through an encoder, in batches of similar length."""

from collections.abc import Callable

import torch
from torch import Tensor

TOKENS_IN_BATCH = 16_384  # padded tokens of one forward: bounds its memory


@torch.inference_mode()
def encode(model: Callable, ids: list[list[int]], pad: int, device: torch.device) -> list[Tensor]:
    """Hidden states [T_n, d] of each row of token ids, in order. `model(ids, mask)` takes [N, T]
    and gives [N, T, d].
    """
    vectors: dict[int, Tensor] = {}
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]), reverse=True)
    while order:
        longest = len(ids[order[0]])
        count = max(1, TOKENS_IN_BATCH // longest)
        # shorter ones would be mostly padding
        rows = [n for n in order[:count] if len(ids[n]) >= 0.7 * longest]
        order = order[len(rows) :]
        tokens = torch.full((len(rows), longest), pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for r, n in enumerate(rows):
            tokens[r, : len(ids[n])], mask[r, : len(ids[n])] = torch.tensor(ids[n]), 1
        hidden = model(tokens.to(device), mask.to(device))
        vectors |= {n: hidden[r, : len(ids[n])] for r, n in enumerate(rows)}
    return [vectors[n] for n in range(len(ids))]
