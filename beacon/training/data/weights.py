"""Loss weights as rows hold them: one number, or one per token or message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def read_weights(value: Any, count: int, unit: str | None) -> list[float] | None:
    """One weight for each of ``count`` units.

    Args:
        value: None (all 1), a number for all of them, or a list of numbers.
        count: How many tokens or messages there are.
        unit: Their name, ``tokens`` or ``messages``; None: a list cannot be had.

    Returns:
        ``count`` numbers, or None.

    Raises:
        ValueError: Another number of them, or not finite and non-negative numbers.
    """
    if value is None:
        return None
    if not isinstance(value, list):
        return [_number(value)] * count
    if unit is None:
        raise ValueError(
            f"one number for the whole text, whose tokens are not known beforehand, got a list of {len(value)}; "
            "give a number, or give input_ids"
        )
    if len(value) != count:
        raise ValueError(f"one number for each of the {count} {unit}, got {len(value)}")
    return [_number(number) for number in value]


def spread(weights: Sequence[float] | None, spans: Sequence[tuple[int, int, int]], length: int) -> list[float] | None:
    """Weights of messages on the ``length`` tokens of a chat; tokens outside of ``spans`` (uncounted anyway) have 1."""
    if weights is None:
        return None
    spread_out = [1.0] * length
    for message, start, stop in spans:
        spread_out[start:stop] = [weights[message]] * (stop - start)
    return spread_out


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"finite numbers of at least 0, got {value!r}")
    return float(value)
