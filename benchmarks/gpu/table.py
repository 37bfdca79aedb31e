"""The story of a run in a few lines, from the rows of its files only."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.aims import AIMS, Aim, figures, over, rate, reached, sizes_of
from benchmarks.gpu.implementations import GRAPH
from benchmarks.machine import REHEARSAL
from benchmarks.results import OURS

Rows = Sequence[dict[str, str]]


def summary(rows: Rows) -> str:
    """A cell per line: our rate and time, ours over each peer's, and the aims that are for it.

    Args:
        rows: The latest of every cell and implementation.
    """
    found = figures(rows)
    lines = ["cell | ours (medians) | ours over each peer's rate | aims"]
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        measured = found.get(case, {})
        parts = [case, _own(here, measured), _ratios(here, measured), _aims(case, here, found)]
        lines.append(" | ".join(part for part in parts if part))
    lines += _absent(rows)
    return "\n".join(lines)


def verdicts(rows: Rows) -> dict[str, int]:
    """How often aims were ``met`` and ``MISSED``, and how many are ``open``: nothing was measured for them."""
    found = figures(rows)
    counts = dict.fromkeys(("met", "MISSED", "open", "rehearsed"), 0)
    for case, row in {row["case"]: row for row in rows}.items():
        for aim in AIMS:
            if _is_for(aim, case, row):
                counts[_verdict(aim, reached(aim, case, found), row)] += 1
    return {verdict: count for verdict, count in counts.items() if count}


def _own(here: Rows, measured: dict[str, dict[str, float]]) -> str:
    first = next((row for row in here if row["impl"] == OURS), here[0])
    if first["status"] != "ok":
        return f"{first['status'].upper()}: {first['reason']}"
    value = rate(measured, first["impl"])
    metrics = measured.get(first["impl"], {})
    unit = "TFLOP/s" if "tflops" in metrics else "GB/s"
    parts = [] if value is None else [f"{value:.4g} {unit}"]
    parts += [f"{metrics[name]:.4g} {name}" for name in ("ms", "plan_ms", "schedule_ms") if name in metrics]
    if OURS + GRAPH in measured:
        parts.append(f"{measured[OURS + GRAPH]['ms']:.4g} ms as a graph")
    return ", ".join(parts)


def _ratios(here: Rows, measured: dict[str, dict[str, float]]) -> str:
    peers = dict.fromkeys(row["impl"] for row in here if not row["impl"].endswith(GRAPH) and row["impl"] != OURS)
    return ", ".join(f"{peer} {value:.2f}" for peer in peers if (value := over(measured, peer)) is not None)


def _aims(case: str, here: Rows, found: dict[str, dict[str, dict[str, float]]]) -> str:
    judged = []
    for aim in AIMS:
        if _is_for(aim, case, here[0]):
            value = reached(aim, case, found)
            figure = "?" if value is None else f"{value:.3g}"
            judged.append(f"{_verdict(aim, value, here[0])}: {aim.value} {figure} >= {aim.least:g}")
    return ", ".join(judged)


def _verdict(aim: Aim, value: float | None, row: dict[str, str]) -> str:
    if row["machine"] == REHEARSAL:
        return "rehearsed"
    return "open" if value is None else "met" if value >= aim.least else "MISSED"


def _is_for(aim: Aim, case: str, row: dict[str, str]) -> bool:
    return "ratio=" in row["shape"] and aim.holds_for(case, sizes_of(row["shape"]), row["machine"])


def _absent(rows: Rows) -> list[str]:
    """Why peers gave nothing: each reason once, with how often."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["status"] != "ok" and row["impl"] != OURS:
            key = row["impl"], row["status"], row["reason"][:160]
            reasons[key] = reasons.get(key, 0) + 1
    return [f"{impl} {status} in {count}: {reason}" for (impl, status, reason), count in reasons.items()]
