"""What goes wrong inside a step, and how the run goes on: too little memory, gradients that explode, a reward that hangs."""

import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from minigrpo.rewards import Scores
from minigrpo.run.distributed import first, gathered, rank
from minigrpo.run.files import write_aside

T = TypeVar("T")


def halving(args: Any, name: str, work: Callable[[], T], undo: Callable[[], Any] = lambda: None, *, alone: bool = True) -> T:
    """work(), and where memory runs out undo() and work() again with args.NAME halved, until it fits or cannot be less.

    The smaller size stays for the rest of the run. It changes nothing but rounding. Each rank does this by itself; where the
    others take part in the work (`alone` False, sharded layers), it cannot go back without them, and the run ends.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            size = getattr(args, name)
            if not alone:
                _warn(f"rank {rank()}: out of memory with --{name} {size}; with --shard a rank cannot go back alone: --resume with a "
                      f"smaller --{name}, or with --activation_checkpointing")
            if size <= 1 or not alone:
                raise
        # Outside of `except`, or the traceback would keep the tensors of the failed try alive.
        undo()
        torch.cuda.empty_cache()
        setattr(args, name, size // 2)
        _warn(f"rank {rank()}: out of memory with --{name} {size}; on with {size // 2}")


class Skipped:
    """Updates that are not taken, because their gradient is NaN, infinite or above --max_grad_norm: counted, and their batch
    kept for study in RUN/skipped/."""

    def __init__(self, folder: Path, args: Any, before: int):
        self.folder, self.largest, self.most, self.count = folder / "skipped", args.max_grad_norm, args.max_skipped, before

    def trusts(self, grad_norm: torch.Tensor, step: int, update: int, batch: Callable[[], list[dict]]) -> bool:
        """Whether to take the update; if not, `batch` gives the rows to write down. All ranks decide alike, on the same norm."""
        norm = float(grad_norm)
        if math.isfinite(norm) and norm <= self.largest:
            return True
        self.count += 1
        path = self.folder / f"step-{step:06d}-{update}-rank-{rank()}.json"
        path.parent.mkdir(exist_ok=True)
        write_aside(path, json.dumps({"step": step, "update": update, "grad_norm": str(norm), "batch": batch()}, indent=1) + "\n")
        if first():
            _warn(f"step {step}: gradient norm {norm:.3g}, update {update} skipped, {self.count} so far, at {self.most} the run stops; "
                  f"its batch: {path}")
        return False

    def stop_if_too_many(self) -> None:
        if self.count >= self.most:
            sys.exit(f"{Path(sys.argv[0]).name}: error: {self.count} updates were skipped, --max_skipped is {self.most}. Their batches are "
                     f"in {self.folder}, and the last checkpoint is untouched by them. Mend the data, lower --learning_rate, or "
                     "raise --max_skipped, and --resume")


def in_time(reward: Callable, answers: list[str], samples: list, size: int, seconds: float) -> Scores:
    """reward(answers, samples), and where that takes longer than `seconds`, each group of `size` answers by itself; those that
    take longer still could not be scored. A call that hangs is left behind in its thread."""
    found = _within(seconds, reward, answers, samples)
    if found is not None:
        return found
    _warn(f"rank {rank()}: the reward took longer than --reward_timeout {seconds:g} s; asking for each group alone")
    spans = [slice(begin, begin + size) for begin in range(0, len(answers), size)]
    shares = [_within(seconds, reward, answers[span], samples[span]) for span in spans]
    late = [samples[span][0].id for span, share in zip(spans, shares) if share is None]
    if late:
        _warn(f"rank {rank()}: no reward in time for the answers to {', '.join(late)}: they are masked")
    names = {name: None for share in shares if share for name in share.parts}  # in their order
    values, valid, parts = [], [], {name: [] for name in names}
    for span, share in zip(spans, shares):
        share, count = share or Scores([0.0] * size, [False] * size), len(answers[span])
        values, valid = values + share.values, valid + share.valid
        for name in names:
            parts[name] += share.parts.get(name, [math.nan] * count)
    errors = list(dict.fromkeys([error for share in shares if share for error in share.errors] + ["it took too long"] * bool(late)))
    return Scores(values, valid, parts, errors)


def stop_if_unscored(scores: Scores, most: float, step: int) -> None:
    """Says which of the step's answers the reward failed on, and ends the run where they are more than a share `most`."""
    everyone = gathered((scores.valid, scores.errors))
    valid = [ok for theirs, _ in everyone for ok in theirs]
    failed = len(valid) - sum(valid)
    if failed:
        reasons = "; ".join(dict.fromkeys(error for _, errors in everyone for error in errors)) or "NaN"
        text = f"step {step}: the reward could not score {failed} of {len(valid)} answers: {reasons}"
        if failed > most * len(valid):
            sys.exit(f"{Path(sys.argv[0]).name}: error: {text}\nThis is more than --max_unscored {most}. Mend the reward, then --resume "
                     "goes on from the last checkpoint" if first() else 1)
        if first():
            _warn(text)


def _warn(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _within(seconds: float, work: Callable, *given: Any) -> Any:
    """work(*given), None after `seconds`; its exceptions come through."""
    result: list = []

    def run():
        try:
            result.append((work(*given), None))
        except BaseException as error:  # raised again below, where someone listens
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # so that one that hangs cannot keep the process
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))  # inf, for no limit, would be an OverflowError
    if not result:
        return None
    value, error = result[0]
    if error is not None:
        raise error
    return value
