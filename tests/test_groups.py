"""Groups replaced by dynamic sampling: every answer keeps its sample, its reward and its tokens."""

import math

import torch

from minigrpo.data import Sample
from minigrpo.generate import Rollout
from minigrpo.run.groups import Groups


def groups_of(names, rewards, width, parts):
    """Groups whose answer r has r + 1 tokens at most, all of them the code of its name."""
    size = len(rewards[0])
    texts = [f"{name}{i}" for name in names for i in range(size)]
    tokens = torch.tensor([[sum(map(ord, text))] * width for text in texts])
    mask = torch.arange(width) < torch.arange(1, len(texts) + 1)[:, None]
    rollout = Rollout(tokens, mask, -tokens.float(), torch.tensor([i % 2 == 0 for i in range(len(texts))]), texts)
    rewards = torch.tensor(rewards)
    samples = [Sample(name, None, "report", "What is seen?", "Nothing.") for name in names]
    return Groups(samples, rollout, rewards, ~rewards.isnan(), parts)


def test_groups_without_spread():
    nan = float("nan")
    found = groups_of("abcde", [[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [nan, 3.0, 3.0], [nan, nan, 1.0], [nan, 1.0, 2.0]], 2, {})
    assert found.without_spread() == [0, 2, 3]


def test_replaced_groups_come_whole():
    old = groups_of("abc", [[1.0, 1.0], [2.0, 3.0], [4.0, 4.0]], 3, {"x": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]})
    new = groups_of("de", [[5.0, 6.0], [7.0, 7.0]], 5, {"y": [9.0, 8.0, 7.0, 6.0]})
    both = old.replace([2, 0], new)
    assert [s.id for s in both.samples] == ["e", "b", "d"] and both.rollout.texts == ["e0", "e1", "b0", "b1", "d0", "d1"]
    assert both.rewards.tolist() == [[7.0, 7.0], [2.0, 3.0], [5.0, 6.0]] and both.valid.all()
    assert both.without_spread() == [0]
    rows = {text: (source, r) for source in (old, new) for r, text in enumerate(source.rollout.texts)}
    for r, text in enumerate(both.rollout.texts):
        source, row = rows[text]
        shown = source.rollout.mask[row]
        assert both.rollout.mask[r].sum() == shown.sum() and both.rollout.finished[r] == source.rollout.finished[row]
        for name in ("tokens", "logprob"):
            assert torch.equal(getattr(both.rollout, name)[r][both.rollout.mask[r]], getattr(source.rollout, name)[row][shown])
    numbers = lambda values: [None if math.isnan(v) else v for v in values]
    assert numbers(both.parts["x"]) == [None, None, 2.0, 3.0, None, None]
    assert numbers(both.parts["y"]) == [7.0, 6.0, None, None, 9.0, 8.0]
    narrow = new.replace([0], groups_of("f", [[1.0, 2.0]], 1, {}))
    assert narrow.rollout.mask.shape == (4, 5) and narrow.rollout.mask[:2].sum() == 2
    assert old.rollout.texts[0] == "a0" and old.rewards[0, 0] == 1.0, "the old groups are left as they were"
