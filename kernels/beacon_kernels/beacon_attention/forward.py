"""Forward kernel: softmax(q k^T * scale) v over up to four runs of keys per query, with an online softmax.

Work item: a tile of queries of one window and ``PACKED`` heads that share their keys; row r of the tile is query
r // PACKED, head r % PACKED. Items are numbered tile by tile, costliest first; a program takes items pid, pid +
programs, ... It walks first the blocks of keys that all its queries see (no mask, no bounds), store after store in one
loop, then those that some see. With m the running maximum in base 2:

    s = q k^T * scale * log2(e);   m' = max(m, s);   p = 2^(s - m');   l = l 2^(m - m') + sum p;   acc likewise
    out = acc / l;   lse = (m + log2 l) ln 2;   a query that sees nothing: out = 0, lse = -inf
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from beacon_kernels.tiles import Tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def pick(t, ends, choices):
    """Of the four stores' choices that of the store which block t of a walk lies in."""
    return tl.where(
        t < ends[0], choices[0], tl.where(t < ends[1], choices[1], tl.where(t < ends[2], choices[2], choices[3]))
    )


@triton.jit
def whole_walk(tile, BLOCK_N: tl.constexpr):
    """Blocks that every query of a tile sees: their number up to each store's end, and each store's key 0."""
    e0 = (tl.load(tile + 3) - tl.load(tile + 2)) // BLOCK_N
    e1 = e0 + (tl.load(tile + 6) - tl.load(tile + 5)) // BLOCK_N
    e2 = e1 + (tl.load(tile + 9) - tl.load(tile + 8)) // BLOCK_N
    e3 = e2 + (tl.load(tile + 12) - tl.load(tile + 11)) // BLOCK_N
    b0 = tl.load(tile + 2)
    b1 = tl.load(tile + 5) - e0 * BLOCK_N
    b2 = tl.load(tile + 8) - e1 * BLOCK_N
    b3 = tl.load(tile + 11) - e2 * BLOCK_N
    return (e0, e1, e2, e3), (b0, b1, b2, b3)


@triton.jit
def masked_walk(tile, BLOCK_N: tl.constexpr):
    """Likewise the blocks that some queries see, and where each store's stretch of them ends."""
    h0 = tl.load(tile + 4)
    h1 = tl.load(tile + 7)
    h2 = tl.load(tile + 10)
    h3 = tl.load(tile + 13)
    b0 = tl.load(tile + 3)
    b1 = tl.load(tile + 6)
    b2 = tl.load(tile + 9)
    b3 = tl.load(tile + 12)
    e0 = (h0 - b0 + BLOCK_N - 1) // BLOCK_N
    e1 = e0 + (h1 - b1 + BLOCK_N - 1) // BLOCK_N
    e2 = e1 + (h2 - b2 + BLOCK_N - 1) // BLOCK_N
    e3 = e2 + (h3 - b3 + BLOCK_N - 1) // BLOCK_N
    return (e0, e1, e2, e3), (b0, b1 - e0 * BLOCK_N, b2 - e1 * BLOCK_N, b3 - e2 * BLOCK_N), (h0, h1, h2, h3)


@triton.jit
def rows_of(runs_ptr, n, offs_q, mask_q):
    """Where the runs of a tile's rows begin and end in each store, eight of ``[BLOCK_M]``."""
    run = runs_ptr + offs_q
    step = tl.cast(n, tl.int64)
    lo = (
        tl.load(run, mask=mask_q, other=0),
        tl.load(run + step * 2, mask=mask_q, other=0),
        tl.load(run + step * 4, mask=mask_q, other=0),
        tl.load(run + step * 6, mask=mask_q, other=0),
    )
    hi = (
        tl.load(run + step, mask=mask_q, other=0),
        tl.load(run + step * 3, mask=mask_q, other=0),
        tl.load(run + step * 5, mask=mask_q, other=0),
        tl.load(run + step * 7, mask=mask_q, other=0),
    )
    return lo, hi


