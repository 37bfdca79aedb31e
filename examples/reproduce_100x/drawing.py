"""What all figures share: reading results, a look for every method, axes."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

BEACON, FULL, GUIDE = "#0072B2", "#D55E00", "0.55"  # of Okabe and Ito's palette, which the colour-blind tell apart
MISSING = "–"


def short(tokens: int) -> str:
    """A length as its axis has it: 512, 8K, 1M."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def load(file: Path) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def by_method(rows: list[dict[str, Any]], order: str = "tokens") -> dict[str, list[dict[str, Any]]]:
    """Rows of every method, in the order of methods in the file, sorted by a column."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return {name: sorted((r for r in rows if r["method"] == name), key=lambda row: int(row[order])) for name in methods}


def new_figure(columns: int, width: float = 4.8) -> tuple[Figure, Any]:
    """A figure of panels side by side, each ``width`` inches wide."""
    figure = Figure(figsize=(0.6 + width * columns, 4.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def look(method: str) -> dict[str, Any]:
    """Colour, width and marker of a method, the same in every figure."""
    if method.startswith("beacon"):
        return {"color": BEACON, "linewidth": 2.6, "marker": "o", "markersize": 6}
    if method == "guide":
        return {"color": GUIDE, "linewidth": 1.2, "linestyle": "--"}
    return {"color": FULL, "linewidth": 1.6, "marker": "s", "markersize": 5}


def dress(axes: Any, across: str, up: str, title: str) -> None:
    """Labels, title, a light grid; on logarithmic axes plain numbers."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_xscale() == "log":
        axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Any) -> None:
    """One legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)


def save(figure: Figure, file: Path) -> Path:
    """Write the figure."""
    figure.savefig(file, dpi=130)
    return file
