"""The clinical content of a report: RadGraph F1, CheXbert F1, BERTScore and RadCliQ, for
evaluate.py.

The scorers and their weights are those of the rewards (`minigrpo.rewards`), and so are the floors:
an answer without text is not passed to a scorer. A scorer whose weights are absent is left out,
with a line that says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..rewards.clinical import PAPER_BASELINE, RADCLIQ_FLOOR, SHORTEST, authors_text

# CheXpert's competition labels
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
# BERTScore as the paper reports it, and the one that RadCliQ was fitted with.
REPORTED = {"model": "distilbert-base-uncased", "layer": 5, "baseline": PAPER_BASELINE}
RADCLIQ = {"model": "distilroberta-base", "layer": 5, "baseline": 0.8473319}


@dataclass
class Clinical:
    """The scorers that could be loaded; None for the others."""

    radgraph: Any = None
    chexbert: Any = None
    bertscore: Any = None  # REPORTED
    radcliq_bertscore: Any = None  # RADCLIQ

    def score(self, predictions: list[str], references: list[str]) -> list[dict]:
        """[N] dicts. "bertscore": about 0..1, floor -2 (F = 0); "radgraph_simple",
        "radgraph_partial", "radgraph_complete": 0..1; "chexbert": `chexbert_statistics`; "radcliq":
        -1.44..3, lower is better, needs the other scorers. Scores that a scorer can't give (None or
        NaN) are left out of the item.
        """
        filled = [i for i, text in enumerate(predictions) if text]
        hyps, refs = [predictions[i] for i in filled], [references[i] for i in filled]
        # as the reward has them
        low_hyps, low_refs = ([authors_text(text) for text in texts] for texts in (hyps, refs))
        floor: dict[str, Any] = {}
        scores: dict[str, list] = {}
        if self.bertscore:
            floor["bertscore"] = -REPORTED["baseline"] / (1 - REPORTED["baseline"])
            scores["bertscore"] = self.bertscore.score(hyps, refs) if hyps else []
        if self.radgraph:
            graphs = radgraph_scores(self.radgraph, hyps + low_hyps, refs + low_refs)
            for level in ("simple", "partial", "complete"):
                floor[f"radgraph_{level}"], scores[f"radgraph_{level}"] = (
                    0.0,
                    [g[level] for g in graphs[: len(hyps)]],
                )
        if self.radgraph and self.chexbert and self.radcliq_bertscore:
            from ..rewards import radcliq_v1

            bert = self.radcliq_bertscore.score(low_hyps, low_refs) if hyps else []
            parts = zip(
                [g["radcliq"] for g in graphs[len(hyps) :]],
                bert,
                cosines(self.chexbert, low_hyps, low_refs),
            )
            values = [np.nan if None in part else radcliq_v1(*part) for part in parts]
            floor["radcliq"] = -RADCLIQ_FLOOR  # the reward is minus the metric
            scores["radcliq"] = [
                -RADCLIQ_FLOOR if len(text.strip()) <= SHORTEST or value > -RADCLIQ_FLOOR else value
                for text, value in zip(hyps, values)
            ]
        items = [dict(floor) for _ in predictions]
        for name, values in scores.items():
            for i, value in zip(filled, values, strict=True):
                if value is not None and np.isfinite(value):
                    items[i][name] = float(value)
                else:
                    del items[i][name]
        if self.chexbert:
            for item, row in zip(
                items, chexbert_statistics(self.chexbert, predictions, references)
            ):
                item["chexbert"] = row
        return items


def load_clinical(weights_dir: str, device: str = "cpu") -> tuple[Clinical, list[str]]:
    """The scorers whose weights are in the folder, and a line for each that is missing."""
    if not Path(weights_dir).is_dir():
        raise ValueError(
            f"--reward_weights {weights_dir} is not a folder: name the one with the weights of the"
            " scorers"
        )

    def radgraph():
        from ..rewards.radgraph import RadGraph

        return RadGraph.from_weights(weights_dir, device=device)

    def chexbert():
        from ..rewards.chexbert import CheXbert

        return CheXbert.from_weights(weights_dir, device=device)

    def bertscore(settings):
        from ..rewards.bertscore import BertScore

        return BertScore.from_weights(weights_dir, device=device, **settings)

    loaders = {
        "radgraph": radgraph,
        "chexbert": chexbert,
        "bertscore": lambda: bertscore(REPORTED),
        "radcliq_bertscore": lambda: bertscore(RADCLIQ),
    }
    scorers, missing = {}, []
    for name, load in loaders.items():
        try:
            scorers[name] = load()
        except (OSError, ImportError, ValueError) as error:
            missing.append(f"{name} is left out: {' '.join(str(error).split())}")
    if not scorers:
        raise ValueError(
            f"--reward_weights {weights_dir} has the weights of none of the scorers: "
            + "; ".join(missing)
        )
    return Clinical(**scorers), missing


def radgraph_scores(radgraph, predictions: list[str], references: list[str]) -> list[dict]:
    """`radgraph_f1` of each pair; each distinct text is annotated once."""
    from ..rewards.radgraph import radgraph_f1

    texts = list(dict.fromkeys([*predictions, *references]))
    graphs = dict(zip(texts, radgraph.annotate(texts) if texts else [], strict=True))
    return [radgraph_f1(graphs[a], graphs[b]) for a, b in zip(predictions, references)]


def cosines(chexbert, predictions: list[str], references: list[str]) -> list[float]:
    """Cosine of the two texts' CheXbert vectors, RadCliQ's s_emb, -1..1."""
    if not predictions:
        return []
    a, b = (np.asarray(chexbert.vectors(texts), dtype=float) for texts in (predictions, references))
    return (
        (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    ).tolist()


def chexbert_statistics(chexbert, predictions: list[str], references: list[str]) -> list[list[int]]:
    """For each item 3 x 14 zeros and ones: true positive, false positive, false negative of each
    condition. Positive and uncertain count as present. A prediction without text mentions no
    condition.
    """
    expected = present(chexbert.labels(references))
    predicted = np.zeros_like(expected)
    filled = [i for i, text in enumerate(predictions) if text]
    if filled:
        predicted[filled] = present(chexbert.labels([predictions[i] for i in filled]))
    return (
        np.concatenate([predicted & expected, predicted & ~expected, ~predicted & expected], 1)
        .astype(int)
        .tolist()
    )


def present(labels) -> np.ndarray:
    """CheXbert's classes [N, 14] (0 blank, 1 positive, 2 negative, 3 uncertain) -> bool [N, 14]."""
    return np.isin(np.asarray(labels), (1, 3))


