"""Several whole documents in one example."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beacon.training.data.examples import full_windows
from beacon.training.data.rows import IGNORED


def plan_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents go together: the longest first, each into the fullest pack that still has room for it.

    Args:
        lengths: Tokens of each document, at most ``capacity``.
        capacity: Tokens of a pack at most.

    Returns:
        Packs of indices, ascending; the packs in the order of their first documents. Every index occurs once.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of each pack, sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = bisect_left(room, (lengths[index], 0))
        if fits == len(room):
            left, pack = capacity, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(fits)
        packs[pack].append(index)
        insort(room, (left - lengths[index], pack))
    return sorted(sorted(pack) for pack in packs)


@dataclass(frozen=True)
class Packer:
    """Packs a batch of examples.

    Args:
        max_length: Tokens of a packed example at most.
        window, stride: What ``windows`` are counted with, in every document by itself.
    """

    max_length: int
    window: int
    stride: int

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of fewer examples, with ``position_ids``.

        The first label of every document becomes -100: its first token does not follow from the document before.
        """
        lengths = [len(ids) for ids in batch["input_ids"]]
        packs = plan_packs(lengths, self.max_length)
        columns: dict[str, list[Any]] = {
            "input_ids": [_joined(batch["input_ids"][i] for i in pack) for pack in packs],
            "labels": [_joined([IGNORED, *batch["labels"][i][1:]] for i in pack) for pack in packs],
            "position_ids": [_joined(range(lengths[i]) for i in pack) for pack in packs],
            "windows": [sum(full_windows(lengths[i], self.window, self.stride) for i in pack) for pack in packs],
            "origin": [_origin(batch["origin"][pack[0]], len(pack) - 1) for pack in packs],
        }
        if "weights" in batch:
            columns["weights"] = [_joined(batch["weights"][i] for i in pack) for pack in packs]
        return columns


def _joined(parts: Any) -> list[Any]:
    joined: list[Any] = []
    for part in parts:
        joined.extend(part)
    return joined


def _origin(first: str, more: int) -> str:
    return f"{first} + {more} more" if more else first
