"""PyTorch's scaled_dot_product_attention, one call per group of equal windows: no masked-out block is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from beacon.attention.inputs import AttentionInputs, Outputs, part, within
from beacon.plan import Block, Plan, Queries


def attend(inputs: AttentionInputs, plan: Plan) -> Outputs:
    """Condensed attention, window by window; windows of equal shape in different rows form one batch.

    Returns:
        Outputs ``[n_raw, heads, head_dim]`` and ``[n_beacon, heads, head_dim]`` (None if not asked for).
    """
    raw: list[torch.Tensor] = [inputs.raw_q] * len(plan.blocks)
    beacon: list[torch.Tensor] = [inputs.raw_q[:0]] * len(plan.blocks)
    place = {id(block): number for number, block in enumerate(plan.blocks)}
    for group in plan.groups:
        k, v = _keys(inputs, group)
        numbers = [place[id(block)] for block in group]
        q = torch.stack([inputs.raw_q[block.raw_queries] for block in group])
        mask = _mask(inputs, plan.raw, group[0], "raw_queries")
        for number, out in zip(numbers, _call(q, k, v, mask, inputs.scale).unbind(), strict=True):
            raw[number] = out
        if inputs.beacon_q is None or group[0].step.beacon_lo == group[0].step.beacon_hi:
            continue
        q = torch.stack([inputs.beacon_q[block.beacon_queries] for block in group])
        mask = _mask(inputs, plan.beacon, group[0], "beacon_queries")
        for number, out in zip(numbers, _call(q, k, v, mask, inputs.scale).unbind(), strict=True):
            beacon[number] = out
    return torch.cat(raw), None if inputs.beacon_q is None else torch.cat(beacon)


def _keys(inputs: AttentionInputs, group: tuple[Block, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory, raw and beacon keys of every window of a group: two of ``[batch, keys, kv_heads, head_dim]``."""
    keys, values = [], []
    for block in group:
        row, seen = block.step.row, block.step.memory
        raw, beacon = block.raw_slots, block.beacon_slots
        keys.append(torch.cat([inputs.memory_k[row][:seen], inputs.raw_k[raw], inputs.beacon_k[beacon]]))
        values.append(torch.cat([inputs.memory_v[row][:seen], inputs.raw_v[raw], inputs.beacon_v[beacon]]))
    if len(group) == 1:
        return keys[0][None], values[0][None]
    return torch.stack(keys), torch.stack(values)


def _mask(inputs: AttentionInputs, queries: Queries, block: Block, which: str) -> torch.Tensor | None:
    """The mask that all windows of a shape share, ``[queries, keys]``; None where everything is visible."""
    key = (which, block.shape)
    if key not in inputs.memo:
        q = part(queries, getattr(block, which))
        zero = torch.zeros_like(q.memory)
        raw, beacon = block.raw_slots, block.beacon_slots
        mask = torch.cat(
            [
                within(zero, q.memory, 0, block.step.memory),
                within(q.raw_lo, q.raw_hi, raw.start, raw.stop),
                within(q.beacon_lo, q.beacon_hi, beacon.start, beacon.stop),
            ],
            dim=1,
        )
        one_plain = which == "raw_queries" and len(q) == 1 and block.step.beacon_hi == 0
        inputs.memo[key] = None if one_plain else mask
    mask_or_none: torch.Tensor | None = inputs.memo[key]
    return mask_or_none


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """``[batch, seqlen, heads, head_dim]`` in and out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)