@triton.jit
def load_block(
    ptr,
    start,
    stop,
    stride,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    NEAR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Entries ``[start, stop)`` of a store, ``[BLOCK, BLOCK_D]``; without ``MASKED`` there are as many as ``BLOCK``.

    ``NEAR``: offsets within a block fit 32 bits, so loops compute them once and add them to a block's first address.
    """
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    if NEAR:
        ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs[:, None] * stride + offs_d[None, :])
    else:
        ptrs = ptr + (start + offs).to(tl.int64)[:, None] * stride + offs_d[None, :]
    if MASKED:
        mask_rows = start + offs < stop
        loaded = tl.load(ptrs, mask=mask_rows[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    elif BLOCK_D == HEAD_DIM:
        loaded = tl.load(ptrs)
    else:
        loaded = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return loaded


@triton.jit
def load_keys(
    t,
    ends,
    bases,
    stops,
    kv_head,
    stores,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    SAME: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Block t of a walk: its first key, then keys and values ``[BLOCK_N, BLOCK_D]``.

    ``stores``: pointers, strides of entries, strides of heads; of each those of the four keys, then of the four values.
    ``SAME``: strides are the same everywhere, and near enough to count within a block in 32 bits.
    """
    start, stop = pick(t, ends, bases) + t * BLOCK_N, pick(t, ends, stops)
    pointers, strides_n, strides_h = stores
    if SAME:
        stride_kn, stride_kh = strides_n[0][0], strides_h[0][0]
        stride_vn, stride_vh = stride_kn, stride_kh
    else:
        stride_kn, stride_kh = pick(t, ends, strides_n[0]), pick(t, ends, strides_h[0])
        stride_vn, stride_vh = pick(t, ends, strides_n[1]), pick(t, ends, strides_h[1])
    k_ptr = pick(t, ends, pointers[0]) + kv_head * stride_kh
    v_ptr = pick(t, ends, pointers[1]) + kv_head * stride_vh
    k = load_block(k_ptr, start, stop, stride_kn, BLOCK_N, MASKED, SAME, HEAD_DIM, BLOCK_D)
    v = load_block(v_ptr, start, stop, stride_vn, BLOCK_N, MASKED, SAME, HEAD_DIM, BLOCK_D)
    return start, k, v


@triton.jit
def attend_block(state, q, k, v, visible, scale_log2, MASKED: tl.constexpr):
    """Take one block of keys into the softmax: q ``[BLOCK_M, BLOCK_D]``, k and v ``[BLOCK_N, BLOCK_D]``.

    The scale is positive, so it can wait until after the maximum: one fused multiply-add per element.
    """
    acc, l_i, m_i = state
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s * scale_log2 - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["n", "items", "items_per_tile"])
def forward_kernel(
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
    stride_on,
    stride_oh,
    n,
    items,
    items_per_tile,
    scale_log2,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Items pid, pid + programs, ...: a tile of queries and ``PACKED`` heads each."""
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
        stores = (
            ((k0_ptr, k1_ptr, k2_ptr, k3_ptr), (v0_ptr, v1_ptr, v2_ptr, v3_ptr)),
            ((stride_k0n, stride_k1n, stride_k2n, stride_k3n), (stride_v0n, stride_v1n, stride_v2n, stride_v3n)),
            ((stride_k0h, stride_k1h, stride_k2h, stride_k3h), (stride_v0h, stride_v1h, stride_v2h, stride_v3h)),
        )

        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        state = (acc, l_i, m_i)
        ends, bases = whole_walk(tile, BLOCK_N)
        for t in range(ends[3]):
            _, k, v = load_keys(t, ends, bases, ends, kv_head, stores, BLOCK_N, False, SAME, HEAD_DIM, BLOCK_D)
            state = attend_block(state, q, k, v, mask_q, scale_log2, False)
        ends, bases, stops = masked_walk(tile, BLOCK_N)
        run_lo, run_hi = rows_of(runs_ptr, n, offs_q, mask_q)
        for t in range(ends[3]):
            start, k, v = load_keys(t, ends, bases, stops, kv_head, stores, BLOCK_N, True, SAME, HEAD_DIM, BLOCK_D)
            offs_n = start + tl.arange(0, BLOCK_N)
            lo, hi = pick(t, ends, run_lo), pick(t, ends, run_hi)
            visible = (offs_n[None, :] >= lo[:, None]) & (offs_n[None, :] < hi[:, None])
            state = attend_block(state, q, k, v, visible, scale_log2, True)
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


def programs(items: int, tile: Tile, device: torch.device) -> int:
    """How many programs share the work items."""
    if not tile.programs_per_sm:
        return items
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(items, sms * tile.programs_per_sm)


def four(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor per store; stores that are not there repeat the first, and no run points into them."""
    return [*tensors, *[tensors[0]] * (4 - len(tensors))]


def strides(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Strides of entries and heads, tensor after tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def near(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether offsets within a block of any of these, at most 256 entries, fit 32 bits."""
    return all(tensor.stride(0) < 2**22 for tensor in tensors)


def same(stores: Sequence[torch.Tensor]) -> bool:
    """Whether all stores have the same strides, and small ones."""
    return near(stores) and len({tuple(strides([store])) for store in stores if len(store)}) <= 1


def constants(tile: Tile, head_dim: int, group: int) -> dict[str, int]:
    """What every kernel here is compiled with."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),  # tl.dot takes no fewer
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def launch(kernel: Any, items: int, tile: Tile, device: torch.device, *args: Any, **constexprs: int) -> None:
    """Run a kernel over its work items."""
    if items:
        # FP fusion is said aloud: Triton's default is about to change.
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
        with torch.cuda.device_of(args[0]):
            kernel[(programs(items, tile, device),)](*args, **constexprs, **options)


def forward(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    runs: torch.Tensor,
    tiles: torch.Tensor,
    tile: Tile,
    packed: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on validated arguments (see :func:`beacon_kernels.beacon_attention.beacon_attention`).

    Args:
        q: ``[n, heads, head_dim]``.
        keys: Stores ``[m, kv_heads, head_dim]``.
        values: Likewise.
        runs: The schedule's.
        tiles: Items of its ``forward``.
        tile: Sizes of the tiles.
        packed: Heads that share a tile.
        softmax_scale: Factor of the logits.

    Returns:
        ``out [n, heads, head_dim]`` in the dtype of q and ``lse [heads, n]`` in float32.
    """
    n, heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    keys, values = four(keys), four(values)
    per_tile = heads // packed
    items = len(tiles) * per_tile
    launch(
        forward_kernel,
        items,
        tile,
        q.device,
        q,
        *keys,
        *values,
        out,
        lse,
        runs,
        tiles,
        *strides([q, *keys, *values, out]),
        n,
        items,
        per_tile,
        softmax_scale * 1.4426950408889634,
        PACKED=packed,
        SAME=same([*keys, *values]),
        **constants(tile, head_dim, heads // keys[0].shape[1]),
    )
    return out, lse
