"""Where keys stand in buffers of fixed size, and what changes there when a window is condensed (integers only).

Every row of the buffers has slots of its own, and a key's position is its slot: memory entries first, then the open
window, whose raw tokens (and beacons, where raw tokens see them) stand at ``memory + u``. A decoded token sees all
slots up to its own. Other places: *open* entries, raw keys of the open window before rotation, one per raw token; and
*waiting* entries, beacons of the open window before rotation (interleave).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from beacon.config import BeaconConfig
from beacon.plan.geometry import Ints, beacon_view, raw_positions
from beacon.plan.schedule import RowState, Span, WindowStep

ENDLESS = 1 << 30  # tokens


@dataclass(frozen=True)
class Room:
    """Entries that one row of the buffers holds.

    Args:
        slots: Memory and the open window.
        opens: Raw tokens of the open window.
        waiting: Beacons of the open window (interleave).
    """

    slots: int = 0
    opens: int = 0
    waiting: int = 0

    def union(self, other: Room) -> Room:
        """The smallest that holds either."""
        slots, opens = max(self.slots, other.slots), max(self.opens, other.opens)
        return Room(slots, opens, max(self.waiting, other.waiting))


def beacons_in_slots(config: BeaconConfig) -> bool:
    """Whether raw tokens see the beacons of their own window."""
    return config.placement == "interleave" and config.attention == "full-coverage"


def open_slots(config: BeaconConfig, state: RowState) -> tuple[Ints, Ints]:
    """Slots of the open window's raw tokens and of its beacons; of the latter none where raw tokens do not see them."""
    offset, number = np.arange(state.open_raw, dtype=np.int64), np.arange(1, state.open_beacons + 1, dtype=np.int64)
    ratio = state.open_ratio or 0
    raw = state.memory + raw_positions(config, offset, np.full_like(offset, ratio))
    if not beacons_in_slots(config):
        return raw, number[:0]
    return raw, state.memory + beacon_view(config, number, np.full_like(number, ratio)).position


def next_slot(config: BeaconConfig, state: RowState) -> int:
    """Slot, and position, of the row's next token."""
    offset, ratio = np.asarray([state.open_raw, state.open_ratio or 0], dtype=np.int64)
    return state.memory + int(raw_positions(config, offset, ratio))


def uncondensed_tokens(config: BeaconConfig, state: RowState, span: Span) -> int:
    """How many more tokens surely condense nothing."""
    if state.tokens < span.keep_first:
        return span.keep_first - state.open_raw - 1
    if span.keep_from is not None and state.open_start + config.window > span.keep_from:
        return ENDLESS
    return config.window - state.open_raw - 1


def quiet_tokens(config: BeaconConfig, state: RowState, span: Span) -> int:
    """How many of these surely bring no beacon and open no window whose ratio is to be chosen."""
    left = uncondensed_tokens(config, state, span)
    if config.placement == "append" or left == ENDLESS or state.tokens < span.keep_first:
        return left
    if state.open_ratio is None:
        return 0
    return min(left, state.open_ratio - state.open_raw % state.open_ratio - 1) if state.open_ratio else left


def room_for(config: BeaconConfig, states: Iterable[RowState], steps: Iterable[tuple[WindowStep, RowState]]) -> Room:
    """What rows in these states take, and rows that read these steps on the way, token by token."""
    room = Room()
    waits = config.placement == "interleave"
    for state in states:
        seen = state.open_beacons if beacons_in_slots(config) else 0
        room = room.union(Room(state.memory + state.open_raw + seen, state.open_raw, waits * state.open_beacons))
    for step, after in steps:
        seen = step.beacon_hi if beacons_in_slots(config) else 0
        room = room.union(Room(step.memory + step.raw_hi + seen, step.raw_hi, waits * step.beacon_hi))
        room = room.union(Room(after.memory + after.open_raw, after.open_raw))
    return room


