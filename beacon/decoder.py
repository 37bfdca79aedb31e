"""Reads tokens into a cache's slots, and condenses there, step by step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from beacon.attention import Entries, slot_path
from beacon.cache import BeaconCache
from beacon.plan import (
    Change,
    RowState,
    WindowStep,
    beacons_in_slots,
    lay_out_change,
    next_slot,
    quiet_tokens,
    room_for,
    uncondensed_tokens,
    upload,
)
from beacon.reading import run_layers
from beacon.recording import Recorder
from beacon.segments import shares_passes
from beacon.slot_passes import ChangePass, Site, TokenPass, Where, rearrange
from beacon.slots import Slots
from beacon.weights import is_spread

ARRAYS = tuple(field.name for field in dataclasses.fields(Change) if field.name != "count")


class Decoder:
    """Reads tokens into slots. It and what it records belong to one cache, and none of it refers back to the cache.

    Args:
        model: The wrapped model.
        config: Its configuration.
        slots: The buffers.
    """

    def __init__(self, model: Any, config: Any, slots: Slots) -> None:
        k = slots.layers[0].k
        self.path = slot_path(config.attention_path, k.device, k.dtype, k.shape[-1])
        self.slots, self.config, self._model = slots, config, model
        self.records, self.made_for = can_record(model, slots), fingerprint(model, k.device)
        self.quiet = 0  # tokens that every row can read before it brings a beacon,
        self.uncondensed = 0  # or condenses a window
        self._site = Site(slots, self.path, model.beacon_rotary(), beacons_in_slots(config), self.records)
        self._device = k.device
        self._recorder = Recorder(k.device)
        self._mark: object = None  # of the states that the following are about
        with torch.inference_mode(False):
            self._where = torch.zeros(3, slots.rows, dtype=torch.int64, device=k.device)
            self._ids = torch.zeros(slots.rows, dtype=torch.int64, device=k.device)
        self._token = self._recorded(partial(_read_token, model, self._site, self._ids, self._where))
        self._changes: dict[Any, _Change] = {}
        self._begun: list[_Change] = []

    def serves(self, model: Any, slots: Slots) -> bool:
        """Whether what is recorded is still what the model would do in these buffers."""
        return self.slots is slots and self.made_for == fingerprint(model, self._device)

    def locate(self, cache: BeaconCache) -> None:
        """Find every row's next slot, unless that is known."""
        if cache.mark is self._mark:
            return
        states, room, span = cache.states, self.slots.room, cache.span
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
        self.uncondensed = min(uncondensed_tokens(self.config, state, span) for state in states)
        self._site.reach, self._site.whole = max(at) + 1, len(set(at)) == 1
        self._mark = cache.mark

    def forget(self) -> None:
        """Look anew where rows stand before the next token."""
        self._mark = None

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one token per row.

        Args:
            ids: Token ids ``[rows]``.

        Returns:
            Final hidden states ``[rows, hidden]`` and logits ``[rows, vocab]``, overwritten by the next token's.
        """
        self._ids.copy_(ids, non_blocking=True)
        hidden, logits = self._token()
        self.quiet -= 1
        self.uncondensed -= 1
        self._site.reach += 1
        return hidden, logits

    def read_beacons(self, steps: Sequence[tuple[WindowStep, RowState]]) -> None:
        """Read the beacons that steps bring beside their tokens; nothing that a row holds is written over."""
        by_count = defaultdict(list)
        for step, after in steps:
            if step.beacon_hi > step.beacon_lo or step.consumed:
                by_count[step.beacon_hi - step.beacon_lo].append((step, after))
        self._site.reach = room_for(self.config, (), steps).slots
        self._begun = []
        for alike in by_count.values():
            # Every combination of rows would be recorded anew: all or one.
            whole = len(alike) == self.slots.rows or not self.records
            for number, some in enumerate([alike] if whole else [[one] for one in alike]):
                self._begun.append(self._change(lay_out_change(self.config, some, self.slots.room), number))
                self._begun[-1].read()

    def rearrange(self) -> None:
        """Condense the windows of these steps that are full: what rows hold is written over, layer by layer."""
        for change in self._begun:
            change.move()
        if not self.records:
            self._changes.clear()  # and what it keeps
        self._begun = []

    def _recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return self._recorder.recorded(function) if self.records else function

    def _change(self, change: Change, number: int) -> _Change:
        """The functions of changes of this shape, set to this one; ``number`` tells those of one token apart."""
        arrays = [getattr(change, name) for name in ARRAYS]
        sizes = tuple(array.size for array in arrays)
        key = change.count, sizes, number
        if key not in self._changes:
            with torch.inference_mode(False):
                integers = torch.zeros(sum(sizes), dtype=torch.int64, device=self._device)
            kept: list[Entries | None] = []
            read = partial(_read_beacons, self._model, self._site, self._ids, integers, sizes, change.count, kept)
            move = partial(_move, self._site, integers, sizes, kept)
            self._changes[key] = _Change(integers, self._recorded(read), self._recorded(move))
        found = self._changes[key]
        whole = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        found.integers.copy_(upload([whole], self._device)[0])
        return found


@dataclasses.dataclass(frozen=True)
class _Change:
    """Changes of one shape: where their integers go, and the two halves of making one."""

    integers: torch.Tensor
    read: Callable[[], Any]
    move: Callable[[], Any]


# What is recorded. These refer to tensors and to the site alone, so that no cycle keeps buffers alive.


def _read_token(model: Any, site: Site, ids: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = run_layers(model, model.model.embed_tokens(ids), TokenPass(site, where))
    logits = model.beacon_head(hidden)
    where.add_(1)
    return hidden, logits


def _read_beacons(
    model: Any,
    site: Site,
    ids: torch.Tensor,
    integers: torch.Tensor,
    sizes: tuple[int, ...],
    count: int,
    kept: list[Entries | None],
) -> None:
    """Keep in ``kept`` what every layer makes of new beacons, at the same addresses every time."""
    at = _places(site, integers, sizes)
    change = ChangePass(site, at, count)
    beacons = sizes[ARRAYS.index("position")]
    if beacons:
        body = model.model
        raw = body.embed_tokens(ids[:0])
        beacon = body.beacon_embed_tokens(ids.new_zeros(1)).to(raw).expand(beacons, -1)
        run_layers(model, beacon, change)
    if not kept:
        with torch.inference_mode(False):
            kept += [
                None if new is None else (torch.empty_like(new[0]), torch.empty_like(new[1])) for new in change.new
            ]
    for mine, new in zip(kept, change.new, strict=True):
        if mine is not None and new is not None:
            mine[0].copy_(new[0])
            mine[1].copy_(new[1])


def _move(site: Site, integers: torch.Tensor, sizes: tuple[int, ...], kept: list[Entries | None]) -> None:
    at = _places(site, integers, sizes)
    for layer, new in zip(site.slots.layers, kept, strict=True):
        rearrange(layer, new, at)


def _places(site: Site, integers: torch.Tensor, sizes: tuple[int, ...]) -> Where:
    places = dict(zip(ARRAYS, integers.split(sizes), strict=True))
    places["runs"] = places["runs"].view(3, 2, -1).int()
    return Where(site, **places)


def can_record(model: Any, slots: Slots) -> bool:
    """Whether a CUDA graph can hold a pass: one GPU, one process, and nobody who steps in between."""
    device = slots.layers[0].k.device
    if device.type != "cuda" or any(layer.k.device != device for layer in slots.layers):
        return False
    if model.training or torch.is_autocast_enabled("cuda") or shares_passes(model):
        return False
    # accelerate's hooks, others', and LoRA layers, which are switched on and off
    names = ("_hf_hook", "_active_adapter")
    stepping_in = (
        any(hasattr(module, name) for name in names) or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )
    return not any(stepping_in) and not any(map(is_spread, model.parameters()))


def fingerprint(model: Any, device: torch.device) -> tuple[Any, ...]:
    """What tells that a model computes in another way, or elsewhere, than when last asked (cheap: every token asks)."""
    layers = model.model.layers
    weights = (model.model.embed_tokens.weight, next(layers[0].parameters()), next(layers[-1].parameters()))
    places = tuple(weight.data_ptr() if weight.device.type == "cuda" else 0 for weight in weights)
    return (*places, model.training, torch.is_autocast_enabled(device.type))
