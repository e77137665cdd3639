"""The groups of a step: B questions with G answers each, R = B G, and their rewards."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minigrpo.data import Sample
from minigrpo.encode import Prompts
from minigrpo.generate import Rollout
from minigrpo.loss import group_advantages
from minigrpo.rewards.spec import parse_spec
from minigrpo.run.distributed import gathered, ranks, total


@dataclass
class Groups:
    """B questions, G answers to each, and their rewards."""

    samples: list[Sample]  # B
    rollout: Rollout  # R answers; row r answers sample r // G
    rewards: Tensor  # [B, G]
    valid: Tensor  # [B, G] bool, False where the answer could not be scored
    parts: dict[str, list[float]]  # R values of each part of the reward, NaN where it gave nothing
    prompt_tokens: list[int]  # B
    # Encoded; groups that were gathered from ranks get theirs later.
    prompts: Prompts = None  # type: ignore[assignment]
    spans: list[range] | None = None  # of each update; None: as many groups in each

    def updates(self, count: int) -> list[range]:
        """The groups of each of `count` updates, among these."""
        size = len(self.samples) // count
        return self.spans or [range(k * size, (k + 1) * size) for k in range(count)]

    def tokens(self) -> list[int]:
        """What each group costs to score: its prompt once, and its answers. [B]"""
        answers = self.rollout.mask.sum(1).view(self.rewards.shape).sum(1).tolist()
        return [prompt + own for prompt, own in zip(self.prompt_tokens, answers)]

    def terms(self, spec: str) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of a --reward, each by itself: rewards [K, B, G], weights [K, B] and valid [K,
        B, G], K the most terms that a task's sum has; the penalty of --soft_overlong is one more.
        """
        mixes = {task: [(n, w) for w, n, _ in terms] for task, terms in parse_spec(spec).items()}
        penalty = [("overlong", 1.0)] * ("overlong" in self.parts)
        mix_of = [mixes[sample.task] + penalty for sample in self.samples]
        size, most = self.rewards.shape[1], max(map(len, mix_of))
        rewards = torch.full((most, *self.rewards.shape), math.nan)
        weights = torch.zeros(most, len(self.samples))
        for b, mix in enumerate(mix_of):
            for k, (name, weight) in enumerate(mix):
                rewards[k, b] = torch.tensor(self.parts[name][b * size : (b + 1) * size])
                weights[k, b] = weight
        valid = self.valid & ~rewards.isnan()
        return rewards, weights, valid

    def take(self, places: list[int]) -> "Groups":
        """The groups at `places`, in that order; the cost of the rollout remains that of the whole
        step.
        """
        size, r = self.rewards.shape[1], self.rollout
        rows = [g * size + i for g in places for i in range(size)]
        at = torch.tensor(rows, device=r.mask.device)
        rollout = Rollout(
            r.tokens[at],
            r.mask[at],
            r.logprob[at],
            r.finished[at],
            [r.texts[i] for i in rows],
            r.row_steps,
            r.bytes_read,
        )
        return Groups(
            [self.samples[g] for g in places],
            rollout,
            self.rewards[places],
            self.valid[places],
            {name: [values[i] for i in rows] for name, values in self.parts.items()},
            [self.prompt_tokens[g] for g in places],
        )

    def to(self, device: torch.device) -> "Groups":
        """The same groups with the tensors of the rollout on `device`; rewards stay on the CPU."""
        r = self.rollout
        moved = Rollout(
            *(x.to(device) for x in (r.tokens, r.mask, r.logprob, r.finished)),
            r.texts,
            r.row_steps,
            r.bytes_read,
        )
        return replace(self, rollout=moved)

    def without_spread(self) -> list[int]:
        """The groups whose advantages are all 0: equal rewards, or fewer than two answers that
        could be scored.
        """
        return (
            (group_advantages(self.rewards, scale="none", valid=self.valid) == 0)
            .all(1)
            .nonzero()[:, 0]
            .tolist()
        )

    def rows(self, advantage: Tensor, among: range) -> list[dict]:
        """The groups at the places `among` in full, for rollouts.jsonl, which shows whether a
        reward is being hacked. advantage [R], of all groups. The reward of an answer that could not
        be scored is None.
        """
        size = self.rewards.shape[1]
        rewards, valid = self.rewards.flatten().tolist(), self.valid.flatten().tolist()

        def answer(r: int) -> dict:
            parts = {name: values[r] for name, values in self.parts.items()}
            return {
                "text": self.rollout.texts[r],
                "reward": rewards[r] if valid[r] else None,
                "advantage": advantage[r].item(),
                **{name: value for name, value in parts.items() if not math.isnan(value)},
            }

        return [
            {
                "id": sample.id,
                "question": sample.question,
                "reference": sample.answer,
                "answers": [answer(r) for r in range(b * size, (b + 1) * size)],
            }
            for b, sample in [*enumerate(self.samples)][among.start : among.stop]
        ]

    def replace(self, which: list[int], others: "Groups") -> "Groups":
        """These groups with the fresh ones at `which`, in order; answers are padded to the longer
        of both.
        """
        size = self.rewards.shape[1]
        groups, rows = torch.tensor(which), [g * size + i for g in which for i in range(size)]
        old, new, at = (
            self.rollout,
            others.rollout,
            torch.tensor(rows, device=self.rollout.mask.device),
        )
        width = max(old.tokens.shape[1], new.tokens.shape[1])

        def put(a: Tensor, b: Tensor) -> Tensor:
            a, b = (F.pad(x, (0, width - x.shape[1])) for x in (a, b))
            return a.index_copy(0, at, b)

        parts = {}
        for name in self.parts | others.parts:
            missing = [float("nan")] * len(old.texts)
            parts[name] = _put(
                self.parts.get(name, missing), others.parts.get(name, missing[: len(rows)]), rows
            )
        rollout = Rollout(
            put(old.tokens, new.tokens),
            put(old.mask, new.mask),
            put(old.logprob, new.logprob),
            old.finished.index_copy(0, at, new.finished),
            _put(old.texts, new.texts, rows),
            old.row_steps + new.row_steps,
            old.bytes_read + new.bytes_read,
        )
        return Groups(
            _put(self.samples, others.samples, which),
            rollout,
            self.rewards.index_copy(0, groups, others.rewards),
            self.valid.index_copy(0, groups, others.valid),
            parts,
            _put(self.prompt_tokens, others.prompt_tokens, which),
        )


