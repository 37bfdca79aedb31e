"""Forward kernel: k_out[i] = R(i) k[index[i]], v_out[i] = v[index[i]], k and v being up to three sources end to end.

With places, row places[i] of the results in place of row i.

    R: out[: r/2] = x1 cos - x2 sin;   out[r/2 : r] = x2 cos + x1 sin;   out[r :] = x[r :]   (x1, x2: halves of x[: r])

Grid: (row blocks * head blocks), head blocks fastest. A program takes ``BLOCK_M`` rows of the result and
``heads_per_program`` heads, which share the rows' tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 4
ELEMENTS = 2048  # of one head's tile: 16 per thread, four 16-byte loads of k and v in half precision
PROGRAMS = 2048  # twice what a large GPU holds at once; more work goes into longer programs


@triton.jit
def pick(a0, a1, a2, entry, end0, end1, SOURCES: tl.constexpr):
    """Of three sources' values (pointers, strides) those of each entry's source, ``[BLOCK_M]``."""
    picked = a0
    if SOURCES > 1:
        picked = tl.where(entry >= end0, a1, picked)
    if SOURCES > 2:
        picked = tl.where(entry >= end1, a2, picked)
    return picked


@triton.jit
def load_channels(rows, mask_m, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channels ``[FIRST, FIRST + WIDTH)`` at the pointers ``rows [BLOCK_M]``, as ``[BLOCK_M, BLOCK]``."""
    offs = tl.arange(0, BLOCK)
    mask = mask_m[:, None] & (offs < WIDTH)[None, :]
    return tl.load(rows[:, None] + (FIRST + offs)[None, :], mask=mask, other=0.0)


