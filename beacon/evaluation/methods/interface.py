"""What every method can do: read a text and give logits, go on with it, answer questions about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from beacon.evaluation.methods.dialogue import Dialogue, Growing, Reread
from beacon.evaluation.methods.greedy import Ids, cut, prompts

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

    def dialogue(self, model: Any, expected_length: int | None = None) -> Dialogue:
        """Begin a dialogue: text, questions and answers, one after the other. Where a method can, it reads each once.

        An answer is that of :meth:`answers` to a question after all that has been read, but for ratio policies, which
        go by ``expected_length`` here.

        Args:
            model: A wrapped model.
            expected_length: Tokens that all of it will have, answers included. Only what reads by the length of a text
                (ratio policies) looks at it, and then goes by it from the first token on.

        Returns:
            The dialogue, in which nothing has been read.

        Raises:
            CannotRun: It cannot read with this model, and why.
        """
        return Reread(partial(self.answers, model))

    def held_bytes(self, model: Any, length: int) -> int | None:
        """Bytes of keys and values that are held, in all layers, when so many tokens have been read.

        Args:
            model: A wrapped model.
            length: Tokens of the text.

        Returns:
            The bytes; None where nobody knows.
        """
        return None

    def load(self, model: Any) -> None:  # noqa: B027 (most have nothing to load)
        """Get ready what is loaded when it is first needed (processes, other models), before time is measured.

        Args:
            model: A wrapped model.

        Raises:
            CannotRun: It cannot be had.
        """

    def close(self, model: Any) -> None:  # noqa: B027 (most hold nothing)
        """Let go of what is held for a model beside it (processes, other models); it comes back when it is needed."""


class LiveMethod(Method):
    """A method that goes on from what it has read, so that a context with many questions is read once."""

    @abstractmethod
    def _begin(self, model: Any, expected_length: int | None) -> Growing:
        """A dialogue that reads each token once."""

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
        dialogue = self._begin(model, longest)
        dialogue.begin_with(context)
        return [dialogue.answer(question, max_new_tokens, end_ids) for question in questions]

    def dialogue(self, model: Any, expected_length: int | None = None) -> Dialogue:
        return self._begin(model, expected_length)
