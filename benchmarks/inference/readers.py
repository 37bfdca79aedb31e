"""What all contenders have in common: they read a text, and some of them decode after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GENERATE, LEAN = "generate", "lean"
Decoder = Callable[[int], torch.Tensor]


@dataclass
class Reading:
    """What has been read, and all tokens so far.

    Args:
        cache: The contender's.
        ids: ``[rows, tokens]``; the last of them is not in the cache yet.
        logits: Of the last token of the text, ``[rows, vocab]``.
    """

    cache: Any
    ids: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, cache: Any, text: torch.Tensor, logits: torch.Tensor) -> Reading:
        """A text and its next token, the likeliest."""
        return cls(cache, torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1), logits)


class Contender:
    """A model ready to read.

    Args:
        model: What reads.
    """

    ways: tuple[str, ...] = ()  # of decoding

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, ids: torch.Tensor, ratio: int) -> Reading:
        """Read a text ``[1, tokens]`` up to the logits of its last token."""
        raise NotImplementedError

    def cache_bytes(self, cache: Any) -> int:
        """Bytes of what is kept, summed over rows."""
        raise NotImplementedError

    def repeated(self, reading: Reading, rows: int) -> Reading:
        """The same text in each of ``rows`` rows; of one row it may be the reading itself."""
        raise NotImplementedError

    def decoder(self, way: str, reading: Reading) -> Decoder:
        """A function that decodes so many more tokens ``[rows, n]`` greedily and leaves them in the reading.

        Raises:
            Unavailable: There is no such way here.
        """
        raise NotImplementedError


def generating(model: Any, reading: Reading, *, only_new: bool) -> Decoder:
    """Decode through the model's ``generate``.

    Args:
        model: What generates.
        reading: Where from.
        only_new: Pass the last token alone; else all tokens, as a stock model wants it, of which it takes the new.
    """

    def decode(count: int) -> torch.Tensor:
        ids = reading.ids[:, -1:] if only_new else reading.ids
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=reading.cache,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=model.config.eos_token_id,
        )
        new: torch.Tensor = out[:, ids.shape[1] :]
        reading.ids = torch.cat([reading.ids, new], dim=1)
        return new

    return decode
