"""Metrics against slow oracles and the reference libraries; bootstrap against loops and known
laws.
"""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge_score.rouge_scorer import RougeScorer

from minigrpo.data import Sample
from minigrpo.metrics import (
    average_precision,
    bleu4,
    bleu_statistics,
    bootstrap,
    compare,
    constant_boxes,
    constant_report,
    evaluate_answers,
    interval,
    paired,
    rouge_l,
)
from minigrpo.rewards import reward_fn, soft_f1

HEART = [0.3, 0.4, 0.7, 0.8]
WORDS = ["no", "pleural", "effusions", "effusion", "is", "seen.", "The"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
coordinate = st.integers(0, 10).map(lambda value: value / 10)
boxes = st.lists(st.tuples(*[coordinate] * 4), max_size=5)


def report(id, answer):
    return Sample(str(id), None, "report", "Report.", answer)


def grounding(id, *reference, **other):
    return Sample(
        str(id), None, "grounding", "Where?", "", boxes=[list(box) for box in reference], **other
    )


@given(st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_bleu4_of_summed_statistics_equals_nltk(pairs):
    predictions, references = zip(*[(p.split(), [r.split()]) for p, r in pairs])
    wanted = corpus_bleu(references, predictions, smoothing_function=SmoothingFunction().method1)
    assert abs(bleu4(np.sum([bleu_statistics(*pair) for pair in pairs], 0)) - wanted) < 1e-12


def test_rouge_l():
    assert rouge_l("No pleural effusions.", "no pleural effusion") == 1  # lower case, stemmed
    assert rouge_l("", "no effusion") == rouge_l("no", "") == 0
    wanted = RougeScorer(["rougeL"], use_stemmer=True).score("a b c d", "a c x")["rougeL"].fmeasure
    assert rouge_l("a c x", "a b c d") == wanted == pytest.approx(4 / 7)


def slow_average_precision(predicted, reference, threshold=0.5):
    """The published definition step by step: mark hits, then integrate the envelope over every rise
    of recall.
    """

    def iou(a, b):
        for box in (a, b):
            if not (box[0] < box[2] and box[1] < box[3]):
                return 0
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inner = max(w, 0) * max(h, 0)
        return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)

    if not reference:
        return 0
    taken, points, hits = set(), [(0.0, 0.0)], 0
    for count, box in enumerate(predicted, 1):
        overlaps = [iou(box, other) for other in reference]
        best = overlaps.index(max(overlaps))
        if overlaps[best] >= threshold and best not in taken:
            taken.add(best)
            hits += 1
        points.append((hits / len(reference), hits / count))
    area = 0.0
    for (before, _), (after, _) in zip(points, points[1:]):
        if after > before:
            area += (after - before) * max(
                precision for recall, precision in points if recall >= after
            )
    return area


@given(boxes, boxes.map(lambda bs: [b for b in bs if b[0] < b[2] and b[1] < b[3]]))
@settings(max_examples=120, deadline=None)
def test_average_precision_equals_the_slow_definition(predicted, reference):
    assert average_precision(predicted, reference) == pytest.approx(
        slow_average_precision(predicted, reference)
    )


def test_average_precision_known_values():
    far = [0.0, 0.0, 0.1, 0.1]
    assert average_precision([HEART], [HEART]) == 1
    # junk after the last hit is free: text order matters
    assert average_precision([HEART, far], [HEART]) == 1
    assert average_precision([far, HEART], [HEART]) == 0.5
    assert average_precision([HEART, HEART], [HEART, far]) == 0.5  # the second finds its box taken
    assert average_precision([], [HEART]) == average_precision([HEART], []) == 0


def test_interval_equals_a_loop(monkeypatch):
    values = np.random.default_rng(1).normal(size=37)
    random_ = np.random.default_rng(0)
    means = [np.mean([values[i] for i in random_.integers(0, 37, 37)]) for _ in range(2000)]
    expected = {
        "mean": values.mean(),
        "low": np.quantile(means, 0.025),
        "high": np.quantile(means, 0.975),
        "n": 37,
    }
    assert interval(values) == pytest.approx(expected)
    monkeypatch.setattr(bootstrap, "BLOCK", 100)  # the blocks only bound memory
    assert interval(values) == pytest.approx(expected)


def test_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(2).normal(size=2000)
    found = interval(values)
    assert found["high"] - found["low"] == pytest.approx(
        2 * 1.96 * values.std() / 2000**0.5, rel=0.06
    )
    assert interval([0.25]) == {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 1}


def test_corpus_interval_resamples_items():
    pairs = [
        ("no pleural effusion is seen", "no pleural effusion is seen"),
        ("no", "The heart"),
        ("x y", "x z"),
    ]
    statistics = np.array([bleu_statistics(*pair) for pair in pairs])
    drawn = np.random.default_rng(0).integers(0, 3, (2000, 3))
    scores = [bleu4(sum(statistics[i] for i in row)) for row in drawn]
    found = interval(statistics, bleu4)
    assert found["mean"] == pytest.approx(float(bleu4(statistics.sum(0))))
    assert (found["low"], found["high"]) == pytest.approx(
        tuple(np.quantile(scores, [0.025, 0.975]))
    )


def test_paired_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(3)
    hardness = rng.normal(size=200)
    a, b = hardness + 0.1 + 0.05 * rng.normal(size=200), hardness
    found = paired(a, b)
    assert (
        found["difference"] == pytest.approx(np.mean(a - b))
        and found["low"] > 0
        and found["p"] < 0.01
    )
    assert interval(a)["low"] < interval(b)["high"]  # apart from the pairing they overlap
    swapped = paired(b, a)
    assert (swapped["low"], swapped["high"], swapped["p"]) == pytest.approx(
        (-found["high"], -found["low"], found["p"])
    )
    assert paired(a, a) == {"difference": 0, "low": 0, "high": 0, "p": 1, "n": 200}


def test_p_value_is_uniform_without_a_difference():
    rng = np.random.default_rng(4)
    p = [paired(rng.normal(size=60), rng.normal(size=60))["p"] for _ in range(120)]
    assert 0.01 <= np.mean(np.less(p, 0.1)) <= 0.2 and min(p) >= 2 / 2001


def test_bootstrap_refuses_what_it_cannot_resample():
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="at least one item, all of them finite: leave out"):
            interval(values)
    with pytest.raises(ValueError, match="2 and 1 items: give both the same items"):
        paired([1.0, 2.0], [1.0])


