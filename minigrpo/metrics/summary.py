"""From items to figures: means and corpus metrics with intervals, by task, finding and source, and
paired differences.
"""

import numpy as np

from ..data.sample import Sample
from .bootstrap import interval, paired
from .clinical import Clinical, condition_f1, conditions
from .drawn import DRAWN, by_finding
from .items import CORPUS, score_items

FEWEST = 10  # items of a finding or source that get a row of their own


def evaluate_answers(
    samples: list[Sample],
    answers: list[str],
    *,
    template_opens_think: bool = False,
    box_scale: float = 1.0,
    clinical: Clinical | None = None,
    cut_off: list[bool] | None = None,
) -> dict:
    """{task: {"n", metric: {"mean", "low", "high", "n"}}, "items": [`score_item` of each, in
    order]}.

    "items" is what `compare` and `breakdown` take; its "bleu4" is a row of statistics, since BLEU
    belongs to the corpus.
    """
    if len(samples) != len(answers) or not samples:
        raise ValueError(
            f"{len(answers)} answers for {len(samples)} samples: give one answer for each, at"
            " least one"
        )
    items = score_items(
        samples,
        answers,
        template_opens_think=template_opens_think,
        box_scale=box_scale,
        clinical=clinical,
        cut_off=cut_off,
    )
    tasks = dict.fromkeys(item["task"] for item in items)
    return {task: summarise([item for item in items if item["task"] == task]) for task in tasks} | {
        "items": items
    }


def scored_keys(items: list[dict]) -> list[str]:
    """The keys that hold scores, in order; an item may lack one (thinking not asked for, a scorer
    that failed).
    """
    return [
        key
        for key in dict.fromkeys(key for item in items for key in item)
        if key not in ("id", "task")
    ]


def summarise(items: list[dict]) -> dict:
    """{"n", metric: interval} over the items; a metric's own "n" counts the items that have it."""
    result: dict = {"n": len(items)}
    for key in scored_keys(items):
        values = [item[key] for item in items if key in item]
        result |= {
            name: interval(values, score) for name, score in CORPUS.get(key, {key: None}).items()
        }
    return result


def breakdown(samples: list[Sample], items: list[dict]) -> dict:
    """{task: {"kind" | "label" | "source": {value: `summarise`}, "finding": {condition: {"n",
    "chexbert_f1"}}, "drawn_finding": {label: {"n", "finding_sensitivity", "finding_ppv"}}}}.

    Values with fewer than ten items are left out; "finding" holds CheXbert's conditions of reports,
    its n the references in which the condition is present; "drawn_finding" the findings of drawn
    films.
    """
    results: dict = {}
    for task in dict.fromkeys(item["task"] for item in items):
        results[task] = {}
        for field in ("kind", "label", "source"):
            groups: dict[str, list[dict]] = {}
            for sample, item in zip(samples, items, strict=True):
                if item["task"] == task and getattr(sample, field) is not None:
                    groups.setdefault(getattr(sample, field), []).append(item)
            by_field = {
                value: summarise(groups[value])
                for value in sorted(groups)
                if len(groups[value]) >= FEWEST
            }
            results[task] |= {field: by_field} if by_field else {}
        rows = [item["chexbert"] for item in items if item["task"] == task and "chexbert" in item]
        if rows:
            results[task]["finding"] = condition_intervals(rows)
        rows = [item["drawn"] for item in items if item["task"] == task and "drawn" in item]
        if rows:
            results[task]["drawn_finding"] = drawn_intervals(rows)
    return {task: by_field for task, by_field in results.items() if by_field}


def condition_intervals(rows: list[list[int]]) -> dict:
    """{condition: {"n", "chexbert_f1": interval}} of `chexbert_statistics` rows, [N, 42]."""
    names, counts = conditions(), np.array(rows)
    hit, missed = counts[:, : len(names)], counts[:, 2 * len(names) :]
    return {
        name: {
            "n": int((hit + missed)[:, c].sum()),
            "chexbert_f1": interval(
                counts[:, c :: len(names)], lambda sums: condition_f1(sums)[..., 0]
            ),
        }
        for c, name in enumerate(names)
    }


def drawn_intervals(rows: list[list[int]]) -> dict:
    """{label: {"n", "finding_sensitivity": interval, "finding_ppv": interval}} of
    `finding_statistics` rows; n counts the findings of that label that were drawn.
    """
    return {
        label: {"n": int(counts[:, 0::3].sum() + counts[:, 1::3].sum())}
        | {name: interval(counts.tolist(), score) for name, score in DRAWN.items()}
        for label, counts in by_finding(rows).items()
    }


def compare(items_a: list[dict], items_b: list[dict]) -> dict:
    """{task: {metric: {"difference", "low", "high", "p", "n"}}} of a minus b, items paired by id in
    any order; for each metric the items count to which both sides give it.
    """
    by_id = {item["id"]: item for item in items_b}
    missing = {
        "b": sorted({item["id"] for item in items_a} - set(by_id)),
        "a": sorted(set(by_id) - {item["id"] for item in items_a}),
    }
    for side, ids in missing.items():
        if ids:
            raise ValueError(
                f"{len(ids)} items are missing from {side}: {', '.join(ids[:10])}"
                f"{', ...' if len(ids) > 10 else ''}: evaluate both models on the same file"
            )
    if len(items_a) != len(items_b) or len(by_id) != len(items_b):
        raise ValueError("an id appears twice among the items: evaluate each sample once")
    results: dict = {}
    for task in dict.fromkeys(item["task"] for item in items_a):
        pairs = [(item, by_id[item["id"]]) for item in items_a if item["task"] == task]
        results[task] = {}
        for key in scored_keys([item for item, _ in pairs]):
            both = [(a[key], b[key]) for a, b in pairs if key in a and key in b]
            for name, score in CORPUS.get(key, {key: None}).items() if both else ():
                results[task][name] = paired(*map(list, zip(*both)), score)
    return results
