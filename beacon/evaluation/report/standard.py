"""What changed of standard tasks: document by document where these are known, else by means and their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from beacon.evaluation.report.changes import Change
from beacon.evaluation.report.statistics import Difference, normal, paired, standard_error
from beacon.evaluation.report.summary import Documents, Summary
from beacon.evaluation.results.entries import suite_weights

LOWER = ("perplexity", "bits_per_byte")  # metrics of the harness of which less is better


def standard_changes(before: Summary, after: Summary) -> Iterator[Change]:
    """Changes of suites, and of tasks that belong to none.

    Args:
        before: The first folder's.
        after: The second's.
    """
    for method in (method for method in after.harness if method in before.harness):
        first, second = before.harness[method], after.harness[method]
        pairs = _Pairs(before.documents.get(method, {}), after.documents.get(method, {}))
        covered = {task for suite in second["suites"].values() for task in suite.get("members", ())}
        for name, measured in second["suites"].items():
            if name in first["suites"]:
                yield from _changes(name, method, first["suites"][name], measured, pairs.of_suite)
        for name, measured in second["tasks"].items():
            if name in first["tasks"] and name not in covered:
                yield from _changes(name, method, first["tasks"][name], measured, partial(pairs.of_task, name))


def _changes(
    name: str,
    method: str,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    pair: Callable[[Mapping[str, Any], Mapping[str, Any], str], Difference | None],
) -> Iterator[Change]:
    """Changes of all metrics of a suite or task: of documents in pairs where these are known, else of means."""
    metrics = list(second["metrics"])
    lengths = [metric for metric in metrics if metric.partition(",")[0].isdigit()]
    for metric in (metric for metric in metrics if metric in first["metrics"]):
        difference = pair(first, second, metric) or _unpaired(metric, first, second)
        higher, decides = not any(word in metric for word in LOWER), metric in (lengths or metrics[:1])
        yield Change(name, method, {}, metric, higher, difference, False, decides=decides)


@dataclass(frozen=True)
class _Pairs:
    """Documents that two folders have of one method, by task and metric.

    Args:
        before: Scores by task, metric and document.
        after: The other folder's.
    """

    before: Documents
    after: Documents

    def scores(self, task: str, metric: str) -> tuple[list[float], list[float]]:
        """Scores of the documents in common, in one order."""
        first, second = (side.get(task, {}).get(metric, {}) for side in (self.before, self.after))
        common = [name for name in first if name in second]
        return [first[name] for name in common], [second[name] for name in common]

    def of_task(self, task: str, first: Any, second: Any, metric: str) -> Difference | None:
        """The change of a task; None where no documents are known."""
        a, b = self.scores(task, metric)
        return paired(a, b) if a else None

    def of_suite(self, first: Mapping[str, Any], second: Mapping[str, Any], metric: str) -> Difference | None:
        """The change of a suite's mean: tasks are independent, so the errors of their changes add in squares."""
        members, weighted = second.get("members"), second.get("weighted")
        pairs = [self.scores(task, metric) for task in members or ()]
        if weighted is None or not pairs or first.get("members") != members or not all(a for a, _ in pairs):
            return None
        counts = [len(a) for a, _ in pairs]
        weights = suite_weights(counts, weighted)
        old, new = (sum(w * fmean(p[side]) for w, p in zip(weights, pairs, strict=True)) for side in (0, 1))
        error = math.hypot(*(w * standard_error(*pair) for w, pair in zip(weights, pairs, strict=True)))
        return normal(old, new, error, (sum(counts), sum(counts)))


def _unpaired(metric: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    """The change of a mean behind which no documents are known."""
    a, b = first["metrics"][metric], second["metrics"][metric]
    known = a["stderr"] is not None and b["stderr"] is not None
    error = math.hypot(a["stderr"], b["stderr"]) if known else None
    return normal(a["value"], b["value"], error, (int(first["documents"]), int(second["documents"])))
