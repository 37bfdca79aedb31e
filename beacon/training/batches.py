"""Batches as the trainer sees them: how long documents are, which labels count, streams read in turn."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from beacon.loss import IGNORED


def document_lengths(inputs: dict[str, Any]) -> list[int]:
    """Tokens of every document of a batch, padding left out (reads them back from the device)."""
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        return [int(count) for count in mask.sum(dim=1).tolist()]
    if positions is not None and len(ids) == 1:
        starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), ids.shape[1]]
        return [end - start for start, end in pairwise(starts)]
    return [ids.shape[1]] * len(ids)


def counted(batch: dict[str, Any]) -> torch.Tensor:
    """Weight with which the token after each one counts, ``[rows, columns - 1]``."""
    counts = batch["labels"][:, 1:] != IGNORED
    if "attention_mask" in batch:
        counts = counts & batch["attention_mask"][:, :-1].bool()
    return counts.float() if batch.get("weights") is None else counts * batch["weights"][:, 1:]


class Stream(torch.utils.data.IterableDataset[Any]):
    """A stream of ``datasets`` of which every process reads all and takes its batches in turn.

    accelerate would give each process files of its own: then one could end before another, and what is trained on
    would depend on how many processes there are.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        self.stream.set_epoch(epoch)
