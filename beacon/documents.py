"""Documents packed one after the other into one row, told apart by position ids that start again at 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed row ``[1, T]`` end.

    Args:
        lengths: Tokens of each document, in order.
    """

    lengths: tuple[int, ...]

    @property
    def mask(self) -> torch.Tensor:
        """Which columns of a row per document hold its tokens, int64 ``[documents, longest]`` on the CPU."""
        longest = max(self.lengths)
        return (torch.arange(longest) < torch.tensor(self.lengths)[:, None]).long()

    def rows(self, packed: torch.Tensor, fill: float) -> torch.Tensor:
        """A row per document ``[documents, longest]`` of a packed row ``[1, T]``, padded on the right."""
        parts = packed[0].split(list(self.lengths))
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def packed_documents(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> Documents | None:
    """The documents that position ids mark in a packed row, as Hugging Face's flattening collator does.

    Args:
        input_ids: Token ids ``[batch, T]``.
        attention_mask: Packed rows have none.
        position_ids: Positions ``[1, T]``; several documents where 0 comes more than once.

    Returns:
        The documents; None where the call holds no packed row.

    Raises:
        ValueError: A document's positions do not count from 0 by one.
    """
    if attention_mask is not None or position_ids is None or position_ids.shape != input_ids.shape:
        return None
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        return None
    positions = position_ids[0].cpu()
    starts = (positions == 0).nonzero()[:, 0]
    if len(starts) < 2:
        return None
    ends = torch.cat([starts[1:], torch.tensor([len(positions)])])
    lengths = (ends - starts).tolist()
    counted = torch.cat([torch.arange(length) for length in lengths])
    if int(starts[0]) != 0 or not torch.equal(positions, counted.to(positions)):
        raise ValueError(
            "position_ids of packed documents must count 0, 1, 2, ... in every document, got other numbers; build them "
            "with transformers.DataCollatorWithFlattening, or pass a row per document with an attention_mask."
        )
    return Documents(tuple(lengths))
