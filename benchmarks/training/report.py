"""The table of a run and how far its aims are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu.aims import HOPPER, figures
from benchmarks.results import OURS
from benchmarks.training.contenders import LOOP, MEANING, NAMES, PUBLISHED

TEXT_COLUMNS = ("impl", "ms p50 (p20-p80)", "raw tok/s", "TFLOP/s", "HFU", "MFU", "peak MiB", "x ours", "loss")


@dataclass(frozen=True)
class Aim:
    """What a step of Llama-2-7B is to reach.

    Args:
        against: Whose time over ours; None: our raw tokens per second, on an H100 or H200.
        least: Where it is met.
    """

    against: str | None
    least: float


AIMS = (Aim(None, 8000.0), Aim(LOOP, 1.4), Aim(PUBLISHED, 3.0))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """One line per contender; ``x ours``: its time over ours."""
    lines = [TEXT_COLUMNS, tuple("-" * len(name) for name in TEXT_COLUMNS)]
    for impl in NAMES:
        own = [row for row in rows if row["impl"] == impl]
        bad = next((row for row in own if row["status"] != "ok"), None)
        if bad is not None:
            lines.append((impl, f"{bad['status']}: {bad['reason']}"[:100], *[""] * (len(TEXT_COLUMNS) - 2)))
        elif own:
            lines.append(_line(impl, {row["metric"]: row for row in own}, times_ours(rows, impl)))
    widths = [max(len(line[n]) for line in lines if line[2] or n < 1) for n in range(len(TEXT_COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *(f"{impl}: {meaning}" for impl, meaning in MEANING.items())])


def times_ours(rows: Sequence[Mapping[str, str]], impl: str) -> float | None:
    """A contender's time over ours, medians."""
    ms = {name: found["ms"] for cell in figures(rows).values() for name, found in cell.items() if "ms" in found}
    return ms[impl] / ms[OURS] if impl in ms and OURS in ms else None


def verdicts(rows: Sequence[Mapping[str, str]], scale: str) -> list[str]:
    """A line per aim; they are for Llama-2-7B on a GPU, the absolute one on an H100 or H200."""
    lines = []
    for aim in AIMS:
        if aim.against is None:
            name, unit = "raw tok/s on an H100 or H200", ""
            value = next((float(r["p50"]) for r in rows if r["impl"] == OURS and r["metric"] == "tokens_per_s"), None)
            counts = any(hopper in row["machine"] for row in rows for hopper in HOPPER)
        else:
            name, unit = f"x {aim.against}", "x"
            value, counts = times_ours(rows, aim.against), any("NVIDIA" in row["machine"] for row in rows)
        judged = "not measured" if value is None else "met" if value >= aim.least else "below"
        if not counts or scale != "7b":
            judged = "not judged here (the aim is for 7b on such a GPU)"
        shown = "-" if value is None else f"{value:.4g}{unit}"
        lines.append(f"aim: >= {aim.least:g} {name}: {shown}: {judged}")
    return lines


def _line(impl: str, metrics: Mapping[str, Mapping[str, str]], ratio: float | None) -> tuple[str, ...]:
    def value(name: str, form: str, factor: float = 1.0) -> str:
        return format(factor * float(metrics[name]["p50"]), form) if name in metrics else "-"

    ms = metrics["ms"]
    return (
        impl,
        f"{float(ms['p50']):.1f} ({float(ms['p20']):.1f}-{float(ms['p80']):.1f})",
        value("tokens_per_s", ".0f"),
        value("tflops", ".3g"),
        value("hfu", ".1f", 100) + ("%" if "hfu" in metrics else ""),
        value("mfu", ".1f", 100) + ("%" if "mfu" in metrics else ""),
        value("peak_mb", ".0f"),
        "-" if ratio is None else f"{ratio:.2f}",
        value("loss", ".4f"),
    )
