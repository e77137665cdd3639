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
    logprob: Tensor  # [R, T] fp32, of the tokens as they were sampled (temperature included), 0 where masked
    finished: Tensor  # [R] bool, ended by itself rather than cut at max_new_tokens
    texts: list[str]  # R answers, without special tokens


@torch.no_grad()
def generate(policy: Policy, prompts: Prompts, *, group_size: int = 1, max_new_tokens: int, temperature: float = 1.0,
             seed: int | None = None) -> Rollout:
    """Sample `group_size` answers to each prompt from softmax(logits / temperature), nothing cut off; 0 is greedy.

    Greedy log-probs are those of temperature 1. Every row draws from a random stream of its own (`random_streams`), so its
    answer depends on the seed and on its prompt's number, and not on who else is in the batch. Without a seed, one is drawn.
    """
    if max_new_tokens < 1 or group_size < 1 or temperature < 0:
        raise ValueError(f"generate needs group_size and max_new_tokens of 1 or more and a temperature of 0 or more, "
                         f"got {group_size}, {max_new_tokens} and {temperature}")
    device = policy.device
    uniform = random_streams(secrets.randbits(63) if seed is None else seed, prompts.number.tolist(), group_size, max_new_tokens)
    uniform, ends = uniform.to(device), torch.tensor(policy.end_ids, device=device)

    prefix, cache = policy.prefill(prompts), AnswerCache(size=max_new_tokens)
    hidden = prefix.hidden.repeat_interleave(group_size, 0)  # (R, d)
    rows = torch.arange(len(hidden), device=device)  # those that are still decoded
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    tokens = torch.full((len(rows), max_new_tokens), policy.tokenizer.pad_token_id, device=device)
    logprobs, mask = torch.zeros(tokens.shape, device=device), torch.zeros(tokens.shape, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token, logprob = sample(hidden, policy.head, temperature, uniform[rows, t])  # (r,), (r,)
        going = ~finished[rows]  # before `finished` learns of this token: the end token itself is part of the answer
        mask[rows, t] = going
        tokens[rows, t] = torch.where(going, token, tokens[rows, t])
        logprobs[rows, t] = torch.where(going, logprob, 0.0)
        finished[rows] |= torch.isin(token, ends)
        if finished.all() or t + 1 == max_new_tokens:
            break
        groups, kept = rows_to_keep(~finished[rows].view(len(prefix.mask), -1))
        if len(kept) < 0.8 * len(rows):  # dropping rows copies the cache, so not at every step
            prefix, rows, token = prefix.select(groups), rows[kept], token[kept]
            cache.select(kept)
        hidden = policy.extend(prefix, token[:, None], cache)[:, 0]
    tokens, logprobs, mask = tokens[:, :t + 1], logprobs[:, :t + 1], mask[:, :t + 1]
    texts = [policy.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask)]
    return Rollout(tokens, mask, logprobs, finished, texts)


def rows_to_keep(going: Tensor) -> tuple[Tensor, Tensor]:
    """The groups that have an open answer, as [b] bool, and which rows to follow further, for `going` [b, g] bool.

    Attention wants groups of one size: each keeps as many rows as the one with most open ones, its open ones first.
    """
    groups, most = going.any(1), int(going.sum(1).max())
    open_first = going.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    first_row = torch.arange(0, going.numel(), going.shape[1], device=going.device)[:, None]
    return groups, (first_row + open_first)[groups].flatten()


def random_streams(seed: int, numbers: list[int], group_size: int, length: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [R, length]: row r's are those of (seed, its prompt's number, its place in the group).

    A stream's first numbers are the same for every `length`. Drawn on the CPU, so that a GPU gets the same ones.
    """
    return torch.from_numpy(np.stack([np.random.default_rng([seed % 2**64, number, answer]).random(length)
                                      for number in numbers for answer in range(group_size)]))


def sample(hidden: Tensor, head: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens [R] and their fp32 log-probs [R] from hidden [R, d], head [V, d] and a uniform number [R] for each row."""
    logits = (hidden @ head.to(hidden.dtype).T).float()
    logprob = (logits / temperature if temperature else logits).log_softmax(-1)  # (R, V)
    token = draw(logprob.exp(), uniform) if temperature else logprob.argmax(-1)
    return token, logprob.gather(1, token[:, None])[:, 0]


def draw(weight: Tensor, uniform: Tensor, block: int = 128) -> Tensor:
    """Index [R] into whose share of the unit interval a uniform number [R] falls; weight [R, V], adding up to about 1.

    First the block of tokens, then the token in it: a running sum over a whole vocabulary is slow in double precision, and
    in fp32 it would swallow the rare words.
    """
    def pick(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The index, and how far into its share the number falls, which is again uniform."""
        end = weight.cumsum(-1, dtype=torch.float64)
        point = uniform[:, None] * end[:, -1:]
        index = torch.searchsorted(end, point, right=True).clamp(max=end.shape[1] - 1)
        share = weight.gather(1, index)
        return index[:, 0], ((point - end.gather(1, index)) / share + 1)[:, 0].clamp(0, 1)

    blocks = F.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))  # (R, V / block, block)
    which, rest = pick(blocks.sum(-1), uniform)
    inside, _ = pick(blocks[torch.arange(len(blocks), device=weight.device), which], rest)
    return (which * block + inside).clamp(max=weight.shape[1] - 1)
