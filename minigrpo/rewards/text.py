"""Text overlap of an answer with its reference."""

from collections import Counter
from collections.abc import Sequence

from ..data.sample import Sample


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """How often each run of n tokens occurs."""
    return Counter(zip(*(tokens[start:] for start in range(n))))


def gleu(prediction: str, reference: str) -> float:
    """Google BLEU of one pair on whitespace tokens: matching 1- to 4-grams over those of the longer
    text, which is min(precision, recall). Range 0..1; floor 0, for an empty text too. Source: Wu et
    al. 2016 (arXiv 1609.08144), 5.2.
    """
    predicted, expected = prediction.split(), reference.split()
    if not predicted or not expected:
        return 0.0
    matches = sum((ngrams(predicted, n) & ngrams(expected, n)).total() for n in range(1, 5))
    longer = max(len(predicted), len(expected))
    return matches / sum(max(longer - n + 1, 0) for n in range(1, 5))


def gleu_reward(answers: list[str], samples: list[Sample], box_scale: float) -> list[float]:
    """`gleu` of each answer with the reference of its sample. Range 0..1, floor 0. Table 3 of the
    paper: nearly as good as RadCliQ.
    """
    return [gleu(answer, sample.answer) for answer, sample in zip(answers, samples, strict=True)]


def length(prediction: str, reference: str) -> float:
    """Words of the shorter text over words of the longer. Range 0..1; floor 0, for an empty text.
    Source: ours, against hacking a reward by short or padded answers.
    """
    words = sorted((len(prediction.split()), len(reference.split())))
    return words[0] / words[1] if words[0] else 0.0


def length_reward(answers: list[str], samples: list[Sample], box_scale: float) -> list[float]:
    """`length` of each answer compared with the reference of its sample. Range 0..1, floor 0. It
    ignores content: for a small weight in a mix.
    """
    return [length(answer, sample.answer) for answer, sample in zip(answers, samples, strict=True)]
