"""Options that tasks share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from beacon.config import check_whole
from beacon.evaluation.suite import Item, Task
from beacon.evaluation.tasks.haystack import Haystack
from beacon.evaluation.tasks.prompts import frame

Value = TypeVar("Value")


@dataclass(kw_only=True, eq=False)
class TextTask(Task):
    """A task on ordinary text of several lengths.

    Args:
        lengths: Tokens of the whole prompt: text, what is hidden in it, and the longest question.
        limit: Items of each length at most; where it cuts a sample's cells, those that are left lie as far apart as
            can be (of depths the first and the last, say; of a dialogue the first turns are kept).
        samples: Items of each cell (a length, and a depth where there are depths). All items of a length have different
            stretches of text, of which the shorter lengths have the beginnings; where the text is too short for all,
            stretches overlap, and those that begin in one part of it count as one text.
        data: A file or folder of ordinary text (see :func:`beacon.evaluation.tasks.documents.local_texts`); None for
            the sources of the standard library.
        seed: Draws what is hidden.
    """

    lengths: Sequence[int] = (4096, 16384, 32768)
    limit: int | None = None
    samples: int = 2
    data: str | Path | None = None
    seed: int = 0

    chat_template = False  # whether questions are asked in the tokenizer's chat format
    in_turns = False  # whether cells are turns of one dialogue, which share its text and are run one after the other

    def __post_init__(self) -> None:
        self.lengths = check_lengths(self.lengths)
        check_whole("samples", self.samples, 1)
        check_whole("seed", self.seed, 0)
        if self.limit is not None:
            check_whole("limit", self.limit, 1)
        self.haystack = Haystack(None if self.data is None else Path(self.data), max(self.lengths))

    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        if self.chat_template:
            frame(tokenizer, True)  # refuses one that cannot be used
        items = list(self._items())
        longest, stretches = max(self.lengths), [item.content["stretch"] for item in items]
        self.haystack.check(tokenizer, longest, 1 + max(stretches))
        places = {number: self.haystack.place(tokenizer, longest, number) for number in dict.fromkeys(stretches)}
        return [replace(item, cluster=f"text {places[item.content['stretch']]}") for item in items]

    def _items(self) -> Iterator[Item]:
        cells = list(enumerate(self.cells()))
        most = len(cells) * self.samples if self.limit is None else self.limit
        for length in self.lengths:
            for sample in range(self.samples):
                count = most - sample * len(cells)
                for number, cell in cells[: max(count, 0)] if self.in_turns else spread(cells, count):
                    yield self._item(length, sample, cell, sample if self.in_turns else sample * len(cells) + number)

    def cells(self) -> Iterator[dict[str, Any]]:
        """What items of one length differ in, apart from the text; goes to their place."""
        yield {}

    def _item(self, length: int, sample: int, cell: dict[str, Any], stretch: int) -> Item:
        place = {"length": length, **cell}
        shown = ", ".join(f"{key} {value}" for key, value in place.items())
        return Item(
            name=f"{shown}, sample {sample}",
            place=place,
            content={"sample": sample, "stretch": stretch},
            series=f"length {length}, sample {sample}" if self.in_turns else None,
        )

    def drawn_from(self, item: Item) -> str:
        """Seed of an item: everything that tells it from others, and nothing else."""
        return f"{self.name}, seed {self.seed}, {item.name}"


def spread(values: Sequence[Value], count: int) -> list[Value]:
    """At most ``count`` values, from the first to the last as evenly as can be; the first where it is one."""
    if count >= len(values):
        return list(values)
    return [values[round(at * (len(values) - 1) / max(count - 1, 1))] for at in range(count)]


def check_flag(name: str, value: object) -> None:
    """Refuse what is no bool.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}; pass True or False.")


def check_lengths(lengths: Any) -> tuple[int, ...]:
    """Lengths in tokens as a tuple without repetition, in the given order.

    Raises:
        TypeError: No ints.
        ValueError: None given, or one below 2.
    """
    return tuple(dict.fromkeys(check_many("lengths", lengths, 2)))


def check_many(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Whole numbers, one or several, as a tuple.

    Raises:
        TypeError: No ints.
        ValueError: None given, or too small a one.
    """
    numbers = as_tuple(name, values)
    for number in numbers:
        check_whole(f"each of {name}", number, least)
    return numbers


def check_depths(depths: Any) -> tuple[float, ...]:
    """Depths in 0 .. 1 as a tuple.

    Raises:
        TypeError: No numbers.
        ValueError: None given, or one outside.
    """
    numbers = as_tuple("depths", depths)
    for depth in numbers:
        if isinstance(depth, bool) or not isinstance(depth, (int, float)):
            raise TypeError(
                f"each of depths must be a number, got {depth!r}; 0 is the start of the text and 1 its end."
            )
        if not (math.isfinite(depth) and 0 <= depth <= 1):
            raise ValueError(f"depths must lie between 0 and 1, got {depth}; 0 is the start of the text and 1 its end.")
    return tuple(map(float, numbers))


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """One value or several as a tuple.

    Raises:
        ValueError: None given.
    """
    many = tuple(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else (values,)
    if not many:
        raise ValueError(f"{name} must name at least one, got none; leave {name} out for the usual ones.")
    return many
