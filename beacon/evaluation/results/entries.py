"""What the harness made of a task: one entry, or one made of parts where a task is measured at several lengths.

An entry has ``documents`` and ``metrics`` (by name), and where it was not measured, or not at every length,
``status`` and ``reason``; ``again`` where it is tried again when the run goes on. One of parts has them in ``lengths``,
by the name of the length, which is that of its metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]

OF_A_PART = ("metrics", "status", "reason", "again", "length", "start", "stamp", "lengths")
WORSE = ("ok", "cannot-run", "failed")


def finished(entry: Entry | None) -> bool:
    """Whether it is not measured again."""
    return entry is not None and entry.get("status") != "failed" and not entry.get("again")


def parts(entry: Entry) -> dict[str, Entry]:
    """An entry by length; one that an older version measured at once has a metric for each."""
    found: Mapping[str, Entry] | None = entry.get("lengths")
    if found is not None:
        return dict(found)
    return {name: {**entry, "metrics": {name: metric}} for name, metric in entry.get("metrics", {}).items()}


def of_parts(some: Mapping[str, Entry]) -> dict[str, Any]:
    """The entry that parts make up."""
    some = dict(sorted(some.items(), key=lambda item: item[1].get("length", 0)))
    lost = {name: part for name, part in some.items() if "status" in part}
    first = next((part for part in some.values() if "status" not in part), next(iter(some.values())))
    made: dict[str, Any] = {name: value for name, value in first.items() if name not in OF_A_PART}
    made["metrics"] = {name: metric for part in some.values() for name, metric in part["metrics"].items()}
    if lost:
        made["status"] = max((part["status"] for part in lost.values()), key=WORSE.index)
        made["reason"] = "; ".join(f"{name}: {part['reason']}" for name, part in lost.items())
    return {**made, "lengths": some}


def added(before: Entry | None, entry: Entry) -> Entry:
    """An entry after an earlier one of the same task, of which parts stay."""
    if before is None or "lengths" not in entry:
        return entry
    return of_parts({**parts(before), **entry["lengths"]})


def better(one: Entry | None, other: Entry) -> Entry:
    """Of two processes' entries the better one, length by length; of equals the second."""
    if one is None:
        return other
    if "lengths" not in one and "lengths" not in other:
        return other if _rank(other) <= _rank(one) else one
    first, second = parts(one), parts(other)
    return of_parts({**first, **{name: better(first.get(name), part) for name, part in second.items()}})


def _rank(entry: Entry) -> tuple[int, bool]:
    return WORSE.index(entry.get("status", "ok")), bool(entry.get("again"))


def suite_weights(documents: Sequence[int], weighted: bool) -> list[float]:
    """How much each task counts in its suite's mean."""
    total = sum(documents)
    return [number / total if weighted else 1 / len(documents) for number in documents]
