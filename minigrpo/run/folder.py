"""A run's folder: created once, never overwritten, resumed from its newest checkpoint.

    args.json  starts.jsonl  metrics.jsonl  curves.png  rollouts.jsonl (GRPO)
    checkpoints/step-000050/  best/step-000040/ (--eval_data)  final/ (LoRA: final/adapter/)
    skipped/ (updates that were not taken)

In checkpoints/ and best/, folders with such names, and their .part, belong to the run. Anything
else there, including links, is not touched.
"""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from minigrpo.data import Sample
from minigrpo.lora import check_checkpoint
from minigrpo.run import args as arguments
from minigrpo.run.distributed import first, gathered, lost_rank, say
from minigrpo.run.files import damage, lock, make_folder, part_of, remove, write_aside
from minigrpo.run.log import read_rows
from minigrpo.run.plots import draw_curves
from minigrpo.run.starts import add_start, differences, past_starts, this_start
from minigrpo.run.state import check_optimizer

OWN = (
    ".lock",
    "args.json",
    "starts.jsonl",
    "metrics.jsonl",
    "metrics.jsonl.damaged",
    "rollouts.jsonl",
    "rollouts.jsonl.damaged",
)  # files that are read or opened at a start
STEP = re.compile(r"step-([0-9]{6,})")


def open_run(
    args, checkpoint: Path | None = None, samples: Sequence[Sample] = ()
) -> tuple[Path, AbstractContextManager]:
    """The run's folder, created with args.json in it, and its lock, a context for the duration of
    the run. ValueError for a folder that already holds a run, without --resume, or that another
    process is writing to.

    If the run continues from `checkpoint`, args.json keeps the arguments of its first start;
    starts.jsonl gains a line, and differences are printed. `samples` are those that the run reads.
    """
    folder, held = Path(args.output_dir), nullcontext()
    if first():
        first_args = _check_folder(folder, args)
        make_folder(folder)
        held = lock(folder / ".lock")
        if held is None:
            raise ValueError(
                f"{folder} is in use: another process is writing this run. Give "
                "another --output_dir"
            )
        before = [] if first_args is None else past_starts(folder, first_args)
        now = this_start(args, step_of(checkpoint), samples)
        for note in differences(before, now):
            print(f"note: {note}")
        if first_args is None:
            write_aside(folder / "args.json", json.dumps(asdict(args), indent=2) + "\n")
        add_start(folder, now)
        _tidy(folder, checkpoint)
    gathered(None)  # the others wait until the folder is there
    return folder, held


def _check_folder(folder: Path, args) -> dict | None:
    """The arguments of the first start of the run in this folder; None if there is no run yet."""
    path = folder / "args.json"
    for name in OWN:  # opening a pipe would wait for ever
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} is not a regular file: remove it, or give another --output_dir"
            )
    if not path.exists():
        ours = (".lock", "args.json.part")
        if folder.is_dir() and any(inside.name not in ours for inside in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and does not hold a run. Give another --output_dir"
            )
        return None
    if not args.resume:
        raise ValueError(
            f"{folder} already holds a run. Give another --output_dir, or --resume to continue it"
        )
    try:
        first_args = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not hold the arguments of a run ({error}): restore the file that the run"
            " wrote"
        ) from None
    grpo = "group_size" in first_args
    if first_args and grpo != hasattr(args, "group_size"):
        raise ValueError(
            f"{folder} holds a run of {'train_grpo.py' if grpo else 'train_sft.py'}: "
            "resume it with that program, or give another --output_dir"
        )
    return first_args


