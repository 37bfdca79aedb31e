"""Means with intervals, and differences of pairs, by resampling clusters of items (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 4000
BLOCK = 2_000_000  # numbers drawn at a time
LEVEL = 0.95
ENOUGH = 6  # clusters: fewer, all of one sign, would still be one of twenty by chance
DEVIATIONS = 1.959964  # standard errors on either side that hold as much of a normal distribution
GEOMETRIC = ("perplexity",)  # metrics whose logarithms are what is averaged: over texts of as many tokens, the same


@dataclass(frozen=True)
class Estimate:
    """A mean over items.

    Args:
        value: The mean; NaN over none.
        low: Lower end of its 95 % interval; None where fewer than ``ENOUGH`` clusters, or infinite items, give none.
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
        clusters: Of items that are not independent.
        least: The smallest p that as many could have given.
    """

    before: float
    after: float
    low: float | None
    high: float | None
    p: float
    n: int
    clusters: int
    least: float


def estimate(values: Sequence[float], geometric: bool = False, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of items, with its bootstrap interval (percentiles).

    Args:
        values: One number for each item.
        geometric: Average logarithms.
        clusters: Items of one are not independent of each other and are resampled together; None: each is one.
    """
    numbers = _logs(values) if geometric else np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return Estimate(math.nan, None, None, 0)
    low, high = None, None
    if np.isfinite(numbers).all():
        sums, counts = _clustered(numbers, clusters)
        low, high = _interval(_means(sums, counts)) if len(sums) >= ENOUGH else (None, None)
    back = _exp if geometric else float
    with np.errstate(invalid="ignore"):
        value = back(float(numbers.mean()))
    return Estimate(value, None if low is None else back(low), None if high is None else back(high), len(numbers))


def paired(
    before: Sequence[float],
    after: Sequence[float],
    geometric: bool = False,
    clusters: Sequence[Hashable] | None = None,
) -> Difference:
    """Compare two measurements of the same items, in the same order.

    The p-value is the bootstrap's over clusters (where no resample is on the other side, the normal tail), but never
    below what an exact test gives, for a bootstrap of a few is sure of anything: from ``ENOUGH`` clusters on whose
    changes are all different numbers, Student's t; else the sign test where all that differ do so in one direction.

    Args:
        before: One number for each item.
        after: The other.
        geometric: Average logarithms; low and high are then of the factor.
        clusters: Items of one are not independent of each other and are resampled together; None: each is one.

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
    finite = bool(np.isfinite(changes).all())
    sums, counts = _clustered(changes if finite else np.nan_to_num(np.sign(changes)), clusters)
    shifts = sums / counts
    smooth = finite and len(sums) >= ENOUGH and len(np.unique(shifts)) == len(sums)
    about: dict[str, Any] = {
        "n": len(changes),
        "clusters": len(sums),
        "least": 0.0 if smooth else _all_of_one_sign(len(sums)),
    }
    if not changes.any():
        same = back(0.0) if len(sums) >= ENOUGH else None
        return Difference(*means, same, same, p=1.0, **about)
    if not finite:  # only their signs can be compared
        return Difference(*means, None, None, p=_sign_test(sums), **about)
    drawn = _means(sums, counts)
    fewer = int(min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)))
    p = 2 * (1 + fewer) / (1 + len(drawn))
    if not fewer:  # as many resamples cannot tell how small it is
        p = min(p, _tail(float(changes.mean()), float(drawn.std())))
    exact = _student(sums, counts) if smooth else _all_of_one_sign(int(np.count_nonzero(sums)))
    low, high = map(back, _interval(drawn)) if len(sums) >= ENOUGH else (None, None)
    return Difference(*means, low, high, p=min(1.0, max(p, exact)), **about)


def holm(probabilities: Sequence[float]) -> list[float]:
    """P-values as they are after looking at as many of them (Holm's step-down correction)."""
    order = sorted(range(len(probabilities)), key=lambda at: probabilities[at])
    adjusted, largest = [1.0] * len(probabilities), 0.0
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, probabilities[at] * (len(order) - place)))
        adjusted[at] = largest
    return adjusted


def normal(before: float, after: float, error: float | None, documents: tuple[int, int]) -> Difference:
    """Compare two means of which only the standard error of their difference is known.

    Of shares of which it is not, or is zero (all right, or all wrong), it is taken from the share over both. A p-value
    is never below what Fisher's exact test gives where all are right before and all wrong after.

    Args:
        before: The first mean.
        after: The second.
        error: Standard error of their difference; None where it is not known.
        documents: How many each is of.
    """
    change, (first, second) = after - before, documents
    if not error and change and min(before, after) >= 0 and max(before, after) <= 1 and min(documents) > 0:
        share = (before * first + after * second) / (first + second)
        error = math.sqrt(share * (1 - share) * (1 / first + 1 / second))
    known = [min(number, 500) for number in documents]  # beyond, it is zero all the same
    least = min(1.0, 2 / math.comb(sum(known), known[0]))
    about: dict[str, Any] = {"n": second, "clusters": second, "least": least}
    if not error:
        return Difference(before, after, None, None, p=1.0, **about)
    low, high = change - DEVIATIONS * error, change + DEVIATIONS * error
    return Difference(before, after, low, high, p=max(least, _tail(change, error)), **about)


