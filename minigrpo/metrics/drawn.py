"""Judges a report of a drawn film by what was drawn: findings named, missed, invented.

The reference report is one way to say it; the drawing is the ground truth. Nothing here needs a
network: phantom reports use few words.
"""

import re

import numpy as np

from ..data.sample import Sample
from ..rewards.phantom_entities import DENIALS, entity_f1

# The words that name a finding. Sides and zones are read around them.
NAMES = {
    "cardiomegaly": r"cardiomegaly|enlarged",
    "consolidation": r"consolidation",
    "nodule": r"nodules?",
    "atelectasis": r"atelectasis",
    "pleural effusion": r"effusions?",
    "pneumothorax": r"pneumothorax",
    "pacemaker": r"pacemaker",
    "endotracheal tube": r"endotracheal tube",
    "nasogastric tube": r"nasogastric tube",
}
SIDELESS = ("cardiomegaly", "endotracheal tube", "nasogastric tube")
LABELS = tuple(NAMES)
_NAME = re.compile(
    "|".join(rf"(?P<{label.replace(' ', '_')}>\b(?:{word})\b)" for label, word in NAMES.items())
)
_SIDE = re.compile(r"\b(?:left|right|bilateral)\b")

Finding = tuple[str, str | None]  # label and side


def named_findings(text: str) -> set[Finding]:
    """(label, side) of each finding that a phantom report states and does not deny; side is None
    for the heart and the tubes, and for a sided finding named without a side. A denial extends to
    the end of its sentence.
    """
    return {finding for sentence in text.lower().split(".") for finding in _stated(sentence)}


def _stated(sentence: str) -> set[Finding]:
    denial = re.search(rf"\b(?:{'|'.join(sorted(DENIALS))})\b", sentence)
    sentence = sentence[: denial.start()] if denial else sentence
    names = list(_NAME.finditer(sentence))
    stated: set[Finding] = set()
    for k, name in enumerate(names):
        label = name.lastgroup.replace("_", " ")
        if label in SIDELESS:
            stated.add((label, None))
            continue
        start = names[k - 1].end() if k else 0
        end = names[k + 1].start() if k + 1 < len(names) else len(sentence)
        # "a left effusion", else "a nodule in the left upper zone": a side right before the name
        # is its own, all words between belonging to the phrase
        before = re.search(
            r"\b(left|right|bilateral) (?:pleural )?$", sentence[start : name.start()]
        )
        after = _SIDE.search(sentence[name.end() : end])
        side = before[1] if before else after[0] if after else None
        sides = ("left", "right") if side == "bilateral" else (side,)
        stated |= {(label, one) for one in sides}
    return stated


def drawn_findings(sample: Sample) -> set[Finding] | None:
    """(label, side) of each finding that was drawn on the sample's film; None if the sample is not
    a report of a phantom.
    """
    if sample.source != "phantom" or not isinstance(sample.findings, list):
        return None
    return {(f["label"], None if f["label"] in SIDELESS else f["side"]) for f in sample.findings}


def drawn_scores(text: str, sample: Sample) -> dict:
    """Scores of one report of a drawn film; {} for any other sample. "entity_f1", "_partial",
    "_simple": RadGraph's F1 of entities against the reference report, 0..1. "findings_named",
    "findings_missed", "findings_invented": counts, against the drawing. "drawn": the row of
    `finding_statistics`.
    """
    truth = drawn_findings(sample)
    if truth is None:
        return {}
    f1, stated = entity_f1(text, sample.answer), named_findings(text)
    return {
        "entity_f1": f1["complete"],
        "entity_f1_partial": f1["partial"],
        "entity_f1_simple": f1["simple"],
        "findings_named": len(stated & truth),
        "findings_missed": len(truth - stated),
        "findings_invented": len(stated - truth),
        "drawn": finding_statistics(stated, truth),
    }


def finding_statistics(stated: set[Finding], truth: set[Finding]) -> list[int]:
    """[named, missed, invented] for each of `LABELS`, one after another."""
    return [
        sum(finding[0] == label for finding in part)
        for label in LABELS
        for part in (stated & truth, truth - stated, stated - truth)
    ]


def _totals(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], len(LABELS), 3).sum(-2)


def sensitivity(sums: np.ndarray) -> np.ndarray:
    """Share of the drawn findings that were named, of summed `finding_statistics`, [..., 3 L] ->
    [...]; 0 where none was drawn.
    """
    totals = _totals(sums)
    return totals[..., 0] / np.maximum(totals[..., 0] + totals[..., 1], 1)


def positive_predictive_value(sums: np.ndarray) -> np.ndarray:
    """Share of the named findings that were drawn, of summed `finding_statistics`, [..., 3 L] ->
    [...]; 0 where none was named.
    """
    totals = _totals(sums)
    return totals[..., 0] / np.maximum(totals[..., 0] + totals[..., 2], 1)


# The metrics of summed statistics, by name.
DRAWN = {"finding_sensitivity": sensitivity, "finding_ppv": positive_predictive_value}


def by_finding(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """{label: [N, 3 L]} of `finding_statistics` rows, all other labels set to 0; labels that occur
    nowhere are left out.
    """
    counts = np.array(rows)
    masks = {label: np.repeat(np.array(LABELS) == label, 3)[None] for label in LABELS}
    return {label: counts * mask for label, mask in masks.items() if (counts * mask).any()}
