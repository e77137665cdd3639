"""Overlap of predicted boxes with reference boxes."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..data.boxes import parse_boxes
from ..data.sample import Sample

Boxes = Sequence[Sequence[float]]  # each x1, y1, x2, y2 in 0..1


def _proper(boxes: Boxes) -> np.ndarray:
    """[N, 4], with zeros in place of a box that is reversed or not within 0..1."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    ok = (boxes >= 0).all(1) & (boxes <= 1).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)
    return np.where(ok[:, None], boxes, 0.0)


def iou_matrix(predicted: Boxes, reference: Boxes) -> np.ndarray:
    """Intersection over union of each pair, [P, N]. A box that is reversed, empty or not within
    0..1 overlaps nothing.
    """
    a, b = _proper(predicted)[:, None], _proper(reference)[None]  # [P, 1, 4], [1, N, 4]
    inner = (
        (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]))
        .clip(min=0)
        .prod(-1)
    )
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def match(predicted: Boxes, reference: Boxes) -> np.ndarray:
    """The overlaps > 0 of the one-to-one matching with the largest total IoU, [K], K <= min(P,
    N).
    """
    iou = iou_matrix(predicted, reference)
    if min(iou.shape) == 1:  # the usual case: one box at least on one side
        matched = iou.max(keepdims=True)
    else:
        matched = iou[linear_sum_assignment(iou, maximize=True)]
    return matched[matched > 0]


def soft_f1(predicted_boxes: Boxes, reference_boxes: Boxes) -> float:
    """2T / (T + FP + n_ref), T the matched IoU, FP the boxes matched to nothing. Range 0..1; floor
    0, also without any predicted or reference box. Source: the paper (arXiv 2512.10691). Its
    loophole: a box that overlaps an unmatched reference by 1% is not a false positive, so junk is
    nearly free; in `dice` it is not.
    """
    if not len(predicted_boxes) or not len(reference_boxes):
        return 0.0
    overlaps = match(predicted_boxes, reference_boxes)
    total, false_positives = overlaps.sum(), len(predicted_boxes) - len(overlaps)
    return float(2 * total / (total + false_positives + len(reference_boxes)))


def dice(predicted_boxes: Boxes, reference_boxes: Boxes) -> float:
    """2T / (n_pred + n_ref): soft F1 in which every predicted box costs 1. Range 0..1; floor 0,
    also without any predicted or reference box. Source: ours, to close the loophole of the paper's
    `soft_f1`.
    """
    if not len(predicted_boxes) or not len(reference_boxes):
        return 0.0
    total = match(predicted_boxes, reference_boxes).sum()
    return float(2 * total / (len(predicted_boxes) + len(reference_boxes)))


def dice_or_none(answer: str, reference_boxes: Boxes, box_scale: float = 1.0) -> float:
    """`dice` of the boxes in `answer`; if there is nothing to find, 1 for a text without a box and
    0 for a box or no text. Range 0..1; floor 0, for an empty answer too. Source: ours, so that
    "there is none" can be the right answer: `soft_f1` and `dice` give 0 to every answer there.
    """
    boxes = parse_boxes(answer, box_scale)
    if not len(reference_boxes):
        return float(bool(answer.strip()) and not boxes)
    return dice(boxes, reference_boxes)


def soft_f1_reward(answers: list[str], samples: list[Sample], box_scale: float) -> list[float]:
    """`soft_f1` of the boxes in each answer. Range 0..1, floor 0."""
    return [
        soft_f1(parse_boxes(a, box_scale), s.boxes) for a, s in zip(answers, samples, strict=True)
    ]


def dice_reward(answers: list[str], samples: list[Sample], box_scale: float) -> list[float]:
    """`dice` of the boxes in each answer. Range 0..1, floor 0."""
    return [dice(parse_boxes(a, box_scale), s.boxes) for a, s in zip(answers, samples, strict=True)]


def dice_or_none_reward(answers: list[str], samples: list[Sample], box_scale: float) -> list[float]:
    """`dice_or_none` of each answer. Range 0..1, floor 0."""
    return [dice_or_none(a, s.boxes, box_scale) for a, s in zip(answers, samples, strict=True)]
