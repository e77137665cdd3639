"""Data order: every sample once an epoch, the same after a resume."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minigrpo.data import Sample, batch_at, group_by_image, prefetch


def test_every_item_once_an_epoch():
    """Bug of tiny-grpo and nanochat: drop_last or an integer division lost samples."""
    drawn = [x for step in range(7) for x in batch_at(list(range(10)), step, 3, seed=0)]
    assert (
        sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10)) and drawn[:10] != drawn[10:20]
    )


def test_a_batch_depends_on_seed_and_step_alone():
    items = list(range(10))
    late = batch_at(items, 5, 3, seed=1)
    assert late == batch_at(items, 5, 3, seed=1) and late != batch_at(items, 5, 3, seed=2)


def test_groups_share_their_image():
    samples = [
        Sample(str(i), image, task, "q", "a")
        for i, (image, task) in enumerate(
            [
                ("a", "grounding"),
                ("b", "grounding"),
                ("a", "grounding"),
                ("a", "report"),
                (None, "report"),
                (None, "report"),
                ("a", "grounding"),
            ]
        )
    ]
    groups = [[s.id for s in group] for group in group_by_image(samples)]
    assert groups == [["0", "2", "3", "6"], ["1"], ["4"], ["5"]]


def test_what_is_made_ahead_takes_no_thread_from_the_caller():
    """Bug: SFT took twice as long, for torch in the prefetching thread had helpers of its own, more
    threads than cores, and OpenMP then puts the caller's to sleep at every operation. Setting the
    number alone was undone by torch's first look at it.
    """

    def make(step):
        torch.ones(200_000).to(torch.uint8)  # large enough to be shared out
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert [threads for _, threads in prefetch(make, range(3))] == [
            1,
            1,
            1,
        ] and torch.get_num_threads() == 2
        later = ThreadPoolExecutor(1).submit(torch.get_num_threads)
        assert later.result() == 2
    finally:
        torch.set_num_threads(before)


def test_prefetch_gives_every_step_in_order_and_passes_errors_on():
    def make(step):
        if step == 4:
            raise ValueError("step 4")
        return step * 10

    assert (
        list(prefetch(make, range(1, 4))) == [(1, 10), (2, 20), (3, 30)]
        and list(prefetch(make, range(4, 4))) == []
    )
    with pytest.raises(ValueError, match="step 4"):
        list(prefetch(make, range(2, 6)))
