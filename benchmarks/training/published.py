"""The published schedule, as a baseline: one window after the other, in plain PyTorch.

Written from the description of the algorithm (DESIGN.md, section 2; arXiv 2401.03462, section 3): memory holds keys
before rotation, and in every window all keys (memory, raw, beacons) are rotated at their present positions; beacons
stand after the window's raw tokens; attention is scaled_dot_product_attention with a materialised mask of
``[queries, keys]`` that all layers share; gradients flow through memory; layers are checkpointed. It computes what
``beacon`` computes, with the same parameters, which a test asserts. Where nothing is prescribed the baseline gets the
better: the mask and the rotation's table are made once per window, and the window that ends the text has no beacons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from beacon.config import BeaconConfig

Table = tuple[torch.Tensor, torch.Tensor]


def published_loss(model: Any, ids: torch.Tensor, ratios: Sequence[int]) -> torch.Tensor:
    """Mean next-token loss of one text.

    Args:
        model: A wrapped Llama with its own q, k, v and o.
        ids: The text, ``[1, tokens]``.
        ratios: One per window but the last.

    Raises:
        NotImplementedError: Another configuration than append, step-expansion, S = W, without sinks.
    """
    config = model.beacon_config
    check_first_version(config)
    body = model.model
    total, window = ids.shape[1], config.window
    memory: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(body.layers)
    entries, losses = 0, []
    for number, start in enumerate(range(0, total, window)):
        stop = min(start + window, total)
        length = stop - start
        ratio = 0 if stop == total else ratios[number]
        beacons = window // ratio if ratio else 0
        hidden = body.embed_tokens(ids[:, start:stop])
        if beacons:
            own = body.beacon_embed_tokens(ids.new_zeros(1)).to(hidden).expand(1, beacons, -1)
            hidden = torch.cat([hidden, own], dim=1)
        table = body.rotary_emb(hidden, positions(entries, length, beacons, ratio, ids.device))
        mask = materialised_mask(entries, length, beacons, ratio, hidden.dtype, ids.device)
        for index, layer in enumerate(body.layers):
            old = memory[index] or (None, None)
            hidden, k, v = checkpoint(read_layer, layer, hidden, length, *old, table, mask, use_reentrant=False)
            if beacons:
                memory[index] = k, v
        entries += beacons
        known = min(stop + 1, total) - start - 1  # tokens of this window whose successor is part of the text
        logits = model.lm_head(body.norm(hidden[:, :known])).float()
        losses.append(F.cross_entropy(logits[0], ids[0, start + 1 : start + 1 + known], reduction="sum"))
    return torch.stack(losses).sum() / (total - 1)


def check_first_version(config: BeaconConfig) -> None:
    """Refuse what the baseline does not compute.

    Raises:
        NotImplementedError: Another configuration than append, step-expansion, S = W, without sinks.
    """
    plain = config.placement == "append" and config.attention == "step-expansion" and config.step == config.window
    if not plain or config.sink or config.attend_beacons or not config.attend_memory or len(config.projections) < 4:
        raise NotImplementedError(f"the baseline computes the paper's first version alone, got {config}")


def positions(entries: int, length: int, beacons: int, ratio: int, device: torch.device) -> torch.Tensor:
    """Of memory, raw tokens and beacons: ``[1, keys]``."""
    own = entries + ratio * torch.arange(1, beacons + 1, device=device)
    return torch.cat([torch.arange(entries + length, device=device), own])[None]


def materialised_mask(
    entries: int, length: int, beacons: int, ratio: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """0 where a query sees a key, else the dtype's minimum: ``[1, 1, raw + beacons, memory + raw + beacons]``."""
    raw, own = torch.arange(length, device=device), torch.arange(beacons, device=device)
    sees = torch.zeros(length + beacons, entries + length + beacons, dtype=torch.bool, device=device)
    sees[:, :entries] = True
    sees[:length, entries : entries + length] = raw <= raw[:, None]
    sees[length:, entries : entries + length] = raw < (own[:, None] + 1) * ratio
    sees[length:, entries + length :] = own == own[:, None]
    mask = torch.zeros(sees.shape, dtype=dtype, device=device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[None, None]


def read_layer(
    layer: Any,
    hidden: torch.Tensor,
    length: int,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    table: Table,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One decoder layer: the hidden states after it, and memory with this window's beacons (keys not rotated)."""
    attention = layer.self_attn
    x = layer.input_layernorm(hidden)[0]
    q, k, v = (_heads(_projected(attention, name, x, length), attention.head_dim) for name in "qkv")
    entries = 0 if memory_k is None else memory_k.shape[2]
    keys = k if memory_k is None else torch.cat([memory_k, k], dim=2)
    values = v if memory_v is None else torch.cat([memory_v, v], dim=2)
    cos, sin = (part[:, None] for part in table)
    first = keys.shape[2] - q.shape[2]
    q, turned = _rotated(q, cos[:, :, first:], sin[:, :, first:]), _rotated(keys, cos, sin)
    groups = q.shape[1] // keys.shape[1]
    out = F.scaled_dot_product_attention(
        q, _repeated(turned, groups), _repeated(values, groups), attn_mask=mask.to(q.dtype), scale=attention.scaling
    )
    out = out[0].transpose(0, 1).flatten(1)
    hidden = hidden + _projected(attention, "o", out, length)[None]
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden, _condensed(keys, entries, length), _condensed(values, entries, length)


def _condensed(stored: torch.Tensor, entries: int, length: int) -> torch.Tensor:
    """Memory and beacons of ``[1, heads, memory + raw + beacons, head_dim]``."""
    return torch.cat([stored[:, :, :entries], stored[:, :, entries + length :]], dim=2)


def _projected(attention: Any, name: str, x: torch.Tensor, length: int) -> torch.Tensor:
    """``[raw + beacons, channels]`` in and out."""
    raw: torch.Tensor = getattr(attention, f"{name}_proj")(x[:length])
    if len(x) == length:
        return raw
    return torch.cat([raw, getattr(attention, f"beacon_{name}_proj")(x[length:])])


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``[1, heads, n, head_dim]`` of ``[n, channels]``."""
    return x.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _repeated(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