def test_evaluate_answers():
    samples = [
        report(0, "no pleural effusion"),
        grounding(1, HEART),
        report(2, "heart is large"),
        grounding(3, HEART),
    ]
    answers = [
        "<think>hm</think> no pleural effusion",
        "[0.3, 0.4, 0.7, 0.8]",
        "<think> heart is large",
        "somewhere",
    ]
    results = json.loads(json.dumps(evaluate_answers(samples, answers)))
    assert list(results) == ["report", "grounding", "items"]
    text, box = results["report"], results["grounding"]

    def mean(figures):
        return {
            name: value["mean"]
            for name, value in figures.items()
            if name not in ("n", "bleu4", "cider")
        }

    assert mean(text) == {
        "length": 1.5,
        "gleu": 0.5,
        "rouge_1": 0.5,
        "rouge_2": 0.5,
        "rouge_l": 0.5,
        "characters": 9.5,
        "unparseable": 0.5,
    }
    assert mean(box) == {
        "length": 2.5,
        "soft_f1": 0.5,
        "map50": 0.5,
        "ap50": pytest.approx(51 / 101),
        "ap": pytest.approx(51 / 101),
        "matched_iou": 1,
        "boxes": 0.5,
        "unparseable": 0.5,
    }
    assert text["cider"]["mean"] == pytest.approx(10 * 3 / 4 / 2)  # three words hold no 4-gram
    assert text["n"] == box["n"] == 2 and set(text["gleu"]) == {"mean", "low", "high", "n"}
    assert [item["id"] for item in results["items"]] == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="1 answers for 4 samples: give one answer for each"):
        evaluate_answers(samples, ["a"])


