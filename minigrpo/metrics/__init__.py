"""What evaluate.py reports: metrics of answers with bootstrap intervals, and differences between two models."""

from ..data.boxes import parse_boxes, split_thinking
from ..data.sample import Sample
from ..rewards import gleu, soft_f1
from .bootstrap import interval, paired
from .constant import constant_boxes, constant_report
from .grounding import average_precision
from .text import bleu4, bleu_statistics, rouge_l

__all__ = ["average_precision", "bleu4", "bleu_statistics", "compare", "constant_boxes", "constant_report",
           "evaluate_answers", "interval", "paired", "rouge_l"]

CORPUS = {"bleu4": bleu4}  # metrics of summed statistics; all others are means over items


def score_item(sample: Sample, answer: str, *, opened: bool = False, box_scale: float = 1.0) -> dict:
    """{"id", "task", metric: value, ...} of one answer as the model wrote it; all but text lengths and boxes in 0..1.

    As for the rewards, an answer whose think block is broken counts as empty.
    """
    _, text, ok = split_thinking(answer, opened)
    text = text if ok else ""
    item = {"id": sample.id, "task": sample.task, "length": len(text.split())}
    if sample.task == "grounding":
        boxes = parse_boxes(text, box_scale)
        return item | {"soft_f1": soft_f1(boxes, sample.boxes), "map50": average_precision(boxes, sample.boxes),
                       "boxes": len(boxes), "unparseable": float(not boxes)}
    return item | {"gleu": gleu(text, sample.answer), "rouge_l": rouge_l(text, sample.answer),
                   "bleu4": bleu_statistics(text, sample.answer), "characters": len(text),
                   "unparseable": float(not text)}


def evaluate_answers(
    samples: list[Sample], answers: list[str], *, opened: bool = False, box_scale: float = 1.0
) -> dict:
    """{task: {"n", metric: {"mean", "low", "high", "n"}}, "items": [`score_item` of each, in order]}.

    "items" is what `compare` takes; its "bleu4" is a row of statistics, since BLEU belongs to the corpus.
    """
    if len(samples) != len(answers) or not samples:
        raise ValueError(f"{len(answers)} answers for {len(samples)} samples: give one answer for each, at least one")
    items = [score_item(sample, answer, opened=opened, box_scale=box_scale) for sample, answer in zip(samples, answers)]
    results: dict = {}
    for task in dict.fromkeys(item["task"] for item in items):
        chosen = [item for item in items if item["task"] == task]
        metrics = [name for name in chosen[0] if name not in ("id", "task")]
        results[task] = {"n": len(chosen)}
        results[task] |= {name: interval([item[name] for item in chosen], CORPUS.get(name)) for name in metrics}
    return results | {"items": items}


def compare(items_a: list[dict], items_b: list[dict]) -> dict:
    """{task: {metric: {"difference", "low", "high", "p", "n"}}} of a minus b, items paired by id in any order."""
    by_id = {item["id"]: item for item in items_b}
    missing = {"b": sorted({item["id"] for item in items_a} - set(by_id)),
               "a": sorted(set(by_id) - {item["id"] for item in items_a})}
    for side, ids in missing.items():
        if ids:
            raise ValueError(f"{len(ids)} items are missing from {side}: {', '.join(ids[:10])}"
                             f"{', ...' if len(ids) > 10 else ''}: evaluate both models on the same file")
    if len(items_a) != len(items_b) or len(by_id) != len(items_b):
        raise ValueError("an id stands twice among the items: evaluate each sample once")
    results: dict = {}
    for task in dict.fromkeys(item["task"] for item in items_a):
        chosen = [item for item in items_a if item["task"] == task]
        others = [by_id[item["id"]] for item in chosen]
        results[task] = {
            name: paired([item[name] for item in chosen], [item[name] for item in others], CORPUS.get(name))
            for name in chosen[0] if name not in ("id", "task")
        }
    return results
