"""Backward kernel of keys and values, in the notation of `backward.py`.

    dv = p^T do;   dk = scale * ds^T q

An item is a tile of keys of one store and one kv_head (and a share of its heads). It walks the queries that see those
keys, head after head: first the blocks that see only some of them, then those that see all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from beacon_kernels.beacon_attention.forward import LOG2E, load_block, pick


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
