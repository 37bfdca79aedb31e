"""Figures and tables of what the model reads: perplexity by length, recall by depth and length, ablations."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from drawing import MISSING, by_method, dress, legend, load, look, new_figure, save, short

WORST = 1e4  # perplexities beyond are drawn there


def plot_perplexity(results: Path) -> Path:
    """Draw ``perplexity.png``: perplexity of the same tokens by the text before them, all methods, and near ones."""
    means = _perplexities(load(results / "perplexity.json")["rows"])
    figure, (left, right) = new_figure(2)
    for axes in (left, right):
        for method, points in means.items():
            values = [min(math.exp(loss), WORST) for loss, _ in points.values()]
            axes.plot(list(points), values, label=method, **look(method))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({context for points in means.values() for context in points}))
        axes.xaxis.set_major_formatter(lambda value, _: short(round(value)))
    left.set_yscale("log")
    near = [math.exp(loss) for points in means.values() for loss, _ in points.values()]
    right.set_ylim(0.95 * min(near), 1.6 * min(near))
    dress(left, "tokens read before the 2,048 targets", "perplexity", "All methods")
    dress(right, "tokens read before the 2,048 targets", "perplexity", "The same, nearer")
    legend(figure, left)
    return save(figure, results / "perplexity.png")


def table_perplexity(results: Path) -> str:
    """``perplexity.json`` as Markdown: a row per method, a column per context; the entries held last."""
    means = _perplexities(load(results / "perplexity.json")["rows"])
    contexts = sorted({context for points in means.values() for context in points})
    lines = [_row(["method", *map(short, contexts), "entries held"]), _row(["---", *["--:"] * (len(contexts) + 1)])]
    for method, points in means.items():
        cells = [_perplexity(points[c][0]) if c in points else MISSING for c in contexts]
        lines.append(_row([method, *cells, f"{points[max(points)][1]:,.0f}"]))
    return "\n".join(lines)


def plot_passkey(results: Path) -> Path:
    """Draw ``passkey.png``: share found whole by length (across) and depth (up), a panel per method."""
    methods = by_method(load(results / "passkey.json")["rows"], "length")
    figure, panels = new_figure(len(methods), width=3.6)
    lengths = sorted({row["length"] for rows in methods.values() for row in rows})
    for axes, (method, rows) in zip(panels, methods.items(), strict=True):
        depths = sorted({row["depth"] for row in rows})
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in rows:
            grid[depths.index(row["depth"]), lengths.index(row["length"])] = row["found"] / row["asked"]
        axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [short(length) for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for index in np.argwhere(~np.isnan(grid)):
            axes.text(index[1], index[0], f"{grid[tuple(index)]:.0%}", ha="center", va="center", fontsize=7)
        axes.set_title(method, fontsize=11)
        axes.set_xlabel("tokens of the text")
    panels[0].set_ylabel("depth of the passkey (0 % is the start)")
    return save(figure, results / "passkey.png")


def table_passkey(results: Path) -> str:
    """``passkey.json`` as Markdown: share found whole over all depths, a row per method, a column per length."""
    return _recall_table(load(results / "passkey.json")["rows"], ("method",))


def plot_needles(results: Path) -> Path:
    """Draw ``needles.png``: answers right as a whole, by length, a panel per kind."""
    rows = load(results / "needles.json")["rows"]
    titles = {"number": "Three of ten numbers", "topic": "Topics of three of ten sections"}
    figure, panels = new_figure(len(titles))
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        for method, points in by_method([row for row in rows if row["kind"] == kind], "length").items():
            shares = [100 * row["found"] / row["asked"] for row in points]
            axes.plot([row["length"] for row in points], shares, label=method, **look(method))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["length"] for row in rows}))
        axes.xaxis.set_major_formatter(lambda value, _: short(round(value)))
        axes.set_ylim(-3, 103)
        dress(axes, "tokens of the text", "answers right as a whole, %", title)
    legend(figure, panels[0])
    return save(figure, results / "needles.png")


def table_needles(results: Path) -> str:
    """``needles.json`` as Markdown: share right, a row per kind and method, a column per length."""
    return _recall_table(load(results / "needles.json")["rows"], ("kind", "method"))


def table_short(results: Path) -> str:
    """``short.json`` as Markdown."""
    names = ["tokens", "ratios", "loss with adapter", "loss without", "largest difference of a logit"]
    lines = [_row(names), _row(["--:"] * len(names))]
    for row in load(results / "short.json")["rows"]:
        lines.append(
            _row([row["length"], row["policy"], f"{row['ours']:.4f}", f"{row['stock']:.4f}", row["difference"]])
        )
    return "\n".join(lines)


def table_ablations(results: Path) -> str:
    """``ablations.json`` as Markdown: perplexity by variant, ratio and context, and passkeys at 4,096 tokens."""
    rows = load(results / "ablations.json")["rows"]
    losses = [row for row in rows if "loss" in row]
    contexts = sorted({row["context"] for row in losses})
    lines = [_row(["variant", "read by", *map(short, contexts), "passkeys at 4K"])]
    lines.append(_row(["---", "---", *["--:"] * (len(contexts) + 1)]))
    for variant, method in dict.fromkeys((row["variant"], row["method"]) for row in losses):
        cells = {row["context"]: row["loss"] for row in losses if (row["variant"], row["method"]) == (variant, method)}
        keys = [row for row in rows if row["variant"] == variant and f"beacon, ratio {row.get('ratio')}" == method]
        share = f"{100 * keys[0]['found'] / keys[0]['asked']:.0f} %" if keys else MISSING
        lines.append(_row([variant, method, *(f"{math.exp(min(cells[c], 20)):.2f}" for c in contexts), share]))
    return "\n".join(lines)


def _perplexities(rows: list[dict[str, Any]]) -> dict[str, dict[int, tuple[float, float]]]:
    """Mean loss over texts, and entries held, by method and context."""
    means: dict[str, dict[int, tuple[float, float]]] = {}
    for method, found in by_method(rows, "context").items():
        for context in sorted({row["context"] for row in found}):
            here = [row for row in found if row["context"] == context]
            means.setdefault(method, {})[context] = (
                sum(row["loss"] for row in here) / len(here),
                sum(row["entries"] for row in here) / len(here),
            )
    return means


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 10 else f"{math.exp(min(loss, 700)):.0e}"


def _recall_table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    lengths = sorted({row["length"] for row in rows})
    lines = [_row([*names, *map(short, lengths), "questions each"])]
    lines.append(_row([*["---"] * len(names), *["--:"] * (len(lengths) + 1)]))
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in names) == key]
        cells, asked = [], 0
        for length in lengths:
            here = [row for row in mine if row["length"] == length]
            asked = sum(row["asked"] for row in here) or asked
            cells.append(f"{100 * sum(r['found'] for r in here) / asked:.0f} %" if here else MISSING)
        lines.append(_row([*key, *cells, asked]))
    return "\n".join(lines)


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
