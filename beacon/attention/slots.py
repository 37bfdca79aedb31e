"""Attention to slots, buffers ``[rows * capacity, kv_heads, head_dim]`` that decoded tokens and their beacons read.

What is visible is read on the device, so that a recorded call serves while the buffers fill. ``triton`` is this
project's decode kernel, which reads what is visible alone; ``sdpa`` reads the first slots of every row under a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from beacon.attention.inputs import Entries


@dataclass(frozen=True)
class Sight:
    """Who sees which slots, the same in all layers.

    Args:
        runs: int32 ``[1 or 3, 2, n * count]``: half-open runs of slots, flat over rows; the third of new entries.
        count: Queries per row.
        capacity: Slots per row.
        rows: Which rows the queries belong to, int64 ``[n]``; None: all, in order.
        reach: The first slots of a row, of which some query may see any.
        whole: Every query sees all of these, and there is nothing else.
        masks: What SDPA adds to the logits, by dtype and whether there are new entries; made when first asked for.
    """

    runs: torch.Tensor
    count: int
    capacity: int
    rows: torch.Tensor | None
    reach: int
    whole: bool = False
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)


def attend(path: str, q: torch.Tensor, slots: Entries, new: Entries | None, sight: Sight, scale: float) -> torch.Tensor:
    """Attention of few queries per row.

    Args:
        path: ``triton`` or ``sdpa``.
        q: Rotated queries ``[n * count, heads, head_dim]``, row after row.
        slots: Rotated keys, and values, of all rows.
        new: Entries that are in no slot, ``count`` of each of these rows.
        sight: Who sees what.
        scale: Factor of the logits.

    Returns:
        ``[n * count, heads, head_dim]``.
    """
    if path == "sdpa":
        return _sdpa(q, slots, new, sight, scale)
    from beacon_kernels.beacon_attention import beacon_decode

    stores = [slots] if new is None else [slots, slots, new]
    keys, values = zip(*stores, strict=True)
    return beacon_decode(q, keys, values, sight.runs, seqlen_q=sight.count, softmax_scale=scale)[0]


def _sdpa(q: torch.Tensor, slots: Entries, new: Entries | None, sight: Sight, scale: float) -> torch.Tensor:
    rows = len(q) // sight.count
    keys, values = (_of_rows(store, sight) for store in slots)  # [rows, reach, kv_heads, head_dim]
    mask = None if sight.whole else _mask(sight, rows, q, new is not None)
    if new is not None:
        keys, values = (
            torch.cat([store, own.unflatten(0, (rows, -1))], dim=1)
            for store, own in zip((keys, values), new, strict=True)
        )
    q, k, v = q.unflatten(0, (rows, -1)).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _of_rows(store: torch.Tensor, sight: Sight) -> torch.Tensor:
    own = store.unflatten(0, (-1, sight.capacity))[:, : sight.reach]
    return own if sight.rows is None else own.index_select(0, sight.rows)


def _mask(sight: Sight, rows: int, like: torch.Tensor, has_new: bool) -> torch.Tensor:
    """``[rows, 1, count, reach (+ count)]``, in the dtype of the queries."""
    key = like.dtype, has_new
    if key in sight.masks:
        return sight.masks[key]
    number = torch.arange(rows, device=like.device)
    first = (number if sight.rows is None else sight.rows) * sight.capacity
    slots = first[:, None, None] + torch.arange(sight.reach, device=like.device)
    lo, hi = sight.runs.view(-1, 2, rows, sight.count, 1).unbind(1)
    seen = (slots >= lo[0]) & (slots < hi[0])
    if len(lo) > 1:
        seen = seen | (slots >= lo[1]) & (slots < hi[1])
    if has_new:
        own = (number * sight.count)[:, None, None] + torch.arange(sight.count, device=like.device)
        seen = torch.cat([seen, (own >= lo[2]) & (own < hi[2])], dim=-1)
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))[:, None]
    sight.masks[key] = mask
    return mask
