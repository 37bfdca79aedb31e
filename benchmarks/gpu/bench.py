"""Check every kernel, measure the ceilings, then cell by cell ours and the peers, within a budget of time."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu import ceilings, table
from benchmarks.gpu.attempts import Outcome, attempt, difference
from benchmarks.gpu.cases import KERNELS, REHEARSAL, Cell
from benchmarks.gpu.correctness import checks
from benchmarks.gpu.implementations import DRAW, IMPLEMENTATIONS
from benchmarks.measure import Spread, alive, settle
from benchmarks.results import OURS, Results, Row, latest, read

FIRST_GUESS = {"forward": 40.0, "backward": 60.0, "decode": 8.0, "rotate_commit": 5.0}  # seconds of a cell
ALIKE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}  # largest difference from a peer of the same function
CHECKS_SHARE = 0.35  # of the budget
LOST = "The GPU computes nothing in this process any more; the rest is not measured."


@dataclass
class Budget:
    """Time that is left, and what a cell of each kernel has taken so far.

    Args:
        seconds: From the beginning; infinite without a limit.
    """

    seconds: float
    begin: float = field(default_factory=time.monotonic)
    taken: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.begin)

    def fits(self, cell: Cell) -> bool:
        """Whether another cell of this kernel is likely to end in time."""
        return self.taken.get(cell.kernel, FIRST_GUESS[cell.kernel]) <= self.left()

    def took(self, cell: Cell, seconds: float) -> None:
        """Remember the longest of a kernel's cells."""
        self.taken[cell.kernel] = max(self.taken.get(cell.kernel, 0.0), seconds)


def check_kernels(
    device: torch.device, results: Results, budget: Budget, *, thorough: bool = False, done: Set[str] = frozenset()
) -> set[str]:
    """Compare with float64; returns the kernels that failed.

    Args:
        device: Where kernels run.
        results: Gets a row per check.
        budget: A share of it is for this, unless ``thorough``.
        thorough: Every plan in every dtype and head_dim.
        done: Checks that are not repeated.
    """
    deadline = CHECKS_SHARE * budget.left()
    broken, counts = set(), dict.fromkeys(("ok", "failed", "skipped"), 0)
    for check in checks(device, thorough=thorough):
        dtype = str(check.dtype).removeprefix("torch.")
        case = f"check {check.kernel}, {check.name}, {dtype}, {check.shape}"
        if case in done:
            continue
        if not thorough and budget.seconds - budget.left() > deadline:
            row = Row(case, OURS, check.shape, dtype, status="skipped", reason="time budget")
        else:
            worst, reason = check.result()
            status = "failed" if reason else "ok"
            row = Row(case, OURS, check.shape, dtype, "error_over_allowed", Spread(*[worst] * 3), status, reason)
        results.append([row])
        counts[row.status] += 1
        if row.status == "failed":
            broken.add(check.kernel)
            say(f"WRONG {case}: {row.reason}")
            if not alive(device):
                say(LOST)
                return set(KERNELS)
    say(
        f"correctness: {counts['ok']} right, {counts['failed']} wrong, {counts['skipped']} not checked for lack of time"
    )
    return broken


def measure_ceilings(device: torch.device, results: Results, *, rehearsal: bool) -> None:
    """What the device does at best, and what planning 128K tokens costs the host."""
    cell = REHEARSAL[0] if rehearsal else Cell("forward", 8, 128 * 1024, kv_heads=8)
    results.append(ceilings.device_ceilings(device))
    results.append(ceilings.host_times(cell, device))


def measure_cells(
    cells: Sequence[Cell], device: torch.device, results: Results, budget: Budget, broken: set[str]
) -> bool:
    """Measure what fits into the budget; every cell gets rows. Returns whether ours went well everywhere."""
    well = True
    for number, cell in enumerate(cells, 1):
        if cell.kernel in broken:
            rows, seconds = _none(cell, "failed", "found wrong by the check before"), 0.0
        elif not budget.fits(cell):
            rows, seconds = _none(cell, "skipped", "time budget"), 0.0
        else:
            begin = time.monotonic()
            rows = _cell_rows(cell, device, budget)
            seconds = time.monotonic() - begin
            budget.took(cell, seconds)
        results.append(rows)
        failed = [row for row in rows if row.status == "failed" and row.impl.startswith(OURS)]
        well = well and not failed
        say(f"[{number}/{len(cells)}] {cell.name}: {rows[0].status}, {seconds:.1f} s" + _first_reason(failed))
        if any(row.status == "failed" for row in rows) and not alive(device):
            say(LOST)
            return False
    return well


def show(path: Path, cases: Sequence[str]) -> None:
    """Figures where matplotlib is there, then the table of these cases."""
    rows = latest(read(path))
    try:
        from benchmarks.gpu.plots import draw

        for figure in draw(path):
            say(f"figure {figure}")
    except ImportError as err:
        say(f"no figures: {err}")
    wanted = {*cases, ceilings.COPY, ceilings.PRODUCT, ceilings.HOST}
    shown = [row for row in rows if row["case"] in wanted]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table.verdicts(shown).items())
    say("\n" + table.summary(shown))
    say(f"{shown[0]['machine']}, commit {shown[0]['commit']}; aims: {counts}; all rows in {path}")


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _cell_rows(cell: Cell, device: torch.device, budget: Budget) -> list[Row]:
    try:
        problem = DRAW[cell.kernel](cell, device)
    except torch.OutOfMemoryError:
        return _none(cell, "skipped", "the cell's tensors do not fit into the GPU's memory")
    rows: list[Row] = []
    own: Outcome | None = None
    for implementation in IMPLEMENTATIONS[cell.kernel]:
        if own is not None and budget.left() <= 0:
            rows.append(
                Row(cell.name, implementation.name, cell.shape, cell.dtype, status="skipped", reason="time budget")
            )
            continue
        outcome = attempt(implementation, cell, problem, device)
        rows += outcome.rows
        if own is None:
            own = outcome
            if own.status != "ok":
                break  # nothing to compare with
        elif own.results is not None and outcome.results is not None:
            apart = difference(own.results, outcome.results)
            rows.append(_difference_row(cell, implementation.name, apart))
            if not apart <= ALIKE[cell.dtype]:
                reason = f"differs from {implementation.name} by {apart:.3g}"
                return [*_none(cell, "failed", reason), *(row for row in rows if row.impl != OURS)]
    settle(device)
    return rows


def _difference_row(cell: Cell, impl: str, apart: float) -> Row:
    return Row(cell.name, impl, cell.shape, cell.dtype, "difference", Spread(*[apart] * 3))


def _none(cell: Cell, status: str, reason: str, impl: str = OURS) -> list[Row]:
    return [Row(cell.name, impl, cell.shape, cell.dtype, status=status, reason=reason)]


def _first_reason(rows: Sequence[Row]) -> str:
    return f" ({rows[0].reason})" if rows else ""
