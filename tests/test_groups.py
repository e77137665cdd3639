"""Groups replaced by dynamic sampling: every answer keeps its sample, its reward and its tokens."""

import math

import numpy as np
import pytest
import torch

from minigrpo.data import Sample
from minigrpo.generate import Rollout
from minigrpo.run.groups import Groups, by_token_budget, micro_batches, padding_share


def groups_of(names, rewards, width, parts):
    """Groups whose answer r has r + 1 tokens at most, all of them the code of its name."""
    size = len(rewards[0])
    texts = [f"{name}{i}" for name in names for i in range(size)]
    tokens = torch.tensor([[sum(map(ord, text))] * width for text in texts])
    mask = torch.arange(width) < torch.arange(1, len(texts) + 1)[:, None]
    rollout = Rollout(
        tokens,
        mask,
        -tokens.float(),
        torch.tensor([i % 2 == 0 for i in range(len(texts))]),
        texts,
        tokens.numel(),
        100,
    )
    rewards = torch.tensor(rewards)
    samples = [Sample(name, None, "report", "What is seen?", "Nothing.") for name in names]
    return Groups(
        samples, rollout, rewards, ~rewards.isnan(), parts, [10 + i for i in range(len(names))]
    )


def test_groups_without_spread():
    nan = float("nan")
    found = groups_of(
        "abcde",
        [[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [nan, 3.0, 3.0], [nan, nan, 1.0], [nan, 1.0, 2.0]],
        2,
        {},
    )
    assert found.without_spread() == [0, 2, 3]


def test_replaced_groups_come_whole():
    old = groups_of(
        "abc", [[1.0, 1.0], [2.0, 3.0], [4.0, 4.0]], 3, {"x": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
    )
    new = groups_of("de", [[5.0, 6.0], [7.0, 7.0]], 5, {"y": [9.0, 8.0, 7.0, 6.0]})
    both = old.replace([2, 0], new)
    assert [s.id for s in both.samples] == ["e", "b", "d"] and both.rollout.texts == [
        "e0",
        "e1",
        "b0",
        "b1",
        "d0",
        "d1",
    ]
    assert both.rewards.tolist() == [[7.0, 7.0], [2.0, 3.0], [5.0, 6.0]] and both.valid.all()
    assert both.without_spread() == [0]
    rows = {
        text: (source, r) for source in (old, new) for r, text in enumerate(source.rollout.texts)
    }
    for r, text in enumerate(both.rollout.texts):
        source, row = rows[text]
        shown = source.rollout.mask[row]
        assert (
            both.rollout.mask[r].sum() == shown.sum()
            and both.rollout.finished[r] == source.rollout.finished[row]
        )
        for name in ("tokens", "logprob"):
            assert torch.equal(
                getattr(both.rollout, name)[r][both.rollout.mask[r]],
                getattr(source.rollout, name)[row][shown],
            )

    def numbers(values):
        return [None if math.isnan(v) else v for v in values]

    assert numbers(both.parts["x"]) == [None, None, 2.0, 3.0, None, None]
    assert numbers(both.parts["y"]) == [7.0, 6.0, None, None, 9.0, 8.0]
    narrow = new.replace([0], groups_of("f", [[1.0, 2.0]], 1, {}))
    assert narrow.rollout.mask.shape == (4, 5) and narrow.rollout.mask[:2].sum() == 2
    assert old.rollout.texts[0] == "a0" and old.rewards[0, 0] == 1.0, (
        "the old groups are left as they were"
    )


def test_micro_batches_keep_to_their_budget():
    """Every prompt once, like lengths together, no part above the budget but a group that is larger
    alone.
    """
    random = np.random.default_rng(0)
    for budget in (1, 300, 1000, 10**6):
        prompts, answers = random.integers(5, 90, 30).tolist(), random.integers(1, 70, 30).tolist()
        parts = by_token_budget(prompts, answers, 4, budget, range(3, 27))
        assert sorted(i for part in parts for i in part) == list(range(3, 27))
        for part in parts:
            computed = len(part) * (
                max(prompts[i] for i in part) + 4 * max(answers[i] for i in part)
            )
            assert computed <= budget or len(part) == 1
        longest = [max(answers[i] for i in part) for part in parts]
        assert longest == sorted(longest, reverse=True)
    assert len(parts) == 1
    assert by_token_budget([10, 10, 10], [5, 50, 5], 2, 40, range(3)) == [[1], [0, 2]], (
        "110 alone, then 2 * (10 + 2 * 5)"
    )


def test_padding_by_hand(policy, mixed):
    prompts, mask = (
        policy.encode(mixed),
        torch.arange(6) < torch.tensor([2, 1, 6, 6, 3, 4, 1, 1])[:, None],
    )
    lengths = prompts.mask.sum(1).tolist()
    parts = micro_batches(prompts, mask, range(4), 10**6)
    assert [(part.tolist(), rows.tolist()) for part, rows in parts] == [
        ([1, 2, 0, 3], [2, 3, 4, 5, 0, 1, 6, 7])
    ]
    assert padding_share(prompts, mask, parts) == pytest.approx(
        1 - (sum(lengths) + 24) / (4 * max(lengths) + 8 * 6)
    )
    alone = micro_batches(prompts, mask, range(4), 1)
    assert padding_share(prompts, mask, alone) == pytest.approx(
        1 - (sum(lengths) + 24) / (sum(lengths) + 2 * (2 + 6 + 4 + 1))
    )
