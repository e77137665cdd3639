"""Fusing readers' boxes, against the package of the method's authors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.data.fusion import fuse_boxes, iou

SIDE = st.integers(0, 40)


@st.composite
def readers(draw):
    """Boxes on a coarse grid, so that overlaps are many."""
    count = draw(st.integers(1, 12))
    corners = [(draw(SIDE), draw(SIDE), draw(st.integers(2, 25)), draw(st.integers(2, 25))) for _ in range(count)]
    return [[x / 70, y / 70, (x + w) / 70, (y + h) / 70] for x, y, w, h in corners]


@settings(max_examples=300, deadline=None)
@given(readers())
def test_same_boxes_as_ensemble_boxes(boxes):
    """Each box a reader of its own. Scores fall by a millionth, so that the package, which sorts by score, keeps the order."""
    package = pytest.importorskip("ensemble_boxes", reason="the oracle: pip install ensemble-boxes")
    count = len(boxes)
    expected, _, _ = package.weighted_boxes_fusion([[box] for box in boxes], [[1 - 1e-6 * k] for k in range(count)],
                                                   [[0]] * count, iou_thr=0.1, skip_box_thr=0.0)
    found, members = fuse_boxes(boxes)
    assert sorted(index for group in members for index in group) == list(range(count))
    np.testing.assert_allclose(sorted(found), sorted(expected.tolist()), atol=1e-4)


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
