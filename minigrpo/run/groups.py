"""The groups of a step: B questions with G answers each, R = B G, and what the answers were worth."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigrpo.data import Sample
from minigrpo.generate import Rollout
from minigrpo.loss import group_advantages
from minigrpo.policy import Prompts


@dataclass
class Groups:
    samples: list[Sample]  # B
    rollout: Rollout  # R answers; row r answers sample r // G
    rewards: Tensor  # [B, G]
    valid: Tensor  # [B, G] bool, False where the answer could not be scored
    parts: dict[str, list[float]]  # R values of each part of the reward, NaN where it gave nothing

    def without_spread(self) -> list[int]:
        """The groups whose advantages are all 0: equal rewards, or fewer than two answers that could be scored."""
        return (group_advantages(self.rewards, scale="none", valid=self.valid) == 0).all(1).nonzero()[:, 0].tolist()

    def replace(self, which: list[int], fresh: "Groups") -> "Groups":
        """These groups with the fresh ones at `which`, in order; answers are padded to the longer of both."""
        size = self.rewards.shape[1]
        groups, rows = torch.tensor(which), [g * size + i for g in which for i in range(size)]
        old, new, at = self.rollout, fresh.rollout, torch.tensor(rows, device=self.rollout.mask.device)
        width = max(old.tokens.shape[1], new.tokens.shape[1])

        def put(a: Tensor, b: Tensor) -> Tensor:
            a, b = (F.pad(x, (0, width - x.shape[1])) for x in (a, b))
            return a.index_copy(0, at, b)

        parts = {}
        for name in self.parts | fresh.parts:
            missing = [float("nan")] * len(old.texts)
            parts[name] = _put(self.parts.get(name, missing), fresh.parts.get(name, missing[:len(rows)]), rows)
        rollout = Rollout(put(old.tokens, new.tokens), put(old.mask, new.mask), put(old.logprob, new.logprob),
                          old.finished.index_copy(0, at, new.finished), _put(old.texts, new.texts, rows),
                          old.row_steps + new.row_steps, old.bytes_read + new.bytes_read)
        return Groups(_put(self.samples, fresh.samples, which), rollout, self.rewards.index_copy(0, groups, fresh.rewards),
                      self.valid.index_copy(0, groups, fresh.valid), parts)


def micro_batches(prompts: Prompts, mask: torch.Tensor, among: range, budget: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(prompts, their rows of answers) of each forward and backward pass over the prompts `among`, as indices; mask [R, T]."""
    size = len(mask) // len(prompts.ids)
    longest = mask.sum(1).view(-1, size).amax(1).tolist()
    parts = by_token_budget(prompts.mask.sum(1).tolist(), longest, size, budget, among)
    rows = torch.arange(len(mask)).view(-1, size)
    return [(torch.tensor(part), rows[part].flatten()) for part in parts]


def by_token_budget(prompts: list[int], answers: list[int], group_size: int, budget: int, among: range) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens each, padding included, of the prompts `among`; like lengths go together.

    prompts [B] and answers [B] (each group's longest) in tokens. A micro-batch computes each prompt once and its answers
    group_size times, all as long as the longest; a group that is larger than the budget goes alone.
    """
    parts: list[list[int]] = []
    for i in sorted(among, key=lambda i: (-answers[i], -prompts[i])):
        joined = [*parts[-1], i] if parts else []
        if joined and len(joined) * (max(prompts[j] for j in joined) + group_size * answers[joined[0]]) <= budget:
            parts[-1] = joined
        else:
            parts.append([i])
    return parts


def padding_share(prompts: Prompts, mask: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of a step's computed tokens that are padding, over all its micro-batches."""
    lengths, answers = prompts.mask.sum(1).cpu(), mask.sum(1).cpu()
    computed = sum(len(part) * int(lengths[part].max()) + len(rows) * int(answers[rows].max()) for part, rows in parts)
    return 1 - int(lengths.sum() + answers.sum()) / max(1, computed)


def _put(old: list, new: list, at: list[int]) -> list:
    """old with new[i] at position at[i]."""
    return list((dict(enumerate(old)) | dict(zip(at, new, strict=True))).values())
