"""Compare two folders of results item by item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beacon.evaluation.report.changes import Change
from beacon.evaluation.report.losing import Loss, find_losses
from beacon.evaluation.report.standard import standard_changes
from beacon.evaluation.report.statistics import GEOMETRIC, holm, paired
from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.results import Record
from beacon.evaluation.results.folder import HARNESS, differences

SMALLEST = 0.01  # change that counts, as a share of what was before
SURE = 0.05  # largest p-value of a change that is told


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two folders.

    Args:
        overall: A change for every metric of every method and task, over all common items.
        places: The same for every value of a task's first axis.
        losses: Items that are not measured in both.
        only: Tasks and methods of one folder only, in words.
        settings: Settings that differ, in words.
        options: Options of tasks and methods that differ, in words.
    """

    overall: Sequence[Change]
    places: Sequence[Change]
    losses: Sequence[Loss]
    only: Sequence[str]
    settings: Sequence[str]
    options: Sequence[str] = ()

    @property
    def regressed(self) -> bool:
        """Whether a main metric got worse over all items of a task, or something is not measured any more."""
        return bool(self.worse) or any(loss.lost for loss in self.losses)

    @property
    def worse(self) -> list[Change]:
        """What decides, and got worse."""
        return [change for change in self.overall if change.decides and change.moved < 0]

    @property
    def better(self) -> list[Change]:
        """What decides, and got better."""
        return [change for change in self.overall if change.decides and change.moved > 0]


def compare(before: Summary, after: Summary, threshold: float = SMALLEST) -> Comparison:
    """Compare results of the same items.

    A metric moved when its p-value is below 5 % and the change exceeds the threshold. The main metric of every task and
    method decides, with p-values corrected for as many; other metrics, comparisons that no result could make sure, and
    tasks of other options are shown as they are. Places are told apart for the reader.

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
    old = {task.name: task for task in before.tasks}
    in_common = False
    for task in (_clustered_as(task, old[task.name]) for task in after.tasks if task.name in old):
        known = dict(old[task.name].head.items)
        items = [(name, place) for name, place in task.head.items if known.get(name) == place]
        in_common |= bool(items)
        for method in (method for method in task.records if method in old[task.name].records):
            first, second = (_by_item(summary.records[method]) for summary in (old[task.name], task))
            overall += _changes(task, method, {}, [name for name, _ in items], first, second)
            for key in task.axes[:1]:
                for value in task.values(key):
                    here = [name for name, place in items if place.get(key) == value]
                    places += _changes(task, method, {key: value}, here, first, second)
    overall += standard_changes(before, after)
    if not overall and not in_common:
        raise ValueError("two folders must have items in common to be compared, got none; run the same tasks in both.")
    return Comparison(
        overall=_judged(_undecided(overall, before, after), threshold),
        places=_judged(_undecided(places, before, after), threshold),
        losses=list(find_losses(before, after)),
        only=_only(before, after),
        settings=list(differences(before.run["settings"], after.run["settings"])),
        options=list(differences(*_options(before, after))),
    )


def _clustered_as(task: TaskSummary, other: TaskSummary) -> TaskSummary:
    """A task whose clusters are told only where another folder tells them too: else their texts may be others."""
    told = {name: cluster for name, cluster in task.head.clusters.items() if name in other.head.clusters}
    return replace(task, head=replace(task.head, clusters=told))


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
    both = [(first[name], second[name]) for name in items if name in first and name in second]
    pairs = [(a.scores, b.scores, task.head.cluster(b.item)) for a, b in both]
    for metric, higher in task.head.metrics.items():
        common = [(a[metric], b[metric], text) for a, b, text in pairs if metric in a and metric in b]
        if common:
            a, b, clusters = map(list, zip(*common, strict=True))
            geometric = metric in GEOMETRIC
            difference = paired(a, b, geometric, clusters)
            decides = metric == task.main
            yield Change(task.name, method, place, metric, higher, difference, geometric, decides=decides)


def _options(before: Summary, after: Summary) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the tasks and methods that both have measured."""
    sides = []
    for summary in (before, after):
        mine = {task.name for task in summary.tasks} | set(summary.methods) | set(summary.harness)
        sides.append(mine | ({HARNESS} if summary.harness else set()))
    common = sorted(sides[0] & sides[1])
    first, second = (
        {name: summary.run.get("options", {}).get(name, {}) for name in common} for summary in (before, after)
    )
    return first, second


def _undecided(changes: Sequence[Change], before: Summary, after: Summary) -> list[Change]:
    """Changes, of which those of tasks with other options do not decide."""
    first, second = _options(before, after)
    own = {task.name for task in after.tasks}
    other = {name for name in first if first[name] != second[name]}
    return [
        replace(change, decides=change.decides and (change.task if change.task in own else HARNESS) not in other)
        for change in changes
    ]


def _judged(changes: Sequence[Change], threshold: float) -> list[Change]:
    """Correct what decides, and tell what moved."""
    changes = [replace(change, decides=change.decides and change.difference.least < SURE) for change in changes]
    corrected = iter(holm([change.difference.p for change in changes if change.decides]))
    judged = []
    for change in changes:
        p = next(corrected) if change.decides else change.difference.p
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
