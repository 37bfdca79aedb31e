"""Whose logits a call returns: columns of its text, and where their hidden states are among the packed tokens."""

from __future__ import annotations

from typing import Any

import torch

from beacon.reading import HiddenStates
from beacon.text import NewText


def kept_columns(columns: int, logits_to_keep: int | torch.Tensor, labels: Any) -> torch.Tensor | None:
    """Columns whose logits are returned (int64), or None for none."""
    if isinstance(logits_to_keep, torch.Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.is_floating_point():
            raise TypeError(
                f"logits_to_keep must be an int or column indices [n], got a {logits_to_keep.dtype} tensor of shape "
                f"{list(logits_to_keep.shape)}; pass for example torch.tensor([-1])."
            )
        try:
            return torch.arange(columns)[logits_to_keep.cpu()]
        except IndexError as err:
            raise ValueError(
                f"logits_to_keep must name columns below {columns}, got {logits_to_keep.tolist()}."
            ) from err
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int):
        raise TypeError(f"logits_to_keep must be an int or column indices [n], got {logits_to_keep!r}; pass 0 for all.")
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must not be negative, got {logits_to_keep}; pass {-logits_to_keep}.")
    if logits_to_keep == 0:
        return torch.arange(columns) if labels is None else None
    return torch.arange(max(columns - logits_to_keep, 0), columns)


def wanted_tokens(text: NewText, columns: torch.Tensor | None, labels: Any) -> torch.Tensor:
    """Which packed text tokens' final hidden states are read: bool ``[n]``."""
    if labels is not None:
        return torch.ones(sum(text.counts), dtype=torch.bool)
    mask = torch.zeros(text.ids.shape, dtype=torch.bool)
    if columns is not None:
        mask[:, columns] = True
    wanted = text.pack(mask)
    wanted[last_tokens(text)] = True
    return wanted


def last_tokens(text: NewText) -> torch.Tensor:
    """Place of every row's last token in the packed text (rows without new text left out)."""
    counts = torch.tensor(text.counts)
    return counts.cumsum(0)[counts > 0] - 1


def stock_columns(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The columns that the stock model would keep.

    Contiguous, for PyTorch multiplies a slice in another way where the head's weight is frozen than where it is not,
    and rounds differently; the stock model that users compare with is not frozen.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:].contiguous() if logits_to_keep else hidden


def unpack(hidden: HiddenStates, text: NewText, columns: torch.Tensor) -> torch.Tensor:
    """States of the kept columns as ``[rows, kept columns, hidden]``, zeros at padding."""
    rows, width = text.ids.shape
    place = torch.full((rows * width,), -1)
    place[text.index] = torch.arange(sum(text.counts))
    place = place.view(rows, width)[:, columns].flatten()
    text_places = (place >= 0).nonzero()[:, 0]
    values = hidden.at(place[text_places])
    if len(text_places) < len(place):
        values = values.new_zeros(len(place), values.shape[1]).index_copy(0, text_places.to(values.device), values)
    return values.view(rows, len(columns), -1)
