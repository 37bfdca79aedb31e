"""Find the fastest tiles for this GPU: check a candidate, time it on a few cells, write the winner into the table.

A candidate is timed by standing in the table while a kernel is called as always. Those that are far from the best on
the first cell are not timed on the others. The winner must beat the table's tile by ``MARGIN``, else that one stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch

from beacon_kernels.testing import SHARED_LIMITS
from beacon_kernels.tiles import ARCHITECTURES, TABLES, Tile
from benchmarks.gpu import decoding, ours, plans
from benchmarks.gpu.attempts import Implementation, attempt
from benchmarks.gpu.bench import LOST, Budget, say
from benchmarks.gpu.candidates import CANDIDATES, candidates, persistent
from benchmarks.gpu.cases import Cell, K
from benchmarks.gpu.comparisons import Sizes
from benchmarks.gpu.correctness import check_tiles
from benchmarks.gpu.retile import Entry, written
from benchmarks.measure import alive
from benchmarks.results import OURS, Results, Row

MARGIN = 1.02
FAR = 1.15  # times the best so far on the first cell: no further cells
CELLS = {  # ratio, length, heads, kv_heads
    "forward": ((2, 32 * K, 32, 8), (8, 32 * K, 32, 32), (32, 32 * K, 32, 8)),
    "forward_middle": ((16, 32 * K, 32, 32),),
    "forward_narrow": ((128, 32 * K, 32, 8), (128, 128 * K, 32, 8)),
    "backward_dq": ((8, 32 * K, 32, 8), (2, 8 * K, 32, 32)),
    "backward_dq_middle": ((16, 32 * K, 32, 32),),
    "backward_dq_narrow": ((128, 32 * K, 32, 8),),
    "backward_dkv": ((8, 32 * K, 32, 8), (2, 8 * K, 32, 32)),
    "decode": ((2, 128 * K, 32, 8), (8, 32 * K, 32, 8), (2, 128 * K, 32, 32)),
}
REHEARSED = ("forward_narrow", "decode")


@dataclass
class Search:
    """The search for one entry of the table.

    Args:
        entry: Which one.
        problems: The cells' tensors.
        device: Where they are.
        results: Where every figure goes.
        times: Milliseconds on every cell, of the tiles that are right and not far from the best.
    """

    entry: Entry
    problems: list[Any]
    device: torch.device
    results: Results
    times: dict[Tile, list[float]] = field(default_factory=dict)

    @property
    def best(self) -> Tile:
        """The fastest so far."""
        return min(self.times, key=lambda tile: geometric_mean(self.times[tile]))

    def wrong(self, *, thorough: bool) -> str:
        """What is wrong with the kernel as the table stands."""
        heads = (2, 1) if self.device.type == "cpu" else (8, 2)
        sizes = Sizes(getattr(torch, self.entry.dtype), *heads, self.entry.head_dim)
        return check_tiles(self.entry.op, sizes, self.device, thorough=thorough)

    def try_all(self, tiles: Iterable[Tile], budget: Budget) -> None:
        """Check and time tiles while there is time.

        Raises:
            RuntimeError: A tile took the GPU down with it.
        """
        for tile in tiles:
            if budget.left() > 0 and tile not in self.times:
                with self.entry.holding(tile):
                    self._try(tile)
                if not alive(self.device):
                    raise RuntimeError(f"{LOST} It was {written(tile)} of {self.entry}.")

    def _try(self, tile: Tile) -> None:
        impl = f"{OURS} {written(tile)}"
        wrong = self.wrong(thorough=False)
        rows: list[Row] = []
        found: list[float] = []
        for problem in [] if wrong else self.problems:
            outcome = attempt(Implementation(impl, _build(self.entry)), problem.cell, problem, self.device)
            rows += outcome.rows
            found += [row.value.p50 for row in outcome.rows if row.metric == "ms" and row.value is not None]
            if not found or (self.times and found[0] > FAR * min(times[0] for times in self.times.values())):
                break
        if wrong:
            cell = self.problems[0].cell
            rows = [Row(cell.name, impl, cell.shape, cell.dtype, status="failed", reason=wrong)]
        self.results.append(replace(row, case=f"tune {self.entry.kernel}: {row.case}") for row in rows)
        if len(found) == len(self.problems):
            self.times[tile] = found


def tune(
    device: torch.device,
    results: Results,
    budget: Budget,
    *,
    kernels: Sequence[str] | None,
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    write: bool,
) -> int:
    """Tune entry after entry; 0, or 1 where the table's own tile is wrong.

    Raises:
        ValueError: No such table, or a GPU that the table has no column for.
    """
    architecture = _architecture(device)
    names = list(kernels or (REHEARSED if device.type == "cpu" else CANDIDATES))
    unknown = [name for name in names if name not in CANDIDATES or name not in TABLES]
    if unknown:
        raise ValueError(f"kernels must be tables with candidates, {', '.join(CANDIDATES)}, got {unknown}.")
    left = [name for name, entries in TABLES.items() if all(entries is not TABLES.get(other) for other in CANDIDATES)]
    if left:
        say(f"not tuned, since there are no candidates: {', '.join(left)}")
    sound = True
    for head_dim in head_dims:
        for dtype in dtypes:
            for name in names:
                sound = _tune(Entry(name, head_dim, dtype, architecture), device, results, budget, write) and sound
    return 0 if sound else 1


def _tune(entry: Entry, device: torch.device, results: Results, budget: Budget, write: bool) -> bool:
    """Tune one entry; False where the table's own tile is wrong or breaks."""
    if budget.left() <= 0:
        say(f"{entry}: skipped, time budget")
        return True
    rehearsal = device.type == "cpu"
    cells = ((4, 32, 2, 1),) if rehearsal else CELLS[entry.kernel]
    search = Search(entry, [_draw(_cell(entry, *cell), device) for cell in cells], device, results)
    current, limit = entry.current, SHARED_LIMITS[entry.architecture]
    search.try_all([current], budget)
    if current not in search.times:
        say(f"{entry}: WRONG OR BROKEN is the table's own {written(current)}")
        return False
    search.try_all(list(candidates(entry, limit))[: 1 if rehearsal else None], budget)
    if entry.kernel != "decode" and not rehearsal:
        search.try_all(persistent(search.best), budget)
    best = _sound_best(search)
    gain = geometric_mean(search.times[current]) / geometric_mean(search.times[best])
    wins = gain >= MARGIN
    if wins and write:
        entry.write(best)
    verdict = "stays" if not wins else "is replaced" if write else "would be replaced"
    say(f"{entry}: best of {len(search.times)} {written(best)}, {gain:.3f} x {written(current)}, which {verdict}")
    return True


