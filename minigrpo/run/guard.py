"""What can go wrong in a step, and how the run continues: running out of memory, exploding
gradients, a reward that hangs.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from minigrpo.rewards import BadReward, Scores
from minigrpo.run.args import out_of_memory
from minigrpo.run.distributed import PATIENCE, first, gathered, rank, ranks
from minigrpo.run.files import write_aside
from minigrpo.run.terminal import fail

T = TypeVar("T")
# Seconds. The reward of a step may take twice that, and the rest is for delays.
LONGEST_TIMEOUT = 3 * PATIENCE.total_seconds() / 8


def retry_smaller_on_oom(
    args: Any,
    name: str,
    work: Callable[[], T],
    undo: Callable[[], Any] = lambda: None,
    *,
    alone: bool = True,
) -> T:
    """work(); if memory runs out, undo() and work() again with args.NAME halved, until it fits or
    is 1.

    The smaller size stays for the rest of the run. It changes only rounding. Each rank does this by
    itself; if the others take part in the work (`alone` False, sharded layers), it cannot retry
    without them, and the run ends.
    """
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            size = getattr(args, name)
            if not alone:
                warn(
                    f"rank {rank()}: out of memory with --{name} {size}; with --shard a rank cannot"
                    f" retry alone: --resume with a smaller --{name}, or with"
                    " --activation_checkpointing"
                )
            if size <= 1 or not alone:
                raise
        # Outside of `except`, or the traceback would keep the tensors of the failed try alive.
        undo()
        torch.cuda.empty_cache()
        setattr(args, name, size // 2)
        warn(f"rank {rank()}: out of memory with --{name} {size}; continuing with {size // 2}")


class Skipped:
    """Updates that are skipped because their gradient is NaN, infinite or above --max_grad_norm:
    they are counted, and their batches are kept for inspection in RUN/skipped/.
    """

    def __init__(self, folder: Path, args: Any, before: int):
        self.folder, self.largest, self.most, self.count = (
            folder / "skipped",
            args.max_grad_norm,
            args.max_skipped,
            before,
        )

    def accept_or_record(
        self, grad_norm: torch.Tensor, step: int, update: int, batch: Callable[[], list[dict]]
    ) -> bool:
        """Whether to take the update; if not, `batch` gives the rows to record. All ranks decide
        alike, by the same norm.
        """
        norm = float(grad_norm)
        if math.isfinite(norm) and norm <= self.largest:
            return True
        self.count += 1
        path = self.folder / f"step-{step:06d}-{update}-rank-{rank()}.json"
        path.parent.mkdir(exist_ok=True)
        write_aside(
            path,
            json.dumps(
                {"step": step, "update": update, "grad_norm": str(norm), "batch": batch()}, indent=1
            )
            + "\n",
        )
        if first():
            warn(
                f"step {step}: gradient norm {norm:.3g}, update {update} skipped ({self.count} so"
                f" far; the run stops at {self.most}); its batch: {path}"
            )
        return False

    def stop_if_too_many(self) -> None:
        if self.count >= self.most:
            sys.exit(
                f"{Path(sys.argv[0]).name}: error: {self.count} updates were skipped, and"
                f" --max_skipped is {self.most}. Their batches are in {self.folder}, and none of"
                " them has reached the last checkpoint. Correct the data, lower --learning_rate, or"
                " raise --max_skipped, and --resume"
            )


def check_timeout(seconds: float) -> None:
    """ValueError for a --reward_timeout for which the other processes would not wait."""
    if ranks() > 1 and seconds > LONGEST_TIMEOUT:
        raise ValueError(
            f"--reward_timeout {seconds:g} with {ranks()} processes: while the reward of one"
            f" process hangs, the others wait, and after {PATIENCE.seconds // 60} minutes they give"
            f" it up for dead; give at most {LONGEST_TIMEOUT:g} seconds"
        )


def in_time(
    reward: Callable, answers: list[str], samples: list, size: int, seconds: float
) -> Scores:
    """reward(answers, samples); if that takes longer than `seconds`, each group of `size` answers
    by itself, with as long again for all: a group may take its share of the time left. Groups that
    take longer count as not scored. A call that hangs is left in its thread, which works on copies
    of the lists.
    """
    scores = _within(seconds, reward, list(answers), list(samples))
    if scores is not None:
        return scores
    warn(
        f"rank {rank()}: the reward took longer than --reward_timeout {seconds:g} s; scoring each"
        " group by itself"
    )
    spans = [slice(begin, begin + size) for begin in range(0, len(answers), size)]
    shares, end = [], time.monotonic() + seconds
    for number, span in enumerate(spans):
        left = max(0.0, end - time.monotonic()) / (len(spans) - number)
        shares.append(_within(left, reward, answers[span], samples[span]))
    late = [samples[span][0].id for span, share in zip(spans, shares) if share is None]
    if late:
        more = f" and {len(late) - 5} more" if len(late) > 5 else ""
        warn(
            f"rank {rank()}: no reward in time for the answers to {', '.join(late[:5])}{more}: "
            "they are masked"
        )
    names = {name: None for share in shares if share for name in share.parts}  # in their order
    values, valid, parts = [], [], {name: [] for name in names}
    for span, share in zip(spans, shares):
        count = len(answers[span])
        share = share or Scores([0.0] * count, [False] * count)
        values, valid = values + share.values, valid + share.valid
        for name in names:
            parts[name] += share.parts.get(name, [math.nan] * count)
    told = [error for share in shares if share for error in share.errors]
    errors = list(dict.fromkeys(told + ["it took too long"] * bool(late)))
    return Scores(values, valid, parts, errors)


def agreed_scores(work: Callable[[], Scores], most: float, step: int) -> Scores:
    """This rank's work(). Reports how many of the step's answers, over all ranks, the reward failed
    on, and ends the run, on all ranks, if they are more than a share `most` or if the reward
    returned something that is not a score.
    """
    scores, problem = None, None
    try:
        scores = work()
    except BadReward as error:
        problem = str(error)
    everyone = gathered((scores and scores.valid, scores and scores.errors, problem))
    end_for(next((text for _, _, text in everyone if text), None))
    valid = [ok for theirs, _, _ in everyone for ok in theirs]
    failed = len(valid) - sum(valid)
    if failed:
        reasons = (
            "; ".join(dict.fromkeys(error for _, errors, _ in everyone for error in errors))
            or "NaN"
        )
        text = (
            f"step {step}: the reward could not score {failed} of {len(valid)} answers: {reasons}"
        )
        if failed > most * len(valid):
            end_for(
                f"{text}\nThis is more than --max_unscored {most}. Correct the reward, then"
                " --resume to continue from the last checkpoint"
            )
        if first():
            warn(text)
    return scores


def end_for(problem: str | None) -> None:
    """Ends the program with this message, if there is one; every rank calls it with the same."""
    if problem:
        fail(problem) if first() else sys.exit(1)


def warn(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _within(seconds: float, work: Callable, *given: Any) -> Any:
    """work(*given), None after `seconds`; its exceptions come through."""
    result: list = []

    def run():
        try:
            result.append((work(*given), None))
        except BaseException as error:  # raised again below, where someone listens
            result.append((None, error))

    # so that one that hangs cannot keep the process
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))  # inf, for no limit, would be an OverflowError
    if not result:
        return None
    value, error = result[0]
    if error is not None:
        raise error
    return value
