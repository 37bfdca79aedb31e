"""Decode with static shapes: one token per row into a cache's slots, then the beacons of windows that have become full.

A token's pass writes its key and value into the row's next slot and reads all slots up to it. Beacons, which nobody
but later tokens reads, have a pass of their own, and only then is memory rearranged. All are functions of tensors
alone, so on a GPU each is recorded once in a CUDA graph and replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch

from beacon.cache import BeaconCache
from beacon.decoder import Decoder
from beacon.plan import Room, RowState, WindowStep, open_slots, room_for, schedule
from beacon.reading import ratio_chooser
from beacon.slots import Slots

logger = logging.getLogger(__name__)


def decodes(cache: Any, input_ids: torch.Tensor) -> bool:
    """Whether a call reads one token into every row of a cache that has room reserved."""
    return (
        isinstance(cache, BeaconCache)
        and cache.max_tokens is not None
        and cache.columns.count > 0
        and input_ids.shape == (cache.batch_size, 1)
        and not torch.is_grad_enabled()
    )


def condenses_next(cache: BeaconCache) -> bool:
    """Whether the next token may condense a window, so that it could not be taken back."""
    decoder = cast("Decoder | None", cache.decoder) if cache.in_slots else None
    return decoder is None or decoder.uncondensed < 1


def decode_token(
    model: Any, cache: BeaconCache, ids: torch.Tensor, ratios: int | tuple[int, ...] | None, expected_length: int | None
) -> torch.Tensor:
    """Read one token into every row of a cache.

    What fails before windows are condensed leaves the cache where it was. Condensing writes over what rows hold:
    interrupted there, the cache is marked and refused from then on.

    Args:
        model: The wrapped model.
        cache: With room reserved (:meth:`beacon.BeaconCache.reserve`); it goes on from here.
        ids: Token ids ``[rows, 1]``.
        ratios: Explicit ratios in force.
        expected_length: Expected length in force.

    Returns:
        Logits ``[rows, vocab]``; the next token's overwrite them.

    Raises:
        ValueError: ``ratios`` names fewer windows than the text fills.
    """
    decoder = settle(model, cache, ratios, expected_length)
    decoder.locate(cache)
    steps = [] if decoder.quiet > 0 else _next_steps(model, cache, ratios, expected_length)
    if steps:
        decoder = settle(model, cache, ratios, expected_length, room_for(cache.config, (), steps))
        decoder.locate(cache)
    try:
        hidden, logits = decoder.read(ids[:, 0])
        if steps:
            decoder.read_beacons(steps)
    except BaseException:
        decoder.forget()
        if decoder.records:  # a replay wrote where they were
            decoder.slots.hidden = None
        raise
    cache.interrupted = True
    decoder.rearrange()
    if steps:
        cache.states = [after for _, after in steps]
    else:
        cache.advance(1)
    cache.columns.append(ids, None)
    decoder.slots.hidden = hidden
    cache.ratios, cache.expected_length = ratios, expected_length
    cache.interrupted = False
    decoder.locate(cache)
    return logits


def settle(
    model: Any,
    cache: BeaconCache,
    ratios: int | tuple[int, ...] | None,
    expected_length: int | None,
    need: Room | None = None,
) -> Decoder:
    """Bring what a cache has read into slots, if it is not there, and see to it that they have room.

    Args:
        model: The wrapped model.
        cache: The cache; unchanged if this fails.
        ratios: Explicit ratios in force.
        expected_length: Expected length in force.
        need: What the next token takes, where that may be more than they have.

    Returns:
        Who writes there.
    """
    config, slots, decoder = cache.config, cache.slots, cast("Decoder | None", cache.decoder)
    if cache.in_slots and slots is not None and (need is None or slots.room.union(need) == slots.room):
        if decoder is None or not decoder.serves(model, slots):
            cache.decoder = decoder = Decoder(model, config, slots)
        return decoder
    rotary = model.beacon_rotary()
    hidden = None
    if cache.in_slots and slots is not None and need is not None:
        room = slots.room.union(need).union(Room(slots.room.slots * 3 // 2, slots.room.opens, slots.room.waiting))
        logger.warning(
            "the static cache for %d tokens is full and grows from %d to %d entries a row; make it with a larger "
            "max_tokens to save the copy",
            cache.max_tokens,
            slots.room.slots,
            room.slots,
        )
        stores, hidden = slots.stores(config, cache.states), slots.hidden
    else:
        room = _reserved(model, cache, ratios, expected_length).union(Room() if need is None else need)
        stores = cache.condensed_stores(rotary)
        known = [state for state in cache.last_hidden if state is not None]
        hidden = torch.stack(known) if len(known) == cache.batch_size else None
    like = [store.open_k[0] for store in stores]
    if slots is None or not slots.serve(cache.batch_size, room, like):
        slots = Slots(cache.batch_size, room, like)
    if decoder is None or not decoder.serves(model, slots):
        decoder = Decoder(model, config, slots)
    with torch.no_grad():
        slots.take_over(config, stores, cache.states, rotary)
        if cache.stock is not None and not cache.in_slots:
            _take_rotated(cache, slots)
    slots.hidden = hidden
    cache.slots, cache.decoder, cache.in_slots = slots, decoder, True
    cache.stores, cache.stock, cache.stock_positions = [], None, []
    cache.mark = object()
    cache.attention_path = f"{decoder.path} (static)"
    return decoder


def _take_rotated(cache: BeaconCache, slots: Slots) -> None:
    """Nothing is condensed yet: keys stay bit for bit those of the stock attention, where its positions are ours."""
    assert cache.stock is not None
    _, mask = cache.columns.read()
    positions = torch.cat([p.expand(cache.batch_size, -1).cpu() for p in cache.stock_positions], dim=1)
    for row, state in enumerate(cache.states):
        columns = mask[row].nonzero()[:, 0]
        if state.memory == 0 and positions[row][columns].tolist() == open_slots(cache.config, state)[0].tolist():
            slots.take_rotated(cache.stock.layers, row, columns)


def _reserved(
    model: Any, cache: BeaconCache, ratios: int | tuple[int, ...] | None, expected_length: int | None
) -> Room:
    """What the rows take until each has the tokens that room is reserved for, if they are read one by one."""
    config = cache.config
    least = min(config.ratios)
    probe = BeaconCache(config, cache.owner, 0)
    probe.warned = True  # of a text that may never come
    room = room_for(config, cache.states, ())
    for row, state in enumerate(cache.states):

        def choose(at: RowState, row: int = row) -> int:
            if callable(config.ratio_policy) and ratios is None:
                return least  # it may count how often it is asked
            try:
                return _chooser(model, probe, row, at.open_start + config.window, ratios, expected_length)(at)
            except ValueError:  # ratios for fewer windows
                return least

        more = max((cache.max_tokens or 0) - state.tokens, 1)
        room = room.union(room_for(config, (), schedule(config, state, more, choose, row=row, span=cache.span)))
    return room


def _next_steps(
    model: Any, cache: BeaconCache, ratios: int | tuple[int, ...] | None, expected_length: int | None
) -> list[tuple[WindowStep, RowState]]:
    """The next token's step of every row."""
    steps = []
    for row, state in enumerate(cache.states):
        choose = _chooser(model, cache, row, state.tokens + 1, ratios, expected_length)
        steps += schedule(cache.config, state, 1, choose, row=row, span=cache.span)
    return steps


def _chooser(
    model: Any,
    cache: BeaconCache,
    row: int,
    known: int,
    ratios: int | tuple[int, ...] | None,
    expected_length: int | None,
) -> Callable[[RowState], int]:
    length = known if expected_length is None else max(expected_length, known)
    return ratio_chooser(cache, row, length, ratios, model.beacon_wrapping.native_context)
