"""What every attention path takes, and the masks that follow from a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from beacon.plan import Plan, Queries


@dataclass(frozen=True)
class AttentionInputs:
    """Rotated queries and the stores of keys and values of one layer (see :mod:`beacon.plan.layout`).

    Args:
        raw_q: Queries of raw tokens, ``[n_raw, heads, head_dim]``.
        beacon_q: Queries of beacons, ``[n_beacon, heads, head_dim]``; None where nothing reads their output.
        raw_k: Raw keys in window frame, ``[n_slots, kv_heads, head_dim]``.
        raw_v: Their values.
        beacon_k: Beacon keys in window frame.
        beacon_v: Their values.
        memory_k: Memory keys in memory frame, one ``[m, kv_heads, head_dim]`` per row.
        memory_v: Their values.
        scale: Factor of the logits (softmax_scale).
        memo: Scratch shared by the layers of one pass (masks are the same in all of them).
    """

    raw_q: torch.Tensor
    beacon_q: torch.Tensor | None
    raw_k: torch.Tensor
    raw_v: torch.Tensor
    beacon_k: torch.Tensor
    beacon_v: torch.Tensor
    memory_k: list[torch.Tensor]
    memory_v: list[torch.Tensor]
    scale: float
    memo: dict[Any, Any] = field(default_factory=dict)


Outputs: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
AttentionPath: TypeAlias = Callable[[AttentionInputs, Plan], Outputs]


def within(lo: torch.Tensor, hi: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Which of the store's entries ``[start, stop)`` each query's run ``[lo, hi)`` covers: bool ``[n, stop-start]``."""
    keys = torch.arange(start, stop, device=lo.device)
    return (keys >= lo[:, None]) & (keys < hi[:, None])


def part(queries: Queries, which: slice) -> Queries:
    """The queries of one block."""
    return Queries(*(getattr(queries, name)[which] for name in queries.__dataclass_fields__))