@triton.jit
def store_channels(rows, x, mask_m, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of :func:`load_channels`, in the dtype of the pointers."""
    offs = tl.arange(0, BLOCK)
    mask = mask_m[:, None] & (offs < WIDTH)[None, :]
    tl.store(rows[:, None] + (FIRST + offs)[None, :], x.to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "heads", "end0", "end1", "heads_per_program"])
def rotate_commit_kernel(
    k0_ptr,
    k1_ptr,
    k2_ptr,
    v0_ptr,
    v1_ptr,
    v2_ptr,
    k_out_ptr,
    v_out_ptr,
    index_ptr,
    places_ptr,
    cos_ptr,
    sin_ptr,
    stride_k0n,
    stride_k0h,
    stride_k1n,
    stride_k1h,
    stride_k2n,
    stride_k2h,
    stride_v0n,
    stride_v0h,
    stride_v1n,
    stride_v1h,
    stride_v2n,
    stride_v2h,
    stride_kon,
    stride_koh,
    stride_von,
    stride_voh,
    stride_cn,
    stride_sn,
    m,
    heads,
    end0,
    end1,
    heads_per_program,
    SOURCES: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_V: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of rows and ``heads_per_program`` heads. Sources end at ``end0``, ``end1`` and the pool's end."""
    head_blocks = tl.cdiv(heads, heads_per_program)
    pid_m = tl.program_id(0) // head_blocks
    first_head = tl.program_id(0) % head_blocks * heads_per_program
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < m
    if HAS_INDEX:
        entry = tl.load(index_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    else:
        entry = offs_m
    if HAS_PLACES:  # read where the host need not know them
        out_row = tl.load(places_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    else:
        out_row = offs_m
    local = entry - pick(0, end0, end1, entry, end0, end1, SOURCES)
    k_rows = pick(k0_ptr, k1_ptr, k2_ptr, entry, end0, end1, SOURCES)
    k_rows += local * pick(stride_k0n, stride_k1n, stride_k2n, entry, end0, end1, SOURCES)
    stride_kh = pick(stride_k0h, stride_k1h, stride_k2h, entry, end0, end1, SOURCES)
    if HAS_V:
        v_rows = pick(v0_ptr, v1_ptr, v2_ptr, entry, end0, end1, SOURCES)
        v_rows += local * pick(stride_v0n, stride_v1n, stride_v2n, entry, end0, end1, SOURCES)
        stride_vh = pick(stride_v0h, stride_v1h, stride_v2h, entry, end0, end1, SOURCES)
    if HALF > 0:
        cos = load_channels(cos_ptr + offs_m * stride_cn, mask_m, 0, HALF, BLOCK_HALF).to(tl.float32)
        sin = load_channels(sin_ptr + offs_m * stride_sn, mask_m, 0, HALF, BLOCK_HALF).to(tl.float32)

    for number in range(first_head, tl.minimum(first_head + heads_per_program, heads)):
        head = tl.cast(number, tl.int64)
        k_ptrs = k_rows + head * stride_kh
        k_out_ptrs = k_out_ptr + out_row * stride_kon + head * stride_koh
        if HALF > 0:
            x1 = load_channels(k_ptrs, mask_m, 0, HALF, BLOCK_HALF).to(tl.float32)  # [BLOCK_M, BLOCK_HALF]
            x2 = load_channels(k_ptrs, mask_m, HALF, HALF, BLOCK_HALF).to(tl.float32)
        if REST > 0:
            rest = load_channels(k_ptrs, mask_m, 2 * HALF, REST, BLOCK_REST)  # [BLOCK_M, BLOCK_REST]
        if HAS_V:  # all loads before the first store, which they could not pass
            v = load_channels(v_rows + head * stride_vh, mask_m, 0, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        if HALF > 0:
            store_channels(k_out_ptrs, x1 * cos - x2 * sin, mask_m, 0, HALF, BLOCK_HALF)
            store_channels(k_out_ptrs, x2 * cos + x1 * sin, mask_m, HALF, HALF, BLOCK_HALF)
        if REST > 0:
            store_channels(k_out_ptrs, rest, mask_m, 2 * HALF, REST, BLOCK_REST)
        if HAS_V:
            store_channels(v_out_ptr + out_row * stride_von + head * stride_voh, v, mask_m, 0, HEAD_DIM, BLOCK_D)


def widths(head_dim: int, half: int) -> dict[str, int]:
    """Compile-time sizes of both kernels, for ``half = rotary_dim / 2``."""
    rest, block_d = head_dim - 2 * half, triton.next_power_of_2(head_dim)
    return {
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(max(half, 1)),
        "REST": rest,
        "BLOCK_REST": triton.next_power_of_2(max(rest, 1)),
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": ELEMENTS // block_d,
    }


def split(rows: int, heads: int, block_m: int) -> tuple[int, int]:
    """Programs, and heads per program: several where the rows alone fill a GPU."""
    blocks = triton.cdiv(rows, block_m)
    heads_per_program = min(heads, max(1, blocks * heads // PROGRAMS))
    return blocks * triton.cdiv(heads, heads_per_program), heads_per_program


def padded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Three pointers whatever there is; the kernels do not touch those beyond ``SOURCES``."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def forward(
    k_sources: list[torch.Tensor],
    v_sources: list[torch.Tensor],
    index: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> list[torch.Tensor]:
    """:func:`forward_into` new tensors: keys, and values if there are any."""
    rows = sum(source.shape[0] for source in k_sources) if index is None else index.shape[0]
    out = [k_sources[0].new_empty(rows, *k_sources[0].shape[1:]) for _ in range(1 + bool(v_sources))]
    forward_into(k_sources, v_sources, index, None, cos, sin, out[0], out[1] if v_sources else None)
    return out


def forward_into(
    k_sources: list[torch.Tensor],
    v_sources: list[torch.Tensor],
    index: torch.Tensor | None,
    places: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
) -> None:
    """Launch the kernel on validated arguments (see :func:`beacon_kernels.rotate_commit.rotate_commit`).

    Args:
        k_sources: One to three tensors ``[n_i, heads, head_dim]``.
        v_sources: As many, or none.
        index: int32 ``[m]`` or None.
        places: int32 or int64 ``[m]`` or None.
        cos: ``[m, rotary_dim / 2]`` or None.
        sin: Likewise.
        k_out: ``[m, heads, head_dim]``, or with places any number of rows; written.
        v_out: Likewise, where there are v_sources.
    """
    heads, head_dim = k_out.shape[1:]
    m = sum(source.shape[0] for source in k_sources) if index is None else index.shape[0]
    if not m:
        return
    sizes = widths(head_dim, 0 if cos is None else cos.shape[1])
    programs, heads_per_program = split(m, heads, sizes["BLOCK_M"])
    keys, values = padded(k_sources), padded(v_sources or k_sources)
    outs = [k_out, k_out if v_out is None else v_out]
    ends = [keys[0].shape[0], keys[0].shape[0] + keys[1].shape[0]]
    with torch.cuda.device_of(k_out):
        rotate_commit_kernel[(programs,)](
            *keys,
            *values,
            *outs,
            k_out if index is None else index,
            k_out if places is None else places,
            k_out if cos is None else cos,
            k_out if sin is None else sin,
            *(stride for tensor in (*keys, *values, *outs) for stride in tensor.stride()[:2]),
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            m,
            heads,
            *ends,
            heads_per_program,
            SOURCES=len(k_sources),
            HAS_INDEX=index is not None,
            HAS_PLACES=places is not None,
            HAS_V=bool(v_sources),
            **sizes,
            num_warps=NUM_WARPS,
            num_stages=1,
            enable_fp_fusion=True,  # said aloud: Triton's default is about to change
        )
