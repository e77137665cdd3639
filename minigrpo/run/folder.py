"""A run's folder: made once, never overwritten, resumed from its newest checkpoint.

    args.json  metrics.jsonl  curves.png  rollouts.jsonl (GRPO)  checkpoints/step-000050/  best/step-000040/ (--eval_data)
    skipped/ (updates that were not taken)  final/ (LoRA: final/adapter/)
"""

import json
import shutil
import signal
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minigrpo.lora import check_checkpoint, merge_adapters, save_adapters
from minigrpo.policy import Policy
from minigrpo.run.distributed import any_rank, first, gathered, is_sharded, rank, ranks, say
from minigrpo.run.files import damage, lock, make_folder, seal, write_aside
from minigrpo.run.shard import full, full_weights, slice_like

WRITING = (OSError, SafetensorError)  # what a full disk raises
STOP_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # 75, EX_TEMPFAIL: run the same command again with --resume
LEFT_OPEN = {"resume", "max_steps", "save_steps", "output_dir", "device", "keep_checkpoints", "track", "reward_timeout",
             "shard"}


def open_run(args) -> tuple[Path, AbstractContextManager]:
    """Make the run folder and write args.json; refuse a folder that already holds a run unless --resume is set, or that another
    process is writing to. Also returns the lock, a context that lasts as long as the run."""
    folder, held = Path(args.output_dir), nullcontext()
    if first():
        before = _check_folder(folder, args)
        make_folder(folder)
        held = lock(folder / ".lock")
        if held is None:
            raise ValueError(f"{folder} is in use: another process is writing this run. Give another --output_dir")
        if before is not None:
            now = asdict(args)
            for name in sorted(set(now) - LEFT_OPEN):
                if before.get(name) != now[name]:
                    print(f"note: --{name} was {before.get(name)} when this run began and is {now[name]} now")
        write_aside(folder / "args.json", json.dumps(asdict(args), indent=2) + "\n")
    gathered(None)  # the others wait until the folder is there
    return folder, held


