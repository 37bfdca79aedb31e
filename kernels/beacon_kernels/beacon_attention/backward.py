"""Backward kernels: dq, dk and dv from what the forward pass saved, p = exp(s - lse) being computed once more.

    delta = rowsum(do * out) - dlse (0 for a query that sees nothing);   dp = do v^T;   ds = p * (dp - delta)
    dv = p^T do;   dk = scale * ds^T q;   dq = scale * ds k

``delta_kernel``: one program per block of queries and head. ``dq_kernel`` walks keys as the forward kernel does, with
tiles of its own. ``dkv_kernel``: an item is a tile of keys of one store and one kv_head (and a share of its heads); it
walks the queries that see those keys, head after head: first the blocks that see only some of them, then those that see
all. Every number has one writer, so results are the same bit by bit from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

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


@triton.jit
def _dkv_step(
    state,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    stride_qn,
    stride_qh,
    stride_dn,
    stride_dh,
    n,
    head,
    start,
    stop,
    key_lo,
    key_hi,
    scale_log2,
    MASKED: tl.constexpr,
    NEAR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add one block of one head's queries to dk and dv ``[BLOCK_N, BLOCK_D]``."""
    dk, dv = state
    q_ptr += head * stride_qh
    do_ptr += head * stride_dh
    q = load_block(q_ptr, start, stop, stride_qn, BLOCK_M, MASKED, NEAR, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_block(do_ptr, start, stop, stride_dn, BLOCK_M, MASKED, NEAR, HEAD_DIM, BLOCK_D)
    offs_q = start + tl.arange(0, BLOCK_M)
    row = head * n + offs_q
    if MASKED:
        lse2 = tl.load(lse_ptr + row, mask=offs_q < stop, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row, mask=offs_q < stop, other=0.0)
    else:
        lse2 = tl.load(lse_ptr + row) * LOG2E
        delta = tl.load(delta_ptr + row)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse2[None, :])  # [BLOCK_N, BLOCK_M]
    if MASKED:
        # Deltas are finite, so ds is 0 as well.
        p = tl.where((offs_q[None, :] >= key_lo[:, None]) & (offs_q[None, :] < key_hi[:, None]), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["n", "items", "items_per_tile", "size0", "size1", "size2", "size3"])
def dkv_kernel(
    q_ptr,
    k0_ptr,
    k1_ptr,
    k2_ptr,
    k3_ptr,
    v0_ptr,
    v1_ptr,
    v2_ptr,
    v3_ptr,
    dk0_ptr,
    dk1_ptr,
    dk2_ptr,
    dk3_ptr,
    dv0_ptr,
    dv1_ptr,
    dv2_ptr,
    dv3_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    key_runs_ptr,
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
    stride_dkn,
    stride_dkh,
    size0,
    size1,
    size2,
    size3,
    n,
    items,
    items_per_tile,
    scale,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    NEAR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile of keys and one kv_head, from one of ``SPLITS`` shares of its group's heads."""
    scale_log2 = scale * LOG2E
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = tiles_ptr + (item // items_per_tile).to(tl.int64) * 7
        kv_head = (item % items_per_tile // SPLITS).to(tl.int64)
        share = tl.cast(item % SPLITS, tl.int64)
        store = tl.load(tile)
        first = tl.load(tile + 1)
        end = tl.load(tile + 2)
        lo = tl.load(tile + 3)
        mid_lo = tl.load(tile + 4)
        mid_hi = tl.load(tile + 5)
        hi = tl.load(tile + 6)
        upto = (1, 2, 3)
        k_ptr = pick(store, upto, (k0_ptr, k1_ptr, k2_ptr, k3_ptr))
        v_ptr = pick(store, upto, (v0_ptr, v1_ptr, v2_ptr, v3_ptr))
        stride_kn = pick(store, upto, (stride_k0n, stride_k1n, stride_k2n, stride_k3n))
        stride_kh = pick(store, upto, (stride_k0h, stride_k1h, stride_k2h, stride_k3h))
        stride_vn = pick(store, upto, (stride_v0n, stride_v1n, stride_v2n, stride_v3n))
        stride_vh = pick(store, upto, (stride_v0h, stride_v1h, stride_v2h, stride_v3h))
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        k = load_block(k_ptr + kv_head * stride_kh, first, end, stride_kn, BLOCK_N, True, False, HEAD_DIM, BLOCK_D)
        v = load_block(v_ptr + kv_head * stride_vh, first, end, stride_vn, BLOCK_N, True, False, HEAD_DIM, BLOCK_D)
        before_store = pick(store, upto, (0, size0, size0 + size1, size0 + size1 + size2))
        key = key_runs_ptr + tl.cast(before_store, tl.int64) + offs_n
        key_lo = tl.load(key, mask=mask_n, other=0)
        key_hi = tl.load(key + (tl.cast(size0, tl.int64) + size1 + size2 + size3), mask=mask_n, other=0)

        state = (tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32), tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32))
        first_head = kv_head * GROUP + share * (GROUP // SPLITS)
        before = (mid_lo - lo) // BLOCK_M
        some = before + (hi - mid_hi + BLOCK_M - 1) // BLOCK_M
        for u in range(some * (GROUP // SPLITS)):  # one loop over heads and blocks: loads run ahead from head to head
            t = u % some
            state = _dkv_step(
                state,
                k,
                v,
                q_ptr,
                do_ptr,
                lse_ptr,
                delta_ptr,
                stride_qn,
                stride_qh,
                stride_dn,
                stride_dh,
                tl.cast(n, tl.int64),
                first_head + u // some,
                tl.where(t < before, lo + t * BLOCK_M, mid_hi + (t - before) * BLOCK_M),
                hi,
                key_lo,
                key_hi,
                scale_log2,
                True,
                NEAR,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
            )
        whole = (mid_hi - mid_lo) // BLOCK_M
        for u in range(whole * (GROUP // SPLITS)):
            state = _dkv_step(
                state,
                k,
                v,
                q_ptr,
                do_ptr,
                lse_ptr,
                delta_ptr,
                stride_qn,
                stride_qh,
                stride_dn,
                stride_dh,
                tl.cast(n, tl.int64),
                first_head + u // whole,
                mid_lo + u % whole * BLOCK_M,
                hi,
                key_lo,
                key_hi,
                scale_log2,
                False,
                NEAR,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
            )
        dk, dv = state
        offs_d = tl.arange(0, BLOCK_D)
        mask_nd = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        size = pick(store, upto, (size0, size1, size2, size3))
        entry = share * size + offs_n  # shares one after the other
        offs = entry[:, None] * stride_dkn + kv_head * stride_dkh + offs_d[None, :]
        dk_ptr = pick(store, upto, (dk0_ptr, dk1_ptr, dk2_ptr, dk3_ptr))
        dv_ptr = pick(store, upto, (dv0_ptr, dv1_ptr, dv2_ptr, dv3_ptr))
        tl.store(dk_ptr + offs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_nd)
        tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask_nd)


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
