"""The record of a run's evaluations: a line of JSON each, appended, cut back when a run goes on from earlier."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

EVALUATIONS = "evaluations.jsonl"  # in the folder of a training run


def append_record(path: Path, step: int, tokens: int, metrics: dict[str, float]) -> None:
    """Add one evaluation to a record, as a line of JSON with ``step``, ``tokens`` and the metrics by name.

    A line that an earlier write left without its end is removed. A metric that is not finite is written as null.

    Args:
        path: The record; made with its folder if missing.
        step: Optimizer steps done.
        tokens: Tokens trained on.
        metrics: As :class:`beacon.training.LongContextEvaluation` returns them.

    Raises:
        ValueError: A metric is named ``step`` or ``tokens``.
    """
    taken = {"step", "tokens"} & set(metrics)
    if taken:
        raise ValueError(f"metrics must not be named step or tokens, got {', '.join(sorted(taken))}; rename them.")
    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    line = json.dumps({"step": step, "tokens": tokens, **values}, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(len(_ended(file.read())))
        file.write(line.encode())


def read_records(path: Path) -> list[dict[str, float]]:
    """The evaluations of a record, in the order they were added; a last line that was cut is left out.

    Args:
        path: A record that :func:`append_record` wrote, or none (no evaluations).

    Returns:
        By name, ``step`` and ``tokens`` included; NaN for what was not finite.

    Raises:
        ValueError: Another line is no record.
    """
    return [record for record, _ in _records(path)]


def drop_after(path: Path, step: int) -> None:
    """Remove the evaluations that came after a step, for training goes on from there.

    The file is replaced at once or not at all.

    Args:
        path: The record; none is as good as an empty one.
        step: The last step that stays.

    Raises:
        ValueError: A line is no record.
    """
    records = list(_records(path))
    kept = [line for record, line in records if record["step"] <= step]
    if len(kept) == len(records):
        return
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(b"".join(kept))
    os.replace(new, path)


def _records(path: Path) -> Iterator[tuple[dict[str, float], bytes]]:
    """Every record with its line."""
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(_ended(content).splitlines(keepends=True), 1):
        try:
            values = json.loads(line)
            record = {name: math.nan if value is None else value for name, value in values.items()}
            known = isinstance(record["step"], int) and isinstance(record["tokens"], int)
        except (ValueError, AttributeError, KeyError) as err:
            raise _no_record(path, number, line) from err
        if not known:
            raise _no_record(path, number, line)
        yield record, line


def _no_record(path: Path, number: int, line: bytes) -> ValueError:
    return ValueError(
        f"{path} must hold one evaluation a line, with step and tokens, got line {number}: {line[:80]!r}; remove it."
    )


def _ended(content: bytes) -> bytes:
    """The lines that have their end."""
    return content[: content.rfind(b"\n") + 1]
