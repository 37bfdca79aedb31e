"""Rows of a source, whatever they hold, as documents of tokens with labels and weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from beacon.training.data.chat import check_template, encode_chat
from beacon.training.data.config import SourceConfig
from beacon.training.data.weights import read_weights, spread

IGNORED = -100

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """Tokens of one row.

    Args:
        origin: Where it is from, for messages.
        ids: Token ids.
        labels: As many; -100 does not count in the loss.
        weights: As many, or None: all 1.
        blank: Whether it is a text of nothing but white space.
    """

    origin: str
    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None
    blank: bool = False


@dataclass(frozen=True)
class Encoder:
    """Turns rows of a source into documents.

    Args:
        source: What the rows are from, and how their columns are called.
        tokenizer: The model's tokenizer.
        append_eos: Whether plain text ends with the tokenizer's end of sequence.
    """

    source: SourceConfig
    tokenizer: Any
    append_eos: bool

    def __call__(self, rows: Sequence[Row], origins: Sequence[str]) -> Iterator[Document]:
        """Documents in the order of the rows.

        Raises:
            ValueError: A row holds something else than it must.
        """
        kinds = [self._kind(row, origin) for row, origin in zip(rows, origins)]
        texts = [self._text(row, origin) for row, origin, kind in zip(rows, origins, kinds) if kind == "text"]
        encoded = iter(self._encoded(texts))
        for row, origin, kind in zip(rows, origins, kinds):
            if kind == "tokens":
                yield self._from_tokens(row, origin)
            elif kind == "chat":
                yield self._from_chat(row, origin)
            else:
                ids = next(encoded)
                weights = self._weights(row, origin, len(ids), None)
                yield Document(origin, ids, ids, weights, blank=not row[self.source.text_column].strip())

    def _kind(self, row: Row, origin: str) -> str:
        source = self.source
        columns = {"tokens": "input_ids", "text": source.text_column, "chat": source.messages_column}
        for kind, column in columns.items():
            if row.get(column) is not None:
                return kind
        named = [column for column in columns.values() if column in row]
        if named:
            raise self._error(origin, named[0], "a text, messages or tokens, got null")
        raise ValueError(
            f"{origin} of {source.path!r} must have one of {', '.join(map(repr, columns.values()))}, got "
            f"{', '.join(map(repr, row)) or 'nothing'}; set text_column or messages_column to what is there."
        )

    def _text(self, row: Row, origin: str) -> str:
        text = row[self.source.text_column]
        if not isinstance(text, str):
            raise self._error(origin, self.source.text_column, f"a string, got {_shown(text)}")
        return text

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        if not self.append_eos:
            return encoded
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                f"the tokenizer must have an eos_token to append, got none in {type(self.tokenizer).__name__}; "
                "set append_eos to False."
            )
        return [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]

    def _from_tokens(self, row: Row, origin: str) -> Document:
        ids = self._integers(row, "input_ids", origin)
        labels = ids if row.get("labels") is None else self._integers(row, "labels", origin)
        if len(labels) != len(ids):
            raise self._error(origin, "labels", f"one label for each of the {len(ids)} tokens, got {len(labels)}")
        return Document(origin, ids, labels, self._weights(row, origin, len(ids), "tokens"))

    def _from_chat(self, row: Row, origin: str) -> Document:
        check_template(self.tokenizer)  # no fault of the row
        column = self.source.messages_column
        messages = row[column]
        if isinstance(messages, dict) and all(isinstance(values, list) for values in messages.values()):
            # What datasets makes of a ``Sequence`` of messages, as older data sets have it.
            messages = [dict(zip(messages, values)) for values in zip(*messages.values())]
        if not isinstance(messages, list) or not messages:
            raise self._error(origin, column, f"a list of messages, got {_shown(messages)}")
        try:
            ids, spans = encode_chat(self.tokenizer, messages)
        except Exception as err:  # templates raise whatever they like
            raise ValueError(f"column {column!r} must hold a chat, in {origin} of {self.source.path!r}: {err}") from err
        labels = [IGNORED] * len(ids)
        for _, start, stop in spans:
            labels[start:stop] = ids[start:stop]
        weights = self._weights(row, origin, len(messages), "messages")
        return Document(origin, ids, labels, spread(weights, spans, len(ids)))

    def _weights(self, row: Row, origin: str, count: int, unit: str | None) -> list[float] | None:
        column = self.source.weights_column
        if column is None:
            return None
        if column not in row:
            raise self._error(origin, column, f"weights or null, got only the columns {', '.join(map(repr, row))}")
        try:
            return read_weights(row[column], count, unit)
        except ValueError as err:
            raise self._error(origin, column, str(err)) from err

    def _integers(self, row: Row, column: str, origin: str) -> list[int]:
        values = row[column]
        if not isinstance(values, list) or not set(map(type, values)) <= {int}:
            raise self._error(origin, column, f"a list of ints, got {_shown(values)}")
        return values

    def _error(self, origin: str, column: str, wanted: str) -> ValueError:
        return ValueError(
            f"column {column!r} must hold {wanted} (in {origin} of {self.source.path!r}); correct or drop such rows."
        )


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
