"""Results taken together: by task, method and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from beacon.evaluation.report.statistics import GEOMETRIC, Estimate, estimate
from beacon.evaluation.results import Record, Results, TaskHead

Place = Mapping[str, Any]
Documents: TypeAlias = Mapping[str, Mapping[str, Mapping[str, float]]]  # scores by task, metric and document


@dataclass(frozen=True)
class Group:
    """What a method made of the items of a place.

    Args:
        method: Its name.
        place: The place, or the part of it that all have in common.
        metrics: Means, by metric.
        ok: Items measured.
        cannot_run: Items that the method cannot read.
        failed: Mistakes.
        missing: Items that were not run yet.
        seconds: Spent, in all.
    """

    method: str
    place: Place
    metrics: Mapping[str, Estimate]
    ok: int
    cannot_run: int
    failed: int
    missing: int
    seconds: float


@dataclass(frozen=True)
class TaskSummary:
    """A task's results.

    Args:
        head: Its metrics and items.
        records: By method, in the order of the items.
    """

    head: TaskHead
    records: Mapping[str, Sequence[Record]]

    @property
    def name(self) -> str:
        """The task's, with what was chosen of it by :meth:`parts`."""
        return self.head.name

    @property
    def main(self) -> str:
        """The main metric."""
        return next(iter(self.head.metrics))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys of places, in the order in which they first come."""
        return tuple(dict.fromkeys(key for _, place in self.head.items for key in place))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Keys whose values are numbers that differ: ``length`` first, then as they come."""
        found = [key for key in self.keys if len(self.values(key)) > 1 and all(map(_is_number, self.values(key)))]
        return tuple(sorted(found, key=lambda key: key != "length"))

    @cached_property
    def columns(self) -> str | None:
        """The key that tells apart the columns of a table: the first axis, or else words that differ."""
        words = (key for key in self.keys if len(self.values(key)) > 1)
        return self.axes[0] if self.axes else next(words, None)

    @cached_property
    def parts(self) -> list[TaskSummary]:
        """The task itself; one for each of some words (sources, say) where these differ beside an axis."""
        words = [key for key in self.keys if key not in self.axes and len(self.values(key)) > 1]
        if not self.axes or not words:
            return [self]
        return [self._only(words[0], value) for value in self.values(words[0])]

    def _only(self, key: str, value: Any) -> TaskSummary:
        items = tuple((name, place) for name, place in self.head.items if place.get(key) == value)
        names = {name for name, _ in items}
        kept = {method: [r for r in records if r.item in names] for method, records in self.records.items()}
        return TaskSummary(replace(self.head, name=f"{self.name}, {value}", items=items), kept)

    @cached_property
    def constants(self) -> Place:
        """Keys that have one value in all items, with it."""
        known = {key: self.values(key) for key in self.keys}
        everywhere = [key for key in known if all(key in place for _, place in self.head.items)]
        return {key: known[key][0] for key in everywhere if len(known[key]) == 1}

    def values(self, key: str) -> list[Any]:
        """What a key is, over all items: in order if numbers, else as they come."""
        values = list(dict.fromkeys(place[key] for _, place in self.head.items if key in place))
        return sorted(values) if all(map(_is_number, values)) else values

    def group(self, method: str, **place: Any) -> Group:
        """What a method made of all items at a place (of all, where none is named)."""
        wanted = [name for name, where in self.head.items if place.items() <= where.items()]
        mine = [record for record in self.records[method] if place.items() <= record.place.items()]
        scored = [record for record in mine if record.status == "ok"]
        metrics = {metric: self._estimate(scored, metric) for metric in self.head.metrics}
        statuses = [record.status for record in mine]
        return Group(
            method=method,
            place=place,
            metrics=metrics,
            ok=statuses.count("ok"),
            cannot_run=statuses.count("cannot-run"),
            failed=statuses.count("failed"),
            missing=len(wanted) - len(mine),
            seconds=sum(record.seconds for record in mine),
        )

    def groups(self, *keys: str) -> list[Group]:
        """Of every method, a group for every place as far as these keys tell places apart."""
        places = _distinct([{key: place[key] for key in keys if key in place} for _, place in self.head.items])
        return [self.group(method, **place) for method in self.records for place in places]

    def _estimate(self, records: Sequence[Record], metric: str) -> Estimate:
        having = [record for record in records if metric in record.scores]  # not every item need have all
        clusters = [self.head.cluster(record.item) for record in having]
        return estimate([record.scores[metric] for record in having], metric in GEOMETRIC, clusters)

    def scores(self, metric: str) -> list[float]:
        """All values of a metric."""
        return [record.scores[metric] for mine in self.records.values() for record in mine if metric in record.scores]


@dataclass(frozen=True)
class Summary:
    """All results of a folder.

    Args:
        run: What ``run.json`` holds.
        tasks: In the order in which they were first begun.
        harness: What the harness measured, by method.
        documents: Scores of its documents, by method.
    """

    run: Mapping[str, Any]
    tasks: Sequence[TaskSummary]
    harness: Mapping[str, Mapping[str, Any]]
    documents: Mapping[str, Documents] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """In the order of the run."""
        found = dict.fromkeys(method for task in self.tasks for method in task.records)
        order = self.run["methods"]
        return sorted(found, key=lambda name: order.index(name) if name in order else len(order))

    @property
    def parts(self) -> list[TaskSummary]:
        """What has a table of its own: the tasks, some of them part by part."""
        return [part for task in self.tasks for part in task.parts]

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values; what is not finite stands as a word."""
        tasks = {}
        for task in self.tasks:
            kept = [asdict(group) for keys in dict.fromkeys(((), task.keys)) for group in task.groups(*keys)]
            tasks[task.name] = {"metrics": dict(task.head.metrics), "groups": _worded(kept)}
        return {"run": dict(self.run), "tasks": tasks, "harness": dict(self.harness)}


def summarise(results: Results) -> Summary:
    """Take the results of a folder together.

    Raises:
        FileNotFoundError: It holds none.
        ValueError: A damaged file.
    """
    tasks = []
    for head in results.tasks():
        records = {method: results.records(head, method) for method in results.methods(head.name)}
        tasks.append(TaskSummary(head, records))
    harness = results.harness()
    return Summary(results.run, tasks, harness, {method: results.documents(method) for method in harness})


def _distinct(places: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for place in places:
        if place not in found:
            found.append(place)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _worded(values: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(values, dict):
        return {key: _worded(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_worded(value) for value in values]
    if isinstance(values, float) and not abs(values) < float("inf"):
        return str(values)
    return values
