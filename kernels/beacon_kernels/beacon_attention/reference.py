"""The definition: attention of queries that each see one contiguous run of every store. Obvious, slow, any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["reference"]


def reference(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    runs: torch.Tensor,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with one dense mask.

    Args:
        q: ``[n, heads, head_dim]``.
        keys: Stores ``[m, kv_heads, head_dim]``.
        values: Likewise.
        runs: Integers ``[stores, 2, n]``: query i sees entries ``[runs[s, 0, i], runs[s, 1, i])`` of store s.
        softmax_scale: Factor of the logits.

    Returns:
        ``out [n, heads, head_dim]`` in the dtype of q, and ``lse [heads, n]``, natural logarithm, in at least float32.
        A query that sees nothing gets 0 and minus infinity.
    """
    k, v = torch.cat(list(keys)), torch.cat(list(values))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    parts = []
    for store, (lo, hi) in zip(keys, runs, strict=True):
        at = torch.arange(len(store), device=q.device)
        parts.append((at >= lo[:, None]) & (at < hi[:, None]))
    visible = torch.cat(parts, dim=1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("qhd,khd->hqk", q, k).to(dtype) * softmax_scale
    logits = logits.masked_fill(~visible, float("-inf"))
    nothing = ~visible.any(dim=1)
    logits = logits.masked_fill(nothing[:, None], 0.0)  # no NaN, in gradients neither
    lse = logits.logsumexp(dim=-1).masked_fill(nothing, float("-inf"))
    weights = logits.softmax(dim=-1).masked_fill(nothing[:, None], 0.0).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", weights, v), lse
