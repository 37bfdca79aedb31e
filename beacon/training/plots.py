"""Pictures of a training run, drawn anew from its files whenever it is evaluated."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from beacon.training.evaluation import MetricName
from beacon.training.records import EVALUATIONS, read_records

logger = logging.getLogger(__name__)

Curve = dict[int, float]  # value by step

STYLES = ("-", "--", ":", "-.")  # by ratio
MARKERS = ("o", "s", "^", "D", "v", "P")
BLUE = "#0072B2"  # of Okabe and Ito's palette, which the colour-blind tell apart, as they do the steps of viridis
FEW = 40  # points with a marker each
SMOOTHED = 50  # points from which on a running mean is drawn
PANELS = (
    ("loss", "training loss (nats per token)"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "speed (tokens/s)"),
)


def draw(folder: Path, history: Sequence[Mapping[str, Any]] = ()) -> list[Path]:
    """Draw ``perplexity.png`` and ``passkey.png`` from ``evaluations.jsonl``, and ``training.png`` from a log.

    Args:
        folder: Of the training run; the pictures go there.
        history: What the trainer logged, as ``log_history`` in ``trainer_state.json``: dicts with ``step`` and any of
            ``loss``, ``learning_rate``, ``grad_norm`` and ``tokens_per_second``.

    Returns:
        The pictures, those for which there are numbers; none where matplotlib is missing (logged once).

    Raises:
        ValueError: ``evaluations.jsonl`` has a bad line.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _say_missing()
        return []
    curves = _metrics(read_records(folder / EVALUATIONS))
    log = {name: _curve((entry.get("step"), entry.get(name)) for entry in history) for name, _ in PANELS}
    pictures = {
        "perplexity.png": _perplexity({name: curve for name, curve in curves.items() if name.kind == "perplexity"}),
        "passkey.png": _passkey({name: curve for name, curve in curves.items() if name.kind != "perplexity"}),
        "training.png": _training({name: curve for name, curve in log.items() if curve}),
    }
    drawn = []
    for file, figure in pictures.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            (folder / file).write_bytes(buffer.getvalue())
            drawn.append(folder / file)
    return drawn


@cache
def _say_missing() -> None:
    logger.warning("no plots are drawn: matplotlib is missing; pip install 'activation-beacon[eval]' brings it.")


# -- numbers -----------------------------------------------------------------------------------------------------------


def _metrics(records: Sequence[Mapping[str, float]]) -> dict[MetricName, Curve]:
    """Curves by metric, longer texts and larger ratios last."""
    names = {name: parsed for record in records for name in record if (parsed := MetricName.parse(name))}
    order = sorted(names, key=lambda name: (names[name].length, names[name].ratio or 0, names[name].kind))
    curves = {names[name]: _curve((record["step"], record.get(name)) for record in records) for name in order}
    return {name: curve for name, curve in curves.items() if curve}


