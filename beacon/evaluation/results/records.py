"""What came of one item, as a line of JSON."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

logger = logging.getLogger(__name__)

Status: TypeAlias = Literal["ok", "cannot-run", "failed"]
STATUSES: tuple[str, ...] = get_args(Status)  # the better ones first
Parsed = TypeVar("Parsed")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a method made of an item.

    Args:
        item: Its name within the task.
        place: Where it belongs in tables and figures.
        status: ``ok``; ``cannot-run`` (a result too: the method cannot read such an item); ``failed`` (a mistake).
        scores: By metric; empty but for ``ok``.
        output: What was written, if anything.
        seconds: How long it took.
        reason: For all but ``ok``.
        again: Of what cannot run: whether it is tried again when the run goes on, for it may be otherwise then.
        start: Which start of the run made it, from 1, as ``run.json`` lists them; None in folders that are older.
    """

    item: str
    place: Mapping[str, Any]
    status: Status
    scores: Mapping[str, float] = field(default_factory=dict)
    output: str | None = None
    seconds: float = 0.0
    reason: str | None = None
    again: bool = False
    start: int | None = None

    @property
    def finished(self) -> bool:
        """Whether its item is not run again."""
        return self.status != "failed" and not self.again

    def to_line(self) -> str:
        """As JSON in one line; numbers that are not finite stand as words, which JSON has no numbers for."""
        scores = {name: value if math.isfinite(value) else str(value) for name, value in self.scores.items()}
        return json.dumps({**asdict(self), "scores": scores}, allow_nan=False)

    @classmethod
    def from_line(cls, line: str | bytes) -> Record:
        """Read a line.

        Raises:
            ValueError: It is no record.
        """
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        kinds: dict[str, Any] = {"item": str, "place": dict, "scores": dict, "seconds": (int, float)}
        wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
        if wrong or values.get("status") not in STATUSES:
            raise ValueError(f"no {wrong[0] if wrong else 'status'}")
        try:
            return cls(**{**values, "scores": {name: float(value) for name, value in values["scores"].items()}})
        except TypeError as err:
            raise ValueError(str(err)) from err


def append_record(path: Path, record: Record) -> None:
    """Write a record down at once; see :func:`append_line`."""
    append_line(path, record.to_line())


def append_line(path: Path, line: str) -> None:
    """Write a line down at once. One that an earlier process left without its end is removed first.

    Args:
        path: The file, which one process at a time writes; made with its folder if missing.
        line: What to add.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")


def read_records(path: Path) -> list[Record]:
    """The records of a file, in the order of its lines; damaged lines are left out, and logged.

    Args:
        path: A file that :func:`append_record` wrote, or none (no records).
    """
    return list(read_lines(path, Record.from_line))


def read_lines(path: Path, parse: Callable[[bytes], Parsed]) -> Iterator[Parsed]:
    """What a file says, line by line; lines that ``parse`` raises a ValueError for are left out, and logged."""
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            yield parse(line)
        except ValueError as err:  # UnicodeDecodeError and JSONDecodeError among them
            logger.warning("%s line %d is damaged (%s): it counts as not run", path, number, err)


def best_records(records: Iterable[Record]) -> dict[str, Record]:
    """One record for each item: of several the best status, and of the same status the last (that will stay so)."""
    best: dict[str, Record] = {}
    for record in records:
        other = best.get(record.item)
        if other is None or _rank(record) <= _rank(other):
            best[record.item] = record
    return best


def _rank(record: Record) -> tuple[int, bool]:
    return STATUSES.index(record.status), record.again
