"""The public function: checks, then the named implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beacon_kernels.dispatch import IMPLEMENTATIONS, check_device
from beacon_kernels.rotate_commit.autograd import gathered, written
from beacon_kernels.rotate_commit.gather import Gather
from beacon_kernels.rotate_commit.reference import reference
from beacon_kernels.rotate_commit.validation import check


def rotate_commit(
    k_sources: Sequence[torch.Tensor],
    v_sources: Sequence[torch.Tensor] | None,
    gather: Gather | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    k_out: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    impl: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take entries from a pool, rotate keys and copy values, in one launch.

    Args:
        k_sources: One to three tensors ``[n_i, heads, head_dim]``, float32, float16 or bfloat16, any strides but in
            head_dim: the pool is one after the other, for example cached open entries, a pass's raw tokens, its
            beacons.
        v_sources: As many of the same shapes, or None: q is rotated that way.
        gather: Which entries, from :func:`build_gather`, on the device of the sources; None takes all in order.
        cos: ``[m, rotary_dim / 2]`` or ``[m, 1, rotary_dim / 2]``, one row per result, any row stride; channels past
            rotary_dim are copied. None copies keys as well.
        sin: Likewise.
        k_out: ``[m, heads, head_dim]`` to write into, for example ``cache[start : start + m]``; None allocates.
        v_out: Likewise for values.
        places: int32 or int64 ``[m]`` on the device of the sources: row i of the result goes to row ``places[i]`` of
            k_out and v_out, which may then have any number of rows. The host never reads them: a CUDA graph of this
            call replays while they change. All must lie inside and differ, or what is written is undefined.
        impl: ``triton`` or ``reference``; an explicit choice never falls back.

    Returns:
        Keys ``[m, heads, head_dim]`` and values (None without v_sources) in the dtype of the sources: ``k_out`` and
        ``v_out`` where given, else new tensors with gradients to the sources (none to cos and sin).

    Raises:
        NotImplementedError: Gradients through ``k_out`` and ``v_out``.
        ValueError: Arguments that do not fit each other, or CPU tensors for compiled kernels.

    Source: arXiv 2104.09864, equation 34, in the half-split layout.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    check(k_sources, v_sources, gather, cos, sin, k_out, v_out, places)
    if cos is not None and sin is not None:
        cos, sin = cos.flatten(0, -2), sin.flatten(0, -2)
    if impl == "reference":
        k, v = reference(k_sources, v_sources, None if gather is None else gather.index, cos, sin)
        if k_out is not None and places is not None:
            k_out.index_copy_(0, places.long(), k)
            return k_out, v if v is None or v_out is None else v_out.index_copy_(0, places.long(), v)
        return k if k_out is None else k_out.copy_(k), v if v is None or v_out is None else v_out.copy_(v)
    check_device(k_sources[0])
    keys, values = list(k_sources), list(v_sources or [])
    if k_out is not None:
        written(keys, values, gather, cos, sin, places, k_out, v_out)
        return k_out, v_out
    out = gathered(keys, values, gather, cos, sin)
    return out[0], out[1] if values else None