def condition_f1(statistics: np.ndarray) -> np.ndarray:
    """F1 of each condition of summed `chexbert_statistics`, [..., 3 C] -> [..., C]; 0 for one that
    does not occur.
    """
    hit, extra, missed = np.moveaxis(
        np.asarray(statistics, float).reshape(*statistics.shape[:-1], 3, -1), -2, 0
    )
    return 2 * hit / np.maximum(2 * hit + extra + missed, 1)


def f1_of(five: bool, macro: bool):
    """A score of summed `chexbert_statistics`: F1 over 14 or 5 conditions, their mean (macro) or
    over all decisions (micro). Range 0..1. Source: Smit et al. 2020 (arXiv 2004.09167);
    f1chexbert's "rrg" reading, in which an absent condition's F1 of 0 enters the macro mean.
    """

    def score(statistics: np.ndarray) -> np.ndarray:
        sums = np.asarray(statistics, float).reshape(*np.shape(statistics)[:-1], 3, 14)
        sums = sums[..., five_columns()] if five else sums
        if not macro:
            sums = sums.sum(-1, keepdims=True)
        return condition_f1(sums.reshape(*sums.shape[:-2], -1)).mean(-1)

    return score


def conditions() -> tuple[str, ...]:
    """CheXbert's fourteen, in the order of its labels."""
    from ..rewards.chexbert import CONDITIONS  # seconds to import, so only here

    return CONDITIONS


def five_columns() -> list[int]:
    """The columns of CheXpert's five among the fourteen."""
    return [conditions().index(name) for name in FIVE]


CHEXBERT = {
    "chexbert_micro14": f1_of(False, False),
    "chexbert_macro14": f1_of(False, True),
    "chexbert_micro5": f1_of(True, False),
    "chexbert_macro5": f1_of(True, True),
}
