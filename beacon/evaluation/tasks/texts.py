"""Documents as tokens, all of one length."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from beacon.evaluation.text import encode

ROOM = 16  # tokens beyond a cut, so that it changes none before
COMPARED = 4  # documents that are tokenized to say which is the longest


def take_texts(
    tokenizer: Any,
    documents: Callable[[], Iterable[tuple[str, str]]],
    length: int,
    limit: int,
    *,
    joined: bool,
    name: str,
) -> list[torch.Tensor]:
    """The first texts of one length.

    Args:
        tokenizer: The model's tokenizer.
        documents: Gives names and texts.
        length: Tokens of each.
        limit: How many at most.
        joined: Read documents one after the other and cut them into texts. Else each long enough gives its beginning.
        name: What the documents are, for messages.

    Returns:
        Token ids of each text, int32 ``[length]``; at least one text.

    Raises:
        ValueError: There is none of this length; says what length would be.
    """
    if joined:
        texts = joined_documents(tokenizer, documents(), length)
    else:
        texts = long_documents(tokenizer, documents(), length)
    found = [ids.int() for ids in islice(texts, limit)]
    if not found:
        best = _longest(tokenizer, documents(), joined)
        what = "all documents together" if joined else "the longest document"
        raise ValueError(
            f"lengths must not exceed the text of {name}, got {length}; the longest possible is {best} ({what})."
        )
    return found


def joined_documents(tokenizer: Any, documents: Iterable[tuple[str, str]], length: int) -> Iterator[torch.Tensor]:
    """Token ids ``[length]`` of consecutive parts of all documents, with the tokenizer's eos token after each."""
    end = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=torch.int64)
    rest = torch.zeros(0, dtype=torch.int64)
    for _, text in documents:
        *whole, rest = torch.cat([rest, encode(tokenizer, text), end]).split(length)
        yield from whole
        if len(rest) == length:
            yield rest
            rest = rest[:0]


def long_documents(tokenizer: Any, documents: Iterable[tuple[str, str]], length: int) -> Iterator[torch.Tensor]:
    """Token ids ``[length]`` of the beginning of every document that has as many."""
    for _, text in documents:
        if len(text.encode()) < length:  # a token has a byte at least
            continue
        for reach in (8, 32, len(text)):  # characters per token: whole books are not tokenized for their beginning
            cut = text[: reach * (length + ROOM)]
            ids = encode(tokenizer, cut)
            if len(ids) >= length + ROOM or len(cut) == len(text):
                break
        if len(ids) >= length:
            yield ids[:length]


def _longest(tokenizer: Any, documents: Iterable[tuple[str, str]], joined: bool) -> int:
    if joined:
        end = tokenizer.eos_token_id is not None
        return sum(len(encode(tokenizer, text)) + end for _, text in documents)
    longest = heapq.nlargest(COMPARED, (text for _, text in documents), key=len)
    return max((len(encode(tokenizer, text)) for text in longest), default=0)
