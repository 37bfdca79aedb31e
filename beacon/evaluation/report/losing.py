"""What was measured in one folder and is not in another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.results import Record

NO_TASK, NO_METHOD = "the second folder has no such task", "the second folder has no such method"
OTHER_DOCUMENTS = "not among the documents of the second folder"
NO_ITEM, NOT_RUN = "not among the items of the second folder", "not run"


@dataclass(frozen=True)
class Loss:
    """Items that have scores in one of two folders only.

    Args:
        task: Name of the task.
        method: Name of the method.
        lost: How many were measured before and are not any more; documents, of the harness.
        gained: How many are measured now only.
        reason: Why the first of the lost is not.
    """

    task: str
    method: str
    lost: int
    gained: int
    reason: str = ""


def find_losses(before: Summary, after: Summary) -> Iterator[Loss]:
    """A loss for every task and method of which items were measured in one folder only, if both have the method.

    Args:
        before: The first folder's.
        after: The second's.
    """
    new = {task.name: task for task in after.tasks}
    for task in before.tasks:
        for method in task.records:
            yield from _of_task(task, new.get(task.name), method)
    for method, measured in before.harness.items():
        for name, entry in measured["tasks"].items():
            documents = (before.documents.get(method, {}).get(name, {}), after.documents.get(method, {}).get(name, {}))
            yield from _of_harness(name, method, entry, after.harness.get(method), documents)


def _of_task(task: TaskSummary, other: TaskSummary | None, method: str) -> Iterator[Loss]:
    first = _measured(task, method)
    if other is None or method not in other.records:
        if first:
            yield Loss(task.name, method, len(first), 0, NO_TASK if other is None else NO_METHOD)
        return
    second, records = _measured(other, method), {record.item: record for record in other.records[method]}
    places = dict(other.head.items)
    lost = [name for name, record in first.items() if not _same(second.get(name), record)]
    gained = [name for name, record in second.items() if not _same(first.get(name), record)]
    if lost:
        name = lost[0]
        is_item = places.get(name) == first[name].place
        yield Loss(
            task.name, method, len(lost), len(gained), _reason(records.get(name), task.main) if is_item else NO_ITEM
        )
    elif gained:
        yield Loss(task.name, method, 0, len(gained))


def _measured(task: TaskSummary, method: str) -> dict[str, Record]:
    """Items with scores; a main metric that is no number, or infinite, is none."""
    return {
        record.item: record
        for record in task.records[method]
        if record.status == "ok" and math.isfinite(record.scores.get(task.main, 0.0))
    }


def _same(record: Record | None, other: Record) -> bool:
    return record is not None and record.place == other.place


def _reason(record: Record | None, main: str) -> str:
    if record is None:
        return NOT_RUN
    return f"{main} {record.scores[main]}" if record.status == "ok" else record.reason or record.status


def _have_common(documents: Sequence[Mapping[str, Mapping[str, float]]]) -> bool:
    """Whether two folders have any document in common; without, they are of other prompts (of a tokenizer, say)."""
    first, second = ({document for some in side.values() for document in some} for side in documents)
    return not first.isdisjoint(second)


def _of_harness(
    name: str,
    method: str,
    entry: Mapping[str, Any],
    measured: Mapping[str, Any] | None,
    documents: tuple[Mapping[str, Mapping[str, float]], Mapping[str, Mapping[str, float]]],
) -> Iterator[Loss]:
    """Of a task of the harness; ``documents`` are the scores of both folders, by metric."""
    if not entry.get("metrics"):
        return
    if measured is None or name not in measured["tasks"]:
        yield Loss(name, method, entry["documents"], 0, NO_METHOD if measured is None else NO_TASK)
        return
    now = measured["tasks"][name]
    if not now.get("metrics"):
        yield Loss(name, method, entry["documents"], 0, now.get("reason") or now.get("status", NOT_RUN))
    elif _have_common(documents):
        first, second = ({document for some in side.values() for document in some} for side in documents)
        if first != second:
            lost, gained = len(first - second), len(second - first)
            yield Loss(name, method, lost, gained, OTHER_DOCUMENTS if lost else "")
    elif now["documents"] < entry["documents"]:
        yield Loss(name, method, entry["documents"] - now["documents"], 0, "the second folder has fewer documents")
