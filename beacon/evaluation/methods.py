"""Ways to read a text that is longer than the native context, all behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from beacon.evaluation.sliding_window import SlidingWindowReader, relevant
from beacon.identity import disabled

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What reading a text gave.

    Args:
        logits: Logits of the last tokens, ``[keep, vocab]``.
        entries: Keys and values of one layer that are held when the text has been read.
    """

    logits: torch.Tensor
    entries: int


class Method(ABC):
    """A way to read a long text with a wrapped model."""

    name: str

    @abstractmethod
    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        """Read a text.

        Args:
            model: A wrapped model.
            ids: Token ids ``[T]``.
            keep: How many of the last tokens give logits, 1 .. T.
            progress: Called with (tokens read, tokens in all) where reading takes several passes.

        Returns:
            Logits and entries held.
        """

    @abstractmethod
    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        """Decode greedily.

        Args:
            model: A wrapped model.
            ids: Token ids ``[T]``.
            count: Tokens to add.

        Returns:
            The ``count`` new token ids.
        """


@dataclass(frozen=True)
class Beacon(Method):
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
        out = model(ids[None, head:], past_key_values=cache, use_cache=True, attention_mask=_ones(ids), **known)
        return Outcome(out.logits[0], held_entries(out.past_key_values))

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        known = {"ratios": self._given(), "expected_length": len(ids) + count}
        cache = model.compress(ids[None, :-1], **known) if len(ids) > 1 else None
        settings = {} if cache is None else {"past_key_values": cache.fork()}
        return _generate(model, ids, count, **settings, **known)

    def _given(self) -> int | list[int] | None:
        return list(self.ratios) if isinstance(self.ratios, tuple) else self.ratios


@dataclass(frozen=True)
class Stock(Method):
    """The stock model reads the whole text at once: worthless beyond its native context, and quadratic."""

    name = "stock"

    @torch.no_grad()
    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        with disabled(model):
            logits = model(ids[None], use_cache=False, logits_to_keep=keep).logits[0]
        return Outcome(logits, len(ids))

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        with disabled(model):
            return _generate(model, ids, count)


@dataclass(frozen=True)
class Truncated(Method):
    """The stock model reads the last tokens, as many as its native context holds.

    Args:
        kept: Read more targets than fit in blocks of the native context, each with this many tokens before its first
            target; None refuses them.
    """

    kept: int | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """With what stays in view."""
        return "truncated" if self.kept is None else f"truncated, {self.kept} kept"

    @torch.no_grad()
    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        native = native_context(model)
        if keep <= native:
            return Stock().read(model, ids[-native:], keep, progress)
        if self.kept is None:
            raise ValueError(
                f"targets must fit the native context where the text is truncated, got {keep} and {native}; take "
                "fewer, or read them in blocks: Truncated(kept=0)."
            )
        if not 0 <= self.kept < native:
            raise ValueError(f"kept must be in 0 .. {native - 1}, got {self.kept}; keep less than the native context.")
        step, logits = native - self.kept, []
        for first in range(len(ids) - keep, len(ids), step):
            block = ids[max(first - self.kept, 0) : first + step]
            logits.append(Stock().read(model, block, min(step, len(ids) - first)).logits)
        return Outcome(torch.cat(logits), native)

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        return Stock().continue_text(model, ids[-(native_context(model) - count) :], count)


@dataclass(frozen=True)
class SlidingWindow(Method):
    """The stock model sees the first tokens and the last ones (StreamingLLM).

    Args:
        window: Raw tokens in view, the reading one included.
        sinks: First tokens in view.
    """

    window: int
    sinks: int = 4

    @property
    def name(self) -> str:  # type: ignore[override]
        """With its size."""
        return f"sliding window {self.window}"

    @torch.no_grad()
    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        reader = SlidingWindowReader(model, self.window, self.sinks)
        text = relevant(ids, keep, self.window, self.sinks, model.config.num_hidden_layers)
        hidden = reader.read(text, progress)
        return Outcome(model.beacon_head(hidden[-keep:]), min(len(ids), self.sinks + self.window))

    @torch.no_grad()
    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        reader = SlidingWindowReader(model, self.window, self.sinks)
        # One decoded token reaches as far back as its layers; every further one begins a token later.
        hidden = reader.read(relevant(ids, 1, self.window, self.sinks, model.config.num_hidden_layers))
        answer: list[int] = []
        while True:
            answer.append(int(model.beacon_head(hidden[-1:]).argmax()))
            if len(answer) == count:
                return answer
            hidden = reader.read(ids.new_tensor(answer[-1:]))


def native_context(model: Any) -> int:
    """Longest text that the base of a wrapped model serves, in tokens."""
    native: int = model.beacon_wrapping.native_context
    return native


def held_entries(cache: Any) -> int:
    """Entries that the first row of a :class:`beacon.BeaconCache` holds in every layer."""
    stats = cache.stats()[0]
    return int(stats["sinks"] + stats["beacons"] + stats["raw"])


def full_cache_bytes(config: Any, tokens: int, bytes_per_value: int) -> int:
    """Bytes of keys and values of ``tokens`` entries in all layers of a model with this Hugging Face config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * width * tokens * bytes_per_value)


def _ones(ids: torch.Tensor) -> torch.Tensor:
    """A mask over all columns: says that the ids given with a cache are new ones, whatever they begin with."""
    return ids.new_ones(1, len(ids))


def _generate(model: Any, ids: torch.Tensor, count: int, **settings: Any) -> list[int]:
    """Greedy continuation of exactly ``count`` tokens."""
    out = model.generate(
        ids[None],
        attention_mask=_ones(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        **settings,
    )
    new: list[int] = out[0, -count:].tolist()
    return new
