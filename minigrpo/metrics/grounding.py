"""Detection quality of predicted boxes."""

import numpy as np

from ..rewards.grounding import Boxes, iou_matrix, match

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # boxes of one answer that count, as in COCO


def average_precision(predicted: Boxes, reference: Boxes, iou: float = 0.5) -> float:
    """Average precision of one sample without confidences; the mean over samples is the paper's
    "mAP@0.5".

    Predictions count in text order. Each takes the reference it overlaps most; it is a false
    positive if that overlap is below `iou` or that reference is taken. The area under the precision
    envelope over recall, range 0..1; 0 without predicted or reference boxes.
    """
    if not len(predicted) or not len(reference):
        return 0.0
    overlap = iou_matrix(predicted, reference)
    hits, taken = [], set()
    for row, best in zip(overlap, overlap.argmax(1)):
        hits.append(row[best] >= iou and best not in taken)
        if hits[-1]:
            taken.add(best)
    true_positives = np.cumsum(hits)
    precision = true_positives / np.arange(1, len(hits) + 1)
    # the best precision at this recall or a higher one
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * hits).sum() / len(reference))  # recall rises by 1 / N at each hit


def match_statistics(predicted: Boxes, reference: Boxes) -> list[float]:
    """[summed IoU, pairs] of the matching that `soft_f1` uses, pairs that don't overlap left
    out.
    """
    overlaps = match(predicted, reference) if len(predicted) and len(reference) else np.zeros(0)
    return [float(overlaps.sum()), len(overlaps)]


def matched_iou(statistics: np.ndarray) -> np.ndarray:
    """Mean IoU of the matched pairs of summed `match_statistics`, [..., 2] -> [...]. Range 0..1; 0
    without a pair. It says how well the found boxes fit, and nothing about those that were missed.
    """
    return statistics[..., 0] / np.maximum(statistics[..., 1], 1)


def detection_statistics(predicted: Boxes, reference: Boxes) -> list[int]:
    """What COCO's AP needs of one item: [references, then for each predicted box 1 and its hits at
    ten thresholds].

    COCO's matching, for each threshold on its own: in text order each box takes the free reference
    that it overlaps most, if by the threshold at least. Rows differ in length; zeros at the end
    change nothing.
    """
    overlap = iou_matrix(predicted[:MOST], reference)
    hits = np.zeros((len(overlap), len(THRESHOLDS)), dtype=int)
    for k, threshold in enumerate(THRESHOLDS) if len(reference) else ():
        free = overlap.copy()
        for box, row in enumerate(free):
            best = len(row) - 1 - row[::-1].argmax()  # the last of equals, as pycocotools has it
            if row[best] >= threshold:
                hits[box, k] = 1
                free[:, best] = -1.0
    return [len(reference), *np.insert(hits, 0, 1, axis=1).ravel().tolist()]


def coco_average_precision(statistics: np.ndarray) -> np.ndarray:
    """AP at each of the ten thresholds over a whole set, of summed `detection_statistics`: [..., 1
    + 11 R] -> [..., 10].

    All samples form one pool, a box of a sample without references counts against it, and precision
    is read at 101 recalls. Written boxes have no confidence: the first of each answer comes before
    all second ones, and boxes of one rank enter together, so that the order of the samples doesn't
    matter (pycocotools breaks such ties by it). Range 0..1; 0 without references. Source: Lin et
    al. 2014 (arXiv 1405.0312); equals pycocotools where no two boxes tie.
    """
    sums = np.asarray(statistics, dtype=float)
    references = np.maximum(sums[..., :1, None], 1)  # [..., 1, 1]
    width = 1 + len(THRESHOLDS)
    # [..., R, 11]
    ranks = sums[..., 1:].reshape(*sums.shape[:-1], sums.shape[-1] // width, width).cumsum(-2)
    precision = ranks[..., 1:] / np.maximum(ranks[..., :1], 1)
    envelope = np.maximum.accumulate(precision[..., ::-1, :], axis=-2)[..., ::-1, :]
    # recalls up to this rank's
    reached = np.searchsorted(RECALLS, ranks[..., 1:] / references, side="right")
    return (np.diff(reached, axis=-2, prepend=0) * envelope).sum(-2) / len(RECALLS)


def ap50(statistics: np.ndarray) -> np.ndarray:
    """`coco_average_precision` at IoU 0.5, [...]."""
    return coco_average_precision(statistics)[..., 0]


def ap(statistics: np.ndarray) -> np.ndarray:
    """`coco_average_precision`, mean of IoU 0.5, 0.55, ... 0.95: COCO's headline figure, [...]."""
    return coco_average_precision(statistics).mean(-1)
