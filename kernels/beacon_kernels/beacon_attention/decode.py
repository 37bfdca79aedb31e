"""Decode kernels: attention of a few queries per row over long stores, the keys split over programs (split-KV).

Grid of ``decode_kernel``: (rows * kv_heads, splits, chunks), by shapes alone: who sees what is read on the device, so a
CUDA graph replays while runs grow. Row r of a program's tile is query r // GROUP of one row of the batch, head
r % GROUP of one group; what the tile has no rows for goes to further chunks. The blocks of keys that some query of the
tile sees are numbered through all stores, and split i walks the i-th share of them. It writes the softmax of that share
alone; ``combine_kernel``, grid (n, heads), weighs the splits:

    out_i = sum_j p_j v_j / sum_j p_j;   lse_i = log sum_j e^(s_j)     over the keys j of split i
    out = sum_i e^(lse_i - lse) out_i;   lse = log sum_i e^(lse_i);    a query that sees nothing: out = 0, lse = -inf
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from beacon_kernels.beacon_attention.forward import LN2, LOG2E, attend_block, constants, four, load_block, pick, strides
from beacon_kernels.beacon_attention.schedule import STORES
from beacon_kernels.tiles import Tile, tile_for

# Strides that follow from the number of queries, which is no reason to compile once more.
PER_CALL = ("stride_ls", "stride_lh", "stride_rs", "stride_rb", "stride_rn", "stride_js", "stride_jh")


@triton.jit
def _run(run_ptr, stride_rb, stride_rn, offs_q, mask_q, size, BLOCK_N: tl.constexpr):
    """What each query sees of a store, clamped to it; the first key, the end and the blocks of what some query sees."""
    mask = mask_q & (size > 0)  # nothing is read for a store that is not there
    run_lo = tl.maximum(tl.load(run_ptr + offs_q * stride_rn, mask=mask, other=0), 0)  # [BLOCK_M]
    run_hi = tl.minimum(tl.load(run_ptr + stride_rb + offs_q * stride_rn, mask=mask, other=0), size)
    first = tl.min(tl.where(run_lo < run_hi, run_lo, size), 0)
    stop = tl.max(tl.where(run_lo < run_hi, run_hi, 0), 0)
    return run_lo, run_hi, first, stop, tl.cdiv(tl.maximum(stop - first, 0), BLOCK_N)


@triton.jit(do_not_specialize=[*PER_CALL, "size_0", "size_1", "size_2", "size_3", "seqlen_q", "kv_heads"])
def decode_kernel(
    q_ptr,
    k0_ptr,
    k1_ptr,
    k2_ptr,
    k3_ptr,
    v0_ptr,
    v1_ptr,
    v2_ptr,
    v3_ptr,
    out_ptr,
    lse_ptr,
    runs_ptr,
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
    stride_os,
    stride_on,
    stride_oh,
    stride_ls,
    stride_lh,
    stride_rs,
    stride_rb,
    stride_rn,
    size_0,
    size_1,
    size_2,
    size_3,
    seqlen_q,
    kv_heads,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One share of the keys of one row of the batch and one kv_head."""
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    pid_s = tl.program_id(1)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_q = offs_m < seqlen_q * GROUP
    offs_q = row * seqlen_q + offs_m // GROUP
    head = kv_head * GROUP + offs_m % GROUP
    offs_d = tl.arange(0, BLOCK_D)
    mask_qd = mask_q[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + offs_q[:, None] * stride_qn + head[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_qd, other=0.0)  # [BLOCK_M, BLOCK_D]

    runs_0 = runs_ptr
    runs_1 = runs_0 + stride_rs
    runs_2 = runs_1 + stride_rs
    runs_3 = runs_2 + stride_rs
    lo_0, hi_0, first_0, stop_0, blocks_0 = _run(runs_0, stride_rb, stride_rn, offs_q, mask_q, size_0, BLOCK_N)
    lo_1, hi_1, first_1, stop_1, blocks_1 = _run(runs_1, stride_rb, stride_rn, offs_q, mask_q, size_1, BLOCK_N)
    lo_2, hi_2, first_2, stop_2, blocks_2 = _run(runs_2, stride_rb, stride_rn, offs_q, mask_q, size_2, BLOCK_N)
    lo_3, hi_3, first_3, stop_3, blocks_3 = _run(runs_3, stride_rb, stride_rn, offs_q, mask_q, size_3, BLOCK_N)
    end_0 = blocks_0
    end_1 = end_0 + blocks_1
    end_2 = end_1 + blocks_2
    end_3 = end_2 + blocks_3
    ends = (end_0, end_1, end_2, end_3)
    bases = (first_0, first_1 - end_0 * BLOCK_N, first_2 - end_1 * BLOCK_N, first_3 - end_2 * BLOCK_N)
    stops = (stop_0, stop_1, stop_2, stop_3)
    run_lo = (lo_0, lo_1, lo_2, lo_3)
    run_hi = (hi_0, hi_1, hi_2, hi_3)
    k_ptrs = (
        k0_ptr + kv_head * stride_k0h,
        k1_ptr + kv_head * stride_k1h,
        k2_ptr + kv_head * stride_k2h,
        k3_ptr + kv_head * stride_k3h,
    )
    v_ptrs = (
        v0_ptr + kv_head * stride_v0h,
        v1_ptr + kv_head * stride_v1h,
        v2_ptr + kv_head * stride_v2h,
        v3_ptr + kv_head * stride_v3h,
    )
    strides_kn = (stride_k0n, stride_k1n, stride_k2n, stride_k3n)
    strides_vn = (stride_v0n, stride_v1n, stride_v2n, stride_v3n)

    share = end_3 // tl.num_programs(1)
    longer = end_3 % tl.num_programs(1)  # so many splits take one block more
    begin = pid_s * share + tl.minimum(pid_s, longer)
    end = begin + share + tl.where(pid_s < longer, 1, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    state = (acc, l_i, m_i)
    for t in range(begin, end):
        start, stop = pick(t, ends, bases) + t * BLOCK_N, pick(t, ends, stops)
        stride_kn, stride_vn = pick(t, ends, strides_kn), pick(t, ends, strides_vn)
        k = load_block(pick(t, ends, k_ptrs), start, stop, stride_kn, BLOCK_N, True, False, HEAD_DIM, BLOCK_D)
        v = load_block(pick(t, ends, v_ptrs), start, stop, stride_vn, BLOCK_N, True, False, HEAD_DIM, BLOCK_D)
        lo, hi = pick(t, ends, run_lo), pick(t, ends, run_hi)
        offs_n = start + tl.arange(0, BLOCK_N)
        visible = (offs_n[None, :] >= lo[:, None]) & (offs_n[None, :] < hi[:, None])
        state = attend_block(state, q, k, v, visible, scale_log2, True)

    acc, l_i, m_i = state
    seen = l_i > 0.0
    out = acc / tl.where(seen, l_i, 1.0)[:, None]
    lse = tl.where(seen, (m_i + tl.log2(tl.where(seen, l_i, 1.0))) * LN2, float("-inf"))
    split = pid_s.to(tl.int64)
    out_ptrs = out_ptr + split * stride_os + offs_q[:, None] * stride_on + head[:, None] * stride_oh + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_qd)
    tl.store(lse_ptr + split * stride_ls + head * stride_lh + offs_q, lse, mask=mask_q)


@triton.jit(do_not_specialize=[*PER_CALL, "splits"])
def combine_kernel(
    out_i_ptr,
    lse_i_ptr,
    out_ptr,
    lse_ptr,
    stride_is,
    stride_in,
    stride_ih,
    stride_js,
    stride_jh,
    stride_on,
    stride_oh,
    stride_lh,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One query and one head."""
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    out_i_ptr += query * stride_in + head * stride_ih
    lse_i_ptr += head * stride_jh + query
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    l_i = 0.0
    m_i = float("-inf")
    for start in range(0, splits, BLOCK_S):
        offs_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask_s = offs_s < splits
        lse_i = tl.load(lse_i_ptr + offs_s * stride_js, mask=mask_s, other=float("-inf")) * LOG2E  # [BLOCK_S]
        out_ptrs = out_i_ptr + offs_s[:, None] * stride_is + offs_d[None, :]
        out_i = tl.load(out_ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_S, BLOCK_D]
        m_new = tl.maximum(m_i, tl.max(lse_i, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(lse_i - m_safe)
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * out_i, 0)
        m_i = m_new
    seen = l_i > 0.0
    out = acc / tl.where(seen, l_i, 1.0)
    lse = tl.where(seen, (m_i + tl.log2(tl.where(seen, l_i, 1.0))) * LN2, float("-inf"))
    tl.store(out_ptr + query * stride_on + head * stride_oh + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    tl.store(lse_ptr + head * stride_lh + query, lse)


def decode_constants(tile: Tile, head_dim: int, group: int, seqlen_q: int) -> dict[str, int]:
    """What ``decode_kernel`` is compiled with: as many rows as a group's heads and the queries take, at least 16."""
    rows = min(tile.block_m, max(16, triton.next_power_of_2(group * seqlen_q)))
    return {**constants(tile, head_dim, group), "BLOCK_M": rows}


def combine_constants(head_dim: int) -> dict[str, int]:
    """What ``combine_kernel`` is compiled with; ``BLOCK_S`` splits are read at a time."""
    return {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_S": 32}


def decode(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    runs: torch.Tensor,
    seqlen_q: int,
    softmax_scale: float,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels on validated arguments (see :func:`beacon_kernels.beacon_attention.beacon_decode`).

    Returns:
        ``out [n, heads, head_dim]`` in the dtype of q and ``lse [heads, n]`` in float32.

    Raises:
        ValueError: No tile for this head_dim or GPU.
    """
    n, heads, head_dim = q.shape
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    tile = tile_for("decode", head_dim, q.element_size(), 10 * major + minor)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    if not n:
        return out, lse
    out_i, lse_i = out[None], lse[None]  # of every split; a single one writes the result
    if num_splits > 1:
        out_i = torch.empty(num_splits, n, heads, head_dim, dtype=torch.float32, device=q.device)
        lse_i = torch.empty(num_splits, heads, n, dtype=torch.float32, device=q.device)
    stores = [*four(keys), *four(values)]
    constexprs = decode_constants(tile, head_dim, group, seqlen_q)
    chunks = triton.cdiv(group * seqlen_q, constexprs["BLOCK_M"])
    with torch.cuda.device_of(q):
        # FP fusion is said aloud: Triton's default is about to change.
        decode_kernel[n // seqlen_q * kv_heads, num_splits, chunks](
            q,
            *stores,
            out_i,
            lse_i,
            runs,
            *q.stride()[:2],
            *strides(stores),
            *out_i.stride()[:3],
            *lse_i.stride()[:2],
            *runs.stride(),
            *[len(k) for k in keys],
            *[0] * (STORES - len(keys)),
            seqlen_q,
            kv_heads,
            softmax_scale * LOG2E.value,
            **constexprs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        if num_splits > 1:
            combine_kernel[n, heads](
                out_i,
                lse_i,
                out,
                lse,
                *out_i.stride()[:3],
                *lse_i.stride()[:2],
                *out.stride()[:2],
                lse.stride(0),
                num_splits,
                **combine_constants(head_dim),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out, lse
