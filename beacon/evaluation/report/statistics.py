"""Means with intervals, and differences of pairs, by resampling items (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
BLOCK = 2_000_000  # numbers drawn at a time
LEVEL = 0.95
DEVIATIONS = 1.959964  # standard errors on either side that hold as much of a normal distribution
GEOMETRIC = ("perplexity",)  # metrics whose logarithms are what is averaged: over texts of as many tokens, the same


@dataclass(frozen=True)
class Estimate:
    """A mean over items.

    Args:
        value: The mean; NaN over none.
        low: Lower end of its 95 % interval; None where fewer than two items, or infinite ones, give none.
        high: The upper end.
        n: Items.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """What changed between two measurements of the same items.

    Args:
        before: Mean of the first.
        after: Mean of the second.
        low: Lower end of the 95 % interval of the difference; for geometric means, of the factor.
        high: The upper end.
        p: Probability of a difference as large if nothing had changed, two-sided.
        n: Pairs.
    """

    before: float
    after: float
    low: float | None
    high: float | None
    p: float
    n: int


def estimate(values: Sequence[float], geometric: bool = False) -> Estimate:
    """The mean of items, with its bootstrap interval (percentiles).

    Args:
        values: One number for each item.
        geometric: Average logarithms.
    """
    numbers = _logs(values) if geometric else np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return Estimate(math.nan, None, None, 0)
    low, high = _interval(_means(numbers)) if len(numbers) > 1 and np.isfinite(numbers).all() else (None, None)
    back = _exp if geometric else float
    with np.errstate(invalid="ignore"):
        value = back(float(numbers.mean()))
    return Estimate(value, None if low is None else back(low), None if high is None else back(high), len(numbers))


def paired(before: Sequence[float], after: Sequence[float], geometric: bool = False) -> Difference:
    """Compare two measurements of the same items, in the same order.

    The p-value is the bootstrap's (where no resample is on the other side, the normal tail), but never below what the
    sign test gives where all pairs that differ do so in one direction: a bootstrap of few pairs is sure of anything.

    Args:
        before: One number for each item.
        after: The other.
        geometric: Average logarithms; low and high are then of the factor.

    Raises:
        ValueError: No pairs, or as many numbers on either side as not.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"pairs need two numbers for each item, got {len(before)} and {len(after)}; give common ones.")
    first, second = (_logs(v) if geometric else np.asarray(v, dtype=np.float64) for v in (before, after))
    back = _exp if geometric else float
    with np.errstate(invalid="ignore"):
        changes = np.where(first == second, 0.0, second - first)  # both infinite are the same
        means = back(float(first.mean())), back(float(second.mean()))
    differing = int(np.count_nonzero(changes))
    if not differing:
        return Difference(*means, back(0.0), back(0.0), 1.0, len(changes))
    least = min(1.0, 2.0 * 0.5**differing)
    if not np.isfinite(changes).all():  # only their signs can be compared
        return Difference(*means, None, None, _sign_test(changes), len(changes))
    drawn = _means(changes)
    fewer = int(min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)))
    p = 2 * (1 + fewer) / (1 + len(drawn))
    if not fewer:  # as many resamples cannot tell how small it is
        p = min(p, _tail(float(changes.mean()), float(drawn.std())))
    p = min(1.0, max(p, least))
    low, high = _interval(drawn)
    return Difference(*means, back(low), back(high), p, len(changes))


def holm(probabilities: Sequence[float]) -> list[float]:
    """P-values as they are after looking at as many of them (Holm's step-down correction)."""
    order = sorted(range(len(probabilities)), key=lambda at: probabilities[at])
    adjusted, largest = [1.0] * len(probabilities), 0.0
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, probabilities[at] * (len(order) - place)))
        adjusted[at] = largest
    return adjusted


def normal(before: float, after: float, error: float | None, n: int) -> Difference:
    """Compare two means of which only the standard error of their difference is known.

    Args:
        before: The first mean.
        after: The second.
        error: Standard error of their difference; None, or zero, tells nothing of a change.
        n: Items of each.
    """
    change = after - before
    if not error:
        return Difference(before, after, None, None, 1.0, n)
    p = _tail(change, error)
    return Difference(before, after, change - DEVIATIONS * error, change + DEVIATIONS * error, p, n)


def _tail(change: float, error: float) -> float:
    """Two-sided p-value of a change with this standard error, if errors are normal."""
    return math.erfc(abs(change) / error / math.sqrt(2)) if error else 0.0


def _sign_test(changes: np.ndarray) -> float:
    up, down = int(np.count_nonzero(changes > 0)), int(np.count_nonzero(changes < 0))
    n, k = up + down, min(up, down)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) * 0.5**n)


def _means(numbers: np.ndarray) -> np.ndarray:
    """Means of resamples, the same in every run."""
    random = np.random.default_rng(0)
    step = max(1, BLOCK // len(numbers))
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate(
        [numbers[random.integers(len(numbers), size=(size, len(numbers)))].mean(axis=1) for size in sizes]
    )


def _interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def _logs(values: Sequence[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, dtype=np.float64))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
