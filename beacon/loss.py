"""Next-token loss that never holds the logits of a whole text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
IGNORED = -100


def chunked_cross_entropy(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``head(hidden)`` against ``targets``, in chunks whose logits are recomputed for gradients.

    Args:
        hidden: ``[n, hidden]``.
        targets: Token ids ``[n]``; -100 does not count.
        head: Maps ``[m, hidden]`` to logits ``[m, vocab]``.
        num_items_in_batch: Divides the sum (gradient accumulation); None divides by the counted targets.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits); 0 if nothing counts.
    """
    counted = targets != IGNORED
    if num_items_in_batch is None:
        num_items_in_batch = counted.sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)

    def part(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")

    parts = []
    for rows, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        if torch.is_grad_enabled() and rows.requires_grad:
            parts.append(checkpoint(part, rows, wanted, use_reentrant=False))
        else:
            parts.append(part(rows, wanted))
    if not parts:
        return hidden.sum() * 0.0
    return torch.stack(parts).sum() / num_items_in_batch
