"""Compare two folders of results item by item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beacon.evaluation.report.clusters import cluster
from beacon.evaluation.report.looks import look
from beacon.evaluation.report.losing import Loss, find_losses
from beacon.evaluation.report.statistics import ENOUGH, GEOMETRIC, Difference, holm, normal, paired
from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.results import Record
from beacon.evaluation.results.folder import HARNESS, differences

SMALLEST = 0.01  # change that counts, as a share of what was before
SURE = 0.05  # largest p-value of a change that is told
LARGE = 0.4  # change of a share that a few texts can tell, if all of them do
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
        p: Of the difference, corrected for all that decide (Holm) where this does, else as it is.
        moved: 1 better, -1 worse, 0 not to be told or too small to count.
        decides: Whether it counts: the main metric of a task with the same options on both sides, with enough items to
            be sure of anything.
        by_items: Items were compared as if independent, for there are fewer than ``ENOUGH`` clusters.
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
    decides: bool = True
    by_items: bool = False


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
    for task in (task for task in after.tasks if task.name in old):
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
    overall += _harness(before, after)
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
    pairs = [(a.scores, b.scores, cluster(b.item, b.place)) for a, b in both]
    for metric, higher in task.head.metrics.items():
        common = [(a[metric], b[metric], text) for a, b, text in pairs if metric in a and metric in b]
        if common:
            a, b, clusters = map(list, zip(*common, strict=True))
            geometric = metric in GEOMETRIC
            difference = paired(a, b, geometric, clusters)
            change = Change(task.name, method, place, metric, higher, difference, geometric)
            if 1 < difference.clusters < min(ENOUGH, len(common)) and look(metric, [*a, *b]).sign == "%":
                change = _by_items(change, paired(a, b))
            yield replace(change, decides=metric == task.main)


def _by_items(change: Change, items: Difference) -> Change:
    """A share on a few texts, judged by its items: of a large change on every one of them.

    What is hidden and asked for is drawn for each item, so this tells of these texts at least.
    """
    found = change.difference
    sure = found.agree and abs(found.after - found.before) >= LARGE
    return replace(change, difference=replace(found, least=items.least, p=items.p if sure else found.p), by_items=True)


def _harness(before: Summary, after: Summary) -> Iterator[Change]:
    """Changes of suites, and of tasks that belong to none. Only means are known, so nothing is paired."""
    for method in (method for method in after.harness if method in before.harness):
        first, second = before.harness[method], after.harness[method]
        covered = {task for suite in second["suites"].values() for task in suite.get("members", ())}
        for kind in ("suites", "tasks"):
            for name, measured in second[kind].items():
                theirs = first[kind].get(name)
                if theirs is not None and name not in covered:
                    metrics = list(measured["metrics"])
                    main = [metric for metric in metrics if metric.partition(",")[0].isdigit()] or metrics[
                        :1
                    ]  # lengths
                    for metric in (metric for metric in metrics if metric in theirs["metrics"]):
                        change = _unpaired(name, method, metric, theirs, measured)
                        yield replace(change, decides=metric in main)


def _unpaired(name: str, method: str, metric: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Change:
    a, b = first["metrics"][metric], second["metrics"][metric]
    known = a["stderr"] is not None and b["stderr"] is not None
    error = math.hypot(a["stderr"], b["stderr"]) if known else None
    higher = not any(word in metric for word in LOWER)
    difference = normal(a["value"], b["value"], error, (int(first["documents"]), int(second["documents"])))
    return Change(name, method, {}, metric, higher, difference, False)


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
