"""metrics.jsonl and rollouts.jsonl: one line a step, flushed, and cut back to the checkpoint that a run resumes from."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from minigrpo.data import asks_to_think, split_thinking

from .groups import Groups


class JsonLines:
    """Appends one JSON object a line; a resumed run drops the lines of steps that it will do again."""

    def __init__(self, path: Path, start_step: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that a kill cut short
                    break
                if row["step"] < start_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self.file = path.open("a")

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


class Timer:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def row(self) -> dict[str, float]:
        return {f"seconds_{name}": round(value, 4) for name, value in self.seconds.items()}


class Means:
    """Means over the updates of a step: of each figure, weighted by the tokens it was taken over."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}

    def add(self, weight: float, **figures: torch.Tensor) -> None:
        for name, value in figures.items():
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0] += float(weight) * float(value)
            total[1] += float(weight)

    def row(self) -> dict[str, float]:
        return {name: total / max(weight, 1e-12) for name, (total, weight) in self.sums.items()}


def rollout_stats(groups: Groups, opened: bool = False) -> dict[str, float]:
    """What a step's answers and rewards looked like; thinking and answer apart where thinking was asked for. docs/metrics.md says what each figure means."""
    rewards, valid, rollout = groups.rewards, groups.valid, groups.rollout
    counted = rewards[valid]
    spread = torch.tensor([row[ok].std().item() if ok.sum() > 1 else 0.0 for row, ok in zip(rewards, valid)])
    stats = {
        "reward": counted.mean().item() if len(counted) else 0.0,
        "reward_std_in_group": spread.mean().item(),
        "groups_without_spread": len(groups.without_spread()) / len(rewards),
        "unscored": 1 - valid.float().mean().item(),
        "answer_tokens": rollout.mask.sum(1).float().mean().item(),
        "cut_off": 1 - rollout.finished.float().mean().item(),
    }
    if opened or any(asks_to_think(sample.question) for sample in groups.samples):
        read = [split_thinking(text, opened) for text in rollout.texts]
        stats |= {"think_format": sum(bool(ok and thinking and answer) for thinking, answer, ok in read) / len(read),
                  "thinking_words": sum(len(thinking.split()) for thinking, _, _ in read) / len(read),
                  "answer_words": sum(len(answer.split()) for _, answer, _ in read) / len(read)}
    for name, values in groups.parts.items():
        known = [v for v in values if v is not None and v == v]
        stats[f"reward_{name}"] = sum(known) / max(1, len(known))
    return stats


def group_rows(groups: Groups, advantage: torch.Tensor, count: int) -> list[dict]:
    """The first groups of a step in full, for rollouts.jsonl: where one sees a reward being hacked. advantage [B G]."""
    size = groups.rewards.shape[1]
    rows = []
    for b, sample in enumerate(groups.samples[:count]):
        span = range(b * size, (b + 1) * size)
        rows.append({"id": sample.id, "question": sample.question, "reference": sample.answer, "answers": [
            {"text": groups.rollout.texts[r], "reward": groups.rewards[b, r - b * size].item(), "advantage": advantage[r].item(),
             **{name: values[r] for name, values in groups.parts.items() if values[r] == values[r]}} for r in span]})
    return rows
