"""The score of a model that never looks at the film: one fixed answer. A trained model must beat
it.
"""

import random

import numpy as np

from ..data.boxes import format_boxes, parse_boxes
from ..data.sample import Sample
from ..rewards import gleu, soft_f1

# keeps it to half a second a label; the best score is known to about 0.02
CANDIDATES, SCORED = 100, 200


def _some(items: list, most: int) -> list:
    return items if len(items) <= most else random.Random(0).sample(items, most)


def _best_boxes(samples: list[Sample]) -> str:
    """The text of the boxes with the highest mean soft F1 over these samples: the median or mean
    box, or one sample's whole set or single box. Compared as written, after rounding.
    """
    every = [box for sample in samples for box in sample.boxes]
    sets = [sample.boxes for sample in _some(samples, CANDIDATES // 2)]
    sets += [[box] for box in _some(every, CANDIDATES // 2)]
    sets += [[np.median(every, axis=0)], [np.mean(every, axis=0)]]
    scored = _some(samples, SCORED)

    def mean_score(text: str) -> float:
        boxes = parse_boxes(text)
        return float(np.mean([soft_f1(boxes, sample.boxes) for sample in scored]))

    return max(dict.fromkeys(map(format_boxes, sets)), key=mean_score)


def _keys(sample: Sample) -> list[tuple[str, str]]:
    """The groups a sample belongs to, the most specific first."""
    keys = [("label", sample.label), ("kind", sample.kind), ("task", sample.task)]
    return [key for key in keys if key[1] is not None]


def constant_boxes(train: list[Sample], test: list[Sample]) -> list[str]:
    """For each test sample the best constant answer for its label in train; for its kind if train
    has no such label (most phrases), and for all grounding if it has no such kind. Boxes are
    written in 0..1. Only the grounding samples of train that have boxes count; all of test must be
    grounding.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in train:
        for key in _keys(sample) if sample.task == "grounding" and sample.boxes else ():
            groups.setdefault(key, []).append(sample)
    if not groups:
        raise ValueError(
            "constant_boxes: train has no grounding samples with boxes: give it a file that has"
            " some"
        )
    if any(sample.task != "grounding" for sample in test):
        raise ValueError("constant_boxes: test has samples that are not grounding: leave them out")
    best: dict[tuple[str, str], str] = {}
    answers = []
    for sample in test:
        key = next(key for key in _keys(sample) if key in groups)
        if key not in best:
            best[key] = _best_boxes(groups[key])
        answers.append(best[key])
    return answers


def constant_report(train: list[Sample], test: list[Sample]) -> list[str]:
    """For every test sample the train report with the highest mean GLEU over train reports, both
    from one seeded draw of at most 200. Samples of train that are not reports are ignored.
    """
    reports = _some([sample.answer for sample in train if sample.task == "report"], SCORED)
    if not reports:
        raise ValueError(
            "constant_report: train has no report samples: give it a file that has some"
        )
    best = max(
        dict.fromkeys(reports), key=lambda report: sum(gleu(report, other) for other in reports)
    )
    return [best] * len(test)


def constant_answers(train: list[Sample], samples: list[Sample]) -> list[str]:
    """For each task that has a constant baseline; samples of other tasks are an error."""
    answers = {}
    for task, choose in (("grounding", constant_boxes), ("report", constant_report)):
        test = [s for s in samples if s.task == task]
        if test:
            answers |= zip((s.id for s in test), choose([s for s in train if s.task == task], test))
    missing = sorted({s.task for s in samples if s.id not in answers})
    if missing:
        raise ValueError(
            f"--model constant has no answer for {', '.join(missing)}: choose --task report or"
            " grounding"
        )
    return [answers[s.id] for s in samples]