def _curve(points: Iterable[tuple[Any, Any]]) -> Curve:
    """Finite values in the order of steps; of several at one step the last."""
    curve = {step: float(value) for step, value in points if _is_number(step) and _is_number(value)}
    return dict(sorted(curve.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over ``reach`` values on either side, fewer at the ends."""
    sums = [0.0, *accumulate(values)]
    spans = [(max(at - reach, 0), min(at + reach + 1, len(values))) for at in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in spans]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _perplexity(curves: Mapping[MetricName, Curve]) -> Any:
    if not curves:
        return None
    steps = sorted({step for curve in curves.values() for step in curve})
    middle = steps[len(steps) // 2]
    late = {name: {step: value for step, value in curve.items() if step >= middle} for name, curve in curves.items()}
    closer = _is_wide(curves.values()) and len(steps) >= 4 and all(late.values())
    figure, panels = _figure(2 if closer else 1)
    _lines(panels[0], curves)
    _log_if_wide(panels[0], curves.values())
    panels[0].set_ylabel("perplexity of the last tokens (lower is better)")
    panels[0].set_title("Perplexity by tokens of text read", fontsize=11)
    if closer:  # untrained beacons are so far off that what comes after them would look flat
        _lines(panels[1], late)
        panels[1].set_title(f"The same from step {middle:,} on", fontsize=11)
    _legend(figure, list(curves))
    return figure


def _passkey(curves: Mapping[MetricName, Curve]) -> Any:
    if not curves:
        return None
    kinds = {"passkey": "Digits, given the right ones before", "passkey_exact": "Whole passkeys"}
    shown = [kind for kind in kinds if any(name.kind == kind for name in curves)]
    figure, panels = _figure(len(shown), sharey=True)
    for axes, kind in zip(panels, shown):
        percent = {
            name: {step: 100 * value for step, value in curve.items()}
            for name, curve in curves.items()
            if name.kind == kind
        }
        _lines(axes, percent)
        axes.set_title(kinds[kind], fontsize=11)
        axes.set_ylim(-4, 104)
        axes.set_yticks(range(0, 101, 20))
    panels[0].set_ylabel("recalled (%)")
    _legend(figure, list(curves))
    return figure


def _training(log: Mapping[str, Curve]) -> Any:
    if not log:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    columns = min(len(log), 2)
    rows = -(-len(log) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, title), axes in zip([panel for panel in PANELS if panel[0] in log], panels):
        curve = log[name]
        steps, values = list(curve), list(curve.values())
        smooth = len(values) >= SMOOTHED and name != "learning_rate"
        marker = "o" if len(values) == 1 else ""
        axes.plot(
            steps, values, color=BLUE, linewidth=0.8 if smooth else 1.6, alpha=0.35 if smooth else 1, marker=marker
        )
        if smooth:
            axes.plot(steps, _running_mean(values, len(values) // 50), color=BLUE, linewidth=1.8)
        axes.set_title(title, fontsize=10)
        _dress(axes)
        if name == "loss" or name == "grad_norm":
            _log_if_wide(axes, [curve])
        elif name == "tokens_per_second":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in panels:  # those left over
        axes.remove()
    return figure


def _figure(columns: int, **settings: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 + 4.6 * columns, 4.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **settings)[0]


def _lines(axes: Any, curves: Mapping[MetricName, Curve]) -> None:
    looks = _looks(list(curves))
    for name, curve in curves.items():
        look = looks[name]
        marker = look["marker"] if len(curve) <= FEW else ""
        axes.plot(list(curve), list(curve.values()), linewidth=1.8, **{**look, "marker": marker})
    _dress(axes)


def _looks(names: Sequence[MetricName]) -> dict[MetricName, dict[str, Any]]:
    """Colour by length (the darker the longer), line and marker by ratio."""
    from matplotlib import colormaps

    lengths, ratios = _lengths(names), _ratios(names)
    last = max(len(lengths) - 1, 1)
    colors = (
        [BLUE] if len(lengths) == 1 else [colormaps["viridis"](0.85 * (1 - at / last)) for at in range(len(lengths))]
    )
    return {
        name: {
            "color": colors[lengths.index(name.length)],
            "linestyle": STYLES[ratios.index(name.ratio) % len(STYLES)],
            "marker": MARKERS[ratios.index(name.ratio) % len(MARKERS)],
            "markersize": 4.5,
        }
        for name in names
    }


def _legend(figure: Any, names: Sequence[MetricName]) -> None:
    """Lengths, and ratios apart from them where there are several, so that it does not list their products."""
    from matplotlib.lines import Line2D

    looks = _looks(names)
    lengths, ratios = _lengths(names), _ratios(names)
    rows = [Line2D([], [], linestyle="none", label="tokens read")]
    for length in lengths:
        color = next(look["color"] for name, look in looks.items() if name.length == length)
        rows.append(Line2D([], [], color=color, linewidth=2.5, label=f"{length:,}"))
    if ratios != [None]:
        rows.append(Line2D([], [], linestyle="none", label="ratio"))
    for ratio in ratios if ratios != [None] else ():
        look = next(look for name, look in looks.items() if name.ratio == ratio)
        label = "as configured" if ratio is None else f"{ratio}"
        rows.append(Line2D([], [], **{**look, "color": "0.3"}, label=label))
    legend = figure.legend(handles=rows, loc="outside right upper", fontsize=9, frameon=False, handlelength=2.6)
    for row, text in zip(rows, legend.get_texts()):
        text.set_weight("bold" if row.get_linestyle() == "None" else "normal")


def _lengths(names: Sequence[MetricName]) -> list[int]:
    return sorted({name.length for name in names})


def _ratios(names: Sequence[MetricName]) -> list[int | None]:
    return sorted({name.ratio for name in names}, key=lambda ratio: -1 if ratio is None else ratio)


def _dress(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    first, last = axes.dataLim.intervalx
    axes.xaxis.set_major_locator(FixedLocator([first]) if first == last else MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _is_wide(curves: Iterable[Curve]) -> bool:
    """Whether positive values span more than a factor of ten."""
    values = [value for curve in curves for value in curve.values()]
    return 0 < 10 * min(values) < max(values)


def _log_if_wide(axes: Any, curves: Iterable[Curve]) -> None:
    """A logarithmic axis with plain numbers where the values span more than a factor of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = list(curves)
    if not _is_wide(curves):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high <= 1000 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=steps))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}")
    axes.yaxis.set_minor_formatter(NullFormatter())
