"""Which samples a step trains on."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .sample import Sample

T = TypeVar("T")


def batch_at(items: list[T], step: int, size: int, seed: int) -> list[T]:
    """The samples that step 0, 1, 2... trains on: reshuffled every epoch, none dropped, and a
    function of (seed, step) alone, so that a resumed run continues where it stopped.
    """
    batch = []
    for position in range(step * size, (step + 1) * size):
        epoch, index = divmod(position, len(items))
        batch.append(items[_order(len(items), seed, epoch)[index]])
    return batch


def prefetch(make: Callable[[int], T], steps: range) -> Iterator[tuple[int, T]]:
    """(step, make(step)) for consecutive steps, the next one made in a thread while the caller
    works on the current one.

    The thread uses a single torch thread: with more threads than cores OpenMP sleeps while waiting,
    and every operation of the caller would pay for waking it.
    """
    import torch  # as below

    with ThreadPoolExecutor(1) as pool:
        threads = torch.get_num_threads()
        # asked first: asking sets it, once a thread
        pool.submit(lambda: (torch.get_num_threads(), torch.set_num_threads(1))).result()
        torch.set_num_threads(threads)  # of threads to come, which the line before has set, too
        coming = pool.submit(make, steps.start) if steps else None
        for step in steps:
            batch = coming.result()
            if step + 1 in steps:
                coming = pool.submit(make, step + 1)
            yield step, batch


def group_by_image(samples: list[Sample]) -> list[list[Sample]]:
    """The samples about each image, in the order in which the images first appear; those without an
    image form groups of one.
    """
    by_image: dict[tuple, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(tuple(sample.images) or (sample.id,), []).append(sample)
    return list(by_image.values())


def _order(n: int, seed: int, epoch: int, _cache: dict = {}) -> list[int]:
    key = n, seed, epoch
    if key not in _cache:
        import torch  # here: the tools that make and check data need no torch

        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _cache.clear()
        _cache[key] = torch.randperm(n, generator=generator).tolist()
    return _cache[key]
