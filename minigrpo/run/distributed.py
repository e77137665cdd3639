"""Everything distributed: data parallelism over the processes that `torchrun` starts, with
PyTorch's own collectives.

Each rank samples and scores whole groups; counts, rewards and metrics cover all ranks; gradients
are summed, and each rank keeps the optimiser state of some parameters, updates those, and sends
them to the others (ZeRO-1, Rajbhandari et al. 1910.02054). With one process every function here
returns its input.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=30)  # for a rank that neither answers nor dies
# elements per transfer: one call for each of hundreds of tensors would cost more than the transfer
BUCKET = 2**26


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the rank that prints, and writes whatever is the same on all."""
    return rank() == 0


def say(*words: Any) -> None:
    if first():
        print(*words, flush=True)


def join(device: str) -> None:
    """Join the other processes of `torchrun --nproc-per-node N program.py`; with one process, do
    nothing. `device` is cpu or cuda.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node is above the {torch.cuda.device_count()} GPUs of this node:"
                " start one process per GPU"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    # or gloo's threads, still running, abort a process that has ended well
    atexit.register(dist.destroy_process_group)


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    return ranks() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


@contextmanager
def lost_rank(advice: Callable[[], str]):
    """If another rank has died, end with a message that includes `advice`, instead of a traceback
    or an endless wait.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        print(
            f"rank {rank()}: another rank has died, so this run cannot go on "
            f"({str(error).splitlines()[0]}). {advice()}, with as many ranks as you like",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # at a plain exit, threads of collectives may wait for the dead rank


# ---- who does what -------------------------------------------------------------------------------


def places_of_this_rank(n: int) -> list[int]:
    """This rank's places among 0..n-1. If there are fewer items than ranks, a rank left without
    takes the first, as another rank does.
    """
    return list(range(rank(), n, ranks())) or [0]


def balance_over_ranks(costs: list[int], size: int) -> tuple[list[int], list[range]]:
    """Distribute items, in consecutive parts of `size`, so that in each part the costs of the ranks
    are as equal as possible.

    Returns the places of this rank, in order, and for each part its span among them. The most
    expensive item goes first, to the rank with the lowest cost in this part and, among those, in
    all parts; every rank computes the same.
    """
    mine, spans, all_parts = [], [], [0] * ranks()
    for begin in range(0, len(costs), size):
        part, got = [0] * ranks(), []
        for place in sorted(
            range(begin, min(begin + size, len(costs))), key=lambda i: (-costs[i], i)
        ):
            to = min(range(ranks()), key=lambda r: (part[r], all_parts[r], r))
            part[to] += costs[place]
            all_parts[to] += costs[place]
            got += [place] if to == rank() else []
        spans.append(range(len(mine), len(mine) + len(got)))
        mine += sorted(got)
    return mine, spans


# ---- what all ranks know -------------------------------------------------------------------------


def gathered(mine: Any) -> list:
    """One object of each rank, in their order."""
    if ranks() == 1:
        return [mine]
    of_ranks: list[Any] = [None] * ranks()
    dist.all_gather_object(of_ranks, mine)
    return of_ranks


def total(x: Tensor) -> Tensor:
    """The sum over ranks of a tensor that has the same shape on all."""
    if ranks() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    return flag if ranks() == 1 else any(gathered(flag))


def in_order(places: list[int], x: Tensor) -> Tensor:
    """Rows x of `places` -> the rows of all ranks, in order of their places, on the CPU."""
    if ranks() == 1:
        return x
    by_place = {
        place: row
        for theirs, rows in gathered((places, x.cpu()))
        for place, row in zip(theirs, rows)
    }
    return torch.stack([by_place[place] for place in sorted(by_place)])


# ---- gradients and weights -----------------------------------------------------------------------


@torch.no_grad()
def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Losses are divided by the count of all ranks, so their gradients add up. A parameter without
    a gradient on any rank keeps none.
    """
    if ranks() == 1:
        return
    parameters = unsharded(parameters)
    touched = total(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32))
    reached = [p for p, times in zip(parameters, touched.tolist()) if times]
    for p in reached:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    _together([p.grad for p in reached], dist.all_reduce)


def is_sharded(x: Tensor) -> bool:
    """Whether this rank has only a slice of it: the decoder layers with --shard, whose gradients
    FSDP2 sums (shard.py).
    """
    return isinstance(x, DTensor)


def unsharded(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [p for p in parameters if not is_sharded(p)]


def owners(parameters: Iterable[torch.nn.Parameter]) -> list[int]:
    """The rank that keeps each parameter's optimiser state: whole parameters, with about the same
    number of elements on each rank.
    """
    parameters, loads = list(parameters), [0] * ranks()
    owner = [0] * len(parameters)
    for i in sorted(range(len(parameters)), key=lambda i: -parameters[i].numel()):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += parameters[i].numel()
    return owner


def parameters_of_this_rank(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The parameters that this rank's optimiser updates: its share of the whole ones, and its
    slices of all sharded ones.
    """
    whole = unsharded(parameters)
    kept = {id(p) for p, owner in zip(whole, owners(whole)) if owner == rank()}
    return [p for p in parameters if is_sharded(p) or id(p) in kept]


@torch.no_grad()
def share_weights(parameters: list[torch.nn.Parameter]) -> None:
    """After a step: every rank sends the parameters that it owns."""
    if ranks() > 1:
        parameters = unsharded(parameters)
        owner_of = owners(parameters)
        for source in range(ranks()):
            _together(
                [p for p, owner in zip(parameters, owner_of) if owner == source],
                lambda flat, source=source: dist.broadcast(flat, source),
            )


def _together(tensors: list[Tensor], work: Callable[[Tensor], Any]) -> None:
    """`work`, in place, on buckets of the concatenated tensors."""
    while tensors:
        count, size = 0, 0
        while count < len(tensors) and (not count or size + tensors[count].numel() <= BUCKET):
            size += tensors[count].numel()
            count += 1
        bucket, tensors = tensors[:count], tensors[count:]
        flat = torch.cat([x.flatten() for x in bucket])
        work(flat)
        for x, new in zip(bucket, flat.split([x.numel() for x in bucket])):
            x.copy_(new.view_as(x))
