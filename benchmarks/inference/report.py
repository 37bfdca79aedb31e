"""The tables of a run and how far its aims are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.inference.aims import AIMS, GB_PER_MIB, SCALE, Medians, sizes_of
from benchmarks.inference.contenders import MEANING, STATIC
from benchmarks.inference.parts import GROUPS
from benchmarks.inference.tasks import DECODE, DECODE_PARTS, PREFILL, PREFILL_PARTS
from benchmarks.results import OURS

Cell = Mapping[str, Mapping[str, str]]  # rows by metric
Rows = Sequence[Mapping[str, str]]
MB_PER_MIB = 2**20 / 1e6
PREFILL_COLUMNS = (
    *("text", "impl", "first token s", "tok/s", "TFLOP/s", "MFU", "x products", "x ours", "peak GB", "cache MB"),
)
LEGEND = (
    "x products: time over that of the matrix products alone",
    "x ours: time over that of beacon; in decoding over that of beacon-static's lean loop where it was measured",
)
DECODE_COLUMNS = ("text", "impl", "way", "tok/s", "x ours", "peak GB", "cache MB")


def report(rows: Rows) -> str:
    """A table per kind of cell, and what the contenders and columns are."""
    sections = [_prefill(rows), _decode(rows), _parts(rows)]
    impls = dict.fromkeys(row["impl"] for row in rows)
    meanings = [f"{impl}: {MEANING[impl]}" for impl in impls if impl in MEANING]
    return "\n\n".join([*filter(None, sections), "\n".join([*meanings, *LEGEND])])


def verdicts(rows: Rows, scale: str, machine: str) -> list[str]:
    """A line per aim; of a scale that the aims say nothing about, only those for which there is a value."""
    found = Medians(rows, scale)
    lines = [aim.line(found, machine, scale) for aim in AIMS]
    if scale == SCALE:
        return lines
    return [line for line in lines if ": -: " not in line] or [f"aims: not judged here (they are for {SCALE})"]


def _prefill(rows: Rows) -> str:
    own = [row for row in rows if row["case"].startswith(f"{PREFILL} ")]
    lines = []
    for case, impl, cell in _cells(own):
        ours, seconds = _value(own, case, OURS, "ttft_s"), _number(cell, "ttft_s")
        if "floor_s" in cell:
            lines.append((_label(case), "matrix products alone", _shown(cell, "floor_s", ".3f")))
        elif seconds is None:
            lines.append((_label(case), impl, _why(cell)))
        else:
            lines.append(
                (
                    _label(case),
                    impl,
                    f"{seconds:.3f}",
                    _shown(cell, "prefill_tokens_per_s", ".0f"),
                    _shown(cell, "tflops", ".3g"),
                    _shown(cell, "mfu", ".1f", 100, "%"),
                    _shown(cell, "matmul_floor_x", ".2f"),
                    "-" if ours is None else f"{seconds / ours:.2f}",
                    _shown(cell, "peak_mb", ".2f", GB_PER_MIB),
                    _shown(cell, "cache_mb", ".1f", MB_PER_MIB),
                )
            )
    return _table(PREFILL_COLUMNS, lines)


def _decode(rows: Rows) -> str:
    """Ours, whose time per token counts as one, is the lean loop where there is one."""
    own = [row for row in rows if row["case"].startswith(f"{DECODE} ")]
    lines = []
    for case, impl, cell in _cells(own):
        ours = _value(own, case, STATIC, "lean_tokens_per_s") or _value(own, case, OURS, "generate_tokens_per_s")
        ways = [name.removesuffix("_tokens_per_s") for name in cell if name.endswith("_tokens_per_s")]
        if not ways:
            lines.append((_label(case), impl, "", _why(cell)))
        for way in ways:
            rate = _number(cell, f"{way}_tokens_per_s")
            if rate is None:
                lines.append((_label(case), impl, way, _why({way: cell[f"{way}_tokens_per_s"]})))
                continue
            peak, held = f"{way}_peak_mb", f"{way}_cache_mb"
            share = "-" if ours is None else f"{ours / rate:.2f}"
            shown = _shown(cell, peak, ".2f", GB_PER_MIB), _shown(cell, held, ".1f", MB_PER_MIB)
            lines.append((_label(case), impl, way, f"{rate:.1f}", share, *shown))
    return _table(DECODE_COLUMNS, lines)


def _parts(rows: Rows) -> str:
    own = [row for row in rows if row["case"].split()[0] in (PREFILL_PARTS, DECODE_PARTS)]
    lines = []
    for case, impl, cell in _cells(own):
        shares = [_shown(cell, f"share_{group}", ".1f", 100, "%") for group in GROUPS]
        shown = [_shown(cell, "ms", ".2f"), *shares] if "ms" in cell else [_why(cell)]
        lines.append((f"{case.split()[0]} {_label(case)}", impl, *shown))
    return _table(("of", "impl", "ms", *GROUPS), lines)


def _cells(rows: Rows) -> Iterable[tuple[str, str, Cell]]:
    """Case, impl and rows by metric: a model after the other, short texts and small batches first."""
    found: dict[str, dict[str, dict[str, Mapping[str, str]]]] = {}
    for row in rows:
        found.setdefault(row["case"], {}).setdefault(row["impl"], {})[row["metric"]] = row
    models = list(dict.fromkeys(case.split()[1] for case in found))

    def place(case: str) -> tuple[int, int, int]:
        return models.index(case.split()[1]), *sizes_of(case)

    return [(case, impl, cell) for case in sorted(found, key=place) for impl, cell in found[case].items()]


def _label(case: str) -> str:
    return " ".join(case.split()[1:-1])


def _number(cell: Cell, metric: str) -> float | None:
    return float(cell[metric]["p50"]) if metric in cell and cell[metric]["p50"] else None


def _shown(cell: Cell, metric: str, form: str, factor: float = 1.0, unit: str = "") -> str:
    value = _number(cell, metric)
    return "-" if value is None else format(factor * value, form) + unit


def _value(rows: Rows, case: str, impl: str, metric: str) -> float | None:
    found = (row["p50"] for row in rows if (row["case"], row["impl"], row["metric"]) == (case, impl, metric))
    return next((float(value) for value in found if value), None)


def _why(cell: Cell) -> str:
    row = next((row for row in cell.values() if row["status"] != "ok"), None)
    return "-" if row is None else f"{row['status']}: {row['reason']}"[:110]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their values; the last cell of a short line, a reason, runs on beyond its column."""
    if not lines:
        return ""
    widths = [
        max(len(columns[n]), *(len(line[n]) for line in lines if n < len(line) - (len(line) < len(columns))), 0)
        for n in range(len(columns))
    ]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in (columns, rule, *lines)
    )