def _sound_best(search: Search) -> Tile:
    """The fastest tile that is right on plans of every kind; those that are not are struck off."""
    while (best := search.best) != search.entry.current:
        with search.entry.holding(best):
            wrong = search.wrong(thorough=True)
        if not wrong:
            break
        say(f"{search.entry}: {written(best)} is fast and wrong, {wrong}")
        del search.times[best]
    return best


def _cell(entry: Entry, ratio: int, length: int, heads: int, kv_heads: int) -> Cell:
    window = K if length >= K else 16
    return Cell(entry.op, ratio, length, heads, kv_heads, entry.head_dim, entry.dtype, window)


def _draw(cell: Cell, device: torch.device) -> Any:
    return (decoding if cell.kernel == "decode" else plans).draw(cell, device)


def _build(entry: Entry) -> Any:
    """Narrow and middle tiles are for beacons at high ratios: those alone are timed."""
    if entry.op == "decode":
        return decoding.ours
    return (
        partial(ours.attention, lists=(ours.BEACONS,))
        if entry.kernel.endswith(("_narrow", "_middle"))
        else ours.attention
    )


def _architecture(device: torch.device) -> int:
    if device.type == "cpu":
        return ARCHITECTURES[0]  # the one whose tiles the interpreter takes
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor not in ARCHITECTURES:
        raise ValueError(
            f"tiles are tuned on compute capability {' or '.join(map(str, ARCHITECTURES))}, got {10 * major + minor}; "
            "give the table a column for it first."
        )
    return 10 * major + minor
