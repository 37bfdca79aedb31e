"""Dialogues: a text, questions and answers that are read one after the other, each once where a method can hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from beacon.evaluation.methods.greedy import Ids, decode_greedily, prompts


class Dialogue(ABC):
    """What has been read so far, for questions that come after all of it. :meth:`Method.dialogue` begins one."""

    @abstractmethod
    def read(self, ids: Ids) -> None:
        """Read more: a text, a question that was asked, the answer to it.

        Args:
            ids: Token ids ``[n]`` of what comes right after all that has been read; may be empty.

        Raises:
            CannotRun: The method cannot read so long a text, and why.
        """

    @abstractmethod
    def answer(self, question_ids: Ids, max_new_tokens: int, end_ids: Sequence[int] = ()) -> list[int]:
        """Answer a question greedily. Neither it nor the answer counts as read: the dialogue stays as it is.

        Args:
            question_ids: Token ids ``[n]`` of what comes right after all that has been read.
            max_new_tokens: Tokens of the answer at most.
            end_ids: Tokens that end it.

        Returns:
            The token ids of the answer, without the one that ended it.

        Raises:
            CannotRun: The method cannot read so long a text, and why.
            ValueError: Nothing to read: an empty question before anything was read.
        """


class Reread(Dialogue):
    """Holds token ids alone: the whole is read anew for every question, as a text of its own.

    Args:
        answers: :meth:`Method.answers` of a model: takes a context, questions, and the length and ends of an answer.
    """

    def __init__(self, answers: Callable[[Ids, Sequence[Ids], int, Sequence[int]], list[list[int]]]) -> None:
        self._answers = answers
        self._ids = torch.zeros(0, dtype=torch.int64)

    def read(self, ids: Ids) -> None:
        self._ids = torch.cat([self._ids, torch.as_tensor(ids, dtype=torch.int64).cpu()])

    def answer(self, question_ids: Ids, max_new_tokens: int, end_ids: Sequence[int] = ()) -> list[int]:
        return self._answers(self._ids, [question_ids], max_new_tokens, end_ids)[0]


class Growing(Dialogue):
    """Holds what a model made of the text, and goes on from there.

    The last token waits until something comes after it, for a question may be empty.

    Args:
        model: What reads.
        least: Tokens that its first reading must bring.
    """

    def __init__(self, model: Any, least: int = 1) -> None:
        self._model, self._least = model, max(least, 1)
        self._waiting = torch.zeros(0, dtype=torch.int64)

    def read(self, ids: Ids) -> None:
        self._take(ids, 1)

    def begin_with(self, context_ids: Ids) -> None:
        """Read a context ``[T]`` to its end: no question about it is empty."""
        self._take(context_ids, 0)

    @torch.no_grad()
    def _take(self, ids: Ids, waits: int) -> None:
        more, _ = prompts(self._model, ids, [])
        waiting = torch.cat([self._waiting.to(more.device), more])
        ready = len(waiting) - waits
        if ready >= self._least:
            self._grow(waiting[:ready])
            waiting, self._least = waiting[ready:], 1
        self._waiting = waiting

    @torch.no_grad()
    def answer(self, question_ids: Ids, max_new_tokens: int, end_ids: Sequence[int] = ()) -> list[int]:
        text, (question,) = prompts(self._model, self._waiting, [question_ids])
        ids = torch.cat([text, question])
        return decode_greedily(self._fork(ids), ids, max_new_tokens, end_ids)

    @abstractmethod
    def _grow(self, ids: torch.Tensor) -> None:
        """Read the next tokens ``[n]``, at least one; what is held stays as it was if that fails."""

    @abstractmethod
    def _fork(self, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """What reads on after all that is held, first ``ids``, for :func:`decode_greedily`; what is held stays."""
