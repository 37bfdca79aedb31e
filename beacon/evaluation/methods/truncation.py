"""Rivals that read no more than the native context: the stock model gets what is left of a text that was cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.greedy import Ids, prompts
from beacon.evaluation.methods.held import attention_bytes, native_context
from beacon.evaluation.methods.interface import Method, Outcome, Progress
from beacon.evaluation.methods.stock import Stock


class _Truncating(Method):
    """The stock model reads what a cut leaves of texts that exceed its native context less what is to be written."""

    @abstractmethod
    def cut(self, model: Any, ids: torch.Tensor, limit: int, keep: int) -> torch.Tensor:
        """What is left of a text of more than ``limit`` tokens: at most so many, the last ``keep`` among them."""

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        return Stock().continue_text(model, self._fitting(model, ids, count), count)

    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """As :meth:`Method.answers`; a context is read once for the questions that fit after the whole of it.

        Raises:
            CannotRun: The answers alone fill the native context.
        """
        context, questions = prompts(model, context_ids, question_ids_list)
        longest = max(map(len, questions), default=0)
        if len(context) + longest <= native_context(model) - max_new_tokens:
            return Stock().answers(model, context, questions, max_new_tokens, end_ids)
        texts = [self._fitting(model, torch.cat([context, question]), max_new_tokens) for question in questions]
        return [Stock().answers(model, text[:0], [text], max_new_tokens, end_ids)[0] for text in texts]

    def held_bytes(self, model: Any, length: int) -> int:
        return attention_bytes(model, min(length, native_context(model)))

    def _read_fitting(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None) -> Outcome:
        text = self._fitting(model, ids, 0, keep)
        return Outcome(Stock().read(model, text, keep, progress).logits, len(text))

    def _fitting(self, model: Any, ids: torch.Tensor, count: int, keep: int = 1) -> torch.Tensor:
        native = native_context(model)
        if native - count < 2:
            raise CannotRun(f"an answer of {count} tokens leaves no room to read in a native context of {native}")
        return ids if len(ids) <= native - count else self.cut(model, ids, native - count, keep)


@dataclass(frozen=True)
class Truncated(_Truncating):
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

    def cut(self, model: Any, ids: torch.Tensor, limit: int, keep: int) -> torch.Tensor:
        return ids[-limit:]


@dataclass(frozen=True)
class TruncateLeft(_Truncating):
    """The stock model reads the last tokens, as many as its native context holds with what it writes.

    What opens any text stays before them: models are lost without their beginning of sequence.

    Args:
        tokenizer: The model's: a text begins with what it puts before any text, or its template before a chat. None:
            only a beginning of sequence is known, by the model's configuration.
    """

    tokenizer: Any = field(default=None, compare=False, repr=False)

    name = "truncate-left"

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        """As :meth:`Method.read`.

        Raises:
            CannotRun: Targets that the native context does not hold.
        """
        native = native_context(model)
        if keep > native:
            raise CannotRun(f"{keep} targets are more than a native context of {native} tokens")
        return self._read_fitting(model, ids, keep, progress)

    def cut(self, model: Any, ids: torch.Tensor, limit: int, keep: int) -> torch.Tensor:
        kept = min(self._opening(model, ids), limit // 2, limit - keep)
        return torch.cat([ids[:kept], ids[len(ids) - (limit - kept) :]])

    def _opening(self, model: Any, ids: torch.Tensor) -> int:
        """How many tokens at the beginning of a text open any text."""
        from beacon.evaluation.tasks.prompts import openings  # where methods are imported too

        known = [] if self.tokenizer is None else openings(self.tokenizer)
        known += [(bos,) for bos in [getattr(model.config, "bos_token_id", None)] if bos is not None]
        pairs = (zip(tokens, ids[: len(tokens)].tolist()) for tokens in known)
        return max((sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], some)) for some in pairs), default=0)


@dataclass(frozen=True)
class TruncateMiddle(_Truncating):
    """The stock model reads the beginning and the end of a text, half of what fits of each.

    Source: LongBench, arXiv 2308.14508 (how its baselines are set up).
    """

    name = "truncate-middle"

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        """As :meth:`Method.read`.

        Raises:
            CannotRun: Targets that the second half does not hold.
        """
        native = native_context(model)
        if keep > native // 2 and len(ids) > native:
            raise CannotRun(f"{keep} targets are more than half of a native context of {native} tokens")
        return self._read_fitting(model, ids, keep, progress)

    def cut(self, model: Any, ids: torch.Tensor, limit: int, keep: int) -> torch.Tensor:
        half = limit // 2
        return torch.cat([ids[:half], ids[-half:]])
