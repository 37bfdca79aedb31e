"""Figures of a report: curves with intervals, and heat maps where a task has two axes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from beacon.evaluation.report.looks import Look, axis_label, look, number, place_value
from beacon.evaluation.report.summary import Group, Summary, TaskSummary

# From Okabe and Ito's palette, which the colour-blind tell apart: warm for beacons, cold and grey for the others; line
# styles beyond them.
WARM = ("#D55E00", "#E69F00", "#8C2D04", "#CC79A7")
COLD = ("#0072B2", "#009E73", "#56B4E9", "#000000", "#6A3D9A", "#8A8A8A", "#7F6A00", "#1B4F3F", "#B0C4DE")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 130
FEW = 12  # rows and columns of a heat map whose cells have room for a number
LEFT_OUT = {"nll": "perplexity", "read_tokens_per_second": "read_seconds"}  # metrics that say the same as another one
HEAT_MAPS = 12  # methods

Looks = Mapping[str, Mapping[str, Any]]


def draw(summary: Summary) -> dict[str, bytes]:
    """All figures of a report.

    Args:
        summary: The results.

    Returns:
        PNG pictures by name: for a task ``TASK`` (curves, or bars where it has no axis) and ``TASK-map``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as err:
        raise ImportError("a report needs matplotlib for its figures; pip install 'activation-beacon[eval]'.") from err
    looks = _looks(summary.methods)
    figures: dict[str, Any] = {}
    for task in summary.parts:
        if not task.scores(task.main):
            continue
        figures[task.name] = _curves(task, looks) if task.axes else _bars(task, looks)
        if len(task.axes) > 1:
            figures[f"{task.name}-map"] = _maps(task)
    return {name: _png(figure) for name, figure in figures.items()}


