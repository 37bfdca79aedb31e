"""The public function: checks, then the named implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beacon_kernels.beacon_attention.autograd import attend
from beacon_kernels.beacon_attention.reference import reference
from beacon_kernels.beacon_attention.schedule import Schedule
from beacon_kernels.beacon_attention.validation import check, check_scale
from beacon_kernels.dispatch import IMPLEMENTATIONS, check_device


def beacon_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    schedule: Schedule,
    *,
    softmax_scale: float | None = None,
    impl: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to one contiguous run of every store per query.

    Args:
        q: ``[n, heads, head_dim]``, float32, float16 or bfloat16; any strides but in head_dim.
        keys: Up to four stores ``[m, kv_heads, head_dim]``, for example committed memory, what this pass commits, raw
            tokens of the windows, beacons of the windows.
        values: Likewise.
        schedule: Who sees what, from :func:`build_schedule`, on the device of q.
        softmax_scale: Factor of the logits, positive; None for ``head_dim ** -0.5``.
        impl: ``triton`` or ``reference`` (one dense mask); an explicit choice never falls back.

    Both results are differentiable, in q, keys and values; the backward pass is deterministic.

    Returns:
        ``out [n, heads, head_dim]`` and ``lse [heads, n]`` (natural logarithm, float32). A query that sees nothing gets
        0 and minus infinity.

    Raises:
        ValueError: Arguments that do not fit each other, no tile for this head_dim or GPU, gradients with a schedule
            that has none, or CPU tensors for compiled kernels.

    Source: arXiv 2401.03462, section 3.2; the runs are the plan's.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    check(q, keys, values, schedule)
    scale = check_scale(q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    if impl == "reference":
        return reference(q, keys, values, schedule.runs[: len(keys)].long(), scale)
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, *keys, *values))
    if records and schedule.dq is None:
        raise ValueError(
            "gradients need a schedule with a backward pass, got one without; build it with gradients=True, or compute "
            "under torch.no_grad()."
        )
    check_device(q)
    return attend(q, list(keys), list(values), schedule, scale)
