"""Measured memory, for tests that promise a bound."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], None]) -> int:
    """Most bytes of tensors that `run()` held at a time beyond those of before, as torch's CPU
    allocator counts them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = sorted(
        (e.start_ns(), e.nbytes())
        for e in profiled.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    held = peak = 0
    for _, size in events:  # freed memory counts negative
        held += size
        peak = max(peak, held)
    return peak
