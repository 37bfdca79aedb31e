"""The definition: one dense mask over all stores, softmax in at least float32. Slow on purpose."""

from __future__ import annotations

import torch

from beacon.attention.inputs import AttentionInputs, Outputs, within
from beacon.plan import Plan, Queries


def visible(queries: Queries, memory_sizes: list[int], raw_slots: int, beacon_slots: int) -> torch.Tensor:
    """The plan as one bool mask ``[n, sum(memory_sizes) + raw_slots + beacon_slots]``."""
    parts = []
    for row, size in enumerate(memory_sizes):
        seen = torch.where(queries.row == row, queries.memory, 0)
        parts.append(within(torch.zeros_like(seen), seen, 0, size))
    parts.append(within(queries.raw_lo, queries.raw_hi, 0, raw_slots))
    parts.append(within(queries.beacon_lo, queries.beacon_hi, 0, beacon_slots))
    return torch.cat(parts, dim=1)


def attend(inputs: AttentionInputs, plan: Plan) -> Outputs:
    """Condensed attention of all raw and beacon queries.

    Returns:
        Outputs ``[n_raw, heads, head_dim]`` and ``[n_beacon, heads, head_dim]`` (None if not asked for).
    """
    k = torch.cat([*inputs.memory_k, inputs.raw_k, inputs.beacon_k])
    v = torch.cat([*inputs.memory_v, inputs.raw_v, inputs.beacon_v])
    sizes = [len(memory) for memory in inputs.memory_k]
    stores = (sizes, len(inputs.raw_k), len(inputs.beacon_k))
    raw = _dense(inputs.raw_q, k, v, visible(plan.raw, *stores), inputs.scale)
    if inputs.beacon_q is None:
        return raw, None
    return raw, _dense(inputs.beacon_q, k, v, visible(plan.beacon, *stores), inputs.scale)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    logits = logits.masked_fill(~mask, float("-inf"))
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1, dtype=dtype).to(q.dtype), v)
