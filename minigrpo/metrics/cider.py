"""CIDEr-D: common n-grams, where those that many references share count little."""

import math
from collections import Counter

from rouge_score.tokenize import tokenize

from ..rewards.text import ngrams

SIGMA = 6.0  # of the length penalty, in words


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, as in rouge-score: "effusion." is the word
    "effusion".
    """
    return tokenize(text, None)


def cider_d(predictions: list[str], references: list[str]) -> list[float]:
    """CIDEr-D of each pair, [N], range 0..10, floor 0; the corpus score is their mean.

    Source: Vedantam et al. 2015 (arXiv 1411.5726), section 5 with equations 1 to 3, in
        pycocoevalcap's form: tf is the
    count; idf is log N - log max(1, df), df the references of *this set* that hold the n-gram, so
    that values of two sets don't compare, and in a set of one all are 0; the length penalty counts
    bigrams. tf-idf of the prediction is clipped at the reference's. A resample of items keeps the
    df of the whole set.
    """
    reference_ngrams = [[ngrams(words(text), n) for n in range(1, 5)] for text in references]
    frequency = Counter(gram for orders in reference_ngrams for grams in orders for gram in grams)
    log_n = math.log(max(1, len(references)))

    def weighted(grams: Counter) -> dict[tuple, float]:
        return {
            gram: count * (log_n - math.log(max(1, frequency[gram])))
            for gram, count in grams.items()
        }

    scores = []
    for prediction, orders in zip(predictions, reference_ngrams, strict=True):
        predicted = [ngrams(words(prediction), n) for n in range(1, 5)]
        penalty = math.exp(-((predicted[1].total() - orders[1].total()) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for ours, theirs in zip(map(weighted, predicted), map(weighted, orders)):
            norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            inner = sum(
                min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0)
                for gram, value in ours.items()
            )
            total += inner / norm if norm else 0.0
        scores.append(10 * penalty * total / 4)
    return scores
