"""metrics.jsonl and rollouts.jsonl: one line per step, flushed, and truncated to the checkpoint
from which a run resumes.
"""

import json
import os
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from minigrpo.data import asks_to_think, split_thinking

from .distributed import first, gathered, say
from .files import WriteError, write_aside, writes
from .groups import Groups


class JsonLines:
    """Appends one JSON object per line, on the disk before the next step. A resumed run drops the
    lines of steps that it will repeat, and moves damaged lines to another file.

    Every rank has the same rows; the first writes them. WriteError if it cannot.
    """

    def __init__(self, path: Path, start_step: int):
        rows, damaged = read_rows(path)
        self.path, self.file = path, None
        self.kept = [row for row in rows if row["step"] < start_step]
        gathered(None)  # all ranks have read it
        if first():
            if damaged:
                set_aside(path, damaged)
            # In place, a kill would lose every line.
            write_aside(path, "".join(json.dumps(row) + "\n" for row in self.kept))
            with writes(path):
                self.file = path.open("ab", buffering=0)

    def past(self, name: str) -> list[float]:
        """A figure of the steps before the one that this run started or resumed with."""
        return [row[name] for row in self.kept if isinstance(row.get(name), (int, float))]

    def write(self, row: dict) -> None:
        if self.file:
            with writes(self.path):
                line = json.dumps(row).encode() + b"\n"
                while line:  # a disk that fills up takes the beginning and refuses the rest
                    line = line[self.file.write(line) :]
                os.fsync(self.file.fileno())
            there = self.path.stat() if self.path.exists() else None
            if not there or not os.path.samestat(there, os.fstat(self.file.fileno())):
                raise WriteError(self.path, "it or its folder was removed or renamed")


def read_rows(path: Path) -> tuple[list[dict], dict[int, bytes]]:
    """The rows of a log, objects with a "step", and, by number, the lines that are not; both empty
    without a file. A last line without an end, cut short by a kill, is neither.
    """
    rows, damaged = [], {}
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate([*lines, last], 1):
        try:
            row = json.loads(line.decode())
            if type(row["step"]) is not int:
                raise TypeError
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.strip() and number <= len(lines):
                damaged[number] = line
    return rows, damaged


def set_aside(path: Path, damaged: dict[int, bytes]) -> None:
    """Lines that are not rows of `path` go to a file beside it."""
    beside = path.with_name(path.name + ".damaged")
    before = beside.read_bytes() if beside.exists() else b""
    write_aside(beside, before + b"".join(line + b"\n" for line in damaged.values()))
    say(
        f"note: {path}: line {', '.join(map(str, damaged))}: not a row of a log, moved to"
        f" {beside.name}; the others are kept"
    )


class Timer:
    """Seconds of a step, from its construction on, and of each of its phases."""

    def __init__(self):
        self.began, self.seconds = time.perf_counter(), {}

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def row(self) -> dict[str, float]:
        whole = {"seconds": round(time.perf_counter() - self.began, 4)}
        return whole | {f"seconds_{name}": round(value, 4) for name, value in self.seconds.items()}


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of the process so far in 1e9 bytes, on the largest rank: resident memory or, on a
    GPU, that of its tensors there.
    """
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return max(gathered(held)) / 1e9


class Means:
    """Means over the updates of a step: of each figure, weighted by the tokens it was taken
    over.
    """

    def __init__(self, sums: dict[str, list[float]] | None = None):
        self.sums = sums or {}

    def add(self, weight: float, **figures: torch.Tensor) -> None:
        """Figures of one micro-batch or update, each the mean over `weight` tokens (or of one
        update: weight 1).
        """
        for name, value in figures.items():
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0] += float(weight) * float(value)
            total[1] += float(weight)

    def add_all(self, other: "Means") -> None:
        for name, (total, weight) in other.sums.items():
            ours = self.sums.setdefault(name, [0.0, 0.0])
            ours[0] += total
            ours[1] += weight

    def row(self) -> dict[str, float]:
        """Over all ranks."""
        whole = Means()
        for sums in gathered(self.sums):
            whole.add_all(Means(sums))
        return {name: total / max(weight, 1e-12) for name, (total, weight) in whole.sums.items()}


def rollout_stats(groups: Groups, template_opens_think: bool = False) -> dict[str, float]:
    """Statistics of a step's answers and rewards, with thinking and answer apart if thinking was
    asked for. docs/metrics.md explains each figure.
    """
    rewards, valid, rollout = groups.rewards, groups.valid, groups.rollout
    counted = rewards[valid]
    spread = torch.tensor(
        [row[ok].std().item() if ok.sum() > 1 else 0.0 for row, ok in zip(rewards, valid)]
    )
    stats = {
        # where nothing could be scored, no figure
        **({"reward": counted.mean().item()} if len(counted) else {}),
        "reward_std_in_group": spread.mean().item(),
        "groups_without_spread": len(groups.without_spread()) / len(rewards),
        "unscored": 1 - valid.float().mean().item(),
        "answer_tokens": rollout.mask.sum(1).float().mean().item(),
        "cut_off": 1 - rollout.finished.float().mean().item(),
    }
    if template_opens_think or any(asks_to_think(sample.question) for sample in groups.samples):
        read = [split_thinking(text, template_opens_think) for text in rollout.texts]
        stats |= {
            "think_format": sum(bool(ok and thinking and answer) for thinking, answer, ok in read)
            / len(read),
            "thinking_words": sum(len(thinking.split()) for thinking, _, _ in read) / len(read),
            "answer_words": sum(len(answer.split()) for _, answer, _ in read) / len(read),
        }
    for name, values in groups.parts.items():
        known = [v for v in values if v == v]
        stats |= {f"reward_{name}": sum(known) / len(known)} if known else {}
    return stats
