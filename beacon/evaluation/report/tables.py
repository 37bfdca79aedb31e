"""Tables of a report, and how they look in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beacon.evaluation.report.looks import Look, axis_label, look, number, place_value
from beacon.evaluation.report.statistics import Estimate
from beacon.evaluation.report.summary import Group, Summary, TaskSummary


@dataclass(frozen=True)
class Cell:
    """A field of a table.

    Args:
        text: What stands there.
        value: By which it is sorted; None sorts by the text.
        note: More about it, for those who ask.
    """

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: What it holds.
        head: Names of the columns.
        rows: As many fields as columns each; the first names the row.
        note: What stands under it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def matrix(task: TaskSummary, metric: str) -> Table:
    """A metric by method (rows) and place (columns), with the mean over all items."""
    shown = look(metric, task.scores(metric))
    better = "higher" if task.head.metrics[metric] else "lower"
    axis = task.columns
    columns = [] if axis is None else task.values(axis)
    whole = not (shown.cost and columns)
    rows = []
    for method in task.records:
        cells = [_estimate_cell(task.group(method, **{str(axis): value}), metric, shown) for value in columns]
        if whole:
            cells.append(_estimate_cell(task.group(method), metric, shown, interval=True))
        rows.append((Cell(method), *cells))
    head = [place_value(axis, value) for value in columns] if axis is not None else []
    by = f" by {axis_label(axis)}" if axis is not None else ""
    by += "".join(f", {key} {place_value(key, value)}" for key, value in task.constants.items())
    note = "In brackets: 95 % interval of the mean, over the texts that items are of, if these are six or more."
    return Table(
        f"{shown.label}{by} ({better} is better)",
        ("method", *head, *(["all"] if whole else [])),
        tuple(rows),
        note if any("[" in cell.text for row in rows for cell in row) else "",
    )


def every_place(task: TaskSummary) -> Table:
    """All metrics of all methods at all places, with intervals and counts."""
    looks = {metric: look(metric, task.scores(metric)) for metric in task.head.metrics}
    rows = []
    for group in task.groups(*task.keys):
        place = [_place_cell(key, group.place.get(key)) for key in task.keys]
        for metric, shown in looks.items():
            found = group.metrics[metric]
            numbers = [_number_cell(value, shown) for value in (found.value, found.low, found.high)]
            counts = [Cell(str(count), count) for count in (found.n, group.cannot_run + group.failed + group.missing)]
            rows.append((Cell(group.method), *place, Cell(shown.label), *numbers, *counts))
    head = ("method", *task.keys, "metric", "mean", "low", "high", "items", "without")
    return Table("Every place", head, tuple(rows), "low, high: 95 % interval. without: items that have no score.")


def problems(task: TaskSummary) -> Table | None:
    """What did not run, with the reasons; None where everything did."""
    axis = () if task.columns is None else (task.columns,)
    counts: Counter[tuple[str, str, str, str]] = Counter()
    order: dict[tuple[str, str, str, str], Any] = {}
    for method, records in task.records.items():
        for record in records:
            if record.status != "ok":
                where = ", ".join(f"{key} {place_value(key, record.place.get(key))}" for key in axis)
                key = (method, where, record.status.replace("-", " "), record.reason or "")
                counts[key] += 1
                order.setdefault(key, record.place.get(axis[0]) if axis else None)
        missing = task.group(method).missing
        if missing:
            key = (method, "", "not run", "the run has not come to them, or their lines were damaged")
            counts[key], order[key] = missing, None
    if not counts:
        return None
    rows = [
        (Cell(method), _sorted_by(Cell(where), order[method, where, status, reason]), Cell(status))
        + (Cell(str(count), count), Cell(reason))
        for (method, where, status, reason), count in counts.items()
    ]
    return Table("What did not run", ("method", "where", "status", "items", "reason"), tuple(rows))


def standard(summary: Summary) -> list[Table]:
    """Of the harness: means over suites, tasks, and what did not run."""
    order = summary.run["methods"]
    methods = sorted(summary.harness, key=lambda name: order.index(name) if name in order else len(order))
    found = {method: summary.harness[method] for method in methods}
    tables = []
    for kind, title in (("suites", "Suites (means over their tasks)"), ("tasks", "Tasks")):
        names = dict.fromkeys(
            (name, metric) for m in found.values() for name in m[kind] for metric in _of(m, kind, name)
        )
        rows = [
            (
                Cell(name),
                Cell(f"length {metric}" if metric.isdigit() else metric),
                _documents_cell([m for m in found.values() if _of(m, kind, name).get(metric)], kind, name, metric),
                *(_harness_cell(m, kind, name, metric) for m in found.values()),
            )
            for name, metric in names
        ]
        if rows:
            note = "± standard error" + (", as the harness tells it." if kind == "tasks" else ".")
            tables.append(Table(title, (kind.removesuffix("s"), "metric", "documents", *found), tuple(rows), note))
    reasons = [
        (Cell(method), Cell(name), Cell(entry["status"].replace("-", " ")), Cell(entry["reason"]))
        for method, measured in found.items()
        for name, entry in measured["tasks"].items()
        if "status" in entry
    ]
    if reasons:
        tables.append(Table("What did not run", ("method", "task", "status", "reason"), tuple(reasons)))
    return tables


def conditions(summary: Summary) -> Table:
    """Where and with what results were taken."""
    run, settings = summary.run, summary.run["settings"]
    of_starts = {
        what: list(dict.fromkeys(map(words, run["starts"])))
        for what, words in (("machine", _machine), ("versions", _versions), ("commit", _commit))
    }
    rows = {
        "started": ", ".join(dict.fromkeys(start["utc"] for start in run["starts"])),
        **{what: "; ".join(words) for what, words in of_starts.items()},
        "model": ", ".join(
            [*dict.fromkeys(filter(None, (start.get("model") for start in run["starts"])))]
            + [f"{name} {value}" for name, value in settings["model"].items()]
        ),
        "beacons": ", ".join(f"{name} {_plain(value)}" for name, value in settings["config"].items()),
        "seed": str(settings["seed"]),
        "computed on": f"{settings['device']}, in {settings['dtype']}",
        **{
            f"options of {name}": ", ".join(f"{option} {_plain(value)}" for option, value in options.items())
            for name, options in run.get("options", {}).items()
            if options
        },
    }
    differing = [what for what, words in of_starts.items() if len(words) > 1]
    note = (
        f"Starts differ in {' and '.join(differing)}: results may be of different code, or speed." if differing else ""
    )
    return Table("Conditions", ("what", "value"), tuple((Cell(k), Cell(v)) for k, v in rows.items()), note)


def markdown(table: Table, level: int = 3) -> str:
    """A table under its title."""
    lines = [
        "| " + " | ".join(map(_escaped, table.head)) + " |",
        "|" + "|".join([" --- ", *(" ---: " for _ in table.head[1:])]) + "|",
        *("| " + " | ".join(_escaped(cell.text) for cell in row) + " |" for row in table.rows),
    ]
    note = f"\n{table.note}\n" if table.note else ""
    return f"{'#' * level} {table.title}\n\n" + "\n".join(lines) + "\n" + note


def _estimate_cell(group: Group, metric: str, shown: Look, interval: bool = False) -> Cell:
    found: Estimate = group.metrics[metric]
    total = group.ok + group.cannot_run + group.failed + group.missing
    if not found.n:
        counts = {"cannot run": group.cannot_run, "failed": group.failed, "not run": group.missing}
        words = max(counts, key=lambda word: counts[word])
        return Cell(words if counts[words] else "–", math.nan, f"0 of {total} items")
    text, note = shown.write(found.value), f"{found.n} items"
    if found.low is not None and found.high is not None:
        span = "[" + ", ".join(shown.write(end).removesuffix(shown.sign) for end in (found.low, found.high)) + "]"
        text += f" {span}" if interval else ""
        note += f", 95 % interval {span}"
    lost = total - group.ok  # what was measured without this metric has none (later turns no first one)
    if lost:
        text += f" ({found.n} of {found.n + lost})"
    return Cell(text, found.value, note)


def _number_cell(value: float | None, shown: Look) -> Cell:
    if value is None or math.isnan(value):
        return Cell("–", math.nan)
    return Cell(shown.write(value), value)


def _place_cell(key: str, value: Any) -> Cell:
    return _sorted_by(Cell("" if value is None else place_value(key, value)), value)


def _sorted_by(cell: Cell, value: Any) -> Cell:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(cell.text, float(value)) if is_number else cell


def _of(measured: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = measured[kind].get(name, {}).get("metrics", {})
    return found


def _documents_cell(measured: Sequence[Mapping[str, Any]], kind: str, name: str, metric: str) -> Cell:
    """Of how many documents a metric is; of several, where methods were measured on other numbers."""
    entries = [m[kind][name] for m in measured]
    counts = [entry["metrics"][metric].get("documents", entry.get("documents")) for entry in entries]
    known = sorted({count for count in counts if count is not None})
    return Cell(" / ".join(map(str, known)) or "–", known[0] if known else math.nan)


def _harness_cell(measured: Mapping[str, Any], kind: str, name: str, metric: str) -> Cell:
    found = _of(measured, kind, name).get(metric)
    if found is None:
        return Cell("–", math.nan)
    error = "" if found["stderr"] is None else f" ± {number(found['stderr'])}"
    return Cell(number(found["value"]) + error, found["value"], f"{measured[kind][name].get('documents')} documents")


def _machine(start: Mapping[str, Any]) -> str:
    machine = start["machine"]
    hardware = machine["gpu"] and f"{machine['gpus']} × {machine['gpu']}"
    return f"{hardware or machine['cpu']}, {machine['threads']} threads, {start['processes']} processes"


def _versions(start: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in start["versions"].items() if version)


def _commit(start: Mapping[str, Any]) -> str:
    commit = start["commit"]
    return "no repository" if commit is None else commit[:12] + (" with changes" if start["dirty"] else "")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
