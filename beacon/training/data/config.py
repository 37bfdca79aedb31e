"""What is trained on: sources of text and how their documents become examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from beacon.config import check_choice, check_whole

FORMATS = ("auto", "text", "jsonl", "parquet", "hub", "python-library")
SAMPLES = ("document", "paragraph", "line")
TOO_LONG = ("truncate", "split", "skip", "error")
BROKEN_LINES = ("skip", "error")
STOPPING = ("all_exhausted", "first_exhausted")
LIBRARY = "python-library"

Config = TypeVar("Config")


def _named(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a string that is not empty, got {value!r}; name one.")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}; pass True or False.")


def _build(cls: type[Config], values: Mapping[str, Any], what: str) -> Config:
    allowed = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in values if key not in allowed)
    if unknown:
        raise ValueError(f"keys of {what} must be among {', '.join(allowed)}, got {', '.join(unknown)}; correct them.")
    return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where text is from.

    A row holds ``text_column``, ``messages_column`` (a chat) or ``input_ids``, tokens already, beside which ``labels``
    may stand. Where a row has several, ``input_ids`` go first, then the text: messages count only where there is no
    text. Other columns are left alone.

    Args:
        path: A file, a glob, a folder (every file below it whose suffix tells the format), an id on the Hugging Face
            hub, or ``python-library``: the sources of the running interpreter's standard library.
        format: ``auto`` (by suffix; what does not exist here is a hub id), ``text``, ``jsonl``, ``parquet``, ``hub``
            or ``python-library``. ``text`` and ``jsonl`` files may be gzipped.
        split: Split of a hub id. ``python-library`` has ``train`` and ``validation``, the files that the shipped model
            has not seen.
        name: Configuration of a hub id.
        weight: Share in the mixture, in any unit.
        text_column: Column of plain text.
        messages_column: Column of chats: a list of ``{role, content}``.
        weights_column: Column of loss weights: a number for the whole row, for ``input_ids`` a list with one per token,
            for a chat a list with one per message. None, or null in a row: 1.
        sample_by: What one document of a text file is: ``document`` (the file), ``paragraph`` (blank lines part them)
            or ``line``.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value is not allowed.
    """

    path: str
    format: str = "auto"
    split: str = "train"
    name: str | None = None
    weight: float = 1.0
    text_column: str = "text"
    messages_column: str = "messages"
    weights_column: str | None = None
    sample_by: str = "document"

    def __post_init__(self) -> None:
        for name in ("path", "split", "text_column", "messages_column"):
            _named(name, getattr(self, name))
        for name in ("name", "weights_column"):
            if getattr(self, name) is not None:
                _named(name, getattr(self, name))
        check_choice("format", self.format, FORMATS)
        check_choice("sample_by", self.sample_by, SAMPLES)
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise TypeError(f"weight must be a number, got {self.weight!r}; pass for example 0.5.")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"weight must be positive and finite, got {self.weight} for {self.path!r}; leave it out instead."
            )

    @classmethod
    def parse(cls, value: object) -> SourceConfig:
        """A source from a path, a mapping of fields, or a source.

        Raises:
            TypeError: It is none of these.
            ValueError: The mapping has unknown keys.
        """
        if isinstance(value, SourceConfig):
            return value
        if isinstance(value, str):
            return cls(path=value)
        if not isinstance(value, Mapping):
            raise TypeError(
                f"a source must be a path or a mapping of fields, got {value!r}; pass for example 'a.jsonl'."
            )
        if "path" not in value:
            raise ValueError(f"a source must have a path, got only {', '.join(map(str, value)) or 'nothing'}; add it.")
        return _build(cls, value, "a source")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Args:
        sources: Where text is from: :class:`SourceConfig`, mappings of its fields, or paths.
        max_length: Tokens of an example at most.
        min_length: Documents of fewer tokens are left out.
        too_long: What becomes of a document of more than ``max_length`` tokens: ``truncate`` keeps its beginning,
            ``split`` makes consecutive pieces of ``max_length`` (and the rest, if it has ``min_length``), ``skip``
            leaves it out, ``error`` raises.
        packing: Put several whole documents into one example of at most ``max_length`` tokens; their ``position_ids``
            start again at 0.
        streaming: Read while training instead of preparing (and caching) everything first.
        shuffle_buffer: Examples among which a streaming data set draws the next one; 0 keeps the order.
        broken_lines: A line of a JSONL file that is no JSON object: ``skip`` it (counted, and a warning names the
            first ones) or ``error``.
        append_eos: End plain text with the tokenizer's end of sequence; chats end as their template says. Special
            tokens that the tokenizer adds by itself, such as a beginning of sequence, are always kept.
        stopping: When a mixture of several sources ends: ``all_exhausted`` (each was read at least once, the smaller
            ones are repeated) or ``first_exhausted``.
        seed: Seed of the mixture and of the shuffling.
        num_proc: Processes that tokenize; None is this one. Not for streaming.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value or a combination of values is not allowed.
    """

    sources: tuple[SourceConfig, ...]
    max_length: int = 8192
    min_length: int = 2
    too_long: str = "truncate"
    packing: bool = False
    streaming: bool = False
    shuffle_buffer: int = 1000
    broken_lines: str = "skip"
    append_eos: bool = True
    stopping: str = "all_exhausted"
    seed: int = 0
    num_proc: int | None = None

    def __post_init__(self) -> None:
        given: object = self.sources
        if isinstance(given, (str, Mapping, SourceConfig)):
            given = (given,)
        if not isinstance(given, Sequence):
            raise TypeError(f"sources must be a list of sources, got {given!r}; pass for example ['a.jsonl'].")
        object.__setattr__(self, "sources", tuple(SourceConfig.parse(source) for source in given))
        if not self.sources:
            raise ValueError("sources must name at least one source, got none; pass for example ['a.jsonl'].")
        for name, least in (("max_length", 2), ("min_length", 1), ("shuffle_buffer", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length must not exceed max_length, got {self.min_length} and {self.max_length}; lower min_length."
            )
        check_choice("too_long", self.too_long, TOO_LONG)
        check_choice("broken_lines", self.broken_lines, BROKEN_LINES)
        check_choice("stopping", self.stopping, STOPPING)
        for name in ("packing", "streaming", "append_eos"):
            _flag(name, getattr(self, name))
        if self.num_proc is not None:
            check_whole("num_proc", self.num_proc, 1)
            if self.streaming:
                raise ValueError(
                    f"num_proc must be None for streaming, got {self.num_proc}; use workers of the data loader instead."
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """Build from a mapping, as a YAML file has it.

        Raises:
            ValueError: A key is unknown, or ``sources`` is missing.
        """
        if "sources" not in values:
            raise ValueError("data must have sources, got none; pass for example sources: [a.jsonl].")
        return _build(cls, values, "data")

    @property
    def weighted(self) -> bool:
        """Whether examples have weights, which they have as soon as one source does."""
        return any(source.weights_column is not None for source in self.sources)
