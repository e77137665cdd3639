"""The scores of one answer. Some are values; some are statistics whose sum over items gives a
metric of the corpus.
"""

from ..data.boxes import parse_boxes, split_thinking
from ..data.sample import Sample
from ..data.thinking import asks_to_think
from ..rewards import gleu, soft_f1
from .cider import cider_d
from .clinical import CHEXBERT, Clinical
from .drawn import DRAWN, drawn_scores
from .grounding import (
    ap,
    ap50,
    average_precision,
    detection_statistics,
    match_statistics,
    matched_iou,
)
from .text import bleu4, bleu_statistics, rouge

# Metrics of summed statistics, by the key of an item that holds them; all other keys are values,
# and metrics their means.
CORPUS = {
    "bleu4": {"bleu4": bleu4},
    "matched_iou": {"matched_iou": matched_iou},
    "detections": {"ap50": ap50, "ap": ap},
    "chexbert": CHEXBERT,
    "drawn": DRAWN,
}


def score_item(
    sample: Sample, answer: str, *, template_opens_think: bool = False, box_scale: float = 1.0
) -> dict:
    """{"id", "task", metric: value, ...} of one answer as the model wrote it; all but text lengths
    and boxes in 0..1.

    As for the rewards, an answer whose think block is broken counts as empty. Where thinking was
    asked for (`template_opens_think`, or the question ends in /think), "think_format" is 1 for one
    closed block with something in it and after it, and "thinking_length" its words.
    """
    thinking, text, ok = split_thinking(answer, template_opens_think)
    text = text if ok else ""
    item = {"id": sample.id, "task": sample.task, "length": len(text.split())}
    if template_opens_think or asks_to_think(sample.question):
        item |= {
            "think_format": float(bool(thinking and text)),
            "thinking_length": len(thinking.split()),
        }
    if sample.task == "grounding":
        boxes = parse_boxes(text, box_scale)
        item |= {"boxes": len(boxes), "detections": detection_statistics(boxes, sample.boxes)}
        if not sample.boxes:  # there is nothing to find
            return item | {"false_alarm": float(bool(boxes)), "unparseable": float(not text)}
        return item | {
            "soft_f1": soft_f1(boxes, sample.boxes),
            "map50": average_precision(boxes, sample.boxes),
            "matched_iou": match_statistics(boxes, sample.boxes),
            "unparseable": float(not boxes),
        }
    return item | {
        "gleu": gleu(text, sample.answer),
        **rouge(text, sample.answer),
        "bleu4": bleu_statistics(text, sample.answer),
        "characters": len(text),
        "unparseable": float(not text),
        **(drawn_scores(text, sample) if sample.task == "report" else {}),
    }


def score_items(
    samples: list[Sample],
    answers: list[str],
    *,
    template_opens_think: bool = False,
    box_scale: float = 1.0,
    clinical: Clinical | None = None,
    cut_off: list[bool] | None = None,
) -> list[dict]:
    """`score_item` of each, and what needs the whole set: "cider" of each text task, the `clinical`
    scores of reports. `cut_off` says of each answer whether it reached the longest length, where
    that is known.
    """
    items = [
        score_item(sample, answer, template_opens_think=template_opens_think, box_scale=box_scale)
        for sample, answer in zip(samples, answers)
    ]
    for item, cut in zip(items, cut_off or ()):
        item["cut_off"] = float(cut)
    for task in {sample.task for sample in samples} - {"grounding"}:
        rows = [i for i, sample in enumerate(samples) if sample.task == task]
        texts = [
            text if ok else ""
            for _, text, ok in (split_thinking(answers[i], template_opens_think) for i in rows)
        ]
        references = [samples[i].answer for i in rows]
        for i, value in zip(rows, cider_d(texts, references)):
            items[i]["cider"] = value
        if clinical and task == "report":
            for i, scores in zip(rows, clinical.score(texts, references)):
                items[i] |= scores
    return items
