"""What the layers do with a cache's slots: read a token, read beacons, condense windows.

Functions of tensors alone, so that on a GPU they can be recorded and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from beacon.attention import Entries, Table, load_rotation
from beacon.attention.slots import Sight, attend
from beacon.modules import BeaconAttention, Rotary, rotate
from beacon.slots import LayerSlots, Slots


@dataclass
class Site:
    """Where passes read and write.

    Args:
        slots: The buffers.
        path: ``triton`` or ``sdpa``.
        rotary: The model's rotary embedding.
        beacons_in_slots: Whether raw tokens see the beacons of their own window.
        records: Whether passes are recorded, so that nothing may depend on how far rows have come.
        reach: The first slots of a row, of which some query may see any; all of them where passes are recorded.
        whole: Every token sees all of these.
    """

    slots: Slots
    path: str
    rotary: Rotary
    beacons_in_slots: bool
    records: bool
    reach: int = 0
    whole: bool = False


class Where:
    """Integers of a pass and rotary tables made from them, on whichever devices the layers are."""

    def __init__(self, site: Site, **places: torch.Tensor) -> None:
        self._site, self._rotation, self._places = site, load_rotation(site.path), places
        self._made: dict[Any, Any] = {}

    def on(self, name: str, device: torch.device) -> torch.Tensor:
        """The integers of that name."""
        key = name, device
        if key not in self._made:
            self._made[key] = self._places[name].to(device)
        found: torch.Tensor = self._made[key]
        return found

    def table(self, name: str, like: torch.Tensor) -> Table:
        """cos and sin at the positions of that name, for entries ``like``."""
        key = name, like.device, like.dtype
        if key not in self._made:
            self._made[key] = self._site.rotary.table(self.on(name, like.device), like.dtype)
        found: Table = self._made[key]
        return found

    def rotated(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Entries ``[n, heads, head_dim]`` rotated at the positions of that name."""
        turn = rotate if self._rotation is None else self._rotation.queries
        return turn(x, self.table(name, x))

    def sight(self, count: int, device: torch.device) -> Sight:
        """What ``count`` queries per row see, by the integers ``runs`` and (if not all) ``rows``."""
        key = "sight", device
        if key not in self._made:
            rows = self.on("rows", device) if "rows" in self._places else None
            site, capacity = self._site, self._site.slots.room.slots
            reach, whole = (capacity, False) if site.records else (site.reach, site.whole and rows is None)
            self._made[key] = Sight(self.on("runs", device), count, capacity, rows, reach, whole)
        found: Sight = self._made[key]
        return found

    def write(self, entries: Entries, name: str, slots: Entries, places: str) -> None:
        """Keys rotated at the positions of one name, and values, into the slots of another."""
        k, v = entries
        where = self.on(places, k.device)
        if self._rotation is not None:
            self._rotation.write(entries, self.table(name, k), slots, where)
            return
        slots[0].index_copy_(0, where, self.rotated(k, name))
        slots[1].index_copy_(0, where, v)


class TokenPass:
    """One new token in every row (a :class:`beacon.modules.Pass`): it sees all slots up to its own.

    Args:
        site: Where.
        where: Slot, open entry (flat over rows) and position of each token, int64 ``[3, rows]``.
    """

    outputs = True

    def __init__(self, site: Site, where: torch.Tensor) -> None:
        self._site = site
        slot, opens, position = where.unbind()
        runs = torch.stack([slot - position, slot + 1])[None].int()
        self._at = Where(site, slot=slot, opens=opens, position=position, runs=runs)

    @property
    def raw_tokens(self) -> int:
        """One per row."""
        return self._site.slots.rows

    def for_last_layer(self, beacon_input: torch.Tensor) -> TokenPass:
        """The same: there are no beacons."""
        return self

    def run(self, attention: BeaconAttention, hidden: torch.Tensor) -> torch.Tensor:
        """Write keys and values, and attend: ``[rows, hidden]`` in and out."""
        layer, at = self._site.slots.layers[attention.layer_idx], self._at
        q, k, v = attention.project(hidden, own=False, queries=True)
        assert q is not None
        device = k.device
        k, v = k.to(layer.k.dtype), v.to(layer.v.dtype)
        layer.open_k.index_copy_(0, at.on("opens", device), k)
        at.write((k, v), "position", (layer.k, layer.v), "slot")
        q = at.rotated(q.to(layer.k.dtype), "position")
        out = attend(self._site.path, q, (layer.k, layer.v), None, at.sight(1, device), attention.scaling)
        result: torch.Tensor = attention.o_proj(out.to(hidden.dtype).flatten(1))
        return result


