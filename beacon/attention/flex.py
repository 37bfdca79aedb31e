"""FlexAttention: one fused call over all windows of a pass, skipping blocks of keys that no query of a tile sees.

Queries are packed as ``[raw | beacons | padding]`` and keys as ``[memory of row 0 | memory of row 1 | ... | raw slots |
beacon slots]``, every store and the query list filled up to whole blocks. So windows whose length is a multiple of
``BLOCK`` meet the tiles' edges, a block never straddles two stores, and a call's shape takes few distinct forms for
the compiler. One call for both lists: beacons are few (``1 / ratio`` of the raw tokens), two calls would pack the keys
once but add up two gradients of every key, and the tiles at their seam cost one block.

On CUDA the kernel is compiled by ``torch.compile`` on first use (several seconds, and again for a handful of shape
classes). On a CPU PyTorch's own unfused version runs: correct, without gradients, and with a dense score matrix, good
for tests only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from beacon.attention.inputs import AttentionInputs, Outputs
from beacon.plan import Plan, Queries

BLOCK = 128  # rows and columns of the sparse block mask; flex_attention's kernels divide it
SMALLEST_HEAD = 16  # tl.dot takes no fewer channels; see FLEX_HEAD_DIM
VARIANTS = 64  # compiled forms: heads, dtype, gradients, one block or several, first static and then dynamic sizes


def attend(inputs: AttentionInputs, plan: Plan) -> Outputs:
    """Condensed attention of all windows in one call.

    Returns:
        Outputs ``[n_raw, heads, head_dim]`` and ``[n_beacon, heads, head_dim]`` (None if not asked for).

    Raises:
        NotImplementedError: Gradients on a CPU, or heads too small for the kernel.
    """
    _check(inputs)
    count = len(inputs.raw_q)
    q = _whole([inputs.raw_q if inputs.beacon_q is None else torch.cat([inputs.raw_q, inputs.beacon_q])])
    k = _whole([*inputs.memory_k, inputs.raw_k, inputs.beacon_k])
    v = _whole([*inputs.memory_v, inputs.raw_v, inputs.beacon_v])
    key = ("flex", inputs.beacon_q is None, torch.is_grad_enabled())  # checkpointing may read first without gradients
    if key not in inputs.memo:
        sizes = [len(store) for store in (*inputs.memory_k, inputs.raw_k, inputs.beacon_k)]
        inputs.memo[key] = block_mask(plan, sizes, beacons=inputs.beacon_q is not None)
    out = _kernel(q.device.type)(
        *(part.transpose(0, 1)[None] for part in (q, k, v)),
        block_mask=inputs.memo[key],
        scale=inputs.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out = out[0].transpose(0, 1)
    if inputs.beacon_q is None:
        return out[:count], None
    return out[:count], out[count : count + len(inputs.beacon_q)]


def block_mask(plan: Plan, sizes: list[int], *, beacons: bool) -> BlockMask:
    """Which blocks of keys each block of queries reads, from the plan's integers; nothing is read back from a GPU.

    Inside one window the bounds of every run grow with the query, so what a stretch of its queries sees together lies
    between the first one's lower and the last one's upper bound, and what all of them see between the last one's lower
    and the first one's upper bound. A block that a stretch sees in parts takes the exact mask, element by element.

    Args:
        plan: Who sees whom.
        sizes: Entries of every memory row, then of the raw slots and of the beacon slots.
        beacons: Whether the beacons' queries follow the raw ones.
    """
    lists = [plan.raw, plan.beacon] if beacons else [plan.raw]
    count = sum(len(queries) for queries in lists)
    filled = [_whole_blocks(size) for size in sizes]
    keys = sum(filled)
    lows, highs = _runs(lists, [sum(filled[:number]) for number in range(len(filled))], _whole_blocks(count))
    first, last = _stretches(plan, count, beacons)
    device = plan.raw.row.device
    owner = torch.from_numpy(first // BLOCK).to(device)
    edges = torch.arange(0, keys, BLOCK, device=device)
    at_first, at_last = torch.from_numpy(first).to(device), torch.from_numpy(last).to(device)
    shape = (len(owner), len(edges))
    touched = torch.zeros(shape, dtype=torch.bool, device=device)
    filled_by_one = torch.zeros_like(touched)
    for low, high in zip(lows, highs, strict=True):
        low_first, low_last = low[at_first, None], low[at_last, None]
        high_first, high_last = high[at_first, None], high[at_last, None]
        touched |= (low_first < high_last) & (low_first < edges + BLOCK) & (high_last > edges)
        filled_by_one |= (low_last <= edges) & (high_first >= edges + BLOCK)

    blocks = (_whole_blocks(count) // BLOCK, len(edges))
    tally = torch.zeros((3, *blocks), dtype=torch.int32, device=device)
    tally.index_add_(1, owner, torch.stack([touched, filled_by_one, torch.ones_like(touched)]).int())
    full = tally[1] == tally[2]
    partial = (tally[0] > 0) & ~full

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        memory = (k >= lows[0][q]) & (k < highs[0][q])
        raw = (k >= lows[1][q]) & (k < highs[1][q])
        beacon = (k >= lows[2][q]) & (k < highs[2][q])
        return memory | raw | beacon

    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(_whole_blocks(count), keys),
        compute_q_blocks=torch.is_grad_enabled(),  # only the backward pass goes through the transposed lists
    )


def _runs(
    lists: list[Queries], offsets: list[int], length: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Lower and upper bounds of the memory, raw and beacon run of every query in packed keys, int32 ``[length]``.

    Padding queries see nothing.
    """
    everyone = {name: torch.cat([getattr(queries, name) for queries in lists]) for name in Queries.__dataclass_fields__}
    *memories, raw, beacon = offsets
    base = torch.tensor(memories, device=everyone["row"].device)[everyone["row"]]
    lows = (base, everyone["raw_lo"] + raw, everyone["beacon_lo"] + beacon)
    highs = (base + everyone["memory"], everyone["raw_hi"] + raw, everyone["beacon_hi"] + beacon)

    def fill(bound: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(bound.int(), (0, length - len(bound)))

    return tuple(fill(low) for low in lows), tuple(fill(high) for high in highs)


def _stretches(plan: Plan, count: int, beacons: bool) -> tuple[np.ndarray, np.ndarray]:
    """First and last query of every stretch that stays inside one window and one block, int64, in order."""
    starts = [block.raw_queries.start for block in plan.blocks]
    if beacons:
        starts += [len(plan.raw) + block.beacon_queries.start for block in plan.blocks]
    cuts = np.union1d(np.array(starts, dtype=np.int64), np.arange(0, count, BLOCK, dtype=np.int64))
    cuts = cuts[cuts < count]  # a window without beacons starts where the next one does, or at the end
    return cuts, np.append(cuts[1:], count) - 1


def _ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen columns of every row, as BlockMask lists them: counts ``[1, 1, rows]``, columns ``[1, 1, rows, cols]``."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _whole(stores: list[torch.Tensor]) -> torch.Tensor:
    """Stores one after the other, each filled up to whole blocks with zeros."""
    fills = [store.new_zeros(_whole_blocks(len(store)) - len(store), *store.shape[1:]) for store in stores]
    return torch.cat([part for pair in zip(stores, fills, strict=True) for part in pair])


def _check(inputs: AttentionInputs) -> None:
    device = inputs.raw_q.device.type
    if device == "cpu" and inputs.records:
        raise NotImplementedError(
            "attention_path='flex' computes no gradients on a CPU; use attention_path='sdpa' or 'auto' to train there."
        )
    if device != "cpu" and inputs.raw_q.shape[-1] < SMALLEST_HEAD:
        raise NotImplementedError(
            f"attention_path='flex' needs a head_dim of at least {SMALLEST_HEAD}, got {inputs.raw_q.shape[-1]}; "
            "use attention_path='sdpa'."
        )


@cache
def _kernel(device: str) -> Callable[..., Any]:
    """flex_attention, compiled where a GPU computes."""
    if device == "cpu":
        return flex_attention
    # Past its limit of compiled forms torch.compile would go on unfused, with a dense score matrix; fullgraph makes
    # that an error, and the limit is raised for this function where the installed PyTorch can do so.
    compiler: Any = torch.compile  # its overloads leave the limit out
    limit = {"recompile_limit": VARIANTS} if "recompile_limit" in inspect.signature(compiler).parameters else {}
    compiled: Callable[..., Any] = compiler(flex_attention, fullgraph=True, **limit)
    return compiled
