"""Documents cut to length: the examples that a model sees, and what became of each document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from beacon.training.data.config import DataConfig
from beacon.training.data.rows import IGNORED, Document

# What became of a document; each example carries that of its document, all but the first piece of one PIECE.
KEPT, TRUNCATED, SPLIT, PIECE, SHORT, SKIPPED, UNCOUNTED, BROKEN = range(8)
WITH_TOKENS = (KEPT, TRUNCATED, SPLIT, PIECE)  # the others have none and are dropped once they are counted

Columns = dict[str, list[Any]]


def full_windows(length: int, window: int, stride: int) -> int:
    """Windows that a text of ``length`` tokens fills."""
    return 0 if length < window else (length - window) // stride + 1


@dataclass(frozen=True)
class Cutter:
    """Cuts documents to at most ``max_length`` tokens.

    Args:
        max_length, min_length, too_long: See :class:`DataConfig`.
        weighted: Whether examples have ``weights``.
        window, stride: What their ``windows`` are counted with.
    """

    max_length: int
    min_length: int
    too_long: str
    weighted: bool
    window: int
    stride: int

    @classmethod
    def of(cls, config: DataConfig, window: int, stride: int) -> Cutter:
        """As a configuration says."""
        return cls(config.max_length, config.min_length, config.too_long, config.weighted, window, stride)

    def empty(self) -> Columns:
        """Columns of examples, without any."""
        names = ("input_ids", "labels", "windows", "origin", "fate", *(("weights",) if self.weighted else ()))
        return {name: [] for name in names}

    def add(self, columns: Columns, document: Document) -> None:
        """Append the examples of a document, or one without tokens that says why there are none.

        Raises:
            ValueError: It is too long, which is an error by ``too_long``.
        """
        length = len(document.ids)
        if length < self.min_length or document.blank:
            self.add_dropped(columns, document.origin, SHORT)
            return
        ranges, fate = [(0, length)], KEPT
        if length > self.max_length:
            if self.too_long == "error":
                raise ValueError(
                    f"a document must have at most {self.max_length} tokens (max_length), got {length} in "
                    f"{document.origin}; raise max_length or set too_long to truncate, split or skip."
                )
            if self.too_long == "skip":
                self.add_dropped(columns, document.origin, SKIPPED)
                return
            fate = SPLIT if self.too_long == "split" else TRUNCATED
            ranges = self._pieces(length) if self.too_long == "split" else [(0, self.max_length)]
        counted = [(start, stop) for start, stop in ranges if _teaches(document, start, stop)]
        if not counted:
            self.add_dropped(columns, document.origin, UNCOUNTED)
            return
        for number, (start, stop) in enumerate(counted):
            columns["input_ids"].append(document.ids[start:stop])
            columns["labels"].append(document.labels[start:stop])
            columns["windows"].append(full_windows(stop - start, self.window, self.stride))
            columns["origin"].append(f"{document.origin}[{start}:]" if fate == SPLIT else document.origin)
            columns["fate"].append(PIECE if number else fate)
            if self.weighted:
                weights = document.weights
                columns["weights"].append([1.0] * (stop - start) if weights is None else weights[start:stop])

    def add_dropped(self, columns: Columns, origin: str, fate: int) -> None:
        """Append an example without tokens."""
        for name, column in columns.items():
            column.append({"windows": 0, "origin": origin, "fate": fate}.get(name, []))

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        starts = range(0, length, self.max_length)
        pieces = [(start, min(start + self.max_length, length)) for start in starts]
        return [(start, stop) for start, stop in pieces if stop - start >= self.min_length]


def _teaches(document: Document, start: int, stop: int) -> bool:
    """Whether the loss counts a token of a stretch, of which the first one is never predicted."""
    labels, weights = document.labels, document.weights
    if weights is None:
        return any(labels[i] != IGNORED for i in range(start + 1, stop))
    return any(labels[i] != IGNORED and weights[i] > 0 for i in range(start + 1, stop))