def _check_folder(folder: Path, args) -> dict | None:
    """The arguments that the run in this folder began with; None where there is none yet."""
    if (folder / "args.json").exists():
        if not args.resume:
            raise ValueError(f"{folder} already holds a run. Give another --output_dir, or --resume to continue it")
        try:
            return dict(json.loads((folder / "args.json").read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / 'args.json'} does not hold a run's arguments ({error}): put back what the run wrote") from None
    if folder.is_dir() and any(path.name not in (".lock", "args.json.part") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run. Give another --output_dir")
    return None


def last_checkpoint(args) -> Path | None:
    """The newest checkpoint that is whole; says which, and exits with 0 where the run is already finished."""
    if not args.resume:
        return None
    folder = Path(args.output_dir)
    if first() and (folder / "args.json").exists():
        probe = lock(folder / ".lock")
        if probe is None:
            raise ValueError(f"{folder} is in use: another process is writing this run. Wait for it, or end it")
        probe.close()
    if (folder / "final").exists() and (folder / "args.json").exists():  # else nothing in it is ours to remove
        if first():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # what a kill right after the last step has left
        say(f"{folder} is finished: its model is {folder / 'final'}")
        sys.exit(0)
    for checkpoint in reversed(checkpoints(folder)):
        wrong = damage(checkpoint) if first() else None  # reading all bytes once is enough
        wrong = gathered(wrong)[0]
        if wrong is None:
            check_checkpoint(checkpoint, args)
            say(f"resuming from {checkpoint}")
            return checkpoint
        say(f"{checkpoint} cannot be used: {wrong}")
    if checkpoints(folder):
        raise ValueError(f"no checkpoint in {folder / 'checkpoints'} can be used. Put a whole one back, or begin anew in another "
                         "--output_dir")
    say(f"no checkpoint in {folder}: starting at step 0")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "checkpoints").glob("step-*[0-9]"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(folder: Path, step: int, policy: Policy, *optimizers: torch.optim.Optimizer, keep: int = 1) -> None:
    """Weights (with LoRA: adapters alone) and optimiser state after `step` steps; of the older ones, the last keep - 1 stay.

    Data order and sampling depend on (seed, step) alone, so a run continues from this as if it had never stopped. Where it
    cannot be written (a full disk), training goes on from the one before.
    """
    place = folder / "checkpoints" / f"step-{step:06d}"
    problem = _save_aside(place.with_suffix(".part"), policy, optimizers)
    if problem is None and first():
        try:
            seal(place.with_suffix(".part"), place)
        except OSError as error:
            problem = error
    if any_rank(problem is not None):
        if first():
            shutil.rmtree(place.with_suffix(".part"), ignore_errors=True)
        if problem:
            kept = checkpoints(folder)
            print(f"\ncheckpoint of step {step} not saved ({problem}); the newest is {kept[-1] if kept else 'none'}. Training goes "
                  "on: make room before the next one is due", file=sys.stderr, flush=True)
        return
    if first():
        for other in (folder / "checkpoints").iterdir():
            if other not in checkpoints(folder)[-keep:]:
                shutil.rmtree(other)


def _save_aside(aside: Path, policy: Policy, optimizers) -> Exception | None:
    """Every rank writes the optimiser state that it keeps, the first one also the weights. Returns what went wrong on this rank."""
    problem, weights = None, full_weights(policy)
    try:
        if first():
            shutil.rmtree(aside, ignore_errors=True)
            save_adapters(policy, aside) if policy.adapters else policy.save_pretrained(aside, weights)
    except WRITING as error:
        problem = error
    if any_rank(problem is not None):
        return problem
    state = optimizer_state(policy, optimizers)
    try:
        save_file(state, aside / f"optimizer-{rank():05d}.safetensors")
    except WRITING as error:
        problem = error
    gathered(None)
    return problem


def optimizer_state(policy: Policy, optimizers) -> dict[str, torch.Tensor]:
    """"parameter:figure" -> tensor, by the parameters' names, so that any number of ranks can share it out anew, sharded or not.

    Sharded parameters come together one by one, and the ranks take turns in keeping them.
    """
    name_of, keeper = {id(p): name for name, p in policy.model.named_parameters()}, cycle(range(ranks()))
    state = {}
    for p, figures in [item for optimizer in optimizers for item in optimizer.state.items()]:
        found = {f"{name_of[id(p)]}:{figure}": full(value).contiguous() for figure, value in figures.items()}  # on all ranks
        if not is_sharded(p) or next(keeper) == rank():
            state |= found
    return state


def load_optimizers(checkpoint: Path, policy: Policy, *optimizers: torch.optim.Optimizer) -> int:
    """Put the checkpoint's optimiser states back, those of this rank's parameters; returns the number of steps done."""
    files = sorted(checkpoint.glob("optimizer-*.safetensors"))
    place = {key: file for file in files for key in _keys(file)}
    name_of = {id(p): name for name, p in policy.model.named_parameters()}
    by_name: dict[str, list[str]] = {}
    for key in place:
        by_name.setdefault(key.rsplit(":", 1)[0], []).append(key)
    for optimizer in optimizers:
        state, number = {}, 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                found = by_name.get(name_of[id(p)], [])
                if found:
                    state[number] = {key.rsplit(":", 1)[1]: slice_like(p, _tensor(place[key], key)) for key in found}
                number += 1
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step_of(checkpoint)


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def _tensor(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor(key)


def save_best(folder: Path, step: int, policy: Policy) -> None:
    """RUN/best/step-000040: the weights (with LoRA: adapters) that were best on --eval_data so far, in place of the ones before."""
    weights = full_weights(policy)
    if not first():
        return
    place = folder / "best" / f"step-{step:06d}"
    aside = place.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_adapters(policy, aside) if policy.adapters else policy.save_pretrained(aside, weights)
        seal(aside, place)
    except WRITING as error:
        shutil.rmtree(aside, ignore_errors=True)
        print(f"\nthe best model so far, of step {step}, could not be saved ({error})", file=sys.stderr, flush=True)
        return
    for other in place.parent.iterdir():
        if other != place:
            shutil.rmtree(other)


def save_final(folder: Path, policy: Policy) -> None:
    """RUN/final, the trained checkpoint, with LoRA merged (and the adapters alone in final/adapter); the ones to resume from
    are no longer needed."""
    aside = folder / "final.part"
    if policy.adapters and first():
        shutil.rmtree(aside, ignore_errors=True)
        save_adapters(policy, aside / "adapter")
    if policy.adapters:
        merge_adapters(policy)
    weights = full_weights(policy)
    if first():
        if not (aside / "adapter").exists():
            shutil.rmtree(aside, ignore_errors=True)
        policy.save_pretrained(aside, weights)
        seal(aside, folder / "final")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    gathered(None)


@contextmanager
def graceful_stop():
    """Yields a function that gives the exit code once Ctrl-C or SIGTERM came, on whichever rank, and 0 before: the step in hand
    is finished. A second Ctrl-C aborts."""
    came: list[int] = []

    def on_signal(number, _):
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(STOP_CODES[number])
        say(f"\n{signal.Signals(number).name}: stopping after this step" + " (Ctrl-C again to abort at once)" * (number == signal.SIGINT))

    before = {number: signal.signal(number, on_signal) for number in STOP_CODES}
    try:
        yield lambda: max(gathered(came[0] if came else 0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_early(code: int, folder: Path, step: int, policy: Policy, *optimizers: torch.optim.Optimizer, keep: int = 1) -> None:
    """Leave a checkpoint behind and end the program with 130 after Ctrl-C, 75 after SIGTERM."""
    save_checkpoint(folder, step, policy, *optimizers, keep=keep)
    say(f"stopped after step {step}; --resume continues from {folder / 'checkpoints'}")
    sys.exit(code)
