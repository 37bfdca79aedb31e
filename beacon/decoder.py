"""Reads tokens into a cache's slots, and condenses there, step by step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from beacon.attention import slot_path
from beacon.cache import BeaconCache
from beacon.plan import (
    Change,
    RowState,
    Span,
    WindowStep,
    beacons_in_slots,
    lay_out_change,
    next_slot,
    quiet_tokens,
    room_for,
    upload,
)
from beacon.reading import run_layers
from beacon.recording import Recorded
from beacon.segments import shares_passes
from beacon.slot_passes import ChangePass, Site, TokenPass, Where, rearrange
from beacon.slots import Slots

ARRAYS = tuple(field.name for field in dataclasses.fields(Change) if field.name != "count")


class Decoder:
    """Reads tokens into the slots of one cache.

    Args:
        model: The wrapped model.
        cache: Its slots hold what it has read.
    """

    def __init__(self, model: Any, cache: BeaconCache) -> None:
        assert cache.slots is not None
        self.slots, self.config = cache.slots, cache.config
        k = self.slots.layers[0].k
        self._device = k.device
        self.path = slot_path(cache.config.attention_path, k.device, k.dtype, k.shape[-1])
        self._site = Site(cache.slots, self.path, model.beacon_rotary(), beacons_in_slots(cache.config))
        self._model = model
        self.records = can_record(model, self.slots)
        self._mark: object = None  # of the states that what follows was made for
        self.quiet = 0  # tokens that every row can read before something else happens
        self._reach, self._whole = 0, False
        with torch.inference_mode(False):
            self._where = torch.zeros(3, self.slots.rows, dtype=torch.int64, device=self._device)
            self._ids = torch.zeros(self.slots.rows, dtype=torch.int64, device=self._device)
        self._token = self._recorded(self._read_token)
        self._changes: dict[Any, tuple[torch.Tensor, Callable[[], Any]]] = {}

    def locate(self, cache: BeaconCache, span: Span) -> None:
        """Find every row's next slot, unless that is known."""
        if cache.mark is self._mark:
            return
        states, room = cache.states, self.slots.room
        at = [next_slot(self.config, state) for state in states]
        rows = range(len(states))
        where = [
            [row * room.slots + at[row] for row in rows],
            [row * room.opens + state.open_raw for row, state in enumerate(states)],
            at,
        ]
        self._where.copy_(upload([torch.tensor(where)], self._device)[0])
        self.quiet = min(
            min(quiet_tokens(self.config, state, span), room.slots - at[row], room.opens - state.open_raw)
            for row, state in enumerate(states)
        )
        self._reach, self._whole = max(at) + 1, len(set(at)) == 1
        self._mark = cache.mark

    def forget(self) -> None:
        """Look anew where rows stand before the next token."""
        self._mark = None

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read one token per row.

        Args:
            ids: Token ids ``[rows]``.

        Returns:
            Logits ``[rows, vocab]``, overwritten by the next token's.
        """
        self._ids.copy_(ids, non_blocking=True)
        self.slots.hidden, logits = self._token()
        self.quiet -= 1
        self._reach += 1
        return logits

    def change(self, steps: Sequence[tuple[WindowStep, RowState]]) -> None:
        """Read the beacons that steps bring beside their tokens, and condense the windows that are full."""
        by_count = defaultdict(list)
        for step, after in steps:
            if step.beacon_hi > step.beacon_lo or step.consumed:
                by_count[step.beacon_hi - step.beacon_lo].append((step, after))
        self._reach = room_for(self.config, (), steps).slots
        for alike in by_count.values():
            # Every combination of rows would be recorded anew: all or one.
            whole = len(alike) == self.slots.rows or not self.records
            for some in [alike] if whole else [[one] for one in alike]:
                self._apply(lay_out_change(self.config, some, self.slots.room))

    # -- what is recorded ----------------------------------------------------------------------------------------------

    def _recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return Recorded(function, self._device) if self.records else function

    def _read_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        reach, whole = (self.slots.room.slots, False) if self.records else (self._reach, self._whole)
        hidden = run_layers(
            self._model, self._model.model.embed_tokens(self._ids), TokenPass(self._site, self._where, reach, whole)
        )
        logits = self._model.beacon_head(hidden)
        self._where.add_(1)
        return hidden, logits

    def _apply(self, change: Change) -> None:
        arrays = [getattr(change, name) for name in ARRAYS]
        sizes = tuple(array.size for array in arrays)
        integers = torch.cat(upload([torch.from_numpy(array).flatten() for array in arrays], self._device))
        key = change.count, sizes
        if key not in self._changes:
            with torch.inference_mode(False):
                held = torch.zeros_like(integers, device=self._device, pin_memory=False)
            self._changes[key] = held, self._recorded(partial(self._read_change, held, change.count, sizes))
        held, apply = self._changes[key]
        held.copy_(integers, non_blocking=True)
        apply()

    def _read_change(self, integers: torch.Tensor, count: int, sizes: tuple[int, ...]) -> None:
        places = dict(zip(ARRAYS, integers.split(sizes), strict=True))
        places["runs"] = places["runs"].view(3, 2, -1).int()
        at = Where(self._site, **places)
        change = ChangePass(self._site, at, count, self.slots.room.slots if self.records else self._reach)
        beacons = len(places["position"])
        if beacons:
            body = self._model.model
            raw = body.embed_tokens(self._ids[:0])
            beacon = body.beacon_embed_tokens(self._ids.new_zeros(1)).to(raw).expand(beacons, -1)
            run_layers(self._model, beacon, change)
        for layer, new in zip(self.slots.layers, change.new, strict=True):
            rearrange(layer, new, at)


def can_record(model: Any, slots: Slots) -> bool:
    """Whether a CUDA graph can hold a pass: one GPU, one process, and no hooks that move weights."""
    device = slots.layers[0].k.device
    one = all(layer.k.device == device for layer in slots.layers) and device.type == "cuda"
    return one and not shares_passes(model) and not any(hasattr(module, "_hf_hook") for module in model.modules())
