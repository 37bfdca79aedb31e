"""The buffers behind :mod:`beacon.plan.slots`: memory and open windows of all rows, written in place.

Unlike the tensors of a :class:`~beacon.modules.LayerStore` they belong to one cache, and nobody shares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.config import BeaconConfig
from beacon.memory import take_in
from beacon.modules import LayerStore, Rotary, rotate
from beacon.plan import Room, RowState, open_slots


@dataclass(frozen=True)
class LayerSlots:
    """One layer's buffers, flat over rows, ``[rows * n, kv_heads, head_dim]`` each.

    Args:
        k: Rotated keys in slots.
        v: Values in slots.
        open_k: Keys of the open windows' raw tokens before rotation.
        wait_k: Keys of waiting beacons before rotation.
        wait_v: Their values.
    """

    k: torch.Tensor
    v: torch.Tensor
    open_k: torch.Tensor
    wait_k: torch.Tensor
    wait_v: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self.k, self.v, self.open_k, self.wait_k, self.wait_v))


class Slots:
    """Buffers of all layers.

    Args:
        rows: Rows of the batch.
        room: Entries of every row.
        like: What the layers' entries are like: a tensor ``[..., kv_heads, head_dim]`` of each.
    """

    def __init__(self, rows: int, room: Room, like: Sequence[torch.Tensor]) -> None:
        self.rows, self.room = rows, room
        self.hidden: torch.Tensor | None = None  # final hidden states of every row's last token [rows, hidden]
        sizes = (room.slots, room.slots, room.opens, room.waiting, room.waiting)
        with torch.inference_mode(False):  # a tensor of inference mode could not be written outside of it
            self.layers = [
                LayerSlots(*(torch.zeros(rows * n, *one.shape[-2:], dtype=one.dtype, device=one.device) for n in sizes))
                for one in like
            ]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self.layers)

    def serve(self, rows: int, room: Room, like: Sequence[torch.Tensor]) -> bool:
        """Whether they hold so many rows of so much room, of such entries."""
        return (
            rows == self.rows
            and self.room.union(room) == self.room
            and [(layer.k.dtype, layer.k.device, layer.k.shape[1:]) for layer in self.layers]
            == [(one.dtype, one.device, one.shape[-2:]) for one in like]
        )

    def take_over(
        self, config: BeaconConfig, stores: Sequence[LayerStore], states: Sequence[RowState], rotary: Rotary
    ) -> None:
        """Copy what a cache holds into the buffers; nothing of what they held before is left."""
        for layer, store in zip(self.layers, stores, strict=True):
            layer.k.zero_()
            layer.v.zero_()  # where no mask could hide NaN
            memory_k, memory_v = take_in(store.memory_k, store.memory_v)
            for row, state in enumerate(states):
                raw, beacons = (torch.from_numpy(places).to(layer.k.device) for places in open_slots(config, state))
                open_k, open_v = store.open_k[row], store.open_v[row]
                first, count = row * self.room.slots, state.open_raw
                layer.k[first : first + state.memory] = memory_k[row]
                layer.v[first : first + state.memory] = memory_v[row]
                places = torch.cat([raw, beacons])
                seen = slice(0, len(places))  # raw tokens come first
                layer.k[first + places] = rotate(open_k[seen], rotary.table(places, open_k.dtype))
                layer.v[first + places] = open_v[seen]
                layer.open_k[row * self.room.opens :][:count] = open_k[:count]
                if self.room.waiting:
                    layer.wait_k[row * self.room.waiting :][: state.open_beacons] = open_k[count:]
                    layer.wait_v[row * self.room.waiting :][: state.open_beacons] = open_v[count:]

    def take_rotated(self, layers: Sequence[Any], row: int, columns: torch.Tensor) -> None:
        """Take over one row's keys as the stock attention has rotated them, where its positions are the slots'.

        Args:
            layers: The stock cache's.
            row: The row.
            columns: Where the row's text is, int64 ``[tokens]``.
        """
        for layer, stock in zip(self.layers, layers, strict=True):
            first = row * self.room.slots
            layer.k[first : first + len(columns)] = stock.keys[row][:, columns.to(stock.keys.device)].transpose(0, 1)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes row ``rows[i]``, as many as there are."""
        if list(rows) == list(range(self.rows)):
            return
        with torch.no_grad():
            for layer in self.layers:
                which = torch.tensor(rows, device=layer.k.device)
                for part in (layer.k, layer.v, layer.open_k, layer.wait_k, layer.wait_v):
                    own = part.unflatten(0, (self.rows, -1))
                    own.copy_(own.index_select(0, which))
        if self.hidden is not None:
            self.hidden = self.hidden.index_select(0, torch.tensor(rows, device=self.hidden.device))

    def stores(self, config: BeaconConfig, states: Sequence[RowState]) -> list[LayerStore]:
        """Copies of what the buffers hold, as a cache keeps it between calls."""
        stores = []
        for layer in self.layers:
            memory_k, memory_v, open_k, open_v = [], [], [], []
            for row, state in enumerate(states):
                raw = torch.from_numpy(open_slots(config, state)[0]).to(layer.k.device)
                first, waits = row * self.room.slots, row * self.room.waiting
                memory_k.append(layer.k[first : first + state.memory].clone())
                memory_v.append(layer.v[first : first + state.memory].clone())
                keys = layer.open_k[row * self.room.opens :][: state.open_raw]
                open_k.append(torch.cat([keys, layer.wait_k[waits:][: state.open_beacons]]))
                open_v.append(torch.cat([layer.v[first + raw], layer.wait_v[waits:][: state.open_beacons]]))
            stores.append(LayerStore(memory_k, memory_v, open_k, open_v))
        return stores
