"""--shard: the decoder layers of a model too large for one GPU, sharded across the ranks (FSDP2,
Zhao et al. 2304.11277).

Of each layer's weights, gradients and optimiser state a rank keeps 1 / N; embeddings, head and
vision tower stay whole and go through distributed.py. A pass with gradient gathers a layer, uses it
and frees it, forward and backward: these are collectives, so all ranks must make the same passes
(`same_passes_on_every_rank`). A pass without gradient runs inside `gathered_layers`, where every
layer is gathered, since otherwise each decoded token would move all weights; ranks then need not
wait for each other.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import get_total_norm

from minigrpo.policy import Policy
from minigrpo.run.distributed import first, gathered, is_sharded, ranks, total, unsharded

T = TypeVar("T")


def shard(policy: Policy) -> Policy:
    """Keep this rank's slices of the decoder layers; every rank has loaded the same weights. With
    one process, do nothing.
    """
    if ranks() == 1:
        return policy
    # k and v leave a layer as views; the warning is about changing them in place, which nobody
    # does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(policy.device.type, (ranks(),))
    for layer in policy.language_model.layers:
        # otherwise a layer that is called by itself stays gathered
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # policy.py computes with a layer's parts; FSDP2 gathers around a call
        layer.forward = lambda work, *given: work(*given)
        # losses are divided by the count of all ranks: gradients are sums
        layer.set_gradient_divide_factor(1.0)
        # or the division by 1 becomes an operation that only NCCL has
        layer.set_force_sum_reduction_for_comms(True)
    policy.sharded = True
    return policy


@contextmanager
def gathered_layers(policy: Policy):
    """A context with all layers gathered, for passes without gradient. All ranks enter together;
    inside, each works at its own pace.
    """
    layers = policy.language_model.layers if policy.sharded else ()
    try:
        for layer in layers:
            layer.unshard()
        yield
    finally:
        for layer in layers:
            layer.reshard()


def same_passes_on_every_rank(
    policy: Policy, mine: list[T], spare: Callable[[], list[T]] = list
) -> list[tuple[T, float]]:
    """The batches that this rank passes through sharded layers, each with weight 1, padded to the
    largest number that any rank has by its own first, or the first of `spare` if it has none, with
    weight 0.
    """
    missing = max(gathered(len(mine))) - len(mine) if policy.sharded else 0
    again = (mine or spare())[:1] * missing if missing else []
    return [(part, 1.0) for part in mine] + [(part, 0.0) for part in again]


@torch.no_grad()
def clip_gradients(parameters: list[torch.nn.Parameter], largest: float) -> Tensor:
    """`clip_grad_norm_` over whole and sharded parameters: the norm of all gradients together, the
    same on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    slices = [grad.to_local() for grad in gradients if is_sharded(grad)]
    if not slices:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    others = unsharded(gradients)  # equal on all ranks, after sum_gradients
    norm = torch.hypot(get_total_norm(others), total(get_total_norm(slices) ** 2).sqrt())
    torch._foreach_mul_(others + slices, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def optimizer_param_groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    """Parameter groups for an optimiser, which cannot work on whole and sharded ones together."""
    kinds = unsharded(parameters), [p for p in parameters if is_sharded(p)]
    return [{"params": kind} for kind in kinds if kind]


# ---- checkpoints, which know nothing of slices ---------------------------------------------------


def full(x: Tensor) -> Tensor:
    """A sharded tensor gathered, on the CPU; others unchanged. A collective."""
    return x.full_tensor().cpu() if is_sharded(x) else x


def full_weights(policy: Policy) -> dict[str, Tensor] | None:
    """The full weights of a sharded policy by name, one by one, for the first rank to write. None
    if nothing is sharded.
    """
    if not policy.sharded:
        return None
    weights = {}
    for name, x in policy.model.state_dict().items():
        x = full(x)  # on all ranks
        if first():
            weights[name] = x
    return weights


def slice_like(p: torch.nn.Parameter, x: Tensor) -> Tensor:
    """This rank's slice of x, which every rank has read, if p is sharded and x has a value for each
    of its elements; otherwise x.
    """
    alike = is_sharded(p) and x.shape == p.shape
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if alike else x
