"""Beacons of single strides, without any reading: their keys and values beside the raw tokens', layer by layer.

Raw keys and values are the stock model's, which reads the whole text; of memory there are the sinks and a few raw
tokens of earlier strides, which beacons learn to see past. No gradient passes through raw tokens, so a step costs a
third of one that reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import beacon
from beacon.modules import rotate
from scales import STRIDE

EVERY = 4  # raw tokens from one beacon to the next, by default
SPARSE = 8  # raw tokens of earlier strides from one that stands in memory to the next


@dataclass(frozen=True)
class View:
    """Where the raw tokens and the beacons of a window stand, and what the beacons see of it.

    Args:
        raw_position: Of the raw tokens ``[STRIDE]``.
        position: Of the beacons ``[beacons]``.
        sees_raw: Bool ``[beacons, STRIDE]``.
        sees_beacon: Bool ``[beacons, beacons]``.
    """

    raw_position: Tensor
    position: Tensor
    sees_raw: Tensor
    sees_beacon: Tensor


def view_of(config: beacon.BeaconConfig, ends: Tensor) -> View:
    """The view in windows that do not overlap.

    Args:
        config: How the model is wrapped.
        ends: Raw tokens before each beacon.
    """
    raws = torch.arange(STRIDE, device=ends.device)
    seen, own = raws < ends[:, None], torch.eye(len(ends), dtype=torch.bool, device=ends.device)
    if config.attend_beacons:
        own = torch.ones_like(own).tril()
    if config.placement == "interleave":
        before = torch.arange(len(ends), device=ends.device)
        return View(raws + (raws[:, None] >= ends).sum(1), ends + before, seen, own)
    if config.attention == "segmentation":
        begins = nn.functional.pad(ends[:-1], (1, 0))
        return View(raws, ends - begins, seen & (raws >= begins[:, None]), own)
    if config.attention == "full-coverage":
        return View(raws, torch.full_like(ends, STRIDE), torch.ones_like(seen), own)
    return View(raws, ends, seen, own)


@dataclass(frozen=True)
class LayerEntries:
    """Keys and values of one layer, not rotated, float ``[strides, n, heads, head_dim]``.

    Args:
        keys: Of the beacons.
        values: Of the beacons.
        raw_keys: Of the raw tokens, n `STRIDE`.
        raw_values: Of the raw tokens.
    """

    keys: Tensor
    values: Tensor
    raw_keys: Tensor
    raw_values: Tensor


def memory_entries(config: beacon.BeaconConfig, length: int) -> Tensor:
    """Raw tokens that stand for memory in texts of ``length`` tokens: the sinks, then a few of every stride."""
    return torch.cat([torch.arange(config.sink), torch.arange(SPARSE // 2, length, SPARSE)])


def read_strides(model: nn.Module, ids: Tensor, ends: Tensor, memory: int) -> Iterator[LayerEntries]:
    """Let beacons read every stride of texts on its own.

    Args:
        model: A wrapped Llama.
        ids: Token ids ``[rows, T]``, T at most the native context and a multiple of the stride.
        ends: Raw tokens of the stride before each beacon, rising.
        memory: Where a stride begins, in entries of memory; at least as many as `memory_entries` gives.

    Yields:
        Entries of every layer in turn; the strides of a text follow one another.
    """
    config, heads, width = model.beacon_config, model.config.num_attention_heads, model.config.head_dim
    raw = _stock_entries(model, ids)
    (rows, length), device = ids.shape, ids.device
    strides = length // STRIDE
    kept = memory_entries(config, length).to(device)
    places = torch.arange(len(kept), device=device)
    view, rotary = view_of(config, ends), model.beacon_rotary()
    raw_table = rotary.table(torch.cat([places, memory + view.raw_position]), torch.float32)
    own_table = rotary.table(memory + view.position, torch.float32)
    number = torch.arange(rows * strides, device=device)[:, None, None] % strides
    shape = (rows * strides, len(ends), -1)
    remembered = ((kept < number * STRIDE) | (places < config.sink)).expand(shape)
    mask = torch.cat([remembered, view.sees_raw.expand(shape), view.sees_beacon.expand(shape)], dim=-1)[:, None]
    hidden = model.model.beacon_embed_tokens.weight.expand(rows * strides, len(ends), -1)
    for index, layer in enumerate(model.model.layers):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        whole = [raw[index, name].unflatten(-1, (heads, width)) for name in ("k_proj", "v_proj")]
        raw_k, raw_v = (part.unflatten(1, (strides, STRIDE)).flatten(0, 1) for part in whole)
        k, v = (part(x).unflatten(-1, (heads, width)) for part in (attention.beacon_k_proj, attention.beacon_v_proj))
        yield LayerEntries(k, v, raw_k, raw_v)
        if index == len(model.model.layers) - 1:
            return
        q = rotate_heads(attention.beacon_q_proj(x).unflatten(-1, (heads, width)), own_table)
        memory_k, memory_v = (part[:, kept].repeat_interleave(strides, 0) for part in whole)
        keys = torch.cat(
            [rotate_heads(torch.cat([memory_k, raw_k], dim=1), raw_table), rotate_heads(k, own_table)], dim=1
        )
        values = torch.cat([memory_v, raw_v, v], dim=1)
        out = nn.functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, keys, values)), attn_mask=mask
        )
        project = getattr(attention, "beacon_o_proj", attention.o_proj)
        hidden = hidden + project(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _stock_entries(model: nn.Module, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """Every layer's keys and values, not rotated, of texts that the stock model reads as a whole."""
    raw: dict[tuple[int, str], Tensor] = {}
    handles = []
    for number, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            place = (number, name)
            handles.append(
                getattr(layer.self_attn, name).register_forward_hook(
                    lambda _, args, out, place=place: raw.__setitem__(place, out)
                )
            )
    try:
        with torch.no_grad(), beacon.disabled(model):
            model.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return raw


def rotate_heads(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``[rows, n, heads, head_dim]`` by a table of n positions."""
    rows, heads = x.shape[0], x.shape[2]
    return rotate(x.transpose(0, 1).flatten(1, 2), table).unflatten(1, (rows, heads)).transpose(0, 1)
