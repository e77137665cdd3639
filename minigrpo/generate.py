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

    Greedy log-probs are those of temperature 1. The same seed gives the same answers.
    """
    if max_new_tokens < 1 or group_size < 1 or temperature < 0:
        raise ValueError(f"generate needs group_size and max_new_tokens of 1 or more and a temperature of 0 or more, "
                         f"got {group_size}, {max_new_tokens} and {temperature}")
    device = policy.device
    random = torch.Generator(device)
    random.manual_seed(seed) if seed is not None else random.seed()
    ends = torch.tensor(policy.end_ids, device=device)

    prefix = policy.prefill(prompts)
    cache = AnswerCache(size=max_new_tokens)
    hidden = prefix.hidden.repeat_interleave(group_size, 0)  # (R, d)
    finished = torch.zeros(len(hidden), dtype=torch.bool, device=device)
    tokens, logprobs, masks = [], [], []
    for _ in range(max_new_tokens):
        token, logprob = sample(hidden, policy.head, temperature, random)  # (R,), (R,)
        masks.append(~finished)  # before `finished` learns of this token: the end token itself is part of the answer
        tokens.append(torch.where(finished, policy.tokenizer.pad_token_id, token))
        logprobs.append(torch.where(finished, 0.0, logprob))
        finished = finished | torch.isin(token, ends)
        if finished.all():
            break
        if len(tokens) < max_new_tokens:
            hidden = policy.extend(prefix, tokens[-1][:, None], cache)[:, 0]
    tokens, mask = torch.stack(tokens, 1), torch.stack(masks, 1)
    texts = [policy.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask)]
    return Rollout(tokens, mask, torch.stack(logprobs, 1), finished, texts)


def sample(hidden: Tensor, head: Tensor, temperature: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Next tokens [R] and their fp32 log-probs [R] from hidden [R, d] and head [V, d]."""
    logits = (hidden @ head.to(hidden.dtype).T).float()
    logprob = (logits / temperature if temperature else logits).log_softmax(-1)  # (R, V)
    if temperature:  # argmax of p / Exponential(1) noise is a draw from p, without a trip to the host
        noise = torch.empty_like(logprob).exponential_(generator=random)
        token = (logprob.exp() / noise).argmax(-1)
    else:
        token = logprob.argmax(-1)
    return token, logprob.gather(1, token[:, None])[:, 0]
