"""Short texts: as long as nothing is condensed, the stock attention reads them whole, and gives the stock logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from beacon.cache import BeaconCache
from beacon.families import is_longrope, uniform_sliding_window
from beacon.identity import home_of
from beacon.reading import Itinerary, checkpoints
from beacon.text import NewText


def stock_serves(model: Any, cache: BeaconCache, trip: Itinerary, keep: bool) -> bool:
    """Whether nothing is condensed yet and in this call: then the stock attention reads the text whole.

    Beyond the native context of a model with longrope it would switch its factors, and with a sliding window forget
    keys that a later window may condense.
    """
    if cache.stock is None or trip.condenses:
        return False
    if (keep or cache.columns.count) and checkpoints(model):
        return False  # checkpointed stock layers neither read nor write a cache
    longest = max((row[-1][1].tokens for row in trip.steps if row), default=0)
    bounded = is_longrope(model.config) or uniform_sliding_window(model.config) is not None
    return not bounded or longest <= model.beacon_wrapping.native_context


def read_stock(
    model: Any,
    cache: BeaconCache,
    trip: Itinerary,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, BeaconCache]:
    """Hand the call to the stock decoder stack. Returns ``[rows, columns, hidden]`` and the cache afterwards."""
    text, after = trip.text, cache.fork()
    if text.ids.device.type == "cpu":  # ids of a text may stay on the host
        text = replace(text, ids=text.ids.to(home_of(model.model.embed_tokens)))
        attention_mask = None if attention_mask is None else attention_mask.to(text.ids.device)
    positions = _stock_positions(cache, text, position_ids)
    ids = text.ids if text.mask is None else text.ids.masked_fill(~text.mask.to(text.ids.device), 0)  # any id pads
    hidden = model.model(
        input_ids=ids,
        attention_mask=_stock_mask(cache, text, attention_mask),
        position_ids=positions,
        past_key_values=after.stock if keep or cache.columns.count else None,
        use_cache=keep,
    ).last_hidden_state
    if positions is None:
        start = cache.columns.count
        positions = torch.arange(start, start + text.ids.shape[1], device=text.ids.device)[None]
    after.stock_positions = [*cache.stock_positions, positions]
    after.attention_path = f"stock ({model.config._attn_implementation})"
    after.states = [steps[-1][1] if steps else state for steps, state in zip(trip.steps, cache.states, strict=True)]
    return hidden, after


def _stock_mask(cache: BeaconCache, text: NewText, given: torch.Tensor | None) -> torch.Tensor | None:
    """The 2-D mask the stock model gets: the caller's, with what is known of the columns read before."""
    past, new_columns = cache.columns.count, text.ids.shape[1]
    if given is not None and given.shape[1] == past + new_columns and (past == 0 or new_columns == 1):
        return given  # a decoded token must not synchronise
    _, known = cache.columns.read()
    if given is None and bool(known.all()):
        return None
    new = torch.ones(text.ids.shape, dtype=torch.bool) if text.mask is None else text.mask
    return torch.cat([known.view(len(new), -1), new], dim=1).long().to(text.ids.device)


def _stock_positions(cache: BeaconCache, text: NewText, given: torch.Tensor | None) -> torch.Tensor | None:
    """The position ids the stock model gets.

    The caller's, or None as long as the stock model's own make every row's tokens consecutive; else the rows' own.
    """
    if not cache.columns.count:
        if given is not None or text.mask is None or not _gaps(text.mask):
            return given
        return (text.mask.long().cumsum(dim=1) - 1).clamp(min=0).to(text.ids.device)
    if text.mask is None and all(state.tokens == cache.columns.count for state in cache.states):
        return given
    new = torch.ones(text.ids.shape, dtype=torch.bool) if text.mask is None else text.mask
    offsets = (new.long().cumsum(dim=1) - 1).clamp(min=0).to(text.ids.device)
    return offsets + _next_position(cache)[:, None].to(text.ids.device)


def _gaps(mask: torch.Tensor) -> bool:
    """Whether a row's text is interrupted by padding."""
    return bool(((mask[:, 1:] & ~mask[:, :-1]).sum(dim=1) + mask[:, 0].long() > 1).any())


def _next_position(cache: BeaconCache) -> torch.Tensor:
    """Position that follows each row's last text token in the stock frame, ``[rows]``."""
    _, mask = cache.columns.read()
    positions = torch.cat([p.expand(len(cache.states), -1).cpu() for p in cache.stock_positions], dim=1)
    return torch.where(mask, positions, -1).amax(dim=1) + 1