def _looks(methods: Sequence[str]) -> Looks:
    looks: dict[str, dict[str, Any]] = {}
    counts = {True: 0, False: 0}
    for at, method in enumerate(methods):
        ours = method.startswith("beacon")
        colors, nth = WARM if ours else COLD, counts[ours]
        looks[method] = {
            "color": colors[nth % len(colors)],
            "linestyle": STYLES[nth // len(colors) % len(STYLES)],
            "marker": MARKERS[at % len(MARKERS)],
            "linewidth": 2.6 if ours else 1.5,
            "zorder": 3 if ours else 2,
            "aside": at - (len(methods) - 1) / 2,  # steps that its points are moved by
        }
        counts[ours] += 1
    return looks


# -- curves ------------------------------------------------------------------------------------------------------------


def _curves(task: TaskSummary, looks: Looks) -> Any:
    from matplotlib.figure import Figure

    metrics = _shown_metrics(task)
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(2.8 + 4.8 * columns, 0.5 + 3.7 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    axis, stopped = task.axes[0], False
    for metric, axes in zip(metrics, panels):
        shown = look(metric, task.scores(metric))
        for method in task.records:
            groups = [task.group(method, **{axis: value}) for value in task.values(axis)]
            stopped |= _line(axes, groups, axis, metric, shown, looks[method])
        _dress(axes, task, axis, metric, shown)
    for axes in panels[len(metrics) :]:
        axes.remove()
    figure.suptitle(_title(task), fontsize=12)
    _legend(figure, {method: looks[method] for method in task.records}, stopped)
    return figure


def _line(axes: Any, groups: Sequence[Group], axis: str, metric: str, shown: Look, style: Mapping[str, Any]) -> bool:
    """Draw a method's curve with its intervals; whether it ends before the others for it cannot run."""
    points = [(group.place[axis], group.metrics[metric]) for group in groups]
    known = [(x, found) for x, found in points if math.isfinite(found.value)]
    if not known:
        return False
    look = {name: value for name, value in style.items() if name != "aside"}
    moved = _aside([x for x, _ in points], style["aside"], axis)
    xs = [moved[x] for x, _ in known]
    ys = [found.value * shown.factor for _, found in known]
    axes.plot(xs, ys, markersize=5.5, **look)
    spans = [(x, found.low, found.high) for x, found in known if found.low is not None and found.high is not None]
    if spans:
        lows, highs = ([span[at] * shown.factor for span in spans] for at in (1, 2))
        axes.vlines([moved[x] for x, _, _ in spans], lows, highs, color=style["color"], alpha=0.5, linewidth=1.2)
    stops = any(group.cannot_run and not group.ok and group.place[axis] > known[-1][0] for group in groups)
    if stops:
        cross = {"marker": "X", "markersize": 11, "color": style["color"], "markeredgecolor": "white", "zorder": 5}
        axes.plot(xs[-1:], ys[-1:], **cross)
    return stops


def _aside(values: Sequence[float], steps: float, axis: str) -> dict[float, float]:
    """Where points are drawn: a little to a side, lest the intervals of methods hide each other."""
    first, last = min(values), max(values)
    share = steps / 150  # of the axis
    if axis == "length" and first > 0:
        return {value: value * (last / first) ** share for value in values}
    return {value: value + (last - first) * share for value in values}


def _dress(axes: Any, task: TaskSummary, axis: str, metric: str, shown: Look) -> None:
    values = task.values(axis)
    if axis == "length" and min(values) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(_ticks(values))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: _short(axis, value))
    axes.set_xlabel(axis_label(axis))
    axes.set_ylabel(f"{shown.label}, {'higher' if task.head.metrics[metric] else 'lower'} is better")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if shown.sign == "%":
        axes.set_ylim(-4, 104)
        axes.set_yticks(range(0, 101, 20))
    else:
        _log_if_wide(axes, [value * shown.factor for value in task.scores(metric)])


def _log_if_wide(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where values span more than a factor of ten; else it begins at zero."""
    from matplotlib.ticker import LogLocator, NullFormatter

    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) <= 10 * min(finite):
        if finite and max(finite) > 2 * min(finite) >= 0:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high <= 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, looks: Looks, stopped: bool) -> None:
    from matplotlib.lines import Line2D

    styles = {method: {name: style[name] for name in style if name != "aside"} for method, style in looks.items()}
    rows = [Line2D([], [], label=method, markersize=5.5, **style) for method, style in styles.items()]
    if stopped:
        rows.append(
            Line2D(
                [], [], linestyle="none", marker="X", markersize=10, color="0.4", label="cannot read\nmore than this"
            )
        )
    figure.legend(handles=rows, loc="outside right upper", fontsize=9, frameon=False, handlelength=2.6)


# -- bars --------------------------------------------------------------------------------------------------------------


def _bars(task: TaskSummary, looks: Looks) -> Any:
    from matplotlib.figure import Figure

    metrics = _shown_metrics(task)
    methods = list(task.records)
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // columns)
    size = (2.2 + 4.6 * columns, 0.5 + rows * (1 + 0.34 * len(methods)))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in panels[len(metrics) :]:
        axes.remove()
    for metric, axes in zip(metrics, panels):
        shown = look(metric, task.scores(metric))
        for at, method in enumerate(methods):
            found = task.group(method).metrics[metric]
            if not math.isfinite(found.value):
                axes.text(0, at, " cannot run" if not found.n else " infinite", va="center", fontsize=9, color="0.4")
                continue
            value = found.value * shown.factor
            axes.barh(at, value, color=looks[method]["color"], height=0.7)
            end = value if found.high is None else found.high * shown.factor
            axes.annotate(f"  {shown.write(found.value)}", (end, at), va="center", fontsize=9)
            if found.low is not None and found.high is not None:
                ends = [[value - found.low * shown.factor], [found.high * shown.factor - value]]
                axes.errorbar(value, at, xerr=ends, color="0.25", capsize=3, linewidth=1.2)
        axes.set_xlabel(f"{shown.label}, {'higher' if task.head.metrics[metric] else 'lower'} is better")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if shown.sign == "%":
            axes.set_xlim(0, 116)
            axes.set_xticks(range(0, 101, 20))
        else:
            axes.margins(x=0.2)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.suptitle(_title(task), fontsize=12)
    return figure


# -- heat maps ---------------------------------------------------------------------------------------------------------


def _maps(task: TaskSummary) -> Any:
    from matplotlib.figure import Figure

    across, down = task.axes[:2]
    xs, ys = task.values(across), task.values(down)
    methods = list(task.records)[:HEAT_MAPS]
    columns = 2 if len(methods) == 4 else min(len(methods), 3)
    rows = -(-len(methods) // columns)
    size = 1.2 + max(2.2, 0.56 * len(xs)), 0.8 + max(1.6, 0.34 * len(ys))
    figure = Figure(figsize=(size[0] * columns + 1.2, size[1] * rows + 0.9), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    shown = look(task.main, task.scores(task.main))
    finite = [value * shown.factor for value in task.scores(task.main) if math.isfinite(value)]
    low, high = (0.0, 100.0) if shown.sign == "%" else (min(finite), max(finite))
    image = None
    for method, axes in zip(methods, panels):
        cells = [[task.group(method, **{across: x, down: y}) for x in xs] for y in ys]
        image = _map(axes, cells, task.main, shown, (low, high)) or image
        axes.set_title(method, fontsize=10, weight="bold" if method.startswith("beacon") else "normal")
        axes.set_xticks(range(len(xs)), [_short(across, x) for x in xs], rotation=45 if len(xs) > 5 else 0)
        axes.set_yticks(range(len(ys)), [_short(down, y) for y in ys])
    for axes in panels[len(methods) :]:
        axes.remove()
    for at, axes in enumerate(panels[: len(methods)]):
        if at + columns >= len(methods):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(axis_label(across))
        if at % columns == 0:
            axes.set_ylabel(axis_label(down))
    if image is not None:
        better = "higher" if task.head.metrics[task.main] else "lower"
        figure.colorbar(image, ax=panels[: len(methods)], label=f"{shown.label}, {better} is better", aspect=30)
    hatched = any(group.cannot_run and not group.ok for group in task.groups(across, down))
    figure.suptitle(_title(task) + ("; hatched: cannot run" if hatched else ""), fontsize=12)
    return figure


def _map(axes: Any, cells: Sequence[Sequence[Group]], metric: str, shown: Look, span: tuple[float, float]) -> Any:
    """Draw one method's map; returns its image for the colour bar."""
    from matplotlib.patches import Rectangle

    values = [[group.metrics[metric].value * shown.factor for group in row] for row in cells]
    image = axes.imshow(values, cmap="viridis", vmin=span[0], vmax=span[1], aspect="auto")
    axes.set_facecolor("0.93")
    roomy = len(cells) <= FEW and len(cells[0]) <= FEW
    for y, row in enumerate(cells):
        for x, group in enumerate(row):
            value = values[y][x]
            if math.isnan(value) and group.cannot_run:
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="0.6", linewidth=0)
                )
            elif not math.isnan(value) and roomy:
                bright = (value - span[0]) > 0.6 * (span[1] - span[0])
                text = number(value, 0) if shown.sign == "%" else number(value)
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if bright else "white")
    return image


# -- all ---------------------------------------------------------------------------------------------------------------


def _shown_metrics(task: TaskSummary) -> list[str]:
    known = [metric for metric in task.head.metrics if task.scores(metric)]
    return [metric for metric in known if LEFT_OUT.get(metric) not in known]


def _title(task: TaskSummary) -> str:
    constants = "".join(f", {key} {place_value(key, value)}" for key, value in task.constants.items())
    items = len(task.head.items)
    return f"{task.name}{constants} ({items} item{'s' if items != 1 else ''})"


def _ticks(values: Sequence[float]) -> list[float]:
    """At most nine of the values."""
    step = -(-len(values) // 9)
    return list(values[::step])


def _short(key: str, value: float) -> str:
    """Lengths in units of 1,024 where they are multiples of it; shares in percent."""
    if key == "depth":
        return f"{100 * value:.0f}"
    if key == "length" and value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:,.0f}K"
    return f"{value:,g}"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
