"""Percentile bootstrap over items: how far a metric would move if other items had been drawn. 2,000
resamples, 95%.

An item's value is a float, or a row of statistics of which a corpus metric is computed once they
are summed (BLEU).
"""

from collections.abc import Callable, Iterator
from itertools import zip_longest

import numpy as np

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
BLOCK = 2_000_000  # drawn indices held at once, 16 MB

Score = Callable[[np.ndarray], np.ndarray]  # summed statistics [..., K] -> metric [...]


def _rows(values) -> np.ndarray:
    """[N] or [N, K] -> float [N, K]; a NaN would spoil every resample, so it is an error. Short
    rows are padded with zeros.
    """
    if len(values) and isinstance(values[0], list):
        values = list(zip(*zip_longest(*values, fillvalue=0.0)))
    rows = np.asarray(values, dtype=float)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if not len(rows) or not np.isfinite(rows).all():
        raise ValueError(
            "bootstrap needs at least one item, all of them finite: leave out items without a score"
        )
    return rows


def _resampled_sums(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Sums over N items drawn with replacement, in blocks [resamples, K]. Equal N draws equal
    items.
    """
    n, random = len(rows), np.random.default_rng(SEED)
    step = max(1, BLOCK // n)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = random.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        # times drawn [size, N] @ [N, K]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n) @ rows


def _bounds(resampled: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def _mean_of(n: int) -> Score:
    return lambda sums: sums[..., 0] / n


def interval(values, score: Score | None = None) -> dict[str, float]:
    """{"mean", "low", "high", "n"} of per-item values [N], or of a corpus metric: statistics [N, K]
    and its `score`.
    """
    rows = _rows(values)
    score = score or _mean_of(len(rows))
    resampled = np.concatenate([score(sums) for sums in _resampled_sums(rows)])
    return {"mean": float(score(rows.sum(0))), **_bounds(resampled), "n": len(rows)}


def paired(values_a, values_b, score: Score | None = None) -> dict[str, float]:
    """{"difference", "low", "high", "p", "n"} of a minus b on the same items in the same order.

    p is two-sided: twice the smaller share of resamples on either side of 0, with one added so that
    it is never 0.
    """
    a, b = _rows(values_a), _rows(values_b)
    if len(a) != len(b):  # their widths may differ: one answer held more boxes
        raise ValueError(
            f"paired bootstrap of {len(a)} and {len(b)} items: give both the same items in the same"
            " order"
        )
    score, k = score or _mean_of(len(a)), a.shape[1]
    sums = np.concatenate([a, b], 1)  # drawn together: an item hard for a is hard for b
    resampled = np.concatenate([score(s[:, :k]) - score(s[:, k:]) for s in _resampled_sums(sums)])
    smaller = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (1 + smaller) / (1 + len(resampled)))
    difference = float(score(a.sum(0)) - score(b.sum(0)))
    return {"difference": difference, **_bounds(resampled), "p": float(p), "n": len(a)}
