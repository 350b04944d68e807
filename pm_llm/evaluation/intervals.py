"""Percentile bootstrap over test rows (Efron and Tibshirani 1993, ch. 13), of scores and of their differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.predictions import Predictions
from pm_llm.evaluation.scorers import scorer_named

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A score with the interval that holds `level` of its bootstrap distribution."""

    value: float
    low: float
    high: float
    level: float = 0.95


def interval(found: Predictions, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """The score of one set of predictions."""
    return mean_interval([found], resamples, seed, level)


def mean_interval(
    found: Sequence[Predictions], resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean score of several tasks (an average accuracy); rows are drawn within each task."""
    draws = [_draws(one, resamples, seed + k) for k, one in enumerate(found)]
    return _interval(
        float(np.mean([value for value, _ in draws])), np.mean([scores for _, scores in draws], axis=0), level
    )


def paired_difference(
    a: Sequence[Predictions],
    b: Sequence[Predictions],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean score of `a` minus mean score of `b` on the same rows: each resample takes the same rows of both.

    Raises:
        PmLlmError: If the two are not about the same tasks, scorers and rows, or do not tell their rows.
    """
    if not all(x.keys for x in (*a, *b)):
        raise PmLlmError("the predictions do not say which rows they are of, so their difference cannot be paired.")
    if [(x.task, x.scorer, list(x.keys)) for x in a] != [(x.task, x.scorer, list(x.keys)) for x in b]:
        raise PmLlmError(
            "the two runs were not scored on the same rows, so their difference cannot be paired. "
            "Use the same tasks, max_test_samples and seed for both."
        )
    pairs = [
        (_draws(x, resamples, seed + k), _draws(y, resamples, seed + k))
        for k, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    value = np.mean([x[0] - y[0] for x, y in pairs])
    return _interval(float(value), np.mean([x[1] - y[1] for x, y in pairs], axis=0), level)


def swap_test(a: Sequence[Predictions], b: Sequence[Predictions], resamples: int = RESAMPLES, seed: int = 0) -> float:
    """How likely a difference of mean scores as large as that by which `a` is better than `b` is if both are alike.

    The two answers to a row are swapped at random, row by row, which changes nothing where neither set is the better
    one: so the level is exact, with few rows too (a permutation test; Efron and Tibshirani 1993, ch. 15).

    Args:
        a: One.
        b: The other, on the same tasks and rows, see :func:`paired_difference`.
        resamples: How many times all rows are swapped at random.
        seed: Of that.

    Returns:
        The one-sided p value, at least `1 / (resamples + 1)`.
    """
    pairs = [_swapped(*one, resamples, seed + k) for k, one in enumerate(zip(a, b, strict=True))]
    least = sum(value for value, _ in pairs)
    found = np.sum([draws for _, draws in pairs], axis=0)
    return float(1 + (found >= least - 1e-9).sum()) / (resamples + 1)


def _swapped(a: Predictions, b: Predictions, resamples: int, seed: int) -> tuple[float, np.ndarray]:
    """By how much `a` is better than `b`, and that with rows swapped at random, shape (resamples,)."""
    x, y, scorer = a.numbers, b.numbers, scorer_named(a.scorer)
    sign = -1.0 if scorer.lower_is_better else 1.0
    swaps = np.random.default_rng(seed).integers(0, 2, (resamples, len(x))).astype(float)
    moved = swaps @ (y - x)
    found = scorer.total(x.sum(axis=0) + moved, len(x)) - scorer.total(y.sum(axis=0) - moved, len(x))
    return sign * (scorer.of(x) - scorer.of(y)), sign * found


def _draws(found: Predictions, resamples: int, seed: int) -> tuple[float, np.ndarray]:
    """The score, and that of `resamples` draws of rows with replacement, shape (resamples,)."""
    rows, scorer = found.numbers, scorer_named(found.scorer)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
    return scorer.of(rows), scorer.total(times @ rows, len(rows))


def _interval(value: float, draws: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def score_lines(
    found: Sequence[Predictions], scorer: str | None = None, tasks: Sequence[str] | None = None
) -> list[str]:
    """A line each, and their mean; of a run's `tasks`, where its probes are among them."""
    if scorer is not None:
        found = [dataclasses.replace(one, scorer=scorer) for one in found]
    named = [(one.task, interval(one), len(one.predictions)) for one in found]
    counted = [one for one in found if tasks is None or one.task in tasks]
    if len({scorer_named(one.scorer).lower_is_better for one in counted}) == 1:
        named.append(("mean", mean_interval(counted), sum(len(one.predictions) for one in counted)))
    return [f"{name}\t{x.value:.2f}\t({x.low:.2f} to {x.high:.2f})\t{rows} rows" for name, x, rows in named]
