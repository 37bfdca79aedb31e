"""Backward kernel: dk[p] = sum of R(i)^T dk_out[i] over the rows i that took entry p, dv[p] likewise without R.

    R^T: dx1 = g1 cos + g2 sin;   dx2 = g2 cos - g1 sin;   dx[r :] = g[r :]

Grid: (entry blocks * head blocks), head blocks fastest. A program takes ``BLOCK_M`` entries of the pool and
``heads_per_program`` heads, and sums in float32 over each entry's rows in ascending order, as the inverse gather lists
them: no atomics, the same bits every time. Entries that nobody took get 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from beacon_kernels.rotate_commit.forward import (
    NUM_WARPS,
    load_channels,
    padded,
    pick,
    split,
    store_channels,
    widths,
)


@triton.jit(do_not_specialize=["pool", "heads", "end0", "end1", "heads_per_program"])
def backward_kernel(
    dk_out_ptr,
    dv_out_ptr,
    dk0_ptr,
    dk1_ptr,
    dk2_ptr,
    dv0_ptr,
    dv1_ptr,
    dv2_ptr,
    offsets_ptr,
    order_ptr,
    cos_ptr,
    sin_ptr,
    stride_kon,
    stride_koh,
    stride_von,
    stride_voh,
    stride_dn,
    stride_dh,
    stride_cn,
    stride_sn,
    pool,
    heads,
    end0,
    end1,
    heads_per_program,
    SOURCES: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_V: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of entries and ``heads_per_program`` heads; all gradients of sources have the same strides."""
    head_blocks = tl.cdiv(heads, heads_per_program)
    pid_m = tl.program_id(0) // head_blocks
    first_head = tl.program_id(0) % head_blocks * heads_per_program
    entry = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = entry < pool
    local = entry - pick(0, end0, end1, entry, end0, end1, SOURCES)
    dk_rows = pick(dk0_ptr, dk1_ptr, dk2_ptr, entry, end0, end1, SOURCES) + local * stride_dn
    if HAS_V:
        dv_rows = pick(dv0_ptr, dv1_ptr, dv2_ptr, entry, end0, end1, SOURCES) + local * stride_dn
    if HAS_INDEX:
        begin = tl.load(offsets_ptr + entry, mask=mask_m, other=0)
        count = tl.load(offsets_ptr + entry + 1, mask=mask_m, other=0) - begin
        most = tl.max(count, 0)
    else:
        most = 1

    for number in range(first_head, tl.minimum(first_head + heads_per_program, heads)):
        head = tl.cast(number, tl.int64)
        dx1 = tl.zeros([BLOCK_M, BLOCK_HALF], dtype=tl.float32)
        dx2 = tl.zeros([BLOCK_M, BLOCK_HALF], dtype=tl.float32)
        rest = tl.zeros([BLOCK_M, BLOCK_REST], dtype=tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for use in range(most):
            if HAS_INDEX:
                mask_u = use < count
                row = tl.load(order_ptr + begin + use, mask=mask_u, other=0).to(tl.int64)
            else:
                mask_u = mask_m
                row = entry
            k_ptrs = dk_out_ptr + row * stride_kon + head * stride_koh
            if HALF > 0:
                cos = load_channels(cos_ptr + row * stride_cn, mask_u, 0, HALF, BLOCK_HALF).to(tl.float32)
                sin = load_channels(sin_ptr + row * stride_sn, mask_u, 0, HALF, BLOCK_HALF).to(tl.float32)
                g1 = load_channels(k_ptrs, mask_u, 0, HALF, BLOCK_HALF).to(tl.float32)  # [BLOCK_M, BLOCK_HALF]
                g2 = load_channels(k_ptrs, mask_u, HALF, HALF, BLOCK_HALF).to(tl.float32)
                dx1 += g1 * cos + g2 * sin
                dx2 += g2 * cos - g1 * sin
            if REST > 0:
                rest += load_channels(k_ptrs, mask_u, 2 * HALF, REST, BLOCK_REST).to(tl.float32)
            if HAS_V:
                v_ptrs = dv_out_ptr + row * stride_von + head * stride_voh
                dv += load_channels(v_ptrs, mask_u, 0, HEAD_DIM, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        if HALF > 0:
            store_channels(dk_rows + head * stride_dh, dx1, mask_m, 0, HALF, BLOCK_HALF)
            store_channels(dk_rows + head * stride_dh, dx2, mask_m, HALF, HALF, BLOCK_HALF)
        if REST > 0:
            store_channels(dk_rows + head * stride_dh, rest, mask_m, 2 * HALF, REST, BLOCK_REST)
        if HAS_V:
            store_channels(dv_rows + head * stride_dh, dv, mask_m, 0, HEAD_DIM, BLOCK_D)


def backward(
    dk_out: torch.Tensor,
    dv_out: torch.Tensor | None,
    source_sizes: list[int],
    offsets: torch.Tensor | None,
    order: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Launch the kernel.

    Args:
        dk_out: Gradient of the keys ``[m, heads, head_dim]``, any strides.
        dv_out: Likewise of the values, or None.
        source_sizes: Entries of each source.
        offsets: int32 ``[pool + 1]``, and
        order: int32 ``[m]``: the inverse gather; both None where every entry was taken in order.
        cos: ``[m, rotary_dim / 2]`` or None.
        sin: Likewise.

    Returns:
        Gradients ``[n_i, heads, head_dim]`` of every source of keys, then of values if dv_out is given.
    """
    sizes = widths(dk_out.shape[2], 0 if cos is None else cos.shape[1])
    outs = [grad if grad.stride(2) == 1 else grad.contiguous() for grad in (dk_out, dv_out) if grad is not None]
    grads = [[grad.new_empty(size, *grad.shape[1:]) for size in source_sizes] for grad in outs]
    found = [grad for sources in grads for grad in sources]
    pool, heads = sum(source_sizes), dk_out.shape[1]
    if not pool or not heads:
        return found
    programs, heads_per_program = split(pool, heads, sizes["BLOCK_M"])
    dk, dv = padded(grads[0]), padded(grads[-1])
    strides = [stride for grad in (outs[0], outs[-1], dk[0]) for stride in grad.stride()[:2]]
    with torch.cuda.device_of(dk_out):
        backward_kernel[(programs,)](
            outs[0],
            outs[-1],
            *dk,
            *dv,
            dk_out if offsets is None else offsets,
            dk_out if order is None else order,
            dk_out if cos is None else cos,
            dk_out if sin is None else sin,
            *strides,
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            pool,
            heads,
            dk[0].shape[0],
            dk[0].shape[0] + dk[1].shape[0],
            heads_per_program,
            SOURCES=len(source_sizes),
            HAS_INDEX=offsets is not None,
            HAS_V=dv_out is not None,
            **sizes,
            num_warps=NUM_WARPS,
            num_stages=1,
            enable_fp_fusion=True,  # said aloud: Triton's default is about to change
        )
    return found
