"""What is held of a text after it has been read: entries, and bytes of keys and values."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from beacon.cache import BeaconCache
from beacon.families import is_longrope, uniform_sliding_window
from beacon.memory import EIGHT_BITS
from beacon.plan import Span, schedule
from beacon.reading import ratio_chooser


def native_context(model: Any) -> int:
    """Longest text that the base of a wrapped model serves, in tokens."""
    native: int = model.beacon_wrapping.native_context
    return native


def held_entries(cache: Any) -> int:
    """Entries that the first row of a :class:`beacon.BeaconCache` holds in every layer."""
    stats = cache.stats()[0]
    return int(stats["sinks"] + stats["beacons"] + stats["raw"])


def full_cache_bytes(config: Any, tokens: int, bytes_per_value: int) -> int:
    """Bytes of keys and values of ``tokens`` entries in all layers of a model with this Hugging Face config."""
    return _values(config) * tokens * bytes_per_value


def attention_bytes(model: Any, entries: int) -> int:
    """Bytes of keys and values of ``entries`` entries in every layer of a model, in its dtype."""
    return full_cache_bytes(model.config, entries, _item(model))


def stock_bytes(model: Any, tokens: int) -> int:
    """Bytes that the stock model's cache holds of a text (layers with a sliding window hold its end)."""
    layers = DynamicCache(config=model.config).layers
    held = sum(min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens for layer in layers)
    return attention_bytes(model, held) // len(layers)


def beacon_bytes(model: Any, tokens: int, ratios: int | list[int] | None = None) -> int:
    """Bytes that a wrapped model's cache holds of a text, by its own plan.

    Args:
        model: A wrapped model.
        tokens: Tokens of the text.
        ratios: As in the model's forward.
    """
    wrapping = model.beacon_wrapping
    config, native = wrapping.config, wrapping.native_context
    cache = BeaconCache(config, wrapping.owner, 1)
    cache.warned = True  # it is said where a text is read
    given = tuple(ratios) if isinstance(ratios, list) else ratios
    choose = ratio_chooser(cache, 0, tokens, given, native)
    steps = schedule(config, cache.states[0], tokens, choose, row=0, span=Span())
    if not steps:
        return 0
    state = steps[-1][1]
    bounded = is_longrope(model.config) or uniform_sliding_window(model.config) is not None
    whole = not any(step.beacon_hi for step, _ in steps) and not (bounded and tokens > native)
    entries = state.open_raw + state.open_beacons
    if whole or config.memory_dtype == "auto":
        return attention_bytes(model, state.memory + entries)
    width = _values(model.config)
    scales = 4 * width // _width(model.config)
    code = EIGHT_BITS[config.memory_dtype][0].itemsize
    return attention_bytes(model, entries) + state.memory * (width * code + scales)


def _values(config: Any) -> int:
    """Numbers in the keys and values of one entry, over all layers."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * kv_heads * _width(config))


def _width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _item(model: Any) -> int:
    return int(model.get_input_embeddings().weight.dtype.itemsize)
