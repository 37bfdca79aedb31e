"""What became of the documents of each source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from beacon.training.data.examples import (
    BROKEN,
    KEPT,
    PIECE,
    SHORT,
    SKIPPED,
    SPLIT,
    TRUNCATED,
    UNCOUNTED,
    WITH_TOKENS,
)

FIRST = 3  # broken lines that are named


@dataclass
class Counts:
    """Documents and examples of one source, or of all. While streaming they grow, and repeated epochs count again.

    Args:
        source: Path of the source.
        fates: Documents by what became of them, as :mod:`beacon.training.data.examples` numbers it.
        broken_first: Where the first broken lines are, and what is wrong with each.
        examples: Examples before packing and mixing.
        tokens: Tokens of these.
        windows: How many of these fill how many windows.
    """

    source: str
    fates: Counter[int] = field(default_factory=Counter)
    broken_first: list[str] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    windows: Counter[int] = field(default_factory=Counter)

    def add(self, fates: np.ndarray, lengths: np.ndarray, windows: np.ndarray, broken: Sequence[str]) -> None:
        """Count examples.

        Args:
            fates, lengths, windows: Of each example ``[n]``, dropped documents included.
            broken: Where broken lines are, the first ones at least.
        """
        self.fates.update(dict(_tally(fates[fates != PIECE])))
        self.broken_first += broken[: FIRST - len(self.broken_first)]
        kept = np.isin(fates, WITH_TOKENS)
        self.examples += int(kept.sum())
        self.tokens += int(lengths[kept].sum())
        self.windows.update(dict(_tally(windows[kept])))

    @property
    def documents(self) -> int:
        """Documents read, broken lines included."""
        return self.fates.total()

    @property
    def kept(self) -> int:
        """Documents of which there are examples."""
        return sum(self.fates[fate] for fate in (KEPT, TRUNCATED, SPLIT))

    @property
    def truncated(self) -> int:
        """Kept documents that lost their end."""
        return self.fates[TRUNCATED]

    @property
    def split(self) -> int:
        """Kept documents that became several examples."""
        return self.fates[SPLIT]

    @property
    def too_short(self) -> int:
        """Documents left out below ``min_length``, blank ones included."""
        return self.fates[SHORT]

    @property
    def too_long(self) -> int:
        """Documents left out above ``max_length``."""
        return self.fates[SKIPPED]

    @property
    def uncounted(self) -> int:
        """Documents left out because the loss would count none of their tokens, such as chats without an assistant."""
        return self.fates[UNCOUNTED]

    @property
    def broken(self) -> int:
        """Lines that are no JSON object."""
        return self.fates[BROKEN]

    @property
    def without_window(self) -> int:
        """Examples that do not fill a single window: nothing in them is condensed."""
        return self.windows[0]

    def left_out(self) -> list[str]:
        """Why documents were left out, a phrase for each reason."""
        first = f" ({', '.join(self.broken_first)}{', ...' if self.broken > len(self.broken_first) else ''})"
        reasons = [
            (self.too_short, "shorter than min_length"),
            (self.too_long, "longer than max_length"),
            (self.uncounted, "without a token that the loss counts"),
            (self.broken, f"broken{first}"),
        ]
        return [f"{count} {reason}" for count, reason in reasons if count]

    def __str__(self) -> str:
        cut = [f"{count} {how}" for count, how in ((self.truncated, "truncated"), (self.split, "split")) if count]
        kept = f"{self.kept} kept" + (f" ({', '.join(cut)})" if cut else "")
        windows = f"{self.without_window} without a full window, at most {max(self.windows, default=0)} windows"
        return (
            f"{self.source}: {', '.join([f'{self.documents} documents', kept, *self.left_out()])}; "
            f"{self.examples} examples of {self.tokens} tokens, {windows}"
        )


@dataclass
class Report:
    """What a data set is made of. While streaming it grows in the process that iterates (each worker has its own).

    Args:
        sources: Counts of each source.
        examples: Examples of the data set, mixed and packed; None while streaming.
    """

    sources: tuple[Counts, ...]
    examples: int | None = None

    @property
    def total(self) -> Counts:
        """The counts of all sources together."""
        total = Counts("all sources")
        for counts in self.sources:
            total.fates.update(counts.fates)
            total.broken_first += counts.broken_first[: FIRST - len(total.broken_first)]
            total.examples += counts.examples
            total.tokens += counts.tokens
            total.windows.update(counts.windows)
        return total

    def lines(self) -> list[str]:
        """A line for each source, then, unless streaming, one for the data set."""
        lines = [str(counts) for counts in self.sources]
        return lines if self.examples is None else [*lines, f"data set: {self.examples} examples"]

    def __str__(self) -> str:
        return " | ".join(self.lines())


def _tally(values: np.ndarray) -> list[tuple[int, int]]:
    return [(int(value), int(count)) for value, count in zip(*np.unique(values, return_counts=True))]
