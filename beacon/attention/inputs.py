"""What every attention path takes, and the masks that follow from a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from beacon.plan import Plan, Queries


@dataclass(frozen=True)
class MemoryParts:
    """The memory before it is joined, for paths that read it as two stores.

    Args:
        old_k: Keys committed by earlier passes in memory frame, one ``[m, kv_heads, head_dim]`` per row.
        old_v: Their values.
        new_k: Keys that this pass commits, packed row after row ``[m, kv_heads, head_dim]``.
        new_v: Their values.
    """

    old_k: list[torch.Tensor]
    old_v: list[torch.Tensor]
    new_k: torch.Tensor
    new_v: torch.Tensor


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
        parts: The memory before it is joined, if anything is committed.
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
    parts: MemoryParts | None = None

    @property
    def records(self) -> bool:
        """Whether gradients are recorded."""
        own = (self.raw_q, self.beacon_q, self.raw_k, self.raw_v, self.beacon_k, self.beacon_v)
        tensors = (*own, *self.memory_k, *self.memory_v)
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


Table: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # cos and sin, two of [n, 1, rotary_dim]
Entries: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # keys and values, two of [n, kv_heads, head_dim]


@dataclass(frozen=True)
class Rotation:
    """How a path rotates, in place of plain PyTorch.

    Args:
        queries: From ``[n, heads, head_dim]`` and its table, the rotated queries.
        keys: From the pool's sources, the plan, the table of raw slots, beacon slots and commits one after the other,
            and a memo as above: these keys, rotated.
        write: From keys and values ``[n, kv_heads, head_dim]``, the keys' table, buffers of both and places in these
            ``[n]``: rotates the keys and writes both there.
    """

    queries: Callable[[torch.Tensor, Table], torch.Tensor]
    keys: Callable[[list[torch.Tensor], Plan, Table, dict[Any, Any]], list[torch.Tensor]]
    write: Callable[[Entries, Table, Entries, torch.Tensor], None]


Outputs: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
AttentionPath: TypeAlias = Callable[[AttentionInputs, Plan], Outputs]


def within(lo: torch.Tensor, hi: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Which of the store's entries ``[start, stop)`` each query's run ``[lo, hi)`` covers: bool ``[n, stop-start]``."""
    keys = torch.arange(start, stop, device=lo.device)
    return (keys >= lo[:, None]) & (keys < hi[:, None])


def part(queries: Queries, which: slice) -> Queries:
    """The queries of one block."""
    return Queries(*(getattr(queries, name)[which] for name in queries.__dataclass_fields__))
