"""Fusing readers' boxes, against the package of the method's authors."""

import numpy as np
import pytest

from minigrpo.data.fusion import fuse_boxes, iou


@pytest.mark.parametrize("seed", range(200))
def test_same_boxes_as_ensemble_boxes(seed):
    """1 to 12 boxes, crowded so that they chain, each a reader of its own. Scores fall by a
    millionth, so that the package, which sorts by score, keeps the order. Corners are drawn at
    random, since on a grid the package's float32 breaks ties its own way.
    """
    package = pytest.importorskip("ensemble_boxes", reason="the oracle: pip install ensemble-boxes")
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 13))
    low = rng.uniform(0, 0.5, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.05, 0.45, (count, 2))], axis=1).tolist()
    expected, _, _ = package.weighted_boxes_fusion(
        [[box] for box in boxes],
        [[1 - 1e-6 * k] for k in range(count)],
        [[0]] * count,
        iou_thr=0.1,
        skip_box_thr=0.0,
    )
    found, members = fuse_boxes(boxes)
    assert sorted(index for group in members for index in group) == list(range(count))
    # of each of ours from each of theirs
    apart = np.abs(np.array(found)[:, None] - expected[None]).max(-1)
    assert len(found) == len(expected) and apart.min(1).max() < 1e-5 and apart.min(0).max() < 1e-5


def test_three_readers_by_hand():
    """Two hearts overlap by 3/5; a nodule elsewhere stays alone."""
    boxes = [[0.0, 0.0, 0.4, 0.4], [0.1, 0.0, 0.5, 0.4], [0.8, 0.8, 0.9, 0.9]]
    assert iou(boxes[0], boxes[1]) == pytest.approx(0.12 / 0.20)
    found, members = fuse_boxes(boxes)
    assert members == [[0, 1], [2]]
    np.testing.assert_allclose(found, [[0.05, 0.0, 0.45, 0.4], boxes[2]])


def test_touching_boxes_and_boxes_below_the_threshold_stay_apart():
    assert len(fuse_boxes([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])[0]) == 2
    assert len(fuse_boxes([[0, 0, 0.5, 1], [0.45, 0, 1, 1]])[0]) == 2  # IoU 0.05
    assert fuse_boxes([]) == ([], [])
    assert iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0
