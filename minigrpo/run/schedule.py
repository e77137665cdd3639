"""The learning rate over a run."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the arguments are checked before torch is imported, with `rise_of`
    import torch


def learning_rate_at(step: int, steps: int, peak: float, warmup: float, schedule: str) -> float:
    """The learning rate of step 0 .. steps - 1: a rise to the peak over the share `warmup` of the
    steps, then the peak (constant), or a decay to a tenth of it along a line or half a cosine. It
    depends on nothing else, so a resumed run continues at the same rate.
    """
    rise = rise_of(steps, warmup)
    if step < rise:
        return peak * (step + 1) / rise
    if schedule == "constant":
        return peak
    done, whole = step - rise, max(1, steps - rise)
    return peak * (
        1 - 0.9 * done / whole
        if schedule == "linear"
        else 0.55 + 0.45 * math.cos(math.pi * done / whole)
    )


def rise_of(steps: int, warmup: float) -> int:
    """Steps of the warm-up; the last of them is at the peak, which is the first step if there is
    only one.
    """
    return max(1, round(warmup * steps))


def set_learning_rate(optimizers: list["torch.optim.Optimizer"], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
