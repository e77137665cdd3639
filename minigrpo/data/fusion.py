"""Fuses the boxes of several readers: weighted boxes fusion (Solovyev, Wang, Gabruseva, 1910.13302)
with equal scores.
"""

Box = list[float]


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0..1; 0 for boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def fuse_boxes(boxes: list[Box], threshold: float = 0.1) -> tuple[list[Box], list[list[int]]]:
    """Boxes of one label, in the readers' order -> (fused boxes, the indices that each is the mean
    of).

    Section 2 of the paper, with all scores 1: a box joins the fused box that it overlaps most, if
    by more than `threshold`, which becomes the mean of its members; else it starts one. The order
    matters where boxes chain.
    """
    fused: list[Box] = []
    members: list[list[int]] = []
    for index, box in enumerate(boxes):
        overlaps = [iou(other, box) for other in fused]
        best = max(range(len(fused)), key=overlaps.__getitem__, default=None)
        if best is None or overlaps[best] <= threshold:
            fused.append(list(box))
            members.append([index])
        else:
            members[best].append(index)
            fused[best] = [
                sum(boxes[k][side] for k in members[best]) / len(members[best]) for side in range(4)
            ]
    return fused, members