def of_all_ranks(mine: list[int], groups: Groups) -> Groups:
    """This rank's groups, at the places `mine` of the step -> those of all ranks, in order."""
    if ranks() == 1:
        return groups
    return joined(gathered((mine, groups.to(torch.device("cpu"))))).to(groups.rollout.mask.device)


def joined(shares: list[tuple[list[int], Groups]]) -> Groups:
    """(places, their groups) of every rank -> the groups of all places, in order."""
    count = 1 + max(place for places, _ in shares for place in places)
    whole = shares[0][1].take([0] * count)  # room for all
    whole.rollout.row_steps = whole.rollout.bytes_read = 0
    whole.parts = {}  # a part that one rank alone has is NaN elsewhere
    for places, groups in shares:
        whole = whole.replace(places, groups)
    return whole


def micro_batches(
    prompts: Prompts, mask: torch.Tensor, among: range, budget: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(prompts, their rows of answers) of each forward and backward pass over the prompts `among`,
    as indices; mask [R, T].
    """
    size = len(mask) // len(prompts.ids)
    longest = mask.sum(1).view(-1, size).amax(1).tolist()
    parts = by_token_budget(prompts.mask.sum(1).tolist(), longest, size, budget, among)
    rows = torch.arange(len(mask)).view(-1, size)
    return [(torch.tensor(part), rows[part].flatten()) for part in parts]


def by_token_budget(
    prompts: list[int], answers: list[int], group_size: int, budget: int, among: range
) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens each, padding included, of the prompts `among`;
    similar lengths go together.

    prompts [B] and answers [B] (each group's longest) in tokens. A micro-batch computes each prompt
    once and its answers group_size times, all as long as the longest; a group that is larger than
    the budget is a micro-batch of its own.
    """
    parts: list[list[int]] = []
    for i in sorted(among, key=lambda i: (-answers[i], -prompts[i])):
        joined = [*parts[-1], i] if parts else []
        if (
            joined
            and len(joined) * (max(prompts[j] for j in joined) + group_size * answers[joined[0]])
            <= budget
        ):
            parts[-1] = joined
        else:
            parts.append([i])
    return parts


def padding_share(
    prompts: Prompts, mask: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Share of a step's computed tokens that are padding, over all its micro-batches."""
    lengths, answers = prompts.mask.sum(1).cpu(), mask.sum(1).cpu()
    computed = sum(
        len(part) * int(lengths[part].max()) + len(rows) * int(answers[rows].max())
        for part, rows in parts
    )
    needed, computed = total(torch.tensor([int(lengths.sum() + answers.sum()), computed])).tolist()
    return 1 - needed / max(1, computed)


def _put(old: list, new: list, at: list[int]) -> list:
    """old with new[i] at position at[i]."""
    return list((dict(enumerate(old)) | dict(zip(at, new, strict=True))).values())
