"""What differs between model families, as data. Adding a family means adding a row here and a tiny test config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """How one model type lays out its attention.

    Args:
        attention_norm: Attribute of the decoder layer that normalises the attention's input; None where the
            attention reads the residual stream itself (norms after it).
        fused_qkv: Attribute of one projection that yields q, k and v together; None where they are separate.
        qk_norm: Norms of q and k, per ``head`` or over ``all`` heads; None without.
        logits_divisor: Config field that divides the logits; None without.
    """

    attention_norm: str | None = "input_layernorm"
    fused_qkv: str | None = None
    qk_norm: Literal["head", "all"] | None = None
    logits_divisor: str | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm="head"),
    "phi3": Family(fused_qkv="qkv_proj"),
    "granite": Family(logits_divisor="logits_scaling"),
    "olmo2": Family(attention_norm=None, qk_norm="all"),
}

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def supported() -> str:
    """The supported model types, for messages."""
    return ", ".join(FAMILIES)


def family_of(config: Any) -> Family:
    """The family of a Hugging Face model configuration.

    Raises:
        NotImplementedError: Unsupported model type, encoder-decoder, mixed layer types or rotary flavour.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model type {name!r} is an encoder-decoder, which beacon.wrap cannot extend; supported: {supported()}."
        )
    if name not in FAMILIES:
        raise NotImplementedError(f"model type {name!r} is not supported; supported model types: {supported()}.")
    layer_types = set(getattr(config, "layer_types", None) or [])
    if len(layer_types) > 1 or layer_types - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(
            f"model type {name!r} with mixed layer types {sorted(layer_types)} is not supported; "
            f"supported: {supported()} with the same attention in every layer."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise NotImplementedError(
            f"model type {name!r} with rope type {rope!r} is not supported (its frequencies change with the length "
            f"read so far); supported rope types: {', '.join(ROPE_TYPES)}."
        )
    return FAMILIES[name]


def uniform_sliding_window(config: Any) -> int | None:
    """The sliding window that every layer uses, or None."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and set(layer_types) != {"sliding_attention"}:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def trained_context(config: Any) -> int:
    """Longest position the base model serves: its maximum, capped by a uniform sliding window.

    For ``longrope`` it is the original maximum: the factors are fixed to the short ones.
    """
    limits = [config.max_position_embeddings]
    window = uniform_sliding_window(config)
    if window is not None:
        limits.append(window)
    if is_longrope(config):
        limits.append(config.rope_parameters["original_max_position_embeddings"])
    return int(min(limits))


def is_longrope(config: Any) -> bool:
    """Whether the rotary embedding switches its factors by length; we fix them to those of short texts."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope"
