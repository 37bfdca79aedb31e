"""Forward kernel: softmax(q k^T * scale) v over up to four runs of keys per query, with an online softmax.

Grid: (query tiles, heads / packed heads). A program takes one tile of queries of one window and ``PACKED`` heads that
share their keys; row r of the tile is query r // PACKED, head r % PACKED. Store after store it walks first the keys
that all its queries see (no mask, no bounds), then those that some see. With m the running maximum in base 2:

    s = q k^T * scale * log2(e);   m' = max(m, s);   p = 2^(s - m');   l = l 2^(m - m') + sum p;   acc likewise
    out = acc / l;   lse = (m + log2 l) ln 2;   a query that sees nothing: out = 0, lse = -inf
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from beacon_kernels.beacon_attention.schedule import Schedule

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _keys(
    state,
    q,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    lo,
    hi,
    run_lo,
    run_hi,
    scale_log2,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend to the keys ``[lo, hi)`` of one store."""
    acc, l_i, m_i = state
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    for start in range(lo, hi, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        rows = offs_n.to(tl.int64)
        k_ptrs = k_ptr + rows[None, :] * stride_kn + offs_d[:, None]
        v_ptrs = v_ptr + rows[:, None] * stride_vn + offs_d[None, :]
        if MASKED:
            mask_n = offs_n < hi
            k = tl.load(k_ptrs, mask=mask_n[None, :] & mask_d[:, None], other=0.0)  # [BLOCK_D, BLOCK_N]
            v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        elif BLOCK_D == HEAD_DIM:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=mask_d[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=mask_d[None, :], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = (offs_n[None, :] >= run_lo[:, None]) & (offs_n[None, :] < run_hi[:, None])
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def forward_kernel(
    q_ptr,
    k0_ptr,
    v0_ptr,
    k1_ptr,
    v1_ptr,
    k2_ptr,
    v2_ptr,
    k3_ptr,
    v3_ptr,
    out_ptr,
    lse_ptr,
    runs_ptr,
    tiles_ptr,
    stride_qn,
    stride_qh,
    stride_k0n,
    stride_k0h,
    stride_v0n,
    stride_v0h,
    stride_k1n,
    stride_k1h,
    stride_v1n,
    stride_v1h,
    stride_k2n,
    stride_k2h,
    stride_v2n,
    stride_v2h,
    stride_k3n,
    stride_k3h,
    stride_v3n,
    stride_v3h,
    stride_on,
    stride_oh,
    n,
    scale_log2,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries and ``PACKED`` heads."""
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * 14
    pid_h = tl.program_id(1)
    first = tl.load(tile)
    end = tl.load(tile + 1)
    kv_head = (pid_h * PACKED // GROUP).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_q = (first + offs_m // PACKED).to(tl.int64)
    head = (pid_h * PACKED + offs_m % PACKED).to(tl.int64)
    mask_q = (offs_q < end) & (offs_m < (end - first) * PACKED)
    offs_d = tl.arange(0, BLOCK_D)
    mask_qd = mask_q[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(
        q_ptr + offs_q[:, None] * stride_qn + head[:, None] * stride_qh + offs_d[None, :], mask=mask_qd, other=0.0
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    state = (acc, l_i, m_i)
    for store in tl.static_range(4):
        if store == 0:
            k_ptr = k0_ptr + kv_head * stride_k0h
            v_ptr = v0_ptr + kv_head * stride_v0h
            stride_kn = stride_k0n
            stride_vn = stride_v0n
        elif store == 1:
            k_ptr = k1_ptr + kv_head * stride_k1h
            v_ptr = v1_ptr + kv_head * stride_v1h
            stride_kn = stride_k1n
            stride_vn = stride_v1n
        elif store == 2:
            k_ptr = k2_ptr + kv_head * stride_k2h
            v_ptr = v2_ptr + kv_head * stride_v2h
            stride_kn = stride_k2n
            stride_vn = stride_v2n
        else:
            k_ptr = k3_ptr + kv_head * stride_k3h
            v_ptr = v3_ptr + kv_head * stride_v3h
            stride_kn = stride_k3n
            stride_vn = stride_v3n
        lo = tl.load(tile + 2 + 3 * store)
        mid = tl.load(tile + 3 + 3 * store)
        hi = tl.load(tile + 4 + 3 * store)
        run = runs_ptr + tl.cast(n, tl.int64) * (2 * store)
        run_lo = tl.load(run + offs_q, mask=mask_q, other=0)
        run_hi = tl.load(run + n + offs_q, mask=mask_q, other=0)
        state = _keys(
            state,
            q,
            k_ptr,
            v_ptr,
            stride_kn,
            stride_vn,
            lo,
            mid,
            run_lo,
            run_hi,
            scale_log2,
            False,
            BLOCK_N,
            HEAD_DIM,
            BLOCK_D,
        )
        state = _keys(
            state,
            q,
            k_ptr,
            v_ptr,
            stride_kn,
            stride_vn,
            mid,
            hi,
            run_lo,
            run_hi,
            scale_log2,
            True,
            BLOCK_N,
            HEAD_DIM,
            BLOCK_D,
        )
    acc, l_i, m_i = state
    seen = l_i > 0.0
    out = acc / tl.where(seen, l_i, 1.0)[:, None]
    lse = tl.where(seen, (m_i + tl.log2(tl.where(seen, l_i, 1.0))) * LN2, float("-inf"))
    tl.store(
        out_ptr + offs_q[:, None] * stride_on + head[:, None] * stride_oh + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_qd,
    )
    tl.store(lse_ptr + head * tl.cast(n, tl.int64) + offs_q, lse, mask=mask_q)


def forward(
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    schedule: Schedule,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on validated arguments (see :func:`beacon_kernels.beacon_attention.beacon_attention`).

    Returns:
        ``out [n, heads, head_dim]`` in the dtype of q and ``lse [heads, n]`` in float32.
    """
    n, heads, head_dim = q.shape
    tile = schedule.tile
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    stores = [*zip(keys, values, strict=True)] + [(keys[0], values[0])] * (4 - len(keys))
    tensors = [tensor for pair in stores for tensor in pair]
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    if not n:
        return out, lse
    grid = (schedule.tiles.shape[0], heads // schedule.packed)
    forward_kernel[grid](
        q,
        *tensors,
        out,
        lse,
        schedule.runs,
        schedule.tiles,
        *q.stride()[:2],
        *strides,
        *out.stride()[:2],
        n,
        softmax_scale * 1.4426950408889634,
        GROUP=heads // keys[0].shape[1],
        PACKED=schedule.packed,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton's default is about to change
    )
    return out, lse
