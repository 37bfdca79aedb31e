"""Checks before a launch: what must hold, what came, what to do. No kernel reads out of bounds after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beacon_kernels.beacon_attention.schedule import Schedule

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise ValueError(
                f"head_dim must be contiguous, got stride {tensor.stride(2)} in {name}; call contiguous()."
            )
    kv_heads = keys[0].shape[1]
    for number, (k, v) in enumerate(zip(keys, values, strict=True)):
        if k.shape != v.shape or k.shape[1] != kv_heads:
            raise ValueError(
                f"stores must have keys and values of one shape and the same kv_heads, got {list(k.shape)} and "
                f"{list(v.shape)} in store {number} beside {kv_heads} heads in store 0."
            )
        if k.shape[0] != schedule.sizes[number]:
            raise ValueError(
                f"the schedule was built for {schedule.sizes[number]} entries in store {number}, got {k.shape[0]}; "
                "build it for these stores."
            )
    if any(schedule.sizes[len(keys) :]):
        raise ValueError(f"the schedule was built for stores {schedule.sizes}, got {len(keys)} of them.")
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
