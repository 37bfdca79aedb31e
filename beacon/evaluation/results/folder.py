"""A folder of results.

::

    run.json                  settings, and where and with what each start of the run was made
    TASK/task.json            the task's metrics, items and options, with the same settings and stamp
    TASK/METHOD.jsonl         a line for every item; METHOD.rank1.jsonl is what a second process did
    harness/METHOD.json       what `evaluate_tasks` returned, likewise
    harness/answers/METHOD.jsonl      a line for every answer to a request of the harness
    harness/documents/METHOD.jsonl    a line for every metric of a task: the scores of its documents

Lines are only ever added, so that a process that is killed loses at most the item it was at.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from beacon.evaluation.results.answers import KeptAnswers
from beacon.evaluation.results.entries import added, better
from beacon.evaluation.results.records import (
    Record,
    append_line,
    append_record,
    best_records,
    read_lines,
    read_records,
)
from beacon.evaluation.suite import Item, Task
from beacon.weights import whole

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RUN, TASK, HARNESS, FIGURES = "run.json", "task.json", "harness", "figures"
ANSWERS, DOCUMENTS = "answers", "documents"  # folders of the harness's
REPORT = ("report.html", "report.md", "summary.json")
PLAIN = " ,()+="  # left as they are in names of files, beside letters, digits and _.-~
OF_A_PROCESS = re.compile(r"(?P<method>.*?)(\.rank\d+)?")
HEAD = ("task", "metrics", "items", "place")  # what task.json must have
NEW = ("tokenizer", "files")  # settings and options that older folders lack
PARTS = ("tasks", "suites")  # and what the harness measured


@dataclass(frozen=True)
class TaskHead:
    """What is known of a task beside its results.

    Args:
        name: As the command names it.
        metrics: By name, each with whether more of it is better; the first is the main one.
        items: Names and places, in the order of running.
        clusters: What names the text that an item has in common with others, by the item's name. Items of which it is
            not told (in folders of older versions) count as one text.
    """

    name: str
    metrics: Mapping[str, bool]
    items: tuple[tuple[str, Mapping[str, Any]], ...]
    clusters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, items: Iterable[Item]) -> TaskHead:
        """The head of a task with these items.

        Raises:
            ValueError: Two items of one name.
        """
        items = tuple(items)
        kept = tuple((item.name, dict(item.place)) for item in items)
        counts = Counter(name for name, _ in kept)
        twice = next((name for name, count in counts.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"items of a task must have names of their own, got {twice!r} twice in {task.name}.")
        clusters = {item.name: f"item {item.name}" if item.cluster is None else item.cluster for item in items}
        return cls(task.name, dict(task.metrics), kept, clusters)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        named = {name: {"cluster": cluster} for name, cluster in self.clusters.items()}
        items = [{"name": name, "place": place, **named.get(name, {})} for name, place in self.items]
        return {"task": self.name, "metrics": dict(self.metrics), "items": items}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskHead:
        """The reverse."""
        items = tuple((item["name"], item["place"]) for item in values["items"])
        clusters = {item["name"]: item["cluster"] for item in values["items"] if item.get("cluster") is not None}
        return cls(values["task"], values["metrics"], items, clusters)

    def cluster(self, item: str) -> str | None:
        """What counts as one with an item of this name, where items are resampled; None where it is not told."""
        return self.clusters.get(item)


class Results:
    """A folder of results, to be read or added to.

    Args:
        path: The folder; it need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def begun(self) -> bool:
        """Whether results are there, or their beginning."""
        return (self.path / RUN).is_file()

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def run(self) -> dict[str, Any]:
        """What ``run.json`` holds: ``settings`` and ``starts``.

        Raises:
            FileNotFoundError: No folder of results.
            ValueError: The file is damaged.
        """
        if not self.begun:
            raise FileNotFoundError(f"{self.path} must be a folder of results, got none with a {RUN}; run beacon eval.")
        return _read(self.path / RUN, ("settings", "methods", "starts"))

    @property
    def starts(self) -> int:
        """How many starts there were."""
        return len(self.run["starts"])

    def tasks(self) -> list[TaskHead]:
        """The tasks that were begun, in the order of their first start.

        Raises:
            ValueError: A damaged file.
        """
        files = sorted(self.path.glob(f"*/{TASK}"))
        begun = [_read(file, HEAD) for file in files]
        return [TaskHead.from_json(values) for values in sorted(begun, key=lambda values: values["place"])]

    def methods(self, task: str) -> list[str]:
        """Methods that have read an item of a task: in the order of the run's, then by name."""
        found = {_method(file) for file in self._of(task).glob("*.jsonl")}
        order = self.run["methods"]
        return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))

    def records(self, task: TaskHead, method: str) -> list[Record]:
        """What a method made of the items of a task, in their order, however many processes did it."""
        lines = (record for file in self._files(task.name, method) for record in read_records(file))
        best = best_records(lines)
        return [best[name] for name, place in task.items if name in best and best[name].place == place]

    def harness(self) -> dict[str, dict[str, Any]]:
        """What the harness measured, by method; processes' parts together. Damaged files are left out, and logged."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted((self.path / HARNESS).glob("*.json")):
            part = _read_whole(file, PARTS)
            if part is not None:
                mine = found.setdefault(_method(file), {**part, "tasks": {}, "suites": {}})
                mine["suites"] |= part["suites"]
                mine["tasks"] |= {name: better(mine["tasks"].get(name), entry) for name, entry in part["tasks"].items()}
        return found

    def answers(self, method: str, rank: int = 0, count: int = 1) -> KeptAnswers:
        """What a method has answered to the harness's requests, all processes' together, to be added to by one."""
        folder = self.path / HARNESS / ANSWERS
        files = [file for file in sorted(folder.glob("*.jsonl")) if _method(file) == method]
        return KeptAnswers(folder / f"{_file_name(method, rank)}.jsonl", files, rank, count)

    def documents(self, method: str) -> dict[str, dict[str, dict[str, float]]]:
        """Scores of the harness's documents by task and metric; of what was measured twice, the last."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for file in sorted((self.path / HARNESS / DOCUMENTS).glob("*.jsonl")):
            if _method(file) == method:
                for task, metric, scores in read_lines(file, _document_scores):
                    found.setdefault(task, {})[metric] = scores
        return found

    # -- writing -------------------------------------------------------------------------------------------------------

    def check(
        self, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None, tasks: Sequence[TaskHead] = ()
    ) -> None:
        """See whether such results may go into the folder; touches nothing.

        Args:
            settings: As of :meth:`begin`, like the others.
            options: Compared for the tasks and methods that the folder has; a method without any has none.
            tasks: Compared by their items.

        Raises:
            NotADirectoryError: It is a file.
            ValueError: It holds something else, or results of other settings or items; says which.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"results need a folder, got the file {self.path}; name another.")
        if not self.begun:
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} must be empty or hold results, got other files; name another folder.")
            return
        run, mine = self.run, _plain(options or {})
        self._check_same("settings", run["settings"], _as_known(run["settings"], _plain(settings)))
        theirs = {**{name: {} for name in run["methods"]}, **run.get("options", {})}  # no options are options, too
        mine = {name: _as_known(theirs.get(name, {}), values) for name, values in mine.items()}
        sides = [{name: some[name] for name in theirs if name in mine} for some in (theirs, mine)]
        self._check_same("options", *_without_places(*sides))
        for head in tasks:
            known = _read_whole(self._of(head.name) / TASK, HEAD)
            if known is not None:
                self._check_same(f"items of {head.name}", _by_name(known), _by_name(_plain(head.to_json())))

    def begin(
        self,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        stamp: Mapping[str, Any],
        tasks: Sequence[TaskHead],
        methods: Sequence[str],
    ) -> None:
        """Write down what is about to be measured, beside what the folder holds already.

        Args:
            settings: What must be the same whenever the run goes on; JSON values.
            options: Of tasks and methods, by their names; JSON values. They must be the same as far as both have them.
            stamp: Where and with what this start is made.
            tasks: What is measured.
            methods: By whom.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        before = self.run if self.begun else {"starts": [], "methods": []}
        values = {
            "settings": settings,
            "options": {**before.get("options", {}), **options},
            "methods": list(dict.fromkeys([*before["methods"], *methods])),
            "starts": [*before["starts"], stamp],
        }
        _write(self.path / RUN, values)
        for head in tasks:
            file = self._of(head.name) / TASK
            if _read_whole(file, HEAD) is None:
                place = 1 + len(list(self.path.glob(f"*/{TASK}")))  # among the tasks
                known = {"options": options.get(head.name, {}), "settings": settings, "stamp": stamp}
                _write(file, {**head.to_json(), "place": place, **known})

    def clear(self) -> None:
        """Remove results and reports, and nothing else."""
        if not self.begun:
            return
        for head in self.path.glob(f"*/{TASK}"):
            shutil.rmtree(head.parent)
        for folder in (HARNESS, FIGURES):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for name in (*REPORT, RUN):
            (self.path / name).unlink(missing_ok=True)

    def append(self, task: str, method: str, record: Record, rank: int = 0) -> None:
        """Write down what a method made of an item, at once."""
        append_record(self._of(task) / f"{_file_name(method, rank)}.jsonl", record)

    def add_harness(self, method: str, measured: Mapping[str, Any], rank: int = 0) -> None:
        """Write down what ``evaluate_tasks`` returned, beside what it did before for the same method."""
        file = self.path / HARNESS / f"{_file_name(method, rank)}.json"
        before = _read_whole(file, PARTS) or {}
        merged = {kind: {**before.get(kind, {}), **measured[kind]} for kind in PARTS}
        known = before.get("tasks", {})
        merged["tasks"] |= {name: added(known.get(name), entry) for name, entry in measured["tasks"].items()}
        _write(file, {**before, **measured, **merged})

    def add_documents(self, method: str, task: str, metric: str, scores: Mapping[str, float], rank: int = 0) -> None:
        """Write down the scores of a task's documents, by their names."""
        file = self.path / HARNESS / DOCUMENTS / f"{_file_name(method, rank)}.jsonl"
        append_line(file, json.dumps({"task": task, "metric": metric, "scores": dict(scores)}))

    # -- names ---------------------------------------------------------------------------------------------------------

    def _of(self, task: str) -> Path:
        return self.path / quote(task, safe=PLAIN)

    def _files(self, task: str, method: str) -> Iterator[Path]:
        return (file for file in sorted(self._of(task).glob("*.jsonl")) if _method(file) == method)

    def _check_same(self, what: str, theirs: Any, mine: Any) -> None:
        changes = list(differences(theirs, mine))
        if changes:
            more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
            raise ValueError(
                f"{self.path} must have been made with the same {what}, got {'; '.join(changes[:4])}{more}. Name "
                "another folder, or overwrite it (--overwrite)."
            )


