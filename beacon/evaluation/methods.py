"""Ways to read a text that is longer than the native context, all behind one interface.

Here are the interface, the model with its beacons and the model without; what else there is, by name, is in
:mod:`beacon.evaluation.baselines`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from beacon.evaluation.greedy import Ids, cut, decode_greedily, neutral_decoding, prompts
from beacon.evaluation.held import beacon_bytes, held_entries, stock_bytes
from beacon.identity import Wrapping, disabled

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
    """A way to read a long text with a wrapped model.

    Attributes:
        name: As reports call it.
        own_process: It reads in another process, whose memory cannot be seen here.
    """

    name: str
    own_process: bool = False

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
        """Decode greedily: the likeliest tokens, whatever the checkpoint's own generation settings say.

        Args:
            model: A wrapped model.
            ids: Token ids ``[T]``.
            count: Tokens to add.

        Returns:
            The ``count`` new token ids; nothing ends them.
        """

    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Answer questions about one context greedily. Where a method can, it reads the context once for all of them.

        Args:
            model: A wrapped model.
            context_ids: Token ids of what is read ``[T]``; may be empty.
            question_ids_list: Token ids of what comes right after it, of each question.
            max_new_tokens: Tokens of an answer at most.
            end_ids: Tokens that end an answer.

        Returns:
            The token ids of each answer, without the one that ended it.

        Raises:
            CannotRun: It cannot read so long a text, and why.
            ValueError: Nothing to read.
        """
        context, questions = prompts(model, context_ids, question_ids_list)
        texts = [torch.cat([context, question]) for question in questions]
        return [cut(self.continue_text(model, text, max_new_tokens), end_ids) for text in texts]

    def held_bytes(self, model: Any, length: int) -> int | None:
        """Bytes of keys and values that are held, in all layers, when so many tokens have been read.

        Args:
            model: A wrapped model.
            length: Tokens of the text.

        Returns:
            The bytes; None where nobody knows.
        """
        return None

    def close(self, model: Any) -> None:  # noqa: B027 (most hold nothing)
        """Let go of what is held for a model beside it (processes, other models); it comes back when it is needed."""


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

    @torch.no_grad()
    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """As :meth:`Method.answers`; the length that a policy goes by is that with the longest question."""
        context, questions = prompts(model, context_ids, question_ids_list)
        longest = len(context) + max(map(len, questions), default=0) + max_new_tokens
        known = {"ratios": self._given(), "expected_length": longest}
        cache = model.compress(context[None], **known) if len(context) else None

        def after(cache: Any) -> Callable[[torch.Tensor], torch.Tensor]:
            def logits(ids: torch.Tensor) -> torch.Tensor:
                nonlocal cache
                columns = len(ids) + (0 if cache is None else cache.get_seq_length())
                seen = ids.new_ones(1, columns)  # all columns: these ids are new, whatever they begin with
                out = model(
                    ids[None], past_key_values=cache, use_cache=True, attention_mask=seen, logits_to_keep=1, **known
                )
                cache = out.past_key_values
                last: torch.Tensor = out.logits[0, -1]
                return last

            return logits

        forks = (None if cache is None else cache.fork() for _ in questions)
        return [decode_greedily(after(own), q, max_new_tokens, end_ids) for own, q in zip(forks, questions)]

    def held_bytes(self, model: Any, length: int) -> int:
        return beacon_bytes(model, length, self._given())

    def _given(self) -> int | list[int] | None:
        return list(self.ratios) if isinstance(self.ratios, tuple) else self.ratios


@dataclass(frozen=True)
class Stock(Method):
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
            return _generate(model, ids, count)

    @torch.no_grad()
    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        context, questions = prompts(model, context_ids, question_ids_list)

        def after(cache: Any) -> Callable[[torch.Tensor], torch.Tensor]:
            own = copy.copy(cache)  # its tensors are shared: none is written in place
            if own is not None:
                own.layers = [copy.copy(layer) for layer in cache.layers]

            def logits(ids: torch.Tensor) -> torch.Tensor:
                nonlocal own
                out = model(ids[None], past_key_values=own, use_cache=True, logits_to_keep=1)
                own = out.past_key_values
                last: torch.Tensor = out.logits[0, -1]
                return last

            return logits

        with as_stock(model):
            cache = None
            if len(context):
                cache = model(context[None], use_cache=True, logits_to_keep=1).past_key_values
            return [decode_greedily(after(cache), question, max_new_tokens, end_ids) for question in questions]

    def held_bytes(self, model: Any, length: int) -> int:
        return stock_bytes(model, length)


def as_stock(model: Any) -> AbstractContextManager[Any]:
    """Where a model is the stock one, wrapped or not."""
    return disabled(model) if isinstance(getattr(model, "beacon_wrapping", None), Wrapping) else nullcontext()


def _ones(ids: torch.Tensor) -> torch.Tensor:
    """A mask over all columns: says that the ids given with a cache are new ones, whatever they begin with."""
    return ids.new_ones(1, len(ids))


def _generate(model: Any, ids: torch.Tensor, count: int, **settings: Any) -> list[int]:
    """Greedy continuation of exactly ``count`` tokens, end tokens as good as any."""
    with neutral_decoding(model):
        out = model.generate(
            ids[None],
            attention_mask=_ones(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            **settings,
        )
    new: list[int] = out[0, -count:].tolist()
    return new