def test_false_alarms_where_there_is_nothing_to_find():
    """Such samples count among false alarms and in COCO's AP, and in no metric of overlap."""
    samples = [grounding(0, HEART), grounding(1), grounding(2), grounding(3)]
    box = "[0.3, 0.4, 0.7, 0.8]"
    found = evaluate_answers(samples, [box, "There is none.", box, ""])["grounding"]
    assert {name: (found[name]["mean"], found[name]["n"]) for name in found if name != "n"} == {
        "length": (pytest.approx((4 + 3 + 4) / 4), 4),
        "boxes": (0.5, 4),
        "soft_f1": (1, 1),
        "map50": (1, 1),
        "matched_iou": (1, 1),
        "ap50": (pytest.approx(0.5), 4),
        "ap": (pytest.approx(0.5), 4),
        "false_alarm": (pytest.approx(1 / 3), 3),
        "unparseable": (0.25, 4),
    }
    train = [grounding("t", HEART, label="nodule"), grounding("u", label="nodule")]
    assert constant_boxes(train, [grounding("v", label="nodule")]) == ["[0.30, 0.40, 0.70, 0.80]"]


@pytest.mark.parametrize(
    "answer, good",
    [
        ("<think>a</think> b", 1),
        ("b", 0),
        ("<think></think> b", 0),
        ("<think>a</think>", 0),
        ("<think>a", 0),
        ("x <think>a</think> b", 0),
        ("<think>a</think><think>b</think> c", 0),
    ],
)
def test_think_format(answer, good):
    """It counts where thinking was asked for, and an answer that never thinks does not have the
    format.
    """
    samples = [report(0, "b"), report(1, "b")]
    samples[0].question += " /think"
    results = evaluate_answers(samples, [answer, "b"])
    assert results["items"][0]["think_format"] == good and "think_format" not in results["items"][1]
    assert (
        results["report"]["think_format"]["mean"] == good
        and results["report"]["think_format"]["n"] == 1
    )
    template_opens_think = evaluate_answers(
        samples, [answer.removeprefix("<think>")] * 2, template_opens_think=True
    )["items"]
    assert template_opens_think[1]["think_format"] == (good if answer.startswith("<think>") else 0)


TRICKY = [
    "[0.3, 0.4, 0.7, 0.8]",
    "[.3,.4,\n7e-1,0.8]",
    "[0.3 0.4 0.7 0.8]",
    "<think>[0.3, 0.4, 0.7, 0.8]",
    "[0.7, 0.8, 0.3, 0.4]",
    "</think>[0.3, 0.4, 0.7, 0.8]",
    "</think>[300, 4e2, 700, 800]</think>",
    "",
    "[[0.3, 0.4, 0.7, 0.8]]",
    "[300, 400, 700, 800]",
    "x</think>[300, 4e2, 700, 800]",
    "<think></think>[0, 0, 1, 1]",
]


@pytest.mark.parametrize("template_opens_think", [False, True])
@pytest.mark.parametrize("scale", [1, 1000])
def test_reward_and_metric_share_the_parser(template_opens_think, scale):
    """The authors' reward and metric read boxes with two patterns and `</think>` from two ends."""
    samples = [grounding(i, HEART) for i in range(len(TRICKY))]
    rewards = reward_fn("soft_f1", template_opens_think=template_opens_think, box_scale=scale)(
        TRICKY, samples
    ).values
    items = evaluate_answers(
        samples, TRICKY, template_opens_think=template_opens_think, box_scale=scale
    )["items"]
    assert [item["soft_f1"] for item in items] == rewards
    assert 0 < sum(reward > 0 for reward in rewards) < len(rewards)


