"""Report text for tests: phantom reports of drawn findings, without drawing films, and their random
edits.
"""

import random

import numpy as np

from minigrpo.data.phantom import KINDS, Finding, report

ODD = [
    "",
    " ",
    ".",
    "no",
    "No pleural effusion.",
    "no  pleural\neffusion",
    "Ergüsse beidseits, µ ≥ 3",
    "<b>&amp;</b>",
    "[0.1, 0.2]",
    "-- ??",
    "a a a a a a a a a a",
    "\N{LINE SEPARATOR}word",
    "3.5 cm nodule; 3.5cm",
    "THE LUNGS ARE CLEAR.",
]


def phantom_reports(count: int, seed: int = 0) -> list[str]:
    rng, texts = np.random.default_rng(seed), []
    for _ in range(count):
        findings = [
            Finding(
                str(rng.choice(list(KINDS))),
                str(rng.choice(["left", "right"])),
                str(rng.choice(["upper", "mid", "lower"])),
                str(rng.choice(["mild", "moderate", "severe"])),
                None,
                [0, 0, 1, 1],
            )
            for _ in range(rng.integers(0, 4))
        ]
        texts.append(" ".join(statement.text for statement in report(findings, rng)))
    return texts


def edited(text: str, rng: random.Random) -> str:
    """Words dropped, doubled, swapped, changed in case or replaced, as a model's report differs
    from its reference.
    """
    words = text.split()
    for _ in range(rng.randint(0, 12)):
        if words:
            i, j = rng.randrange(len(words)), rng.randrange(len(words))
            kind = rng.randrange(5)
            words[i : i + 1] = ([], [words[i]] * 2, [words[j]], [words[i].upper()], ["opacity"])[
                kind
            ]
    return " ".join(words)


def pairs(count: int = 500, seed: int = 0) -> tuple[list[str], list[str]]:
    """(predictions, references): edits, other films' reports, and every pair of an odd string with
    a report.
    """
    rng = random.Random(seed)
    references = phantom_reports(count, seed)
    predictions = [
        edited(text, rng) if rng.random() < 0.8 else rng.choice(references) for text in references
    ]
    return predictions + ODD + references[: len(ODD)] + ODD, references + references[
        : len(ODD)
    ] + ODD + ODD[::-1]
