"""What changed between two folders of results, number by number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beacon.evaluation.report.statistics import Difference


@dataclass(frozen=True)
class Change:
    """How a metric of a method changed.

    Args:
        task: Name of the task.
        method: Name of the method.
        place: Empty: over all items.
        metric: Name of the metric.
        higher: Whether more of it is better.
        difference: Means, interval, pairs; of factors where ``geometric``.
        geometric: Whether low and high are factors.
        p: Of the difference, corrected for all that decide (Holm) where this does, else as it is.
        moved: 1 better, -1 worse, 0 not to be told or too small to count.
        decides: Whether it counts: the main metric of a task with the same options on both sides, with enough items to
            be sure of anything.
    """

    task: str
    method: str
    place: Mapping[str, Any]
    metric: str
    higher: bool
    difference: Difference
    geometric: bool
    p: float = 1.0
    moved: int = 0
    decides: bool = True
