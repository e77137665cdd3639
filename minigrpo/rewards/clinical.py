"""Rewards for reports that read the text with a model. Each takes (answers, samples, scorers):
answers without thinking.

`Scorers` loads the models that --reward names, once, and caches references. A blank answer gets the
floor here; a failing scorer raises or returns NaN, which `Reward` turns into "could not be scored".
The models' modules are imported only when they are loaded: they take seconds, and rewards for boxes
need none of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.sample import Sample
from .cache import Cached
from .radcliq import radcliq_v1

if TYPE_CHECKING:
    from .bertscore import BertScore
    from .chexbert import CheXbert
    from .radgraph import RadGraph

RADCLIQ_FLOOR = -3.0
# of distilbert-base-uncased's layer 5, the encoder of the paper's BERTScore reward
PAPER_BASELINE = 0.66620487
SHORTEST, LONGEST = 5, 2048  # characters, of the authors' text mode


@dataclass
class Scorers:
    """The models, each loaded on first use, and their scored references."""

    weights_dir: str | None = None  # None: the hub
    device: str = "cpu"
    disk: Path | None = None  # file of the cache; None: in memory only

    @cached_property
    def radgraph_xl(self) -> "Graphs":
        from .radgraph import RadGraph

        return Graphs(
            RadGraph.from_weights(self.weights_dir, xl=True, device=self.device), self.disk
        )

    @cached_property
    def radgraph(self) -> "Graphs":
        from .radgraph import RadGraph

        return Graphs(
            RadGraph.from_weights(self.weights_dir, xl=False, device=self.device), self.disk
        )

    @cached_property
    def chexbert(self) -> "Findings":
        from .chexbert import CheXbert

        return Findings(CheXbert.from_weights(self.weights_dir, device=self.device), self.disk)

    @cached_property
    def bertscore_radcliq(self) -> "BertScore":
        from .bertscore import BertScore

        return BertScore.from_weights(self.weights_dir, device=self.device)

    @cached_property
    def bertscore(self) -> "BertScore":
        from .bertscore import BertScore

        return BertScore.from_weights(
            self.weights_dir,
            model="distilbert-base-uncased",
            layer=5,
            baseline=PAPER_BASELINE,
            device=self.device,
        )


class Graphs:
    """RadGraph with its references cached."""

    def __init__(self, model: "RadGraph", disk: Path | None):
        self.model = model
        self.references = Cached(
            model.annotate,
            model.fingerprint,
            disk,
            pack=lambda graph: json.dumps(graph).encode(),
            unpack=json.loads,
        )

    def f1(self, hyps: list[str], refs: list[str]) -> list[dict[str, float]]:
        """`radgraph_f1` of each pair."""
        from .radgraph import radgraph_f1

        return [
            radgraph_f1(hyp, ref)
            for hyp, ref in zip(self.model.annotate(hyps), self.references(refs), strict=True)
        ]


class Findings:
    """CheXbert with its references cached."""

    def __init__(self, model: "CheXbert", disk: Path | None):
        self.model = model
        kept = partial(Cached, path=disk, pack=np.ndarray.tobytes)
        self.vectors = kept(
            lambda texts: list(model.vectors(texts)),
            model.fingerprint + "vector",
            unpack=partial(_array, dtype=np.float32, size=model.bert.config.hidden_size),
        )
        self.labels = kept(
            lambda texts: list(model.labels(texts)),
            model.fingerprint + "labels",
            unpack=partial(_array, dtype=np.int64, size=14),
        )

    def s_emb(self, hyps: list[str], refs: list[str]) -> list[float]:
        """Cosine of the [CLS] vectors of each pair."""
        from .chexbert import cosine

        return cosine(self.model.vectors(hyps), np.stack(self.vectors(refs))).tolist()

    def f1(self, hyps: list[str], refs: list[str]) -> list[float]:
        """`label_f1` of each pair."""
        from .chexbert import label_f1

        return label_f1(self.model.labels(hyps), np.stack(self.labels(refs))).tolist()


def _array(value: bytes, dtype, size: int) -> np.ndarray:
    array = np.frombuffer(value, dtype)
    if array.shape != (size,):
        raise ValueError(f"{array.size} numbers where {size} are stored")
    return array


def with_floor(floor: float, usable: Callable[[str], bool] = str.strip) -> Callable:
    """Turns a reward of (answers, references, scorers) into one of (answers, samples, scorers): an
    answer that is not `usable` gets `floor` and is not passed to the scorer.
    """

    def decorate(function: Callable) -> Callable:
        def reward(answers: list[str], samples: list[Sample], scorers: Scorers) -> list[float]:
            rows = [row for row, answer in enumerate(answers) if usable(answer)]
            scored = (
                function(
                    [answers[row] for row in rows], [samples[row].answer for row in rows], scorers
                )
                if rows
                else []
            )
            values = dict(zip(rows, scored, strict=True))
            return [values.get(row, floor) for row in range(len(answers))]

        reward.__doc__, reward.__name__ = function.__doc__, function.__name__
        return reward

    return decorate


def authors_text(text: str) -> str:
    """The text as RadVLM-GRPO scores it: lower-cased, its first 2,048 characters."""
    return text.lower()[:LONGEST]


def _radcliq(hyps: list[str], refs: list[str], graphs: Graphs, scorers: Scorers) -> list[float]:
    parts = zip(
        [f1["radcliq"] for f1 in graphs.f1(hyps, refs)],
        scorers.bertscore_radcliq.score(hyps, refs),
        scorers.chexbert.s_emb(hyps, refs),
        strict=True,
    )
    values = [-radcliq_v1(*three) for three in parts]
    return [RADCLIQ_FLOOR if value < RADCLIQ_FLOOR else value for value in values]  # NaN stays NaN


@with_floor(RADCLIQ_FLOOR, lambda text: len(text.strip()) > SHORTEST)
def radcliq(hyps: list[str], refs: list[str], scorers: Scorers) -> list[float]:
    """Minus RadCliQ-v1 as RadVLM-GRPO uses it: RadGraph-XL, texts lower-cased and cut at 2,048
    characters. Range -3..1.44; floor -3, also for at most 5 characters. Source: Yu et al. 2023
    (Patterns 4:100802), arXiv 2512.10691.
    """
    return _radcliq(
        [authors_text(text) for text in hyps],
        [authors_text(text) for text in refs],
        scorers.radgraph_xl,
        scorers,
    )


@with_floor(RADCLIQ_FLOOR)
def radcliq_published(hyps: list[str], refs: list[str], scorers: Scorers) -> list[float]:
    """Minus RadCliQ-v1 as published: RadGraph 1.0, texts unchanged. Range -3..1.44, floor -3.
    Source: Yu et al. 2023.
    """
    return _radcliq(hyps, refs, scorers.radgraph, scorers)


def _radgraph(level: str) -> Callable:
    def reward(hyps: list[str], refs: list[str], scorers: Scorers) -> list[float]:
        return [f1[level] for f1 in scorers.radgraph_xl.f1(hyps, refs)]

    reward.__doc__ = f"""RadGraph-XL F1, level {level} (see `radgraph_f1`). Range 0..1, floor 0.
    Source: Delbrouck et al. 2022 (arXiv 2210.12186). Table 3 of the paper: `complete` is hacked by
    shortening.
    """
    return with_floor(0.0)(reward)


@with_floor(-PAPER_BASELINE / (1 - PAPER_BASELINE))
def bertscore(hyps: list[str], refs: list[str], scorers: Scorers) -> list[float]:
    """BERTScore F1 of distilbert-base-uncased, layer 5, rescaled with its baseline 0.66620487.
    Range -2..1, about 0 for unrelated reports; floor -1.996, which is F = 0. Source: Zhang et al.
    2020 (arXiv 1904.09675).
    """
    return scorers.bertscore.score(hyps, refs)


@with_floor(0.0)
def chexbert(hyps: list[str], refs: list[str], scorers: Scorers) -> list[float]:
    """F1 of the pair's CheXbert findings, all 14, positive and uncertain as present. Range 0..1,
    floor 0. Source: Smit et al. 2020 (arXiv 2004.09167). It sees findings, not prose: a list of
    words can score well.
    """
    return scorers.chexbert.f1(hyps, refs)


CLINICAL: dict[str, tuple[Callable, tuple[str, ...]]] = {  # name: (reward, the scorers it loads)
    "radcliq": (radcliq, ("radgraph_xl", "bertscore_radcliq", "chexbert")),
    "radcliq_published": (radcliq_published, ("radgraph", "bertscore_radcliq", "chexbert")),
    "radgraph": (_radgraph("complete"), ("radgraph_xl",)),  # the paper's level
    "radgraph_simple": (_radgraph("simple"), ("radgraph_xl",)),
    "radgraph_partial": (_radgraph("partial"), ("radgraph_xl",)),
    "radgraph_complete": (_radgraph("complete"), ("radgraph_xl",)),
    "bertscore": (bertscore, ("bertscore",)),
    "chexbert": (chexbert, ("chexbert",)),
}
