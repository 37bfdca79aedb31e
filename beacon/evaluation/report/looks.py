"""How metrics and places are called and written: labels with units, and numbers as words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LABELS = {
    "length": "tokens of text",
    "depth": "depth in the text (%)",
    "asked": "number of the topic asked for",
}
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


@dataclass(frozen=True)
class Look:
    """How a metric is shown.

    Args:
        label: What it is, with its unit.
        factor: From its value to what is shown.
        sign: After a number.
        cost: A quantity that grows with the text, of which no mean over lengths is wanted.
    """

    label: str
    factor: float = 1.0
    sign: str = ""
    cost: bool = False

    def write(self, value: float) -> str:
        """A number, in a few digits, with its sign."""
        return number(value * self.factor, 1 if self.sign == "%" else None) + self.sign


def look(metric: str, values: Iterable[float]) -> Look:
    """How a metric with these values is shown: shares as percentages, bytes in what suits the largest."""
    finite = [value for value in values if math.isfinite(value)]
    words = metric.replace("_", " ")
    if "bytes" in metric:
        size, unit = next((s for s in SIZES if finite and max(finite) >= s[0]), (1.0, "bytes"))
        return Look(f"{words.replace('bytes', '').strip()} ({unit})".strip(), 1 / size, cost=True)
    if "per_second" in metric:
        return Look(f"{words.removesuffix('per second').strip()}/s", cost=True)
    if "seconds" in metric:
        return Look(f"{words.replace('seconds', '').strip()} (s)".strip(), cost=True)
    if metric == "entries":
        return Look("entries held in each layer", cost=True)
    if metric == "nll":
        return Look("negative log-likelihood (nats per token)")
    if metric != "perplexity" and finite and min(finite) >= 0 and max(finite) <= 1:
        return Look(f"{words} (%)", 100.0, "%")
    return Look(words)


def axis_label(key: str) -> str:
    """What a place's key is called beside an axis."""
    return LABELS.get(key, key.replace("_", " "))


def place_value(key: str, value: object) -> str:
    """A place's value in words."""
    if key == "depth" and isinstance(value, (int, float)):
        return f"{100 * value:.0f}%"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def number(value: float, digits: int | None = None) -> str:
    """Three or four significant digits, or so many after the point; thousands apart."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "–")
    if digits is not None:
        return f"{value:,.{digits}f}"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.2e}"
    after = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    if 0 < size < 0.001:
        return f"{value:.2g}"
    return f"{value:,.{after}f}"
