"""Next-token loss that never holds the logits of a whole text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from beacon.reading import HiddenStates
from beacon.text import NewText

CHUNK = 1024
IGNORED = -100


def chunked_cross_entropy(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    num_items_in_batch: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    chunks: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``head(hidden)`` against ``targets``, in chunks whose logits are recomputed for gradients.

    Args:
        hidden: ``[n, hidden]``.
        targets: Token ids ``[n]``; -100 does not count.
        head: Maps ``[m, hidden]`` to logits ``[m, vocab]``.
        num_items_in_batch: Divides the sum (gradient accumulation); None divides by the counted targets, or by the sum
            of their weights.
        weights: Factor of each target's loss ``[n]``; None counts all alike.
        chunks: How often the head is called at least, without rows where there are no more, and none left out:
            processes that share a model must call it equally often. None leaves out chunks in which nothing counts.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits); 0 if nothing counts.
    """
    counted = targets != IGNORED
    if num_items_in_batch is None:
        total = counted.sum() if weights is None else (weights * counted).sum()
        num_items_in_batch = torch.where(total > 0, total, 1)  # nothing counts: the sum is 0 as well
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)

    def part(rows: torch.Tensor, wanted: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        logits = head(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if factors is None:
            return F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        return F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none") @ factors.to(logits.dtype)

    parts = []
    pieces: list[Any]
    pieces = [hidden.split(CHUNK), targets.split(CHUNK)]
    pieces.append([None] * len(pieces[0]) if weights is None else weights.split(CHUNK))
    if chunks is None:
        needed = [bool(count) for count in torch.stack([part.sum() for part in counted.split(CHUNK)]).tolist()]
    else:
        more = max(chunks - len(pieces[0]), 0)
        pieces = [[*of, *[None if of[0] is None else of[0][:0]] * more] for of in pieces]
        needed = [True] * len(pieces[0])
    for rows, wanted, factor, need in zip(*pieces, needed, strict=True):
        if not need:  # the head is the dearest part: a long prompt or padding goes without
            continue
        if torch.is_grad_enabled() and rows.requires_grad:
            parts.append(checkpoint(part, rows, wanted, factor, use_reentrant=False))
        else:
            parts.append(part(rows, wanted, factor))
    if not parts:
        return hidden.sum() * 0.0
    return torch.stack(parts).sum() / num_items_in_batch


def check_labels(labels: Any, text: NewText, vocab_size: int) -> torch.Tensor:
    """Labels of the new columns.

    Args:
        labels: What the caller gave, for all columns of the call or for the new ones.
        text: The call's text.
        vocab_size: Number of token ids.

    Returns:
        Token ids ``[rows, columns]``.

    Raises:
        TypeError: They are no integer tensor.
        ValueError: Their shape or a value is wrong.
    """
    wrong = not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dtype == torch.bool
    if wrong or labels.ndim != 2:
        what = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(
            f"labels must be an integer tensor [batch, seqlen], got {what}; pass labels=input_ids with -100 where "
            "nothing counts."
        )
    new = labels[:, text.skipped :] if labels.shape[1] != text.ids.shape[1] else labels
    if new.shape != text.ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids, got {tuple(labels.shape)} for {tuple(text.ids.shape)}; "
            "pass labels=input_ids with -100 where nothing counts."
        )
    counted = new[new != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < vocab_size:
        raise ValueError(
            f"labels must be {IGNORED} or lie in [0, {vocab_size}), got "
            f"{int(counted.min())} to {int(counted.max())}; use this model's own tokenizer."
        )
    return new


def check_weights(weights: Any, text: NewText) -> torch.Tensor:
    """Loss weights of the new columns, float32 ``[rows, columns]``.

    Raises:
        TypeError: They are no floating-point tensor.
        ValueError: Their shape is wrong, or one is negative, NaN or infinite.
    """
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point() or weights.ndim != 2:
        what = f"{tuple(weights.shape)} of {weights.dtype}" if isinstance(weights, torch.Tensor) else type(weights)
        raise TypeError(f"weights must be a floating-point tensor [batch, seqlen], got {what}; pass one per label.")
    new = weights[:, text.skipped :] if weights.shape[1] != text.ids.shape[1] else weights
    if new.shape != text.ids.shape:
        raise ValueError(
            f"weights must have the shape of input_ids, got {tuple(weights.shape)} for {tuple(text.ids.shape)}; pass "
            "one per label."
        )
    if not bool((new.isfinite() & (new >= 0)).all()):
        raise ValueError("weights must be finite and not negative, got another value; give 0 where nothing counts.")
    return new.float()


def text_loss(
    states: HiddenStates,
    text: NewText,
    labels: torch.Tensor,
    last_hidden: list[torch.Tensor | None],
    head: Callable[[torch.Tensor], torch.Tensor],
    num_items_in_batch: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    chunks: int | None = None,
) -> torch.Tensor:
    """Mean next-token loss of a call; the first label of a row belongs to the last token of the call before.

    Args:
        states: Final hidden states of the call's text.
        text: The call's text.
        labels: Token ids ``[rows, columns]``; -100 does not count.
        last_hidden: Final hidden state of each row's last token before the call, if any.
        head: As in :func:`chunked_cross_entropy`.
        num_items_in_batch: As in :func:`chunked_cross_entropy`.
        weights: Factor of each label's loss ``[rows, columns]``, or None.
        chunks: As in :func:`chunked_cross_entropy`.

    Returns:
        The loss, a scalar.
    """
    hidden = states.at(torch.arange(sum(text.counts)))
    wanted = text.pack(labels).to(hidden.device)
    targets = torch.full_like(wanted, IGNORED)
    targets[:-1] = wanted[1:]
    own = None if weights is None else text.pack(weights).to(hidden.device)
    factors = None if own is None else own.roll(-1)
    begin = 0
    firsts = []
    carried: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row, count in enumerate(text.counts):
        before = last_hidden[row]
        if count and before is not None:
            carried.append((before.to(hidden), wanted[begin]))
            firsts.append(begin)
        if count:
            targets[begin + count - 1] = IGNORED
        begin += count
    if carried:
        hidden = torch.cat([hidden, torch.stack([h for h, _ in carried])])
        targets = torch.cat([targets, torch.stack([target for _, target in carried])])
        factors = None if own is None or factors is None else torch.cat([factors, own[firsts]])
    return chunked_cross_entropy(hidden, targets, head, num_items_in_batch, factors, chunks)