def test_compare_pairs_by_id():
    rng = random.Random(0)
    samples = [report(i, " ".join(rng.choices(WORDS, k=8))) for i in range(30)] + [
        grounding("g", HEART)
    ]
    good = [sample.answer or "[0.3, 0.4, 0.7, 0.8]" for sample in samples]
    bad = [" ".join(rng.choices(WORDS, k=8)) for _ in samples]
    a, b = evaluate_answers(samples, good), evaluate_answers(samples, bad)
    found = compare(a["items"], b["items"][::-1])
    for name in ("gleu", "rouge_l", "bleu4"):
        expected = a["report"][name]["mean"] - b["report"][name]["mean"]
        assert found["report"][name]["difference"] == pytest.approx(expected)
        assert found["report"][name]["low"] > 0 and found["report"][name]["p"] < 0.01
    assert found["grounding"]["soft_f1"]["difference"] == 1
    with pytest.raises(
        ValueError, match="1 items are missing from b: g: evaluate both models on the same file"
    ):
        compare(a["items"], b["items"][:-1])
    with pytest.raises(ValueError, match="1 items are missing from a: g"):
        compare(a["items"][:-1], b["items"])
    with pytest.raises(ValueError, match="appears twice"):
        compare(a["items"] + a["items"][:1], b["items"])


def test_constant_boxes_per_label_kind_and_overall():
    rng = np.random.default_rng(0)
    lungs = [[0.1, 0.2, 0.45, 0.8], [0.55, 0.2, 0.9, 0.8]]

    def jitter(box):
        return (np.array(box) + rng.uniform(-0.02, 0.02, 4)).tolist()

    train = [grounding(i, jitter(HEART), label="heart", kind="anatomy") for i in range(40)]
    train += [grounding(i, *map(jitter, lungs), label="lungs", kind="anatomy") for i in range(20)]
    train += [grounding(i, [0, 0, 0.1, 0.1], label=f"phrase {i}", kind="phrase") for i in range(5)]
    train += [report("r", "not grounding")]
    test = [
        grounding("a", HEART, label="heart", kind="anatomy"),
        grounding("b", *lungs, label="lungs", kind="anatomy"),
        grounding("c", [0, 0, 0.1, 0.1], label="new", kind="phrase"),
        grounding("d", HEART, kind="anatomy"),
        grounding("e", HEART),
    ]
    answers = constant_boxes(train, test)
    scores = [item["soft_f1"] for item in evaluate_answers(test, answers)["items"]]
    # one or both lungs and the heart compete for the kind's constant
    assert min(scores[:3]) > 0.9 and scores[3] > 0.3
    assert answers == constant_boxes(train, test)
    with pytest.raises(ValueError, match="no grounding samples with boxes: give it a file"):
        constant_boxes([report("r", "x")], test)
    with pytest.raises(ValueError, match="not grounding: leave them out"):
        constant_boxes(train, [report("r", "x")])


def test_constant_boxes_beats_every_single_candidate():
    rng = np.random.default_rng(1)
    corners, sizes = rng.uniform(0, 0.4, (60, 2)), rng.uniform(0.2, 0.5, (60, 2))
    train = [
        grounding(i, [*corner, *(corner + size)])
        for i, (corner, size) in enumerate(zip(corners, sizes))
    ]
    best = evaluate_answers(train, constant_boxes(train, train))["grounding"]["soft_f1"]["mean"]
    others = [
        np.mean([soft_f1(np.round(other.boxes, 2), s.boxes) for s in train]) for other in train
    ]
    assert best >= max(others) - 1e-12


def test_constant_report_is_the_most_typical_one():
    typical = "no pleural effusion is seen"
    train = [
        report(1, "a large mass"),
        report(2, typical),
        report(3, typical),
        grounding("g", HEART),
    ]
    assert constant_report(train, [report("t", "x")] * 2) == [typical] * 2
    with pytest.raises(ValueError, match="no report samples: give it a file"):
        constant_report([grounding("g", HEART)], train)
