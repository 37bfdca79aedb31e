"""The definition: concatenate the sources, take entries, rotate keys. Obvious, any dtype, autograd by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["reference", "rotate"]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first ``rotary_dim`` channels, half-split; computed in at least float32.

    Args:
        x: ``[m, heads, head_dim]``.
        cos: ``[m, rotary_dim / 2]``.
        sin: Likewise.

    Returns:
        ``[m, heads, head_dim]`` in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    half = cos.shape[-1]
    first, second, rest = x.to(dtype).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def reference(
    k_sources: Sequence[torch.Tensor],
    v_sources: Sequence[torch.Tensor] | None,
    index: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gather, rotate keys, copy values.

    Args:
        k_sources: Tensors ``[n_i, heads, head_dim]``: the pool.
        v_sources: Likewise, or None.
        index: Integers ``[m]`` into the pool; None takes every entry in order.
        cos: ``[m, rotary_dim / 2]``, or None to leave keys as they are.
        sin: Likewise.

    Returns:
        Keys ``[m, heads, head_dim]``, and values or None.
    """
    k = torch.cat(list(k_sources))
    v = None if v_sources is None else torch.cat(list(v_sources))
    if index is not None:
        k = k.index_select(0, index)
        v = None if v is None else v.index_select(0, index)
    if cos is not None and sin is not None:
        k = rotate(k, cos, sin)
    return k, v
