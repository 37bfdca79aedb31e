"""Decode with static shapes: one token per row into a cache's slots, then the beacons of windows that have become full.

A token's pass writes its key and value into the row's next slot and reads all slots up to it. Beacons, which nobody
but later tokens reads, have a pass of their own, and only then is memory rearranged. Both are functions of tensors
alone, so on a GPU each is recorded once in a CUDA graph and replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch

from beacon.cache import BeaconCache
from beacon.decoder import Decoder
from beacon.plan import Room, RowState, WindowStep, room_for, schedule
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


def is_quiet(cache: BeaconCache) -> bool:
    """Whether the next token surely condenses nothing."""
    decoder = None if cache.slots is None or not cache.in_slots else cache.slots.decoder
    return decoder is not None and decoder.quiet > 0


def decode_token(
    model: Any, cache: BeaconCache, ids: torch.Tensor, ratios: int | tuple[int, ...] | None, expected_length: int | None
) -> torch.Tensor:
    """Read one token into every row of a cache.

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
    decoder.locate(cache, cache.span)
    try:
        if decoder.quiet > 0:
            logits = decoder.read(ids[:, 0])
            cache.advance(1)
        else:
            steps = _next_steps(model, cache, ratios, expected_length)
            decoder = settle(model, cache, ratios, expected_length, room_for(cache.config, (), steps))
            decoder.locate(cache, cache.span)
            logits = decoder.read(ids[:, 0])
            decoder.change(steps)
            cache.states = [after for _, after in steps]
    except BaseException:
        decoder.forget()  # the cache is where it was: what has been written lies behind all that it holds
        raise
    cache.columns.append(ids, None)
    cache.ratios, cache.expected_length = ratios, expected_length
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
        cache: The cache.
        ratios: Explicit ratios in force.
        expected_length: Expected length in force.
        need: What the next token takes, where that may be more than they have.

    Returns:
        Who writes there.
    """
    config, slots = cache.config, cache.slots
    need = Room() if need is None else need
    if not cache.in_slots or slots is None:
        room = _reserved(model, cache, ratios, expected_length).union(need)
        stores = cache.condensed_stores(model.beacon_rotary())
    elif slots.room.union(need) == slots.room:
        if slots.decoder is None:
            slots.decoder = Decoder(model, cache)
        return cast(Decoder, slots.decoder)
    else:
        before, cache.max_tokens = cache.max_tokens, 2 * max(cache.max_tokens or 0, *(s.tokens for s in cache.states))
        room = _reserved(model, cache, ratios, expected_length).union(need).union(slots.room)
        logger.warning(
            "the static cache for %d tokens is full and grows from %d to %d entries a row, for %d tokens; make it with "
            "a larger max_tokens to save the copy",
            before,
            slots.room.slots,
            room.slots,
            cache.max_tokens,
        )
        stores = slots.stores(config, cache.states)
    like = [store.open_k[0] for store in stores]
    if slots is None or not slots.serve(cache.batch_size, room, like):
        slots = Slots(cache.batch_size, room, like)
    with torch.no_grad():
        slots.take_over(config, stores, cache.states, model.beacon_rotary())
    cache.slots, cache.in_slots = slots, True
    cache.stores, cache.stock, cache.stock_positions = [], None, []
    cache.mark = object()
    if slots.decoder is None:
        slots.decoder = Decoder(model, cache)
    cache.attention_path = f"{slots.decoder.path} (static)"
    return cast(Decoder, slots.decoder)


def _reserved(
    model: Any, cache: BeaconCache, ratios: int | tuple[int, ...] | None, expected_length: int | None
) -> Room:
    """What the rows take until each has the tokens that room is reserved for."""
    room = room_for(cache.config, cache.states, ())
    probe = BeaconCache(cache.config, cache.owner, 0)
    probe.warned = True  # of a text that may never come
    for row, state in enumerate(cache.states):
        more = max((cache.max_tokens or 0) - state.tokens, 1)
        choose = _chooser(model, probe, row, state.tokens + more, ratios, expected_length)
        try:
            steps = schedule(cache.config, state, more, choose, row=row, span=cache.span)
        except ValueError:  # ratios for fewer windows: it grows if others are named
            continue
        room = room.union(room_for(cache.config, (), steps))
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
