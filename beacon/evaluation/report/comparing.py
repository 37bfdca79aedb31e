"""Compare two folders of results item by item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beacon.evaluation.report.statistics import GEOMETRIC, Difference, holm, normal, paired
from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.results import Record
from beacon.evaluation.results.folder import differences

SMALLEST = 0.01  # change that counts, as a share of what was before
SURE = 0.05  # largest p-value of a change that is told
LOWER = ("perplexity", "bits_per_byte")  # metrics of the harness of which less is better


@dataclass(frozen=True)
class Change:
    """How a metric of a method changed.

    Args:
        task: Name of the task.
        method: Name of the method.
        place: Empty: over all items.
        metric: Name of the metric.
        higher: Whether more of it is better.
        difference: Means, interval, pairs; of factors where ``geometric``.
        geometric: Whether low and high are factors.
        p: Of the difference, corrected for as many comparisons as there are of this kind (Holm).
        moved: 1 better, -1 worse, 0 not to be told or too small to count.
    """

    task: str
    method: str
    place: Mapping[str, Any]
    metric: str
    higher: bool
    difference: Difference
    geometric: bool
    p: float = 1.0
    moved: int = 0


@dataclass(frozen=True)
class Loss:
    """Items that have scores in one of two folders only.

    Args:
        task: Name of the task.
        method: Name of the method.
        lost: How many were measured before and are not any more.
        gained: How many are measured now only.
        reason: Why the first of the lost is not.
    """

    task: str
    method: str
    lost: int
    gained: int
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two folders.

    Args:
        overall: A change for every metric of every method and task, over all common items.
        places: The same for every value of a task's first axis.
        losses: Items that are not measured in both.
        only: Tasks and methods of one folder only, in words.
        settings: Settings that differ, in words.
    """

    overall: Sequence[Change]
    places: Sequence[Change]
    losses: Sequence[Loss]
    only: Sequence[str]
    settings: Sequence[str]

    @property
    def regressed(self) -> bool:
        """Whether anything got worse over all items of a task, or is not measured any more."""
        return any(change.moved < 0 for change in self.overall) or any(loss.lost for loss in self.losses)


def compare(before: Summary, after: Summary, threshold: float = SMALLEST) -> Comparison:
    """Compare results of the same items.

    A metric moved when its p-value, corrected for the number of comparisons, is below 5 % and the change exceeds the
    threshold. Places are told apart for the reader; regressions are changes over all items of a task.

    Args:
        before: The first folder's.
        after: The second's.
        threshold: Smallest change that counts, as a share of the mean before.

    Raises:
        ValueError: A bad threshold, or nothing to compare.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"the threshold must be a share of at least 0, got {threshold}; pass for example 0.01.")
    overall: list[Change] = []
    places: list[Change] = []
    losses: list[Loss] = []
    old = {task.name: task for task in before.tasks}
    for task in (task for task in after.tasks if task.name in old):
        same = dict(old[task.name].head.items)
        items = [(name, place) for name, place in task.head.items if same.get(name) == place]
        for method in (method for method in task.records if method in old[task.name].records):
            first, second = (_by_item(summary.records[method]) for summary in (old[task.name], task))
            losses += _losses(task.name, method, [name for name, _ in items], first, second)
            overall += _changes(task, method, {}, [name for name, _ in items], first, second)
            for key in task.axes[:1]:
                for value in task.values(key):
                    here = [name for name, place in items if place.get(key) == value]
                    places += _changes(task, method, {key: value}, here, first, second)
    overall += _harness(before, after)
    if not overall and not losses:
        raise ValueError("two folders must have items in common to be compared, got none; run the same tasks in both.")
    settings = list(differences(before.run["settings"], after.run["settings"]))
    return Comparison(_judged(overall, threshold), _judged(places, threshold), losses, _only(before, after), settings)


def _by_item(records: Sequence[Record]) -> dict[str, Record]:
    return {record.item: record for record in records}


def _changes(
    task: TaskSummary,
    method: str,
    place: Mapping[str, Any],
    items: Sequence[str],
    first: Mapping[str, Record],
    second: Mapping[str, Record],
) -> Iterator[Change]:
    """The changes of all metrics over some items."""
    pairs = [(first[name].scores, second[name].scores) for name in items if name in first and name in second]
    for metric, higher in task.head.metrics.items():
        common = [(a[metric], b[metric]) for a, b in pairs if metric in a and metric in b]
        if common:
            difference = paired([a for a, _ in common], [b for _, b in common], metric in GEOMETRIC)
            yield Change(task.name, method, place, metric, higher, difference, metric in GEOMETRIC)


def _losses(
    task: str, method: str, items: Sequence[str], first: Mapping[str, Record], second: Mapping[str, Record]
) -> Iterator[Loss]:
    done = [{name for name in items if name in side and side[name].status == "ok"} for side in (first, second)]
    lost = [name for name in items if name in done[0] - done[1]]
    gained = done[1] - done[0]
    if lost:
        record = second.get(lost[0])
        yield Loss(
            task, method, len(lost), len(gained), "not run" if record is None else record.reason or record.status
        )
    elif gained:
        yield Loss(task, method, 0, len(gained))


def _harness(before: Summary, after: Summary) -> Iterator[Change]:
    """Changes of suites, and of tasks that belong to none. Only means are known, so nothing is paired."""
    for method in (method for method in after.harness if method in before.harness):
        first, second = before.harness[method], after.harness[method]
        covered = {task for suite in second["suites"].values() for task in suite.get("members", ())}
        for kind in ("suites", "tasks"):
            for name, measured in second[kind].items():
                theirs = first[kind].get(name)
                if theirs is not None and name not in covered:
                    for metric in (metric for metric in measured["metrics"] if metric in theirs["metrics"]):
                        yield _unpaired(name, method, metric, theirs, measured)


def _unpaired(name: str, method: str, metric: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Change:
    a, b = first["metrics"][metric], second["metrics"][metric]
    known = a["stderr"] is not None and b["stderr"] is not None
    error = math.hypot(a["stderr"], b["stderr"]) if known else None
    higher = not any(word in metric for word in LOWER)
    difference = normal(a["value"], b["value"], error, int(second["documents"]))
    return Change(name, method, {}, metric, higher, difference, False)


def _judged(changes: Sequence[Change], threshold: float) -> list[Change]:
    judged = []
    for change, p in zip(changes, holm([change.difference.p for change in changes]), strict=True):
        a, b = change.difference.before, change.difference.after
        large = a != b and not abs(b - a) <= threshold * abs(a)  # infinite ones are large
        moved = 0 if p >= SURE or not large else 1 if (b > a) == change.higher else -1
        judged.append(replace(change, p=p, moved=moved))
    return judged


def _only(before: Summary, after: Summary) -> list[str]:
    """What one folder alone has."""
    words = []
    sides = [{(task.name, method) for task in summary.tasks for method in task.records} for summary in (before, after)]
    standard = [{("standard tasks", method) for method in summary.harness} for summary in (before, after)]
    first, second = (side | more for side, more in zip(sides, standard, strict=True))
    for where, found in (("first", first - second), ("second", second - first)):
        words += [f"{task}, {method}: in the {where} only" for task, method in sorted(found)]
    return words
