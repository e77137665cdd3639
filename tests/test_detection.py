"""COCO's AP over a whole set against pycocotools; matched IoU; their bootstrap."""

import contextlib
import io

import numpy as np
import pytest

from minigrpo.metrics import (
    coco_average_precision,
    detection_statistics,
    evaluate_answers,
    interval,
    paired,
)
from minigrpo.metrics.grounding import ap, ap50, match_statistics, matched_iou
from tests.test_metrics import HEART, grounding


def boxes(rng, count):
    corners, sizes = rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.05, 0.4, (count, 2))
    return np.concatenate([corners, corners + sizes], 1)


def drawn(rng, images, most=4):
    """(predicted, reference) of each image: some references found with noise, some missed, some
    invented; some images empty.
    """
    found = []
    for _ in range(images):
        reference = boxes(rng, rng.integers(0, most))
        kept = reference[rng.random(len(reference)) < 0.8]
        noisy = np.clip(kept + rng.normal(0, 0.02, kept.shape), 0, 1)
        predicted = rng.permutation(np.concatenate([noisy, boxes(rng, rng.integers(0, 2))]))
        found.append((predicted.tolist(), reference.tolist()))
    return found


def pycoco(items, scores):
    """AP at the ten thresholds, as COCOeval has it; scores[i][j] of box j of image i."""
    coco, evaluation = (
        pytest.importorskip("pycocotools.coco"),
        pytest.importorskip("pycocotools.cocoeval"),
    )

    def xywh(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    truth = [(i, xywh(box)) for i, (_, reference) in enumerate(items) for box in reference]
    dataset = {
        "info": {},
        "images": [{"id": i} for i in range(len(items))],
        "categories": [{"id": 1}],
        "annotations": [
            {
                "id": n,
                "image_id": i,
                "category_id": 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for n, (i, box) in enumerate(truth, 1)
        ],
    }
    results = [
        {"image_id": i, "category_id": 1, "bbox": xywh(box), "score": score}
        for i, (predicted, _) in enumerate(items)
        for box, score in zip(predicted, scores[i])
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO()
        known.dataset = dataset
        known.createIndex()
        run = evaluation.COCOeval(known, known.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][:, :, 0, 0, 2].mean(1)


def summed(rows):
    width = max(map(len, rows))
    return np.sum([row + [0] * (width - len(row)) for row in rows], 0)


@pytest.mark.parametrize("seed", range(5))
def test_ap_equals_pycocotools_where_no_two_boxes_tie(seed):
    """Each image's boxes take ranks of their own, behind those of the images before it."""
    rng = np.random.default_rng(seed)
    items = drawn(rng, 30)
    rows, scores, rank = [], [], 0
    for predicted, reference in items:
        row = detection_statistics(predicted, reference)
        rows.append(row[:1] + [0] * 11 * rank + row[1:])
        scores.append([1000.0 - rank - k for k in range(len(predicted))])
        rank += len(predicted)
    wanted = pycoco(items, scores)
    found = coco_average_precision(summed(rows))
    np.testing.assert_allclose(found, wanted, atol=1e-9, rtol=0)
    assert 0.2 < wanted[0] < 1 and wanted[9] < wanted[0]
    assert (ap50(summed(rows)), ap(summed(rows))) == pytest.approx((wanted[0], wanted.mean()))


def test_tied_boxes_enter_together():
    """pycocotools breaks ties by the order of the images; ours doesn't depend on it, and lies where
    theirs scatter.
    """
    rng = np.random.default_rng(9)
    items = drawn(rng, 600)
    theirs = []
    for _ in range(5):
        items = [items[i] for i in rng.permutation(len(items))]
        theirs.append(
            pycoco(items, [[10.0 - k for k in range(len(predicted))] for predicted, _ in items])
        )
    ours = coco_average_precision(summed([detection_statistics(*item) for item in items]))
    assert np.ptp([t[0] for t in theirs]) > 0
    np.testing.assert_allclose(ours, np.mean(theirs, 0), atol=0.02)
    shuffled = [items[i] for i in rng.permutation(len(items))]
    assert (
        coco_average_precision(summed([detection_statistics(*item) for item in shuffled])) == ours
    ).all()


def test_ap_known_values():
    far = [0.0, 0.0, 0.1, 0.1]

    def value(*items):
        return float(ap50(summed([detection_statistics(*item) for item in items])))

    assert value(([HEART], [HEART])) == pytest.approx(1)
    assert value(([], [HEART])) == value(([HEART], [])) == value(([], [])) == 0
    # a box on a film without any costs, unlike in map50
    assert value(([HEART], [HEART]), ([far], [])) == pytest.approx(0.5)
    # after the last hit: it is ranked behind
    assert value(([HEART, far], [HEART])) == pytest.approx(1)
    assert value(([HEART, HEART], [HEART, far])) == pytest.approx(51 / 101)
    assert value(([[0.9, 0.9, 0.1, 0.1], [-1, 0, 5, 9]], [HEART])) == 0
    # COCO's 100 detections
    assert len(detection_statistics([HEART] * 250, [HEART])) == 1 + 11 * 100


def test_the_free_box_is_taken_where_the_authors_form_gives_up():
    """The paper's AP gives each box its best reference, taken or not; COCO's gives it the best free
    one.
    """
    left, right = [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.42]
    items = evaluate_answers(
        [grounding(0, left, right)], ["[0.1, 0.1, 0.5, 0.5] [0.1, 0.1, 0.5, 0.48]"]
    )["items"]
    assert items[0]["map50"] == 0.5 and float(
        ap50(np.array(items[0]["detections"]))
    ) == pytest.approx(1)


def test_ap_interval_equals_a_loop_over_resampled_items():
    rng = np.random.default_rng(3)
    rows = [detection_statistics(*item) for item in drawn(rng, 25)]
    picks = np.random.default_rng(0).integers(0, 25, (2000, 25))
    values = [float(ap(summed([rows[i] for i in pick]))) for pick in picks]
    found = interval(rows, ap)
    assert (found["low"], found["high"]) == pytest.approx(
        tuple(np.quantile(values, [0.025, 0.975]))
    )
    assert found["mean"] == pytest.approx(float(ap(summed(rows))))


def test_paired_takes_rows_of_two_widths():
    a = [detection_statistics([HEART] * k, [HEART]) for k in (1, 1, 1, 1)]
    b = [detection_statistics([HEART] * k, [HEART]) for k in (0, 3, 0, 2)]
    found = paired(a, b, ap50)
    assert found["difference"] == pytest.approx(1 - 51 / 101) and found["n"] == 4


def test_matched_iou_is_of_pairs_and_not_of_samples():
    far, half = [0.0, 0.0, 0.1, 0.1], [0.3, 0.4, 0.7, 0.6]
    rows = [
        match_statistics([HEART, far], [HEART, far]),
        match_statistics([half], [HEART]),
        match_statistics([], [HEART]),
        match_statistics([far], [HEART]),
    ]
    assert rows == [[2.0, 2], [pytest.approx(0.5), 1], [0, 0], [0, 0]]
    assert matched_iou(np.sum(rows, 0)) == pytest.approx(2.5 / 3)
    assert matched_iou(np.zeros(2)) == 0
