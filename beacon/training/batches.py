"""Batches as the trainer sees them: how long documents are, which labels count, streams read in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice, pairwise
from typing import Any

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

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
        mask = batch["attention_mask"].bool()
        counts = counts & mask[:, :-1] & mask[:, 1:]
    return counts.float() if batch.get("weights") is None else counts * batch["weights"][:, 1:]


class Stream(torch.utils.data.IterableDataset[Any]):
    """A stream of ``datasets`` without an end, of which every process reads all and takes its batches in turn.

    accelerate would give each process files of its own: then one could end before another, and what is trained on
    would depend on how many processes there are. When the stream ends it begins anew, shuffled in another way; a step
    may span its end.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            number = -1
            for number, example in enumerate(self.stream):  # noqa: B007
                yield example
            if number < 0:  # an empty stream, or a loader's worker without a file
                return


class LengthGrouped(torch.utils.data.Sampler[int]):
    """Examples of like length together, in an order that seed and epoch alone decide.

    Transformers' own sampler draws from the global random state, so a resumed epoch would be another.

    Args:
        lengths: Of every example, in any unit.
        batch_size: Examples that should be alike.
        seed: Of the order.
        epoch: Tells the epoch that begins.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def in_turn(dataset: Any, batch_size: int, process: int, processes: int) -> Iterator[tuple[list[Any], bool]]:
    """A process's batches of a finite data set, as many as every other's; with whether it is not read before.

    Args:
        dataset: Iterable of examples, read whole by every process.
        batch_size: Examples per batch.
        process: Number of this process.
        processes: How many there are.

    Yields:
        Examples, and False for those that only keep processes in step.
    """
    batches = iter(partial(_next_batch, iter(dataset), batch_size), [])
    first: list[Any] = []
    while turn := list(islice(batches, processes)):
        first = first or turn[0]
        yield (turn[process], True) if process < len(turn) else (first, False)


def _next_batch(examples: Iterator[Any], batch_size: int) -> list[Any]:
    return list(islice(examples, batch_size))
