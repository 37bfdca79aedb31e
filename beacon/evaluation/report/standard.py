"""What changed of standard tasks: document by document where these are known, else by means and their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from beacon.evaluation.report.changes import Change
from beacon.evaluation.report.statistics import Difference, normal, paired, weighted
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

    def scores(self, task: str, metric: str) -> tuple[list[float], list[float], list[str]]:
        """Scores of the documents in common, in one order, and the texts that these are about."""
        first, second = (side.get(task, {}).get(metric, {}) for side in (self.before, self.after))
        common = [name for name in first if name in second]
        return [first[name] for name in common], [second[name] for name in common], list(map(text_of, common))

    def of_task(self, task: str, first: Any, second: Any, metric: str) -> Difference | None:
        """The change of a task; None where no documents are known."""
        a, b, texts = self.scores(task, metric)
        return paired(a, b, clusters=texts) if a else None

    def of_suite(self, first: Mapping[str, Any], second: Mapping[str, Any], metric: str) -> Difference | None:
        """The change of a suite's mean; None where documents of a task are not known."""
        members, by_documents = second.get("members"), second.get("weighted")
        if by_documents is None or not members or first.get("members") != members:
            return None
        sides = (self.before, self.after)
        having = [task for task in members if any(metric in side.get(task, {}) for side in sides)]
        pairs = {task: self.scores(task, metric) for task in having}
        counts = [len(texts) for _, _, texts in pairs.values()]
        if not pairs or not all(counts):
            return None
        weights = dict(zip(pairs, suite_weights(counts, by_documents), strict=True))
        rows = [
            (a, b, weights[task] / len(texts), task, text)
            for task, (first, second, texts) in pairs.items()
            for a, b, text in zip(first, second, texts, strict=True)
        ]
        return weighted(*map(list, zip(*rows, strict=True)))


def text_of(document: str) -> str:
    """What the name of a document says of its text; see :func:`beacon.evaluation.harness.keeping.document_name`."""
    return document.partition(".")[0]


def _unpaired(metric: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    """The change of a mean behind which no documents are known."""
    a, b = first["metrics"][metric], second["metrics"][metric]
    known = a["stderr"] is not None and b["stderr"] is not None
    error = math.hypot(a["stderr"], b["stderr"]) if known else None
    counts = (int(a.get("documents", first["documents"])), int(b.get("documents", second["documents"])))
    return normal(a["value"], b["value"], error, counts)
