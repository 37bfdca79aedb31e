"""Ordinary text of any length, tokenized once and as far as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from beacon.evaluation.tasks.documents import local_texts
from beacon.evaluation.text import encode, library_documents


class Haystack:
    """Documents one after the other, a line feed between them.

    Args:
        path: A file or folder of text; None for the sources of the standard library, those first that the shipped model
            has not seen.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._tokenizer: Any = None
        self._documents: Iterator[tuple[str, str]] | None = None  # None: all are read
        self._tokens = torch.zeros(0, dtype=torch.int32)

    def stretch(self, tokenizer: Any, length: int, number: int = 0) -> torch.Tensor:
        """A part of the text: the ``number``-th of this length.

        Args:
            tokenizer: The model's tokenizer.
            length: Tokens.
            number: Which one; stretches follow each other, and begin again where the text ends.

        Returns:
            Token ids ``[length]``, int64.

        Raises:
            FileNotFoundError: There is no such text.
            ValueError: The text is shorter.
        """
        self.check(tokenizer, length)
        self._read(tokenizer, (number + 1) * length)
        start = number * length
        if start + length > len(self._tokens):
            start %= len(self._tokens) - length + 1
        return self._tokens[start : start + length].long()

    def check(self, tokenizer: Any, length: int) -> None:
        """Make sure that there is text of ``length`` tokens.

        Raises:
            FileNotFoundError: There is no such text.
            ValueError: The text is shorter; says how long it is.
        """
        self._read(tokenizer, length)
        if len(self._tokens) < length:
            where = "the standard library" if self.path is None else str(self.path)
            raise ValueError(
                f"lengths must not exceed the text in {where}, got {length}; the longest possible is "
                f"{len(self._tokens)}: ask for less or give more text with data=."
            )

    def _read(self, tokenizer: Any, length: int) -> None:
        if tokenizer is not self._tokenizer:
            documents = iter(library_documents()) if self.path is None else local_texts(self.path)
            self._tokenizer, self._documents = tokenizer, documents
            self._tokens = self._tokens[:0]
        parts, count = [self._tokens], len(self._tokens)
        while count < length and self._documents is not None:
            _, text = next(self._documents, ("", None))
            if text is None:
                self._documents = None
                break
            parts.append(encode(tokenizer, text.rstrip("\n") + "\n").int())
            count += len(parts[-1])
        if len(parts) > 1:
            self._tokens = torch.cat(parts)
