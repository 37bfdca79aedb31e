"""Backward kernels: dq, dk and dv from what the forward pass saved, p = exp(s - lse) being computed once more.

    delta = rowsum(do * out) - dlse (0 for a query that sees nothing);   dp = do v^T;   ds = p * (dp - delta)
    dv = p^T do;   dk = scale * ds^T q;   dq = scale * ds k

``delta_kernel``: one program per block of queries and head. ``dq_kernel`` walks keys as the forward kernel does, with
tiles of its own. ``dkv_kernel`` has its own file, `backward_dkv.py`. Every number has one writer, so results are the
same bit by bit from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from beacon_kernels.beacon_attention.backward_dkv import dkv_kernel
from beacon_kernels.beacon_attention.forward import (
    LOG2E,
    constants,
    four,
    launch,
    load_block,
    load_keys,
    masked_walk,
    near,
    pick,
    rows_of,
    same,
    strides,
    whole_walk,
)
from beacon_kernels.tiles import Tile

DELTA_TILE = Tile(32, 1, 4, 1)


@triton.jit(do_not_specialize=["n", "items", "heads", "stride_lh"])
def delta_kernel(
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    stride_on,
    stride_oh,
    stride_dn,
    stride_dh,
    stride_lh,
    stride_ln,
    n,
    items,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """delta of ``BLOCK_M`` queries and one head."""
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head = (item % heads).to(tl.int64)
        start = item // heads * BLOCK_M
        offs_q = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_q = offs_q < n
        out = load_block(out_ptr + head * stride_oh, start, n, stride_on, BLOCK_M, True, False, HEAD_DIM, BLOCK_D)
        do = load_block(do_ptr + head * stride_dh, start, n, stride_dn, BLOCK_M, True, False, HEAD_DIM, BLOCK_D)
        row = head * tl.cast(n, tl.int64) + offs_q
        seen = tl.load(lse_ptr + row, mask=mask_q, other=0.0) > float("-inf")
        dlse = tl.load(dlse_ptr + head * stride_lh + offs_q * stride_ln, mask=mask_q & seen, other=0.0)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1) - dlse
        tl.store(delta_ptr + row, tl.where(seen, delta, 0.0), mask=mask_q)


@triton.jit
def _dq_step(dq, q, do, k, v, lse2, delta, visible, scale_log2, MASKED: tl.constexpr):
    """Add one block of keys to dq: all of ``[BLOCK_M or BLOCK_N, BLOCK_D]``."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    p = tl.exp2(s - lse2[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)  # and finite deltas, so ds is 0 there
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["n", "items", "items_per_tile"])
def dq_kernel(
    q_ptr,
    k0_ptr,
    k1_ptr,
    k2_ptr,
    k3_ptr,
    v0_ptr,
    v1_ptr,
    v2_ptr,
    v3_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    runs_ptr,
    tiles_ptr,
    stride_qn,
    stride_qh,
    stride_k0n,
    stride_k0h,
    stride_k1n,
    stride_k1h,
    stride_k2n,
    stride_k2h,
    stride_k3n,
    stride_k3h,
    stride_v0n,
    stride_v0h,
    stride_v1n,
    stride_v1h,
    stride_v2n,
    stride_v2h,
    stride_v3n,
    stride_v3h,
    stride_dn,
    stride_dh,
    stride_dqn,
    stride_dqh,
    n,
    items,
    items_per_tile,
    scale,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of a tile of queries and ``PACKED`` heads; the walk is the forward kernel's."""
    scale_log2 = scale * LOG2E
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = tiles_ptr + (item // items_per_tile).to(tl.int64) * 14
        pid_h = item % items_per_tile
        first = tl.load(tile)
        end = tl.load(tile + 1)
        kv_head = (pid_h * PACKED // GROUP).to(tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        offs_q = (first + offs_m // PACKED).to(tl.int64)
        head = (pid_h * PACKED + offs_m % PACKED).to(tl.int64)
        mask_q = offs_q < end
        offs_d = tl.arange(0, BLOCK_D)
        mask_qd = mask_q[:, None] & (offs_d < HEAD_DIM)[None, :]
        q = tl.load(
            q_ptr + offs_q[:, None] * stride_qn + head[:, None] * stride_qh + offs_d[None, :], mask=mask_qd, other=0.0
        )
        do = tl.load(
            do_ptr + offs_q[:, None] * stride_dn + head[:, None] * stride_dh + offs_d[None, :], mask=mask_qd, other=0.0
        )
        row = head * tl.cast(n, tl.int64) + offs_q
        lse2 = tl.load(lse_ptr + row, mask=mask_q, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row, mask=mask_q, other=0.0)
        stores = (
            ((k0_ptr, k1_ptr, k2_ptr, k3_ptr), (v0_ptr, v1_ptr, v2_ptr, v3_ptr)),
            ((stride_k0n, stride_k1n, stride_k2n, stride_k3n), (stride_v0n, stride_v1n, stride_v2n, stride_v3n)),
            ((stride_k0h, stride_k1h, stride_k2h, stride_k3h), (stride_v0h, stride_v1h, stride_v2h, stride_v3h)),
        )

        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        ends, bases = whole_walk(tile, BLOCK_N)
        for t in range(ends[3]):
            _, k, v = load_keys(t, ends, bases, ends, kv_head, stores, BLOCK_N, False, SAME, HEAD_DIM, BLOCK_D)
            dq = _dq_step(dq, q, do, k, v, lse2, delta, mask_q, scale_log2, False)
        ends, bases, stops = masked_walk(tile, BLOCK_N)
        run_lo, run_hi = rows_of(runs_ptr, n, offs_q, mask_q)
        for t in range(ends[3]):
            start, k, v = load_keys(t, ends, bases, stops, kv_head, stores, BLOCK_N, True, SAME, HEAD_DIM, BLOCK_D)
            offs_n = start + tl.arange(0, BLOCK_N)
            lo, hi = pick(t, ends, run_lo), pick(t, ends, run_hi)
            visible = (offs_n[None, :] >= lo[:, None]) & (offs_n[None, :] < hi[:, None])
            dq = _dq_step(dq, q, do, k, v, lse2, delta, visible, scale_log2, True)
        tl.store(
            dq_ptr + offs_q[:, None] * stride_dqn + head[:, None] * stride_dqh + offs_d[None, :],
            (dq * scale).to(dq_ptr.dtype.element_ty),
            mask=mask_qd,
        )


def backward(
    do: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    runs: torch.Tensor,
    dq_tiles: torch.Tensor,
    dkv_tiles: torch.Tensor,
    key_runs: torch.Tensor,
    dq_tile: Tile,
    dkv_tile: Tile,
    packed: int,
    splits: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Launch the kernels on what the forward pass took and gave.

    Args:
        do: Gradient of out, ``[n, heads, head_dim]``, any strides.
        dlse: Gradient of lse, ``[heads, n]``, any strides.
        q: The forward pass's.
        keys: Likewise.
        values: Likewise.
        out: Likewise.
        lse: Likewise.
        runs: The schedule's.
        dq_tiles: Items of its ``dq``.
        dkv_tiles: Items of its ``dkv``.
        key_runs: Its inverse runs.
        dq_tile: Sizes of the tiles of queries.
        dkv_tile: Sizes of the tiles of keys.
        packed: Heads that share a tile of queries.
        splits: Programs that share the heads of a group for dk and dv; their parts are added up in float32, in order.
        softmax_scale: Factor of the logits.

    Returns:
        dq, then dk and dv of every store, contiguous, in the dtype of q.
    """
    n, heads, head_dim = q.shape
    kv_heads = keys[0].shape[1]
    do = do if do.stride(2) == 1 else do.contiguous()
    delta = torch.empty_like(lse)
    delta_items = -(-n // DELTA_TILE.block_m) * heads
    launch(
        delta_kernel,
        delta_items,
        DELTA_TILE,
        q.device,
        out,
        do,
        lse,
        dlse,
        delta,
        *strides([out, do, dlse]),
        n,
        delta_items,
        heads,
        **constants(DELTA_TILE, head_dim, heads // kv_heads),
    )
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = q.dtype if splits == 1 else torch.float32
    dk, dv = ([q.new_empty(splits, *k.shape, dtype=dtype) for k in keys] for _ in range(2))
    four_k, four_v = four(keys), four(values)
    items = len(dq_tiles) * (heads // packed)
    launch(
        dq_kernel,
        items,
        dq_tile,
        q.device,
        q,
        *four_k,
        *four_v,
        do,
        dq,
        lse,
        delta,
        runs,
        dq_tiles,
        *strides([q, *four_k, *four_v, do, dq]),
        n,
        items,
        heads // packed,
        softmax_scale,
        PACKED=packed,
        SAME=same([*keys, *values]),
        **constants(dq_tile, head_dim, heads // kv_heads),
    )
    items = len(dkv_tiles) * kv_heads * splits
    launch(
        dkv_kernel,
        items,
        dkv_tile,
        q.device,
        q,
        *four_k,
        *four_v,
        *four(dk),
        *four(dv),
        do,
        lse,
        delta,
        key_runs,
        dkv_tiles,
        *strides([q, *four_k, *four_v, do]),
        kv_heads * head_dim,
        head_dim,
        *[len(k) for k in keys],
        *[0] * (4 - len(keys)),
        n,
        items,
        kv_heads * splits,
        softmax_scale,
        SPLITS=splits,
        NEAR=near([q, do]),
        **constants(dkv_tile, head_dim, heads // kv_heads),
    )
    dk, dv = ([part[0] if splits == 1 else part.sum(0).to(q.dtype) for part in parts] for parts in (dk, dv))
    return dq, dk, dv
