"""Overlap of a report with its reference."""

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from ..rewards.text import ngrams

_ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """{"rouge_1", "rouge_2", "rouge_l"}: F of common words, of common bigrams and of the longest
    common subsequence, on stemmed, lower-cased words. Range 0..1, floor 0. Source: Lin 2004; this
    is rouge-score's own figure.
    """
    scores = _ROUGE.score(reference, prediction)
    return {
        name: float(scores[key].fmeasure)
        for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"))
    }


def rouge_l(prediction: str, reference: str) -> float:
    """`rouge` of the longest common subsequence alone."""
    return rouge(prediction, reference)["rouge_l"]


def bleu_statistics(prediction: str, reference: str) -> list[int]:
    """What corpus BLEU-4 needs of one item: clipped matches of n = 1..4, n-grams of n = 1..4, words
    of either text.

    Whitespace tokens. nltk's convention: a text too short for an n-gram counts one unmatched.
    """
    predicted, expected = prediction.split(), reference.split()
    matches = [(ngrams(predicted, n) & ngrams(expected, n)).total() for n in range(1, 5)]
    totals = [max(len(predicted) - n + 1, 1) for n in range(1, 5)]
    return [*matches, *totals, len(predicted), len(expected)]


def bleu4(statistics: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4 of summed `bleu_statistics`, [..., 10] -> [...]. Range 0..1. Source: Papineni
    et al. 2002.

    Smoothing: an n for which nothing matched counts 0.1 matches (nltk's method1), so that a small
        corpus without a
    common 4-gram is not 0; with no common word at all it is 0.
    """
    sums = np.asarray(statistics, dtype=float)
    matches, totals, words, expected = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    precision = np.exp(np.log(np.where(matches > 0, matches, 0.1) / totals).mean(-1))
    brevity = np.exp(np.minimum(0.0, 1 - expected / np.maximum(words, 1)))
    return np.where(matches[..., 0] > 0, precision * brevity, 0.0)
