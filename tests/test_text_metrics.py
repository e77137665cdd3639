"""BLEU, GLEU, ROUGE and CIDEr-D against the libraries that define them, on 500 report pairs and odd
strings.
"""

import math
from collections import Counter

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from nltk.translate.gleu_score import sentence_gleu
from rouge_score.rouge_scorer import RougeScorer

from minigrpo.metrics import bleu4, bleu_statistics, cider_d, rouge
from minigrpo.metrics.cider import words
from minigrpo.rewards import gleu
from tests.corpus import ODD, pairs

PREDICTIONS, REFERENCES = pairs()


def test_the_corpus_is_what_it_says():
    assert len(PREDICTIONS) == 500 + 3 * len(ODD) == len(REFERENCES) and len(set(REFERENCES)) > 300
    assert 0.3 < np.mean([gleu(*pair) for pair in zip(PREDICTIONS, REFERENCES)]) < 0.9


def test_gleu_equals_nltk():
    for prediction, reference in zip(PREDICTIONS, REFERENCES):
        wanted = (
            sentence_gleu([reference.split()], prediction.split())
            if prediction.split() and reference.split()
            else 0
        )
        assert abs(gleu(prediction, reference) - wanted) < 1e-12


def test_bleu4_equals_nltk():
    """Where a report without words is the reference, nltk smooths 0 of 0; there is none in a data
    file.
    """
    chosen = [pair for pair in zip(PREDICTIONS, REFERENCES) if pair[1].split()]
    statistics = [bleu_statistics(*pair) for pair in chosen]
    smooth = SmoothingFunction().method1
    whole = corpus_bleu(
        [[r.split()] for _, r in chosen], [p.split() for p, _ in chosen], smoothing_function=smooth
    )
    assert abs(float(bleu4(np.sum(statistics, 0))) - whole) < 1e-12
    for (prediction, reference), row in zip(chosen, statistics):
        wanted = (
            corpus_bleu([[reference.split()]], [prediction.split()], smoothing_function=smooth)
            if prediction.split()
            else 0
        )
        assert abs(float(bleu4(np.array(row))) - wanted) < 1e-12


def test_rouge_equals_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for prediction, reference in zip(PREDICTIONS, REFERENCES):
        wanted = scorer.score(reference, prediction)
        assert rouge(prediction, reference) == {
            "rouge_1": wanted["rouge1"].fmeasure,
            "rouge_2": wanted["rouge2"].fmeasure,
            "rouge_l": wanted["rougeL"].fmeasure,
        }


def slow_cider(predictions, references):
    """The definition as loops over n, n-grams and texts."""

    def grams(text, n):
        return Counter(tuple(words(text)[i : i + n]) for i in range(len(words(text)) - n + 1))

    scores = np.zeros(len(predictions))
    for n in range(1, 5):
        hyps, refs = [grams(t, n) for t in predictions], [grams(t, n) for t in references]
        seen = Counter(gram for ref in refs for gram in set(ref))

        def idf(gram):
            return math.log(len(refs)) - math.log(max(1, seen[gram]))

        for i, (hyp, ref) in enumerate(zip(hyps, refs)):
            norms = [
                math.sqrt(sum((count * idf(gram)) ** 2 for gram, count in side.items()))
                for side in (hyp, ref)
            ]
            inner = sum(min(hyp[gram], ref[gram]) * ref[gram] * idf(gram) ** 2 for gram in hyp)
            delta = max(0, len(words(predictions[i])) - 1) - max(0, len(words(references[i])) - 1)
            scores[i] += (
                10
                / 4
                * (inner / math.prod(norms) if math.prod(norms) else 0)
                * math.exp(-(delta**2) / 72)
            )
    return scores


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_cider_equals_the_slow_definition(every):
    chosen = PREDICTIONS[::every], REFERENCES[::every]
    np.testing.assert_allclose(cider_d(*chosen), slow_cider(*chosen), atol=1e-9, rtol=0)


@pytest.mark.peers
def test_cider_equals_pycocoevalcap():
    cider = pytest.importorskip(
        "pycocoevalcap.cider.cider",
        reason="pycocoevalcap is not installed: `make test-peers` installs it",
    )
    tables = [
        {i: [" ".join(words(text))] for i, text in enumerate(texts)}
        for texts in (REFERENCES, PREDICTIONS)
    ]
    mean, each = cider.Cider().compute_score(*tables)
    ours = cider_d(PREDICTIONS, REFERENCES)
    np.testing.assert_allclose(ours, each, atol=1e-9, rtol=0)
    assert abs(np.mean(ours) - mean) < 1e-9 and 1 < mean < 9


def test_cider_known_values():
    first, second = "a large left pleural effusion", "the heart size is normal"
    assert cider_d([first, second], [first, second]) == pytest.approx([10, 10])
    assert cider_d(["A large, left pleural effusion.", ""], [first, second]) == pytest.approx(
        [10, 0]
    )
    assert cider_d([first], [first]) == [0]  # a set of one tells no rare word from a common one
    assert cider_d([], []) == []
