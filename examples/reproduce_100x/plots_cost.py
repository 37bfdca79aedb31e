"""Figure and table of what reading costs, drawn from ``cost.json`` alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator

from drawing import MISSING, by_method, dress, legend, load, look, new_figure, save, short


def plot_cost(results: Path) -> Path:
    """Draw ``cost.png`` from ``cost.json``: time and peak memory of reading, by length and method.

    Args:
        results: Folder of both.

    Returns:
        The figure.
    """
    found = load(results / "cost.json")
    figure, (left, right) = new_figure(2)
    curves = by_method(found["rows"])
    _cost_panel(left, curves, "seconds", 1.0)
    _cost_panel(right, curves, "peak_bytes", 2.0**20)
    dress(left, "tokens read", "seconds", "Time of reading")
    dress(right, "tokens read", "MiB", "Peak memory beside the weights")
    legend(figure, left)
    return save(figure, results / "cost.png")


def table_cost(results: Path) -> str:
    """``cost.json`` as a Markdown table, a row per length, and a line with the conditions."""
    found = load(results / "cost.json")
    cells = {method: {row["tokens"]: row for row in rows} for method, rows in by_method(found["rows"]).items()}
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("s", lambda row: f"{row['seconds']:,.2f}"),
        ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
        ("peak MiB", lambda row: f"{row['peak_bytes'] / 2**20:,.0f}"),
        ("KV entries", lambda row: f"{row['kv_entries']:,}"),
    ]
    lines = [
        "| tokens | " + " | ".join(f"{method}: {title}" for method in cells for title, _ in columns) + " |",
        "|--:" * (1 + len(columns) * len(cells)) + "|",
    ]
    for tokens in sorted({row["tokens"] for row in found["rows"]}):
        rows = [method.get(tokens) for method in cells.values()]
        shown = [MISSING if row is None else cell(row) for row in rows for _, cell in columns]
        lines.append(f"| {tokens:,} | {' | '.join(shown)} |")
    settings, machine = found["settings"], found["machine"]
    stopped = f" {found['stopped'][0].upper()}{found['stopped'][1:]}." if found["stopped"] else ""
    conditions = f"{machine['device']}, threads: {settings['threads']}, {settings['dtype']}, torch {machine['torch']}."
    return "\n".join([*lines, "", conditions + stopped])


def _cost_panel(axes: Any, curves: dict[str, list[dict[str, Any]]], column: str, unit: float) -> None:
    """One quantity by length, both logarithmic, and a line that grows with the length from the first point on."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    points = [(row["tokens"], row[column] / unit) for rows in curves.values() for row in rows if row[column] > 0]
    if not points:  # readings so small that they took no new memory
        return
    for method, rows in curves.items():
        rows = [row for row in rows if row[column] > 0]
        axes.plot([row["tokens"] for row in rows], [row[column] / unit for row in rows], label=method, **look(method))
    low, high = (bound(value for _, value in points) for bound in (min, max))
    axes.set_ylim(low / 2, high * 2)  # the line may leave it
    lengths = sorted({tokens for tokens, _ in points})
    slope = 0.75 * min(value for tokens, value in points if tokens == lengths[0]) / lengths[0]
    axes.plot(lengths, [slope * tokens for tokens in lengths], label="linear in the length", **look("guide"))
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(lambda value, _: short(round(value)))