def weighted(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float],
    groups: Sequence[Hashable],
    clusters: Sequence[Hashable],
) -> Difference:
    """Compare weighted means of pairs in groups: a suite's, whose tasks have documents.

    The p-value is that of random signs of the clusters' changes, which all are as likely as not if nothing changed
    (where no draw is as far off, the normal tail), but never below the sign test's if all that differ did so in one
    direction.

    Args:
        before: One number for each pair.
        after: The other.
        weights: How much each pair counts; they add up to 1.
        groups: Which group each is of; those of one are expected to change alike.
        clusters: Pairs of one are not independent of each other.

    Returns:
        The difference; without an interval where a group has a single pair, of whose spread nothing is known.
    """
    share = np.asarray(weights, dtype=np.float64)
    first, second = (np.asarray(side, dtype=np.float64) for side in (before, after))
    means = float(share @ first), float(share @ second)
    sums = _clustered(share * (second - first), clusters)[0]
    moved = int(np.count_nonzero(sums))
    about: dict[str, Any] = {"n": len(share), "clusters": len(sums), "least": _all_of_one_sign(len(sums))}
    if not moved:
        return Difference(*means, 0.0, 0.0, p=1.0, **about)
    change, drawn = float(sums.sum()), _signed(sums[sums != 0])
    reached = int(np.count_nonzero(np.abs(drawn) >= abs(change) * (1 - 1e-9)))
    p = (1 + reached) / (1 + len(drawn)) if reached else _tail(change, float(np.sqrt((sums**2).sum())))
    error = _error_of_groups(share, second - first, groups, clusters) if len(sums) >= ENOUGH else None
    low, high = (None, None) if error is None else (change - DEVIATIONS * error, change + DEVIATIONS * error)
    return Difference(*means, low, high, p=min(1.0, max(p, _all_of_one_sign(moved))), **about)


def _error_of_groups(
    weights: np.ndarray, changes: np.ndarray, groups: Sequence[Hashable], clusters: Sequence[Hashable]
) -> float | None:
    """Standard error of a weighted mean, from the spread within groups; None where one has a single pair."""
    sums, counts = _clustered(changes, groups)
    if (counts < 2).any():
        return None
    seen = {group: at for at, group in enumerate(dict.fromkeys(groups))}
    index = np.array([seen[group] for group in groups])
    spread = (changes - (sums / counts)[index]) * np.sqrt(counts / (counts - 1))[index]
    return float(np.sqrt((_clustered(weights * spread, clusters)[0] ** 2).sum()))


def _signed(shares: np.ndarray) -> np.ndarray:
    """Sums of shares with random signs, the same in every run."""
    random = np.random.default_rng(0)
    step = max(1, BLOCK // len(shares))
    parts = []
    for start in range(0, RESAMPLES, step):
        signs = random.integers(2, size=(min(step, RESAMPLES - start), len(shares)), dtype=np.int8)
        parts.append((2 * signs - 1) @ shares)
    return np.concatenate(parts)


def _tail(change: float, error: float) -> float:
    """Two-sided p-value of a change with this standard error, if errors are normal."""
    return math.erfc(abs(change) / error / math.sqrt(2)) if error else 0.0


def _all_of_one_sign(count: int) -> float:
    """Two-sided p-value of the sign test where all do the same."""
    return min(1.0, 2.0 * 0.5**count)


def _student(sums: np.ndarray, counts: np.ndarray) -> float:
    """Two-sided p-value of a mean over clusters, of whatever sizes, by Student's t.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    mean, free = sums.sum() / counts.sum(), len(sums) - 1
    error = math.sqrt(len(sums) / free * ((sums - mean * counts) ** 2).sum()) / counts.sum()
    if free > 200:
        return _tail(float(mean), float(error))
    angle = math.atan2(abs(mean), error * math.sqrt(free))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if free % 2 else (1.0, 0.0)
    for at in range(1 + free % 2, free, 2):
        total += term
        term *= cosine**2 * at / (at + 1)
    inside = 2 / math.pi * (angle + sine * total) if free % 2 else sine * total
    return min(1.0, max(1e-15, 1 - inside))  # it is no more exact than that


def _sign_test(changes: np.ndarray) -> float:
    up, down = int(np.count_nonzero(changes > 0)), int(np.count_nonzero(changes < 0))
    n, k = up + down, min(up, down)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) * 0.5**n)


def _clustered(numbers: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each cluster."""
    if clusters is None:
        return numbers, np.ones(len(numbers))
    seen: dict[Hashable, int] = {}
    index = [seen.setdefault(cluster, len(seen)) for cluster in clusters]
    return np.bincount(index, weights=numbers), np.bincount(index).astype(np.float64)


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means of resamples of clusters, the same in every run."""
    random = np.random.default_rng(0)
    step = max(1, BLOCK // len(sums))
    parts = []
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(len(sums), size=(min(step, RESAMPLES - start), len(sums)))
        parts.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(parts)


def _interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def _logs(values: Sequence[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, dtype=np.float64))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
