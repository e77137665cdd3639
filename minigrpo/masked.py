"""Masked tensors, and checks of what comes in, for loss.py and advantages.py: masked places are
never read, and everything is computed in fp32 or better.
"""

import math

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """fp32, or float64 where x has it: sums over thousands of bf16 tokens would lose the last
    ones.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unmasked(x: Tensor, mask: Tensor) -> Tensor:
    """x in `exact` where the mask is set, 0 elsewhere: unlike x * mask, this lets no NaN through,
    forward or backward.
    """
    return torch.where(mask, exact(x), 0.0)


def finite_exp(x: Tensor) -> Tensor:
    """exp, kept finite: an infinite ratio times an advantage or a slope of 0 would be NaN."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 1).exp()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """For statistics: without gradient, 0 for an empty mask."""
    return unmasked(x.detach(), mask).sum() / mask.sum().clamp(min=1)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_tensors(**values: Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def as_bool(name: str, mask: Tensor) -> Tensor:
    """Only a mask that is not bool already is looked at: on a GPU, looking waits for it."""
    check_tensors(**{name: mask})
    if mask.dtype == torch.bool:
        return mask
    other = mask[(mask != 0) & (mask != 1)]
    if len(other):
        raise ValueError(f"{name} must hold 0 and 1 alone, got {other[0].item():g}")
    return mask.bool()


def same_shape(optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """`optional` ones may be None."""
    given = tensors | {k: x for k, x in (optional or {}).items() if x is not None}
    check_tensors(**given)
    if len({x.shape for x in given.values()}) > 1:
        shapes = ", ".join(f"{k} {tuple(x.shape)}" for k, x in given.items())
        raise ValueError(f"these must have one shape, [R, T]: {shapes}")
