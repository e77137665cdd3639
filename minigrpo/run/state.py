"""The optimiser's state in a checkpoint: values by parameter name, for any number of ranks."""

from itertools import cycle
from pathlib import Path

import torch
from safetensors import safe_open

from minigrpo.policy import Policy
from minigrpo.run.distributed import is_sharded, rank, ranks
from minigrpo.run.shard import full, slice_like

ADAM = {"step", "exp_avg", "exp_avg_sq"}  # the figures of AdamW's state


def check_optimizer(checkpoint: Path, args) -> None:
    """ValueError if --optimizer is not the one whose state is in the checkpoint."""
    figures = {key.rsplit(":", 1)[1] for file in _files(checkpoint) for key in _keys(file)}
    before, now = "muon" if figures - ADAM else "adamw", getattr(args, "optimizer", "adamw")
    if figures and before != now:
        raise ValueError(
            f"{checkpoint} holds the state of --optimizer {before}, with which {now} cannot"
            f" continue: resume with --optimizer {before}, or start another run with --model"
            f" {checkpoint}"
        )


def optimizer_state(policy: Policy, optimizers) -> dict[str, torch.Tensor]:
    """ "parameter:figure" -> tensor, by parameter name, so that any number of ranks can divide it
    among them, sharded or not.

    Sharded parameters are gathered one by one, and the ranks take turns in keeping them.
    """
    name_of = {id(p): name for name, p in policy.model.named_parameters()}
    keeper = cycle(range(ranks()))
    state = {}
    for p, figures in [item for optimizer in optimizers for item in optimizer.state.items()]:
        state_of_rank = {
            f"{name_of[id(p)]}:{figure}": full(value).contiguous()  # on all ranks
            for figure, value in figures.items()
        }
        if not is_sharded(p) or next(keeper) == rank():
            state |= state_of_rank
    return state


def load_optimizers(checkpoint: Path, policy: Policy, *optimizers: torch.optim.Optimizer) -> None:
    """Restore the optimiser states of this rank's parameters from the checkpoint."""
    place = {key: file for file in _files(checkpoint) for key in _keys(file)}
    name_of = {id(p): name for name, p in policy.model.named_parameters()}
    by_name: dict[str, list[str]] = {}
    for key in place:
        by_name.setdefault(key.rsplit(":", 1)[0], []).append(key)
    for optimizer in optimizers:
        state, number = {}, 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                entries = by_name.get(name_of[id(p)], [])
                if entries:
                    state[number] = {
                        key.rsplit(":", 1)[1]: slice_like(p, _tensor(place[key], key))
                        for key in entries
                    }
                number += 1
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("optimizer-*.safetensors"))


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def _tensor(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor(key)
