"""One table of results per kind of run: a row per measurement, appended, never rewritten."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import Stamp
from benchmarks.measure import Spread

OURS = "beacon"  # the impl whose row says that a cell is finished
SAME = ("machine", "torch", "triton", "kernels")  # a finished cell counts while these stay
COLUMNS = (
    *("case", "impl", "shape", "dtype", "metric", "p20", "p50", "p80", "status", "reason"),
    *(field.name for field in dataclasses.fields(Stamp)),
    "utc",
)


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Args:
        case: Name of the cell.
        impl: Who computed it.
        shape: The cell's sizes.
        dtype: Of the tensors.
        metric: What was measured; empty where nothing was.
        value: Its quantiles.
        status: ``ok``, ``failed`` (wrong, or it broke), ``unavailable`` (cannot run here) or ``skipped``.
        reason: For all but ``ok``.
    """

    case: str
    impl: str
    shape: str
    dtype: str
    metric: str = ""
    value: Spread | None = None
    status: str = "ok"
    reason: str = ""


class Results:
    """A CSV file that grows.

    Args:
        path: The file; it and its folder are made with the first rows.
        stamp: Where and with what the rows are taken.

    Raises:
        ValueError: The file has other columns.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path, self.stamp = path, stamp
        if path.exists():
            with path.open(newline="") as file:
                found = tuple(next(csv.reader(file), ()))
            if found != COLUMNS:
                raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got {', '.join(found)}; move it.")

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows down at once: a cell stands in the file whole or not at all."""
        utc = datetime.now(UTC).isoformat(timespec="milliseconds")
        stamped = [self._flat(row) | dataclasses.asdict(self.stamp) | {"utc": utc} for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not begun:
                writer.writeheader()
            writer.writerows(stamped)

    def finished(self) -> set[str]:
        """Cells that the same kernels were measured on, on the same machine with the same software."""
        mine = dataclasses.asdict(self.stamp)
        return {
            row["case"]
            for row in read(self.path)
            if row["impl"] == OURS and row["status"] == "ok" and all(row[name] == mine[name] for name in SAME)
        }

    @staticmethod
    def _flat(row: Row) -> dict[str, str]:
        flat = {name: getattr(row, name) for name in ("case", "impl", "shape", "dtype", "metric", "status", "reason")}
        values = ("", "", "") if row.value is None else (f"{v:.6g}" for v in dataclasses.astuple(row.value))
        return flat | dict(zip(("p20", "p50", "p80"), values, strict=True))


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of every cell and impl the rows of its last run, cells in the order in which they first came."""
    newest: dict[tuple[str, str], str] = {}
    for row in rows:
        newest[row["case"], row["impl"]] = row["utc"]
    order = {case: number for number, case in enumerate(dict.fromkeys(row["case"] for row in rows))}
    kept = [row for row in rows if newest[row["case"], row["impl"]] == row["utc"]]
    return sorted(kept, key=lambda row: order[row["case"]])
