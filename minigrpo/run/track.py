"""A step's figures to TensorBoard and Weights & Biases, beside metrics.jsonl."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from minigrpo.run.distributed import first, say
from minigrpo.run.terminal import fail


def tracker(args, folder: Path, start: int) -> Callable[[dict], None]:
    """A function that logs a row of metrics.jsonl to all that --track names, on the first rank. A
    resumed run continues its curves. A tracker that cannot start ends the program; one that fails
    later is dropped.
    """
    logs = {}
    for name in args.track if first() else ():
        try:
            logs[name] = {"tensorboard": _tensorboard, "wandb": _wandb}[name](args, folder, start)
        except Exception as error:  # packages of others, which write to disks and to servers
            fail(f"--track {name} cannot start ({error}): correct this, or leave it out")

    def log(row: dict) -> None:
        for name, write in list(logs.items()):
            try:
                write(row)
            except Exception as error:
                del logs[name]
                say(
                    f"\nnote: --track {name} failed ({error}) and gets no more rows; metrics.jsonl"
                    " keeps them all"
                )

    return log


def _tensorboard(args, folder: Path, start: int) -> Callable[[dict], None]:
    from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only here

    # drops what will be logged again
    writer = SummaryWriter(folder / "tensorboard", purge_step=start)

    def write(row: dict) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def _wandb(args, folder: Path, start: int) -> Callable[[dict], None]:
    import wandb

    # the same run again after --resume
    same = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project="minigrpo",
        name=folder.name,
        id=same,
        resume="allow",
        dir=folder,
        config=asdict(args),
    )

    def write(row: dict) -> None:
        run.log(row, step=row["step"])

    return write
