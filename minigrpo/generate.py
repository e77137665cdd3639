"""Batched sampling over a hand-written KV cache: G answers to each prompt from one pass over it."""

import secrets
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigrpo.encode import Prompts
from minigrpo.policy import AnswerCache, Policy, Prefix


@dataclass
class Rollout:
    """R = B G sampled answers; row r answers prompt r // G."""

    tokens: Tensor  # [R, T] padded after the end token
    mask: Tensor  # [R, T] bool, True up to and including the first end token
    logprob: Tensor  # [R, T] fp32, nats, as sampled (temperature included), 0 where masked
    finished: Tensor  # [R] bool, ended by itself rather than cut at max_new_tokens
    texts: list[str]  # R answers, without special tokens
    row_steps: int  # tokens computed, including those after the end of an answer
    bytes_read: int  # bytes of weights, keys and values that decoding read; they limit its speed


# Decoding steps between checks for finished rows. 8 on a GPU, where a check waits for the device.
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
    softmax(logits / temperature), without top-k or top-p; temperature 0 is greedy. R = B group_size
    rows.

    Greedy log-probs are those at temperature 1. Every row has its own random stream
    (`random_streams`), so its answer depends on the seed, its prompt's number and its place in the
    group, but not on the rest of the batch. Without a seed, a random one is used. At most
    `rows_at_once` answers (whole groups, at least one) are decoded together; when a group has
    finished, the next prompt takes its rows. ValueError for sizes below 1 or a temperature below 0.
    """
    at_least_one = (group_size, max_new_tokens, 1 if rows_at_once is None else rows_at_once)
    if min(at_least_one) < 1 or temperature < 0:
        raise ValueError(
            "generate needs group_size, max_new_tokens and rows_at_once of 1 or more and a"
            f" temperature of 0 or more, got {group_size}, {max_new_tokens}, {rows_at_once} and"
            f" {temperature}"
        )
    B = len(prompts.ids)
    seed = secrets.randbits(63) if seed is None else seed
    uniform = random_streams(seed, prompts.stream_id.tolist(), group_size, max_new_tokens)  # (R, T)
    places = B if rows_at_once is None else min(B, max(1, rows_at_once // group_size))
    # Around all steps: in bf16, the weights are cast once and not for each token.
    with policy.precision():
        decoding = Decoding(policy, prompts, uniform, places)
        while True:
            decoding.draw(temperature)
            refill = None
            if decoding.cache.written % CHECK_EVERY.get(policy.device.type, 8) == 0:
                if decoding.is_over():
                    return decoding.rollout()
                refill = decoding.make_room()
            decoding.advance()
            if refill:
                decoding.admit(*refill)


class Decoding:
    """The R answers so far, and the r of them that are being decoded: those to b prompts, G to
    each. `places` is the largest b; the other prompts wait.
    """

    def __init__(self, policy: Policy, prompts: Prompts, uniform: Tensor, places: int):
        device, (R, T) = policy.device, uniform.shape
        self.policy, self.prompts, self.uniform = policy, prompts, uniform.to(device)
        self.group_size = R // len(prompts.ids)
        self.end_ids = torch.tensor(policy.end_ids, device=device)
        # the answers
        self.tokens = torch.full((R, T), policy.tokenizer.pad_token_id, device=device)
        self.logprob = torch.zeros(R, T, device=device)
        self.mask = torch.zeros(R, T, dtype=torch.bool, device=device)
        self.finished = torch.zeros(R, dtype=torch.bool, device=device)
        # the rows that are being decoded
        self.prefix = policy.prefill(prompts.select(slice(places), trim=False))  # b prompts
        self.cache = AnswerCache(T)
        self.started = places  # prompts, of B
        self.hidden = self.prefix.hidden.repeat_interleave(self.group_size, 0)  # (r, d)
        self.rows = torch.arange(len(self.hidden), device=device)  # (r,) which of the R they are
        self.length = torch.zeros_like(self.rows)  # (r,) tokens that each has
        self.active = torch.ones_like(self.rows, dtype=torch.bool)  # (r,) not ended yet
        self.row_steps, self.bytes_read, self.weights = 0, 0, policy.decoding_bytes()

    def draw(self, temperature: float) -> None:
        """Sample a token for each row, and record it where the answer has not ended."""
        at = self.rows, self.length
        # as the scorer, which projects in fp32
        with torch.autocast(self.policy.device.type, enabled=False):
            self.token, logprob = sample(
                self.hidden, self.policy.head, temperature, self.uniform[at]
            )  # (r,), (r,)
        self.row_steps += len(self.rows)
        self.tokens[at] = torch.where(self.active, self.token, self.tokens[at])
        self.logprob[at] = torch.where(self.active, logprob, self.logprob[at])
        self.mask[at] |= self.active  # with the end token itself, which is part of the answer
        ended = torch.isin(self.token, self.end_ids)
        self.finished[self.rows] |= self.active & ended
        self.active &= ~ended & (self.length + 1 < self.tokens.shape[1])

    def is_over(self) -> bool:
        return self.started == len(self.prompts.ids) and not self.active.any()

    def make_room(self) -> tuple[Tensor, Prefix] | None:
        """The places, among the b, of groups that have finished, and the waiting prompts that take
        them. If no prompt waits, finished rows are dropped.
        """
        waiting = len(self.prompts.ids) - self.started
        groups, kept = rows_to_keep(self.active.view(len(self.prefix.mask), -1))
        if waiting and not groups.all():
            places = (~groups).nonzero()[:waiting, 0]
            next_prompts = slice(self.started, self.started + len(places))
            prefix = self.policy.prefill(self.prompts.select(next_prompts, trim=False))
            self.prefix.put(places, prefix)
            return places, prefix
        # Dropping rows copies the cache, so not at every step.
        if not waiting and len(kept) < 0.8 * len(self.rows):
            self.prefix = self.prefix.select(groups)
            self.cache.select(kept)
            self.rows, self.token = self.rows[kept], self.token[kept]
            self.length, self.active = self.length[kept], self.active[kept]
        return None

    def advance(self) -> None:
        """One pass over the rows' new tokens."""
        self.bytes_read += self.weights + self.prefix.nbytes + self.cache.nbytes
        self.hidden = self.policy.decode(self.prefix, self.token, self.length, self.cache)
        self.length = (self.length + 1).clamp(max=self.tokens.shape[1] - 1)

    def admit(self, places: Tensor, prefix: Prefix) -> None:
        """Begin the answers to the next prompts, in the rows of the groups at `places`."""
        in_group = torch.arange(self.group_size, device=places.device)
        at = (places[:, None] * self.group_size + in_group).flatten()
        first = self.started * self.group_size
        self.rows[at] = torch.arange(first, first + len(at), device=places.device)
        self.hidden[at] = prefix.hidden.repeat_interleave(self.group_size, 0)
        self.length[at], self.active[at] = 0, True
        self.started += len(places)

    def rollout(self) -> Rollout:
        longest = int(self.mask.any(0).sum())
        tokens, mask = self.tokens[:, :longest], self.mask[:, :longest]
        decode = partial(self.policy.tokenizer.decode, skip_special_tokens=True)
        texts = [decode(row[keep]) for row, keep in zip(tokens, mask)]
        logprob = self.logprob[:, :longest]
        return Rollout(tokens, mask, logprob, self.finished, texts, self.row_steps, self.bytes_read)


def rows_to_keep(active: Tensor) -> tuple[Tensor, Tensor]:
    """The groups that have an active answer, [b] bool, and the rows to continue with, for `active`
    [b, g] bool.

    Attention needs groups of equal size: each keeps as many rows as the group with the most active
    ones, its own active ones first.
    """
    groups, size = active.any(1), int(active.sum(1).max())
    active_first = active.int().argsort(dim=1, descending=True, stable=True)[:, :size]
    first_row = torch.arange(0, active.numel(), active.shape[1], device=active.device)[:, None]
    return groups, (first_row + active_first)[groups].flatten()


def random_streams(seed: int, numbers: list[int], group_size: int, length: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [R, length]: those of row r depend on (seed, its prompt's
    number, its place in the group).

    The first numbers of a stream are the same for every `length`. They are drawn on the CPU, so
    that a GPU gets the same ones.
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

    First the block of tokens, then the token within it: a cumulative sum over the whole vocabulary
    is slow in double precision, and in fp32 it would lose rare words.
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
