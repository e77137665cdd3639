"""What a run saves: checkpoints, the best weights, the final ones, each as a complete folder or not
at all.

Ranks save together. A full disk, or another error in writing, loses no step.
"""

import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from minigrpo.lora import merge_adapters, save_adapters
from minigrpo.policy import Policy
from minigrpo.run.distributed import first, gathered, rank, say
from minigrpo.run.files import WriteError, part_of, remove, seal, writes
from minigrpo.run.folder import (
    checkpoints,
    is_numbered,
    newest,
    remove_checkpoints,
    remove_folder,
    step_of,
)
from minigrpo.run.shard import full_weights
from minigrpo.run.state import optimizer_state
from minigrpo.run.terminal import fail

STOP_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # 75, EX_TEMPFAIL: again with --resume


def save_checkpoint(
    folder: Path, step: int, policy: Policy, *optimizers: torch.optim.Optimizer, keep: int = 1
) -> None:
    """Save weights (with LoRA: only adapters) and optimiser state after `step` steps; of the older
    checkpoints, the last keep - 1 are kept.

    Data order and sampling depend on (seed, step) alone, so a run continues from this as if it had
    never stopped. If it cannot be written, that is reported and the run continues.
    """
    problem = _save_state(folder, step, policy, optimizers)
    if problem and first():
        print(
            f"\nthe checkpoint of step {step} was not saved: {problem}; the newest is"
            f" {newest(folder)}. Training continues: make room before the next one is due",
            file=sys.stderr,
            flush=True,
        )
    elif first():
        older = [path for path in checkpoints(folder) if step_of(path) <= step]
        for path in older[:-keep]:
            remove_folder(path)


def save_best(folder: Path, step: int, policy: Policy) -> None:
    """RUN/best/step-000040: the weights (with LoRA: adapters) that were best on --eval_data so far;
    they replace the previous ones.
    """
    place = folder / "best" / f"step-{step:06d}"
    problem = _save(place, _writer(policy))
    if problem and first():
        print(
            f"\nthe best model so far, of step {step}, was not saved: {problem}",
            file=sys.stderr,
            flush=True,
        )
    elif first():
        for path in place.parent.iterdir():
            if path != place and is_numbered(path):
                remove_folder(path)


def save_final(folder: Path, step: int, policy: Policy, *optimizers: torch.optim.Optimizer) -> None:
    """RUN/final, the trained checkpoint, with LoRA merged (and the adapters in final/adapter); the
    checkpoints to resume from are then removed.

    If it cannot be written, they stay, the state after `step` steps is added, and the program ends:
    --resume then only has to save final/.
    """
    unsaved, adapters, weights = None, policy.adapters, full_weights(policy)
    if adapters:  # they are small, and merging cannot be undone
        unsaved = _save_state(folder, step, policy, optimizers)

    def write(part: Path) -> None:
        if adapters:
            save_adapters(policy, part / "adapter")
            merge_adapters(policy)
        policy.save_pretrained(part, weights)

    problem = _save(folder / "final", write)
    if problem is None:
        if first():
            remove_checkpoints(folder)
        return
    if not adapters:
        unsaved = _save_state(folder, step, policy, optimizers)
    kept = "The newest checkpoint is" if unsaved else f"All {step} steps are in"
    if not first():
        sys.exit(1)
    fail(f"{problem}. {kept} {newest(folder)}: make room, then --resume finishes the run")


def _save_state(folder: Path, step: int, policy: Policy, optimizers) -> WriteError | None:
    def write_own(part: Path) -> None:
        save_file(state, part / f"optimizer-{rank():05d}.safetensors")

    state = optimizer_state(policy, optimizers)
    return _save(folder / "checkpoints" / f"step-{step:06d}", _writer(policy), write_own)


def _writer(policy: Policy) -> Callable[[Path], None]:
    """What the first rank writes of a policy in training, into a folder."""
    weights = full_weights(policy)
    return lambda part: (
        save_adapters(policy, part) if policy.adapters else policy.save_pretrained(part, weights)
    )


def _save(
    place: Path, write: Callable[[Path], None], write_own: Callable[[Path], None] | None = None
) -> WriteError | None:
    """Save a sealed folder: the first rank writes, then every rank its own part. Returns an error
    on any rank to all of them; the partial folder is then removed.
    """
    part, numbered = part_of(place), is_numbered(place)

    def begin() -> None:
        if numbered:  # checkpoints/ or best/, but not a run's folder that is gone
            place.parent.mkdir(exist_ok=True)
        remove(part)
        part.mkdir()
        write(part)

    def end() -> None:
        if numbered:
            remove_folder(place)
        seal(part, place)

    for work in (first() and begin, write_own and partial(write_own, part), first() and end):
        problem = None
        try:
            with writes(place):
                work() if work else None
        except WriteError as error:
            problem = error
        if problem := next(filter(None, gathered(problem)), None):
            if first():
                remove(part)
            return problem
    return None


@contextmanager
def graceful_stop():
    """Yields a function that returns the exit code once any rank has received Ctrl-C or SIGTERM,
    and 0 before: the current step is finished. A second Ctrl-C aborts.
    """
    came: list[int] = []

    def on_signal(number, _):
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(STOP_CODES[number])
        say(
            f"\n{signal.Signals(number).name}: stopping after this step"
            + " (Ctrl-C again to abort at once)" * (number == signal.SIGINT)
        )

    before = {number: signal.signal(number, on_signal) for number in STOP_CODES}
    try:
        yield lambda: max(gathered(came[0] if came else 0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_early(
    code: int,
    folder: Path,
    step: int,
    policy: Policy,
    *optimizers: torch.optim.Optimizer,
    keep: int = 1,
) -> None:
    """Save a checkpoint and end the program with 130 after Ctrl-C, 75 after SIGTERM."""
    save_checkpoint(folder, step, policy, *optimizers, keep=keep)
    say(f"stopped after step {step}; --resume continues from {newest(folder)}")
    sys.exit(code)
