"""What all figures share: reading results, a look for every method, axes."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

# Colour and marker of a method; colours of Okabe and Ito's palette, which the colour-blind tell apart, and three more.
LOOKS = {
    "beacon": ("#0072B2", "s"),
    "beacon, ratio 8": ("#56B4E9", "^"),
    "beacon, ratio 32": ("#009E73", "v"),
    "beacon, ratio 128": ("#0072B2", "o"),
    "beacon, ratio 128, then 4": ("#000000", "o"),
    "beacon, ratio 128, then 8": ("#777777", "o"),
    "beacon, retrieval": ("#000000", "*"),
    "sliding window": ("#E69F00", "s"),
    "sliding window 192": ("#E69F00", "s"),
    "sliding window 508": ("#E69F00", "D"),
    "truncated": ("#CC79A7", "s"),
    "truncated, 0 kept": ("#CC79A7", "s"),
    "truncated, 256 kept": ("#CC79A7", "D"),
    "position interpolation": ("#AA4499", "x"),
    "dynamic NTK": ("#8C564B", "x"),
    "YaRN": ("#661100", "+"),
}
OTHER = ("#D55E00", "s")  # what attends to everything
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
    if method == "guide":
        return {"color": "0.55", "linewidth": 1.2, "linestyle": "--"}
    color, marker = LOOKS.get(method, OTHER)
    ours = method.startswith("beacon")
    return {
        "color": color,
        "marker": marker,
        "markersize": 6 if ours else 5,
        "linewidth": 2.4 if ours else 1.4,
        "linestyle": "-" if ours else (0, (5, 2)),
    }


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
    """One legend for all panels, below them, in rows of up to five."""
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(labels) // 5)
    columns = -(-len(labels) // rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.set_figheight(4.2 + 0.2 * rows)


def save(figure: Figure, file: Path) -> Path:
    """Write the figure."""
    figure.savefig(file, dpi=130)
    return file
