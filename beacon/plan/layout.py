"""Lay the window steps of all rows out as flat integer arrays: the plan that every attention path follows.

Stores that the plan indexes (packed over rows, see :mod:`beacon.attention`):

* the *pool*: keys before rotation and values of the open windows' cached entries (per row: raws, then beacons),
  then of the pass's raw tokens, then of its beacons;
* *raw slots* and *beacon slots*: pool entries at their place in a window. With stride < window a raw token has a
  slot in every window it belongs to;
* *memory*, one store per row: committed earlier, then what this pass commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from beacon.config import BeaconConfig
from beacon.plan.geometry import Ints, View, beacon_view, raw_positions, raw_view
from beacon.plan.schedule import RowState, WindowStep
from beacon.plan.transfer import upload


def _spread(starts: Ints, counts: Ints) -> Ints:
    """``arange(start, start + count)`` of every pair, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - ends + counts, counts)


def _offsets(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts


@dataclass(frozen=True)
class Queries:
    """One list of queries (raw tokens or beacons), packed over rows in reading order; int64 tensors ``[n]``.

    The visible runs are half-open: memory ``[0, memory)`` of the query's row, raw slots ``[raw_lo, raw_hi)`` and
    beacon slots ``[beacon_lo, beacon_hi)`` of the packed stores.
    """

    row: torch.Tensor
    position: torch.Tensor
    memory: torch.Tensor
    raw_lo: torch.Tensor
    raw_hi: torch.Tensor
    beacon_lo: torch.Tensor
    beacon_hi: torch.Tensor

    def __len__(self) -> int:
        return self.position.shape[0]


@dataclass(frozen=True)
class Keys:
    """Entries of a store: where each comes from in the pool, and its position; int64 tensors ``[n]``."""

    pool: torch.Tensor
    position: torch.Tensor

    def __len__(self) -> int:
        return self.position.shape[0]


@dataclass(frozen=True)
class Block:
    """One window's share of a pass, as slices of the packed stores (Python ints)."""

    step: WindowStep
    raw_queries: slice
    beacon_queries: slice
    raw_slots: slice
    beacon_slots: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """Blocks of equal shape have equal masks and can be computed as one batch."""
        s = self.step
        return (s.memory, s.raw_lo, s.raw_hi, s.ratio, s.beacon_lo, s.beacon_hi)


@dataclass(frozen=True)
class Plan:
    """Who sees whom and where, for one pass over all rows.

    Args:
        config: What it was built for.
        rows: Number of rows.
        raw: Queries of the raw tokens.
        beacon: Queries of the beacons.
        raw_slots: Raw keys in window frame.
        beacon_slots: Beacon keys in window frame.
        commits: New memory entries in memory frame, row after row.
        opens: Pool entries that stay in the open windows, row after row (raws, then beacons).
        commit_counts: New memory entries per row.
        open_counts: Open entries per row after the pass.
        blocks: The windows.
        original: The plan on the CPU, where this is a copy on another device.
    """

    config: BeaconConfig
    rows: int
    raw: Queries
    beacon: Queries
    raw_slots: Keys
    beacon_slots: Keys
    commits: Keys
    opens: Keys
    commit_counts: tuple[int, ...]
    open_counts: tuple[int, ...]
    blocks: tuple[Block, ...]
    original: Plan | None = None

    @property
    def host(self) -> Plan:
        """The same plan on the CPU: work lists are made there, and nothing is read back from a GPU."""
        return self if self.original is None else self.original

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on another device."""
        if device == self.raw.row.device:
            return self
        lists = {
            name: getattr(self, name) for name in ("raw", "beacon", "raw_slots", "beacon_slots", "commits", "opens")
        }
        here = iter(upload([part for one in lists.values() for part in vars(one).values()], device))
        moved = {name: type(one)(*(next(here) for _ in vars(one))) for name, one in lists.items()}
        return replace(self, **moved, original=self.host)

    @cached_property
    def groups(self) -> tuple[tuple[Block, ...], ...]:
        """Blocks of equal shape together (at most one per row and window)."""
        grouped: dict[tuple[int, ...], list[Block]] = {}
        for block in self.blocks:
            grouped.setdefault(block.shape, []).append(block)
        return tuple(tuple(group) for group in grouped.values())

    @property
    def plain_causal(self) -> bool:
        """Whether raw tokens and beacons of every window stand in one plain causal order."""
        interleaved = self.config.placement == "interleave" and self.config.attention == "full-coverage"
        return len(self.beacon) == 0 or (interleaved and self.config.attend_memory)


def build_plan(
    config: BeaconConfig, states: Sequence[RowState], steps: Sequence[Sequence[WindowStep]], ends: Sequence[RowState]
) -> Plan:
    """Lay out one pass.

    Args:
        config: The configuration.
        states: Where each row stands before the pass.
        steps: The pass's window steps of each row, in reading order.
        ends: Where each row stands after the pass.

    Returns:
        The plan, on the CPU.
    """
    flat = [step for row_steps in steps for step in row_steps]
    fields = np.array(
        [
            (s.row, s.memory, s.start, s.raw_lo, s.raw_hi, s.ratio, s.beacon_lo, s.beacon_hi, s.commit_raw)
            + (s.commit_beacons,)
            for s in flat
        ],
        dtype=np.int64,
    ).reshape(len(flat), 10)
    row, memory, start, raw_lo, raw_hi, ratio, beacon_lo, beacon_hi, commit_raw, commit_beacons = fields.T
    raw_n, beacon_n = raw_hi - raw_lo, beacon_hi - beacon_lo
    slot_at, beacon_slot_at = _offsets(raw_hi), _offsets(beacon_hi)

    # Pool: cached entries of the open windows, then new raw tokens, then new beacons.
    cached_raw = np.array([state.open_raw for state in states], dtype=np.int64)
    cached_beacons = np.array([state.open_beacons for state in states], dtype=np.int64)
    open_start = np.array([state.open_start for state in states], dtype=np.int64)
    cached_at = _offsets(cached_raw + cached_beacons)
    cached = int((cached_raw + cached_beacons).sum())
    new_raw = np.zeros(len(states), dtype=np.int64)
    np.add.at(new_raw, row, raw_n)
    new_raw_at = cached + _offsets(new_raw)
    new_beacon_at = cached + int(new_raw.sum()) + _offsets(beacon_n)

    def raw_pool(which: Ints, local: Ints) -> Ints:
        """Pool index of the raw tokens ``local`` places after their row's open start."""
        old = local < cached_raw[which]
        return np.where(old, cached_at[which] + local, new_raw_at[which] + local - cached_raw[which])

    def beacon_pool(step: Ints, number: Ints) -> Ints:
        """Pool index of the beacons ``number`` (from 0) of a step's window."""
        old = number < beacon_lo[step]
        kept = cached_at[row[step]] + cached_raw[row[step]] + number
        return np.where(old, kept, new_beacon_at[step] + number - beacon_lo[step])

    every = np.arange(len(flat), dtype=np.int64)

    at = np.repeat(every, raw_n)
    view = raw_view(config, _spread(raw_lo, raw_n), ratio[at])
    raw = _queries(row[at], memory[at], memory[at], view, slot_at[at], beacon_slot_at[at])

    at = np.repeat(every, beacon_n)
    view = beacon_view(config, _spread(beacon_lo + 1, beacon_n), ratio[at])
    seen = memory[at] if config.attend_memory else np.zeros_like(at)
    beacon = _queries(row[at], memory[at], seen, view, slot_at[at], beacon_slot_at[at])

    at = np.repeat(every, raw_hi)
    a = _spread(np.zeros_like(raw_hi), raw_hi)
    raw_slots = _keys(
        raw_pool(row[at], start[at] - open_start[row[at]] + a), memory[at] + raw_positions(config, a, ratio[at])
    )
    at = np.repeat(every, beacon_hi)
    i = _spread(np.zeros_like(beacon_hi), beacon_hi)
    beacon_slots = _keys(beacon_pool(at, i), memory[at] + beacon_view(config, i + 1, ratio[at]).position)

    count = commit_raw + commit_beacons
    at = np.repeat(every, count)
    entry = _spread(np.zeros_like(count), count)
    is_raw = entry < commit_raw[at]
    from_raw = raw_pool(row[at], start[at] - open_start[row[at]] + entry)
    from_beacon = beacon_pool(at, entry - commit_raw[at])
    commits = _keys(np.where(is_raw, from_raw, from_beacon), memory[at] + entry)
    commit_counts = np.zeros(len(states), dtype=np.int64)
    np.add.at(commit_counts, row, count)

    # A row that reads nothing keeps what it has cached; the others keep what their last window leaves open.
    last_step = np.cumsum([len(row_steps) for row_steps in steps], dtype=np.int64) - 1
    idle = np.array([not row_steps for row_steps in steps], dtype=bool)
    end_start = np.array([end.open_start for end in ends], dtype=np.int64)
    open_raw = np.array([end.open_raw for end in ends], dtype=np.int64)
    open_beacons = np.array([end.open_beacons for end in ends], dtype=np.int64)
    at = np.repeat(np.arange(len(states), dtype=np.int64), open_raw + open_beacons)
    entry = _spread(np.zeros_like(open_raw), open_raw + open_beacons)
    number = entry - open_raw[at]
    from_raw = raw_pool(at, end_start[at] - open_start[at] + entry)
    cached_beacon = cached_at[at] + cached_raw[at] + number
    from_beacon = cached_beacon if not flat else np.where(idle[at], cached_beacon, beacon_pool(last_step[at], number))
    pool = np.where(number < 0, from_raw, from_beacon)
    opens = _keys(pool, np.zeros_like(pool))

    queries_at, beacons_at = _offsets(raw_n), _offsets(beacon_n)
    bounds = (queries_at, raw_n, beacons_at, beacon_n, slot_at, raw_hi, beacon_slot_at, beacon_hi)
    blocks = []
    for step, (q, qn, b, bn, s, sn, t, tn) in zip(flat, np.stack(bounds, axis=1).tolist(), strict=True):
        blocks.append(Block(step, slice(q, q + qn), slice(b, b + bn), slice(s, s + sn), slice(t, t + tn)))
    return Plan(
        config,
        len(states),
        raw,
        beacon,
        raw_slots,
        beacon_slots,
        commits,
        opens,
        tuple(commit_counts.tolist()),
        tuple((open_raw + open_beacons).tolist()),
        tuple(blocks),
    )


def _queries(row: Ints, origin: Ints, seen: Ints, view: View, slot_at: Ints, beacon_slot_at: Ints) -> Queries:
    runs = (
        row,
        origin + view.position,
        seen,
        slot_at + view.raw_lo,
        slot_at + view.raw_hi,
        beacon_slot_at + view.beacon_lo,
        beacon_slot_at + view.beacon_hi,
    )
    return Queries(*(torch.from_numpy(np.ascontiguousarray(run)) for run in runs))


def _keys(pool: Ints, position: Ints) -> Keys:
    return Keys(torch.from_numpy(np.ascontiguousarray(pool)), torch.from_numpy(np.ascontiguousarray(position)))