@dataclass(frozen=True)
class Change:
    """New beacons of some rows, equally many in each, and what their windows leave behind when they are condensed.

    int64 arrays; places are flat over the buffers of all rows.

    Args:
        rows: Rows of the buffers ``[n]``.
        count: New beacons per row.
        position: Of every new beacon ``[n * count]``, row after row, as the next four.
        runs: What it sees, half-open: slots in two runs, and new beacons (numbered through all rows) in a third:
            ``[3, 2, n * count]``.
        slot: Where its rotated key and value go; empty where raw tokens do not see it.
        wait: Where it waits; empty where it is condensed at once (append).
        commit_from: Waiting beacons that become memory; empty where the new ones do, or none.
        commit_to: Their slots, or those of the new ones.
        commit_position: Their positions there.
        moved_from: Open entries whose key is rotated anew (sinks, kept tails).
        moved_value: Slots of their values.
        moved_to: Their new slots.
        moved_position: Their positions there.
        shift_from: Open entries that stay in the window.
        shift_to: Where they go.
    """

    rows: Ints
    count: int
    position: Ints
    runs: Ints
    slot: Ints
    wait: Ints
    commit_from: Ints
    commit_to: Ints
    commit_position: Ints
    moved_from: Ints
    moved_value: Ints
    moved_to: Ints
    moved_position: Ints
    shift_from: Ints
    shift_to: Ints


def lay_out_change(config: BeaconConfig, steps: Sequence[tuple[WindowStep, RowState]], room: Room) -> Change:
    """What the steps do beyond reading their raw tokens, which the buffers hold already.

    Args:
        config: The configuration.
        steps: Steps of different rows that bring equally many beacons, each with its row's state afterwards.
        room: Of the buffers.
    """
    count = steps[0][0].beacon_hi - steps[0][0].beacon_lo
    parts = [_change(config, step, after, room, n * count) for n, (step, after) in enumerate(steps)]
    joined = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    return Change(np.array([step.row for step, _ in steps], dtype=np.int64), count, **joined)


def _change(config: BeaconConfig, step: WindowStep, after: RowState, room: Room, first_new: int) -> dict[str, Ints]:
    nothing = np.zeros(0, dtype=np.int64)
    first_slot, first_open, first_wait = step.row * room.slots, step.row * room.opens, step.row * room.waiting
    number = np.arange(step.beacon_lo + 1, step.beacon_hi + 1, dtype=np.int64)
    view = beacon_view(config, number, np.full_like(number, step.ratio))
    position = step.memory + view.position
    in_slots, waits = beacons_in_slots(config), config.placement == "interleave"
    zero, window_slot, new = np.zeros_like(number), first_slot + step.memory, first_new - step.beacon_lo
    runs = [
        (zero + first_slot, zero + (window_slot if config.attend_memory else first_slot)),
        (window_slot + view.raw_lo, window_slot + view.raw_hi),
        (new + view.beacon_lo, new + view.beacon_hi),
    ]
    if in_slots:  # in plain causal order with raw tokens and sisters
        runs[1:] = [(zero + window_slot, first_slot + position + 1), (zero, zero)]

    committed = np.arange(step.commit_beacons, dtype=np.int64)
    memory_at = step.memory + step.commit_raw + committed
    sinks = np.arange(step.commit_raw if step.ratio else 0, dtype=np.int64)
    stays = np.arange(step.consumed, step.raw_hi if step.consumed else 0, dtype=np.int64)
    tail_at = after.memory + stays - step.consumed
    moves = stays if step.ratio else nothing  # at ratio 0 the tail keeps its positions
    moved = np.concatenate([sinks, moves])
    moved_at = np.concatenate([step.memory + sinks, tail_at[: len(moves)]])
    return {
        "position": position,
        "runs": np.array(runs),
        "slot": first_slot + position if in_slots else nothing,
        "wait": first_wait + number - 1 if waits else nothing,
        "commit_from": first_wait + committed if waits else nothing,
        "commit_to": first_slot + memory_at,
        "commit_position": memory_at,
        "moved_from": first_open + moved,
        "moved_value": first_slot + step.memory + raw_positions(config, moved, np.full_like(moved, step.ratio)),
        "moved_to": first_slot + moved_at,
        "moved_position": moved_at,
        "shift_from": first_open + stays,
        "shift_to": first_open + stays - step.consumed,
    }
