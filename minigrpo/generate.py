"""Batched sampling over a hand-written KV cache: G answers to each prompt from one pass over it."""

from dataclasses import dataclass

import torch
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

    Greedy log-probs are those of temperature 1. On a CPU the same seed gives the same answers.
    """
    if max_new_tokens < 1 or group_size < 1 or temperature < 0:
        raise ValueError(f"generate needs group_size and max_new_tokens of 1 or more and a temperature of 0 or more, "
                         f"got {group_size}, {max_new_tokens} and {temperature}")
    device = policy.device
    random = torch.Generator(device)
    random.manual_seed(seed) if seed is not None else random.seed()
    ends = torch.tensor(policy.end_ids, device=device)

    prefix, cache = policy.prefill(prompts), AnswerCache(size=max_new_tokens)
    hidden = prefix.hidden.repeat_interleave(group_size, 0)  # (R, d)
    rows = torch.arange(len(hidden), device=device)  # those that are still decoded
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    tokens = torch.full((len(rows), max_new_tokens), policy.tokenizer.pad_token_id, device=device)
    logprobs, mask = torch.zeros(tokens.shape, device=device), torch.zeros(tokens.shape, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token, logprob = sample(hidden, policy.head, temperature, random)  # (r,), (r,)
        going = ~finished[rows]  # before `finished` learns of this token: the end token itself is part of the answer
        mask[rows, t] = going
        tokens[rows, t] = torch.where(going, token, tokens[rows, t])
        logprobs[rows, t] = torch.where(going, logprob, 0.0)
        finished[rows] |= torch.isin(token, ends)
        open_groups = ~finished[rows].view(-1, group_size).all(1)  # (b,)
        if not open_groups.any() or t + 1 == max_new_tokens:
            break
        if open_groups.float().mean() < 0.75:  # dropping ended groups copies the cache, so not at every step
            keep = open_groups.repeat_interleave(group_size)
            prefix, rows, token = prefix.select(open_groups), rows[keep], token[keep]
            cache.select(keep)
        hidden = policy.extend(prefix, token[:, None], cache)[:, 0]
    tokens, logprobs, mask = tokens[:, :t + 1], logprobs[:, :t + 1], mask[:, :t + 1]
    texts = [policy.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask)]
    return Rollout(tokens, mask, logprobs, finished, texts)


def sample(hidden: Tensor, head: Tensor, temperature: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Next tokens [R] and their fp32 log-probs [R] from hidden [R, d] and head [V, d]."""
    logits = (hidden @ head.to(hidden.dtype).T).float()
    logprob = (logits / temperature if temperature else logits).log_softmax(-1)  # (R, V)
    if temperature:  # the token in whose share of the unit interval a uniform number falls
        share = logprob.double().exp().cumsum(-1)  # in fp32 the sum would swallow the rare words of a large vocabulary
        drawn = torch.rand(len(share), 1, dtype=share.dtype, device=share.device, generator=random) * share[:, -1:]
        token = torch.searchsorted(share, drawn, right=True)[:, 0].clamp(max=share.shape[1] - 1)
    else:
        token = logprob.argmax(-1)
    return token, logprob.gather(1, token[:, None])[:, 0]
