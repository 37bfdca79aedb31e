"""This library's contenders: condensed reading, in whole passes or window by window, and decoding after it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.attempts import Unavailable
from benchmarks.inference.readers import GENERATE, LEAN, Contender, Decoder, Reading, generating


class Beacon(Contender):
    """A wrapped model."""

    ways = (GENERATE,)

    def read(self, ids: torch.Tensor, ratio: int) -> Reading:
        return self._read(ids, ratio, None)

    def _read(self, ids: torch.Tensor, ratio: int, cache: Any) -> Reading:
        out = self.model(ids, past_key_values=cache, ratios=ratio, logits_to_keep=1, use_cache=True)
        return Reading.of(out.past_key_values, ids, out.logits[:, -1])

    def cache_bytes(self, cache: Any) -> int:
        return sum(row["bytes"] for row in cache.stats())

    def repeated(self, reading: Reading, rows: int) -> Reading:
        return Reading(reading.cache.select([0] * rows), reading.ids.repeat(rows, 1), reading.logits)

    def decoder(self, way: str, reading: Reading) -> Decoder:
        return generating(self.model, reading, only_new=True)


class BeaconStatic(Beacon):
    """The same with a cache of fixed size, which CUDA graphs can replay.

    Args:
        model: A wrapped model.
        room: Tokens that the cache has room for after the text.
    """

    ways = (LEAN, GENERATE)

    def __init__(self, model: Any, room: int) -> None:
        super().__init__(model)
        self.room = room

    def read(self, ids: torch.Tensor, ratio: int) -> Reading:
        for name in ("static_cache", "decode"):
            if not hasattr(self.model, name):
                raise Unavailable(f"a wrapped model has no {name}() in this version")
        return self._read(ids, ratio, self.model.static_cache(max_tokens=ids.shape[1] + self.room))

    def decoder(self, way: str, reading: Reading) -> Decoder:
        if way == GENERATE:
            return super().decoder(way, reading)

        def decode(count: int) -> torch.Tensor:
            new: torch.Tensor = self.model.decode(
                reading.ids[:, -1:], past_key_values=reading.cache, max_new_tokens=count, eos_token_id=[]
            )
            reading.ids = torch.cat([reading.ids, new], dim=1)
            return new

        return decode
