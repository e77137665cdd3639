"""A run's folder: made once, never overwritten, resumed from its newest checkpoint.

    args.json  metrics.jsonl  curves.png  rollouts.jsonl (GRPO)  checkpoints/step-000050/  final/ (LoRA: final/adapter/)
"""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minigrpo.lora import check_checkpoint, merge_adapters, save_adapters
from minigrpo.policy import Policy


def open_run(args) -> Path:
    """Make the run folder and write args.json; refuse a folder that already holds a run unless --resume is set."""
    folder = Path(args.output_dir)
    if (folder / "args.json").exists():
        if not args.resume:
            raise ValueError(f"{folder} already holds a run. Give another --output_dir, or --resume to continue it")
        before, now = json.loads((folder / "args.json").read_text()), asdict(args)
        for name in sorted(set(now) - {"resume", "max_steps", "save_steps", "output_dir", "device"}):
            if before.get(name) != now[name]:
                print(f"note: --{name} was {before.get(name)} when this run began and is {now[name]} now")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run. Give another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    return folder


def last_checkpoint(args) -> Path | None:
    """The newest checkpoint to resume from; says which, and exits with 0 where the run is already finished."""
    if not args.resume:
        return None
    folder = Path(args.output_dir)
    if (folder / "final").exists():
        print(f"{folder} is finished: its model is {folder / 'final'}")
        sys.exit(0)
    found = sorted((folder / "checkpoints").glob("step-*[0-9]"))
    if found:
        check_checkpoint(found[-1], args)
    print(f"resuming from {found[-1]}" if found else f"no checkpoint in {folder}: starting at step 0")
    return found[-1] if found else None


def save_checkpoint(folder: Path, step: int, policy: Policy, *optimizers: torch.optim.Optimizer) -> None:
    """Weights (with LoRA: adapters alone) and optimiser state after `step` steps; the one before is removed once this one is
    complete.

    Data order and sampling depend on (seed, step) alone, so a run continues from this as if it had never stopped.
    """
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    aside = checkpoint.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    save_adapters(policy, aside) if policy.adapters else policy.save_pretrained(aside)
    state = {f"{which}.{number}.{name}": value for which, optimizer in enumerate(optimizers)
             for number, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()}
    save_file(state, aside / "optimizer.safetensors")
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.rename(aside, checkpoint)
    for other in checkpoint.parent.glob("step-*"):
        if other != checkpoint:
            shutil.rmtree(other)


def load_optimizers(checkpoint: Path, *optimizers: torch.optim.Optimizer) -> int:
    """Put the checkpoint's optimiser states back; returns the number of steps done."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        which, number, name = key.split(".")
        states[int(which)].setdefault(int(number), {})[name] = value
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(checkpoint.name.removeprefix("step-"))


def save_final(folder: Path, policy: Policy) -> None:
    """RUN/final, the trained checkpoint, with LoRA merged (and the adapters alone in final/adapter); the ones to resume from
    are no longer needed."""
    aside = folder / "final.part"
    shutil.rmtree(aside, ignore_errors=True)
    if policy.adapters:
        save_adapters(policy, aside / "adapter")
        merge_adapters(policy)
    policy.save_pretrained(aside)
    os.rename(aside, folder / "final")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


@contextmanager
def graceful_stop():
    """Yields a function that tells whether Ctrl-C was pressed: the step in hand is finished, a second one aborts."""
    pressed = []

    def on_interrupt(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        print("\nstopping after this step (Ctrl-C again to abort at once)", file=sys.stderr)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def stop_early(folder: Path, step: int, policy: Policy, *optimizers: torch.optim.Optimizer) -> None:
    """Leave a checkpoint behind and end the program with 130, as an interrupt does."""
    save_checkpoint(folder, step, policy, *optimizers)
    print(f"stopped after step {step}; --resume continues from {folder / 'checkpoints'}")
    sys.exit(130)
