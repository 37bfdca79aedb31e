"""Ordinary text of any length, tokenized once and as far as it is needed."""

from __future__ import annotations

import math
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
        longest: Tokens of the longest stretch, which those of a number all begin with; None: each length has its own.
    """

    def __init__(self, path: Path | None = None, longest: int | None = None) -> None:
        self.path, self.longest = path, longest
        self._tokenizer: Any = None
        self._documents: Iterator[tuple[str, str]] | None = None  # None: all are read
        self._tokens = torch.zeros(0, dtype=torch.int32)

    def stretch(self, tokenizer: Any, length: int, number: int = 0) -> torch.Tensor:
        """A part of the text.

        Args:
            tokenizer: The model's tokenizer.
            length: Tokens.
            number: Which one. The longest stretches follow each other; where the text ends, further ones lie across
                those before, each beginning at another token.

        Returns:
            Token ids ``[length]``, int64.

        Raises:
            FileNotFoundError: There is no such text.
            ValueError: The text is shorter, or has fewer such stretches.
        """
        start = self._start(tokenizer, max(length, self.longest or 0), number)
        return self._tokens[start : start + length].long()

    def place(self, tokenizer: Any, length: int, number: int) -> int:
        """Which part of the text a stretch of the longest length begins in: those of other parts have less in common.

        Args:
            tokenizer: The model's tokenizer.
            length: Tokens of a part, as many as the longest stretch has.
            number: Which stretch.

        Raises:
            FileNotFoundError: There is no such text.
            ValueError: The text is shorter, or has fewer such stretches.
        """
        return self._start(tokenizer, length, number) // length

    def _start(self, tokenizer: Any, length: int, number: int) -> int:
        self.check(tokenizer, length, number + 1)
        self._read(tokenizer, (number + 1) * length)
        start = number * length
        return start if start + length <= len(self._tokens) else _across(len(self._tokens), length, number)

    def check(self, tokenizer: Any, length: int, count: int = 1) -> None:
        """Make sure that there are ``count`` different stretches of ``length`` tokens.

        Raises:
            FileNotFoundError: There is no such text.
            ValueError: The text is shorter; says how long it is.
        """
        self._read(tokenizer, length + count - 1)
        longest = max(len(self._tokens) - count + 1, 0)
        if longest < length:
            where = "the standard library" if self.path is None else str(self.path)
            each = f" with {count} stretches, each of which begins elsewhere" if count > 1 else ""
            raise ValueError(
                f"lengths must not exceed the text in {where}, got {length}; the longest possible is {longest}{each}: "
                "ask for less or give more text with data=."
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


def _across(total: int, length: int, number: int) -> int:
    """Where a stretch begins when those that follow each other are used up: no two at one place, none near the last.

    Args:
        total: Tokens of the text.
        length: Tokens of a stretch, at least 2.
        number: Which stretch, ``total // length .. total - length``.
    """
    whole = total // length
    free = total - length + 1 - whole  # places that are no multiples of the length
    step = max(1, round(free * (math.sqrt(5) - 1) / 2))  # golden: the places left are split evenly
    while math.gcd(step, free) != 1:
        step += 1
    place = (free - 1 - (number - whole) * step) % free  # the first at the very end
    return place + 1 + place // (length - 1)