def last_checkpoint(args) -> Path | None:
    """The newest intact checkpoint, which is printed; None without --resume or if there is none
    yet. Exits with 0 if the run is finished. ValueError if no checkpoint is intact, or if the run
    cannot continue with these arguments.
    """
    if not args.resume:
        return None
    folder = Path(args.output_dir)
    if (folder / "args.json").exists():  # else nothing in it is ours
        _check_folder(folder, args)
        if first():
            probe = lock(folder / ".lock")
            if probe is None:
                raise ValueError(
                    f"{folder} is in use: another process is writing this run. Wait "
                    "for it, or end it"
                )
            probe.close()
        if (folder / "final").exists():
            _end_finished(folder, args)
    saved = checkpoints(folder)
    for checkpoint in reversed(saved):
        wrong = damage(checkpoint) if first() else None  # reading all bytes once is enough
        wrong = gathered(wrong)[0]
        if wrong is None:
            check_checkpoint(checkpoint, args)
            check_optimizer(checkpoint, args)
            say(f"resuming from {checkpoint}")
            return checkpoint
        say(f"{checkpoint} cannot be used: {wrong}")
    if saved:
        raise ValueError(
            f"no checkpoint in {folder / 'checkpoints'} can be used. Restore an intact one, or"
            " start over in another --output_dir"
        )
    say(f"no checkpoint in {folder}: starting at step 0")
    return None


def _end_finished(folder: Path, args) -> None:
    """Finish what a kill after the last step left undone, and exit."""
    rows, _ = read_rows(folder / "metrics.jsonl")
    if first():
        remove_checkpoints(folder)
        if rows and not (folder / "curves.png").exists():
            draw_curves(folder)
    say(f"{folder} is finished: its model is {folder / 'final'}")
    if rows and args.max_steps > (done := rows[-1]["step"] + 1):
        say(
            f"It took {done} steps, and --max_steps is {args.max_steps}. To train it further, "
            f"start another run from it: --model {folder / 'final'} --output_dir ANOTHER, "
            "without --resume"
        )
    sys.exit(0)


def _tidy(folder: Path, checkpoint: Path | None) -> None:
    """Remove what a kill left half written, and rename damaged checkpoints to step-000006.damaged,
    since they would otherwise count among those to keep.
    """
    parts = [path for name in ("checkpoints", "best") for path in (folder / name).glob("*.part")]
    for part in [*parts, folder / "final.part"]:
        if is_numbered(part.with_suffix("")) or part.stem == "final":
            remove(part)
    for other in checkpoints(folder) if checkpoint else []:
        # `last_checkpoint` has found those after `checkpoint` to be damaged.
        if other != checkpoint and (step_of(other) > step_of(checkpoint) or damage(other)):
            aside = other.with_name(other.name + ".damaged")
            if not aside.exists() and not other.is_symlink():
                other.rename(aside)
                say(f"{other} is damaged and has been renamed to {aside.name}")


def is_numbered(path: Path) -> bool:
    """Whether its name is step-NNNNNN and nothing more."""
    return STEP.fullmatch(path.name) is not None


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    paths = (folder / "checkpoints").glob("step-*")
    return sorted((path for path in paths if is_numbered(path) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path | None) -> int:
    """The number of steps done; 0 without a checkpoint."""
    return int(STEP.fullmatch(checkpoint.name)[1]) if checkpoint else 0


def remove_folder(path: Path) -> None:
    """Remove a folder, but not a link to one or a file."""
    if path.is_dir() and not path.is_symlink():
        remove(path)


def remove_checkpoints(folder: Path) -> None:
    """Remove those of a finished run, and checkpoints/ itself if nothing else is in it."""
    for path in [*checkpoints(folder), *map(part_of, checkpoints(folder))]:
        remove_folder(path)
    try:
        (folder / "checkpoints").rmdir()
    except OSError:
        pass


@contextmanager
def run_errors(folder: Path, memory: str):
    """A context around a run's steps: an external cause that ends it is reported in one message,
    with the checkpoint from which --resume continues. `memory` names the arguments to lower if
    memory runs out.
    """

    def advice() -> str:
        return f"--resume continues from {newest(folder)}"

    with lost_rank(advice), arguments.run_errors(advice, memory):
        yield


def newest(folder: Path) -> str:
    """Where --resume would continue, in words."""
    saved = checkpoints(folder)
    return str(saved[-1]) if saved else "step 0: no checkpoint has been saved yet"