def _document_scores(line: bytes) -> tuple[str, str, dict[str, float]]:
    values = json.loads(line)
    known = isinstance(values, dict) and isinstance(values.get("scores"), dict)
    if not known or not all(isinstance(values.get(name), str) for name in ("task", "metric")):
        raise ValueError("no scores of documents")
    return values["task"], values["metric"], {name: float(value) for name, value in values["scores"].items()}


def _file_name(method: str, rank: int) -> str:
    return quote(method, safe=PLAIN) + (f".rank{rank}" if rank else "")


def _method(file: Path) -> str:
    match = OF_A_PROCESS.fullmatch(file.stem)
    assert match is not None
    return unquote(match["method"])


def _by_name(head: Mapping[str, Any]) -> dict[str, Any]:
    """A head of which differences can be told item by item."""
    order = list(head["metrics"])  # the first is the main one
    items = {item["name"]: {key: value for key, value in item.items() if key != "name"} for item in head["items"]}
    return {"metrics": head["metrics"], "order": order, **items}


def differences(theirs: Any, mine: Any, name: str = "") -> Iterator[str]:
    """What differs between JSON values, in words: dotted names with both values."""
    if isinstance(theirs, dict) and isinstance(mine, dict) and (theirs or mine):
        for key in dict.fromkeys((*theirs, *mine)):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(theirs.get(key, "absent"), mine.get(key, "absent"), inner)
    elif theirs != mine:
        yield f"{name} {_short(theirs)} (now {_short(mine)})"


