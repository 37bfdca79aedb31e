"""The stock model, which reads everything at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from beacon.evaluation.methods.dialogue import Dialogue, Growing
from beacon.evaluation.methods.greedy import Ids, generate_greedily
from beacon.evaluation.methods.held import stock_bytes
from beacon.evaluation.methods.interface import LiveMethod, Method, Outcome, Progress
from beacon.identity import Wrapping, disabled


@dataclass(frozen=True)
class Stock(LiveMethod):
    """The stock model reads the whole text at once: worthless beyond its native context, and quadratic.

    The model need not be wrapped.
    """

    name = "stock"

    @torch.no_grad()
    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        with as_stock(model):
            logits = model(ids[None], use_cache=False, logits_to_keep=keep).logits[0]
        return Outcome(logits, len(ids))

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        with as_stock(model):
            return generate_greedily(model, ids, count)

    def dialogue(self, model: Any, expected_length: int | None = None) -> Dialogue:
        """As :meth:`Method.dialogue`; read anew where rotary frequencies change with the length read so far."""
        return self._begin(model, expected_length) if _same_frequencies(model.config) else Method.dialogue(self, model)

    def _begin(self, model: Any, expected_length: int | None) -> Growing:
        return _Cached(model)

    def held_bytes(self, model: Any, length: int) -> int:
        return stock_bytes(model, length)


def as_stock(model: Any) -> AbstractContextManager[Any]:
    """Where a model is the stock one, wrapped or not."""
    return disabled(model) if isinstance(getattr(model, "beacon_wrapping", None), Wrapping) else nullcontext()


class _Cached(Growing):
    """A Hugging Face cache that grows."""

    _cache: Any = None

    def answer(self, question_ids: Ids, max_new_tokens: int, end_ids: Sequence[int] = ()) -> list[int]:
        with as_stock(self._model):
            return super().answer(question_ids, max_new_tokens, end_ids)

    def _grow(self, ids: torch.Tensor) -> None:
        with as_stock(self._model):
            cache = _copy(self._cache)
            out = self._model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values

    def _fork(self, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return _after(self._model, self._cache)


def _after(model: Any, cache: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What reads on after a cache (None: from the beginning) and foresees, for :func:`decode_greedily`."""
    own = _copy(cache)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        nonlocal own
        out = model(ids[None], past_key_values=own, use_cache=True, logits_to_keep=1)
        own = out.past_key_values
        last: torch.Tensor = out.logits[0, -1]
        return last

    return logits


def _copy(cache: Any) -> Any:
    """A cache that grows by itself; its tensors are shared: none is written in place."""
    own = copy.copy(cache)
    if own is not None:
        own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def _same_frequencies(config: Any) -> bool:
    """Whether rotary frequencies are the same however much has been read; else keys in a cache would be stale."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]  # some have one for a kind of layers
    return not {part.get("rope_type") for part in parts} & {"dynamic", "longrope"}