class ChangePass:
    """New beacons of some rows (a :class:`beacon.modules.Pass`). What they make is kept aside until all layers have it.

    Args:
        site: Where.
        at: Integers of a :class:`beacon.plan.Change`.
        count: New beacons per row.
    """

    outputs = False

    def __init__(self, site: Site, at: Where, count: int) -> None:
        self._site, self._at, self._count = site, at, count
        self._last_input: torch.Tensor | None = None
        self.new: list[Entries | None] = [None] * len(site.slots.layers)

    @property
    def raw_tokens(self) -> int:
        """None: they have been read."""
        return 0

    def for_last_layer(self, beacon_input: torch.Tensor) -> ChangePass:
        """The same for the last layer, whose beacons stop at keys and values."""
        last = ChangePass(self._site, self._at, self._count)
        last.new, last._last_input = self.new, beacon_input
        return last

    def run(self, attention: BeaconAttention, hidden: torch.Tensor) -> torch.Tensor:
        """Keep keys and values, and attend: ``[n * count, hidden]`` in and out; no rows in the last layer."""
        layer, at = self._site.slots.layers[attention.layer_idx], self._at
        last = self._last_input is not None
        hidden = hidden if self._last_input is None else self._last_input
        q, k, v = attention.project(hidden, own=True, queries=not last)
        device = k.device
        k, v = k.to(layer.k.dtype), v.to(layer.v.dtype)
        self.new[attention.layer_idx] = k, v
        own: Entries | None = None
        if not last or self._site.beacons_in_slots:
            own = at.rotated(k, "position"), v
        if self._site.beacons_in_slots and own is not None:  # behind all that is visible by now
            for store, entries in zip((layer.k, layer.v), own, strict=True):
                store.index_copy_(0, at.on("slot", device), entries)
        if q is None or own is None:
            return hidden[:0]
        q = at.rotated(q.to(layer.k.dtype), "position")
        out = attend(self._site.path, q, (layer.k, layer.v), own, at.sight(self._count, device), attention.scaling)
        o_proj = getattr(attention, "beacon_o_proj", attention.o_proj)
        result: torch.Tensor = o_proj(out.to(hidden.dtype).flatten(1))
        return result


def rearrange(layer: LayerSlots, new: Entries | None, at: Where) -> None:
    """Keep new beacons, commit what becomes memory, and move what stays in the window.

    Args:
        layer: Buffers of a layer.
        new: Keys, not rotated, and values of new beacons.
        at: Integers of a :class:`beacon.plan.Change`.
    """
    device = layer.k.device

    def of(name: str) -> torch.Tensor:
        return at.on(name, device)

    if new is not None and len(of("wait")):
        for store, entries in zip((layer.wait_k, layer.wait_v), new, strict=True):
            store.index_copy_(0, of("wait"), entries)
        new = None
    # All is read before anything is written where it stood.
    moved_k, moved_v = layer.open_k.index_select(0, of("moved_from")), layer.v.index_select(0, of("moved_value"))
    shifted = layer.open_k.index_select(0, of("shift_from"))
    if len(of("commit_to")):
        which = of("commit_from")
        k, v = new or (layer.wait_k.index_select(0, which), layer.wait_v.index_select(0, which))
        at.write((k, v), "commit_position", (layer.k, layer.v), "commit_to")
    if len(moved_k):
        at.write((moved_k, moved_v), "moved_position", (layer.k, layer.v), "moved_to")
    if len(shifted):
        layer.open_k.index_copy_(0, of("shift_to"), shifted)
