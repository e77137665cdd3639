"""Detection quality of predicted boxes."""

import numpy as np

from ..rewards.grounding import Boxes, iou_matrix


def average_precision(predicted: Boxes, reference: Boxes, iou: float = 0.5) -> float:
    """Average precision of one sample without confidences; the mean over samples is the paper's "mAP@0.5".

    Predictions count in text order. Each takes the reference it overlaps most; it is a false positive if that overlap
    is below `iou` or that reference is taken. The area under the precision envelope over recall, range 0..1; 0 without
    predicted or reference boxes.
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
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
    return float((envelope * hits).sum() / len(reference))  # recall rises by 1 / N at each hit