def _as_known(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """Without what folders of earlier versions do not tell."""
    return {name: value for name, value in mine.items() if name in theirs or name not in NEW}


def _without_places(*sides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Options without where data are, as far as both sides know what is in them."""
    told = {name for name in sides[0] if all("files" in side[name] for side in sides)}
    return [
        {name: {k: v for k, v in given.items() if name not in told or k != "data"} for name, given in side.items()}
        for side in sides
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(values: Any) -> Any:
    """Values as they come back from a file."""
    return json.loads(json.dumps(values))


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        partial.write_text(json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1) + "\n", encoding="utf-8")


def _read_whole(file: Path, needed: Iterable[str]) -> dict[str, Any] | None:
    """What a file holds; None where there is none, or (logged) a damaged one."""
    if not file.exists():
        return None
    try:
        return _read(file, needed)
    except ValueError as err:
        logger.warning("%s It counts as not there.", err)
        return None


def _read(file: Path, needed: Iterable[str]) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as err:
        raise ValueError(
            f"{file} must be JSON, got a damaged file ({err}); remove it, or overwrite the folder."
        ) from err
    missing = [name for name in needed if not isinstance(values, dict) or name not in values]
    if missing:
        raise ValueError(
            f"{file} must have {', '.join(missing)}, got a file without; remove it, or overwrite the folder."
        )
    found: dict[str, Any] = values
    return found
