"""The function that is mapped over the rows of a source."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from beacon.training.data.examples import BROKEN, WITH_TOKENS, Columns, Cutter
from beacon.training.data.lines import BrokenLineError, parse_line
from beacon.training.data.report import FIRST, Counts
from beacon.training.data.rows import Encoder, Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenize:
    """Rows become examples, with a column ``fate`` that says what became of their documents.

    Args:
        encode: Rows to documents.
        cut: Documents to examples.
        kind: What the rows are, as :class:`beacon.training.data.sources.Rows` has it.
        skip_broken: Whether a broken line is dropped rather than an error.
    """

    encode: Encoder
    cut: Cutter
    kind: str
    skip_broken: bool

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> Columns:
        """Columns of the examples of a batch of rows, dropped ones without tokens.

        Raises:
            ValueError: A line is broken (unless skipped), or a row holds something else than it must.
        """
        origins = self._numbered(indices) if self.kind == "table" else batch["origin"]
        parsed = [self._row(batch, at, origin) for at, origin in enumerate(origins)]
        good = [(row, origin) for row, origin in zip(parsed, origins) if not isinstance(row, str)]
        documents = self.encode([row for row, _ in good], [origin for _, origin in good])
        columns = self.cut.empty()
        for row, origin in zip(parsed, origins):
            if isinstance(row, str):
                self.cut.add_dropped(columns, f"{origin}: {row}", BROKEN)
            else:
                self.cut.add(columns, next(documents))
        return columns

    def _row(self, batch: dict[str, list[Any]], at: int, origin: str) -> Row | str:
        """A row, or what is wrong with its line."""
        if self.kind == "table":
            return {name: column[at] for name, column in batch.items()}
        if self.kind == "texts":
            return {self.encode.source.text_column: batch["text"][at]}
        try:
            return parse_line(batch["line"][at])
        except BrokenLineError as err:
            if self.skip_broken:
                return str(err)
            raise ValueError(
                f"each line must be a JSON object, got another in {origin} of {self.encode.source.path!r} ({err}); "
                "correct it or set broken_lines to skip."
            ) from err

    def _numbered(self, indices: list[int]) -> list[str]:
        worker = get_worker_info()  # each numbers the rows that it reads
        suffix = "" if worker is None else f" of worker {worker.id}"
        return [f"{self.encode.source.path}[{index}{suffix}]" for index in indices]


@dataclass(frozen=True)
class Streamed:
    """Tokenizes, counts what became of the documents and drops what has no tokens, all while a data set is read.

    Args:
        tokenize: Rows to examples.
        counts: What is counted up.
    """

    tokenize: Tokenize
    counts: Counts

    def __deepcopy__(self, memo: dict[int, Any]) -> Streamed:
        # Mixing copies its data sets deeply: the copy still has to count for the same report.
        return self

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> Columns:
        """Columns of the examples that have tokens."""
        columns = self.tokenize(batch, indices)
        fates = columns.pop("fate")
        broken = [origin for origin, fate in zip(columns["origin"], fates) if fate == BROKEN]
        for origin in broken[: FIRST - len(self.counts.broken_first)]:
            logger.warning("a broken line is skipped: %s (of %s)", origin, self.counts.source)
        lengths = np.array([len(ids) for ids in columns["input_ids"]])
        self.counts.add(np.array(fates), lengths, np.array(columns["windows"]), broken)
        keep = [fate in WITH_TOKENS for fate in fates]
        return {name: [value for value, kept in zip(column, keep) if kept] for name, column in columns.items()}
