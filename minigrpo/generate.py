"""Batched sampling over a hand-written KV cache: G answers to each prompt from one pass over it."""

import secrets
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigrpo.policy import AnswerCache, Policy, Prompts


@dataclass
class Rollout:
    """R = B G sampled answers; row r answers prompt r // G."""

    tokens: Tensor  # [R, T] padded after the end token
    mask: Tensor  # [R, T] bool, True up to and including the first end token
    # [R, T] fp32, of the tokens as they were sampled (temperature included), 0 where masked
    logprob: Tensor
    finished: Tensor  # [R] bool, ended by itself rather than cut at max_new_tokens
    texts: list[str]  # R answers, without special tokens
    row_steps: int  # tokens computed, those after the end of an answer included
    # weights, keys and values that the decoding steps read: at best as fast as memory
    bytes_read: int


# steps between looks at which rows have ended; elsewhere 8, for a look waits for the device
CHECK_EVERY = {"cpu": 1}


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Prompts,
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = None,
    rows_at_once: int | None = None,
) -> Rollout:
    """Sample `group_size` answers, of at most `max_new_tokens` tokens, to each of B prompts from
    softmax(logits / temperature), nothing cut off; temperature 0 is greedy. R = B group_size rows.

    Greedy log-probs are those of temperature 1. Every row draws from a random stream of its own
    (`random_streams`), so its answer depends on the seed and on its prompt's number, and not on who
    else is in the batch. Without a seed, one is drawn. At most `rows_at_once` answers (whole
    groups, at least one) are decoded together; where a group has ended, a waiting prompt takes its
    rows.
    """
    if (
        max_new_tokens < 1
        or group_size < 1
        or temperature < 0
        or (rows_at_once is not None and rows_at_once < 1)
    ):
        raise ValueError(
            "generate needs group_size, max_new_tokens and rows_at_once of 1 or more and a"
            f" temperature of 0 or more, got {group_size}, {max_new_tokens}, {rows_at_once} and"
            f" {temperature}"
        )
    device, B = policy.device, len(prompts.ids)
    places = B if rows_at_once is None else min(B, max(1, rows_at_once // group_size))
    uniform = random_streams(
        secrets.randbits(63) if seed is None else seed,
        prompts.stream_id.tolist(),
        group_size,
        max_new_tokens,
    )
    uniform, ends = uniform.to(device), torch.tensor(policy.end_ids, device=device)
    finished = torch.zeros(B * group_size, dtype=torch.bool, device=device)
    tokens = torch.full(
        (B * group_size, max_new_tokens), policy.tokenizer.pad_token_id, device=device
    )
    logprobs, mask = (
        torch.zeros(tokens.shape, device=device),
        torch.zeros(tokens.shape, dtype=torch.bool, device=device),
    )

    prefix, cache, started = (
        policy.prefill(prompts.select(slice(places), trim=False)),
        AnswerCache(max_new_tokens),
        places,
    )
    # (r, d) of the answers that are being decoded
    hidden = prefix.hidden.repeat_interleave(group_size, 0)
    rows = torch.arange(len(hidden), device=device)  # which of the R they are
    # tokens that each has; is it still open?
    length, going = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    row_steps, bytes_read, weights = 0, 0, policy.decoding_bytes()
    # around all steps: in bf16, the weights are cast once and not for each token
    with policy.precision():
        while True:
            # as the scorer, which projects in fp32
            with torch.autocast(device.type, enabled=False):
                # (r,), (r,)
                token, logprob = sample(hidden, policy.head, temperature, uniform[rows, length])
            at, ended, row_steps = (rows, length), torch.isin(token, ends), row_steps + len(rows)
            tokens[at], logprobs[at] = (
                torch.where(going, token, tokens[at]),
                torch.where(going, logprob, logprobs[at]),
            )
            mask[at] |= going  # with the end token itself, which is part of the answer
            finished[rows] |= going & ended
            going &= ~ended & (length + 1 < max_new_tokens)
            fresh = None
            if cache.written % CHECK_EVERY.get(device.type, 8) == 0:
                groups, kept = rows_to_keep(going.view(len(prefix.mask), -1))
                if started < B and not groups.all():
                    places = (~groups).nonzero()[: B - started, 0]
                    fresh = policy.prefill(
                        prompts.select(slice(started, started + len(places)), trim=False)
                    )
                    prefix.put(places, fresh)
                elif not going.any():
                    break
                # dropping rows copies the cache, so not at every step
                elif started == B and len(kept) < 0.8 * len(rows):
                    prefix, rows, token, length, going = (
                        prefix.select(groups),
                        rows[kept],
                        token[kept],
                        length[kept],
                        going[kept],
                    )
                    cache.select(kept)
            bytes_read += weights + prefix.nbytes + cache.nbytes
            hidden, length = (
                policy.decode(prefix, token, length, cache),
                (length + 1).clamp(max=max_new_tokens - 1),
            )
            if fresh:
                taken = (
                    places[:, None] * group_size + torch.arange(group_size, device=device)
                ).flatten()
                first = started * group_size
                rows[taken] = torch.arange(first, first + len(taken), device=device)
                hidden[taken], length[taken], going[taken] = (
                    fresh.hidden.repeat_interleave(group_size, 0),
                    0,
                    True,
                )
                started += len(places)
    longest = int(mask.any(0).sum())
    tokens, logprobs, mask = tokens[:, :longest], logprobs[:, :longest], mask[:, :longest]
    texts = [
        policy.tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(tokens, mask)
    ]
    return Rollout(tokens, mask, logprobs, finished, texts, row_steps, bytes_read)


def rows_to_keep(going: Tensor) -> tuple[Tensor, Tensor]:
    """The groups that have an open answer, as [b] bool, and which rows to follow further, for
    `going` [b, g] bool.

    Attention wants groups of one size: each keeps as many rows as the one with most open ones, its
        open ones first.
    """
    groups, most = going.any(1), int(going.sum(1).max())
    open_first = going.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    first_row = torch.arange(0, going.numel(), going.shape[1], device=going.device)[:, None]
    return groups, (first_row + open_first)[groups].flatten()


def random_streams(seed: int, numbers: list[int], group_size: int, length: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [R, length]: row r's are those of (seed, its prompt's
    number, its place in the group).

    A stream's first numbers are the same for every `length`. Drawn on the CPU, so that a GPU gets
    the same ones.
    """
    return torch.from_numpy(
        np.stack(
            [
                np.random.default_rng([seed % 2**64, number, answer]).random(length)
                for number in numbers
                for answer in range(group_size)
            ]
        )
    )


def sample(
    hidden: Tensor, head: Tensor, temperature: float, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Next tokens [R] and their fp32 log-probs [R] from hidden [R, d], head [V, d] and a uniform
    number [R] for each row.
    """
    logits = (hidden @ head.to(hidden.dtype).T).float()
    logprob = (logits / temperature if temperature else logits).log_softmax(-1)  # (R, V)
    token = draw(logprob.exp(), uniform) if temperature else logprob.argmax(-1)
    return token, logprob.gather(1, token[:, None])[:, 0]


def draw(weight: Tensor, uniform: Tensor, block: int = 128) -> Tensor:
    """Index [R] into whose share of the unit interval a uniform number [R] falls; weight [R, V],
    adding up to about 1.

    First the block of tokens, then the token in it: a running sum over a whole vocabulary is slow
    in double precision, and in fp32 it would swallow the rare words.
    """

    def pick(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The index, and how far into its share the number falls, which is again uniform."""
        end = weight.cumsum(-1, dtype=torch.float64)
        point = uniform[:, None] * end[:, -1:]
        index = torch.searchsorted(end, point, right=True).clamp(max=end.shape[1] - 1)
        share = weight.gather(1, index)
        return index[:, 0], ((point - end.gather(1, index)) / share + 1)[:, 0].clamp(0, 1)

    # (R, V / block, block)
    blocks = F.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    which, rest = pick(blocks.sum(-1), uniform)
    inside, _ = pick(blocks[torch.arange(len(blocks), device=weight.device), which], rest)
    return (which * block + inside).clamp(max=weight.shape[1] - 1)
