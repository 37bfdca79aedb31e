"""Condensed reading: the wrapped model with its beacons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from beacon.evaluation.methods.dialogue import Dialogue, Growing
from beacon.evaluation.methods.greedy import all_columns, generate_greedily
from beacon.evaluation.methods.held import beacon_bytes, held_entries
from beacon.evaluation.methods.interface import LiveMethod, Outcome, Progress


@dataclass(frozen=True)
class Beacon(LiveMethod):
    """Condensed reading.

    Args:
        ratios: As in the model's forward; None for the configured policy.
    """

    ratios: int | tuple[int, ...] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """With its ratio where that is one number."""
        return f"beacon, ratio {self.ratios}" if isinstance(self.ratios, int) else "beacon"

    @torch.no_grad()
    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        cache, head = None, len(ids) - keep
        known = {"ratios": self._given(), "expected_length": len(ids)}
        if head:
            cache = model.compress(ids[None, :head], progress=progress, **known)
        out = model(ids[None, head:], past_key_values=cache, use_cache=True, attention_mask=all_columns(ids), **known)
        return Outcome(out.logits[0], held_entries(out.past_key_values))

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        known = {"ratios": self._given(), "expected_length": len(ids) + count}
        cache = model.compress(ids[None, :-1], **known) if len(ids) > 1 else None
        settings = {} if cache is None else {"past_key_values": cache.fork()}
        return generate_greedily(model, ids, count, **settings, **known)

    def dialogue(self, model: Any, expected_length: int | None = None) -> Dialogue:
        """As :meth:`Method.dialogue`; ratios that are not given are those of a text of ``expected_length`` tokens.

        Without it the policy goes by what has been read whenever a window ends, as in the model's forward.
        """
        return super().dialogue(model, expected_length)

    def _begin(self, model: Any, expected_length: int | None) -> Growing:
        return _Condensed(model, {"ratios": self._given(), "expected_length": expected_length})

    def held_bytes(self, model: Any, length: int) -> int:
        return beacon_bytes(model, length, self._given())

    def _given(self) -> int | list[int] | None:
        return list(self.ratios) if isinstance(self.ratios, tuple) else self.ratios


class _Condensed(Growing):
    """A :class:`beacon.BeaconCache` that grows.

    Args:
        model: A wrapped model.
        known: ``ratios`` and ``expected_length``, as in the model's forward.
    """

    def __init__(self, model: Any, known: Mapping[str, Any]) -> None:
        super().__init__(model)
        self._known = known
        self._cache: Any = None

    def _grow(self, ids: torch.Tensor) -> None:
        # Left as it is by a call that fails.
        self._cache = self._model.compress(ids[None], all_columns(ids, self._cache), self._cache, **self._known)

    def _fork(self, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return _after(self._model, self._cache, self._known)


def _after(model: Any, cache: Any, known: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What reads on after a cache (None: from the beginning) and foresees, for :func:`decode_greedily`."""
    own = None if cache is None else cache.fork()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        nonlocal own
        seen = all_columns(ids, own)
        out = model(ids[None], past_key_values=own, use_cache=True, attention_mask=seen, logits_to_keep=1, **known)
        own = out.past_key_values
        last: torch.Tensor = out.logits[0, -1]
        return last

    return logits
