"""Checks before a launch: what must hold, what came, what to do.

No kernel reads out of bounds after them, given a schedule that `build_schedule` made: that validates every integer,
once; here only sizes and forms are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beacon_kernels.beacon_attention.schedule import STORES, Schedule
from beacon_kernels.tiles import HEAD_DIMS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SPLITS = 65535  # programs along the second axis of a CUDA grid


def check(q: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], schedule: Schedule) -> None:
    """Check tensors against each other and the schedule.

    Args:
        q: ``[n, heads, head_dim]``.
        keys: Stores ``[m, kv_heads, head_dim]``.
        values: Likewise.
        schedule: What the kernel will follow.

    Raises:
        ValueError: Shapes, dtypes, devices or sizes that do not fit.
    """
    check_tensors(q, keys, values)
    if len(keys) > STORES:
        raise ValueError(f"there can be at most {STORES} stores, got {len(keys)}; concatenate some.")
    for number, k in enumerate(keys):
        if k.shape[0] != schedule.sizes[number]:
            raise ValueError(
                f"the schedule was built for {schedule.sizes[number]} entries in store {number}, got {k.shape[0]}; "
                "build it for these stores."
            )
    if any(schedule.sizes[len(keys) :]):
        raise ValueError(f"the schedule was built for stores {schedule.sizes}, got {len(keys)} of them.")
    kv_heads = keys[0].shape[1]
    group, rest = divmod(q.shape[1], kv_heads)
    if rest or group % schedule.packed:
        raise ValueError(
            f"heads must be a multiple of kv_heads, and heads per kv_head one of packed, got {q.shape[1]} heads, "
            f"{kv_heads} kv_heads and packed={schedule.packed}."
        )
    if schedule.runs.shape[2] != q.shape[0] or schedule.runs.device != q.device:
        raise ValueError(
            f"the schedule must be for {q.shape[0]} queries on {q.device}, got {schedule.runs.shape[2]} on "
            f"{schedule.runs.device}; build it for them, and move it with to()."
        )
    if group % schedule.splits:
        raise ValueError(
            f"splits must divide {group} heads per kv_head, got {schedule.splits}; build the schedule anew."
        )
    _check_form(schedule)


def _check_form(schedule: Schedule) -> None:
    """That the schedule's parts belong together."""
    n, entries = schedule.runs.shape[2], sum(schedule.sizes)
    parts: list[tuple[str, torch.Tensor, list[int]]] = [("runs", schedule.runs, [STORES, 2, n])]
    for name, work, count, columns in (
        ("forward", schedule.forward, n, 14),
        ("dq", schedule.dq, n, 14),
        ("dkv", schedule.dkv, entries, 7),
    ):
        if work is not None:
            parts.append((name, work.items, [len(work.items), columns]))
            if work.count != count:
                raise ValueError(
                    f"the schedule's {name} must cover {count} entries, got {work.count}; take all parts from one "
                    "build_schedule."
                )
    if schedule.key_runs is not None:
        parts.append(("key_runs", schedule.key_runs, [2, entries]))
    for name, tensor, shape in parts:
        if (
            tensor.dtype != torch.int32
            or list(tensor.shape) != shape
            or not tensor.is_contiguous()
            or tensor.device != schedule.runs.device
        ):
            raise ValueError(
                f"the schedule's {name} must be contiguous int32 {shape} on {schedule.runs.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}; build it with build_schedule and move it with to()."
            )


def check_decode(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    runs: torch.Tensor,
    seqlen_q: int,
    num_splits: int | None,
) -> None:
    """Check what a decoding step is given; the values of runs stay on their device, and the kernel clamps them.

    Args:
        q: ``[n, heads, head_dim]``.
        keys: Stores ``[m, kv_heads, head_dim]``.
        values: Likewise.
        runs: ``[stores, 2, n]``.
        seqlen_q: Queries per row.
        num_splits: Programs that share the keys of a row; None leaves it open.

    Raises:
        ValueError: Shapes, dtypes, devices or numbers that do not fit.
    """
    check_tensors(q, keys, values)
    n, heads = q.shape[:2]
    kv_heads = keys[0].shape[1]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} heads and {kv_heads} kv_heads.")
    if len(keys) > STORES or list(runs.shape) != [len(keys), 2, n]:
        raise ValueError(
            f"runs must have shape [stores, 2, n] with at most {STORES} stores, got {list(runs.shape)} for {len(keys)} "
            f"stores and {n} queries; give every query a run of every store."
        )
    if runs.dtype != torch.int32 or runs.device != q.device:
        raise ValueError(f"runs must be int32 on {q.device}, got {runs.dtype} on {runs.device}; convert and move them.")
    if seqlen_q < 1 or n % seqlen_q:
        raise ValueError(
            f"seqlen_q must divide the number of queries, got seqlen_q={seqlen_q} for {n} queries; pack rows of equal "
            "length."
        )
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be from 1 to {MAX_SPLITS}, got {num_splits}; None chooses.")


def check_tensors(q: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Check queries and stores against each other.

    Args:
        q: ``[n, heads, head_dim]``.
        keys: Stores ``[m, kv_heads, head_dim]``.
        values: Likewise.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    if not keys or len(keys) != len(values):
        raise ValueError(f"keys and values must be as many stores, at least one, got {len(keys)} and {len(values)}.")
    for name, tensor in (("q", q), *(("keys", k) for k in keys), *(("values", v) for v in values)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must have shape [entries, heads, head_dim], got {list(tensor.shape)}.")
        if tensor.dtype != q.dtype or tensor.dtype not in DTYPES:
            raise ValueError(
                f"q, keys and values must share one of float32, float16 and bfloat16, got {name} in {tensor.dtype} and "
                f"q in {q.dtype}; cast them."
            )
        if tensor.device != q.device:
            raise ValueError(
                f"q, keys and values must be on one device, got {name} on {tensor.device}, q on {q.device}."
            )
        if tensor.shape[2] != q.shape[2]:
            raise ValueError(f"head_dim must be the same, got {tensor.shape[2]} in {name} and {q.shape[2]} in q.")
        if not 1 <= tensor.shape[2] <= HEAD_DIMS[-1]:
            raise ValueError(
                f"head_dim must be from 1 to {HEAD_DIMS[-1]}, got {tensor.shape[2]} in {name}; take another path."
            )
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise ValueError(
                f"head_dim must be contiguous, got stride {tensor.stride(2)} in {name}; call contiguous()."
            )
    kv_heads = keys[0].shape[1]
    if kv_heads < 1:
        raise ValueError("keys must have at least one kv_head, got 0.")
    for number, (k, v) in enumerate(zip(keys, values, strict=True)):
        if k.shape != v.shape or k.shape[1] != kv_heads:
            raise ValueError(
                f"stores must have keys and values of one shape and the same kv_heads, got {list(k.shape)} and "
                f"{list(v.shape)} in store {number} beside {kv_heads} heads in store 0."
            )


def check_scale(softmax_scale: float) -> float:
    """The factor itself, if it is positive: kernels take maxima before they scale.

    Raises:
        ValueError: It is not, or not finite.
    """
    if not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}; scale q instead.")
    return softmax_scale
