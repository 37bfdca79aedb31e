"""Answers to the harness's requests, kept as soon as they are given, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class AnswerStore(Protocol):
    """Where answers are kept."""

    def find(self, request: str) -> Any | None:
        """The answer to a request; None where it was not answered yet."""

    def keep(self, request: str, answer: Any, about: Mapping[str, Any]) -> None:
        """Keep an answer at once.

        Args:
            request: Names the request.
            answer: What came of it; JSON values, where a tuple counts as a list.
            about: The task and the number of its document, as far as they are known.
        """

    def is_mine(self, context: str) -> bool:
        """Whether this process answers requests about a context, or another one does."""

    def expect(self, count: int) -> None:
        """So many answers will be kept now."""


class AnsweredElsewhere(Exception):
    """Other processes answer the rest; what this one had to is kept."""


class KeepingLM:
    """A model of the harness that asks nothing of which the answer is kept.

    Drawn answers are not kept: they would be the same each time.

    Args:
        lm: The model.
        answers: Where answers are, and go to.
    """

    def __init__(self, lm: Any, answers: AnswerStore) -> None:
        self.lm, self.answers = lm, answers
        self._asked: dict[str, dict[str, Any]] = {}
        lm.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.lm, name)
        return self._keeping(name, found) if name in KINDS else found

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """What the model calls whenever it has answered a request (the harness's ``CacheHook``)."""
        request = request_name(kind, arguments)
        if request in self._asked:
            self.answers.keep(request, answer, self._asked.pop(request))

    def _keeping(self, kind: str, ask: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def answered(requests: Sequence[Any], **settings: Any) -> list[Any]:
            names = [request_name(kind, request.args) for request in requests]
            known = {name: self.answers.find(name) for name in names}
            drawn = [at for at, request in enumerate(requests) if _is_drawn(kind, request.args)]
            left = {name: at for at, name in enumerate(names) if known[name] is None and at not in set(drawn)}
            mine = [at for at in left.values() if self.answers.is_mine(requests[at].args[0])]
            self._asked = {names[at]: {"task": requests[at].task_name, "document": requests[at].doc_id} for at in mine}
            if mine:
                self.answers.expect(len(mine))
                known |= self._answer(kind, ask, [requests[at] for at in mine], [names[at] for at in mine], settings)
            if len(mine) < len(left):
                raise AnsweredElsewhere(f"{len(left) - len(mine)} of {len(requests)} requests")
            fresh = dict(zip(drawn, ask([requests[at] for at in drawn], **settings), strict=True)) if drawn else {}
            return [fresh[at] if at in fresh else _as_given(kind, known[name]) for at, name in enumerate(names)]

        return answered

    def _answer(
        self,
        kind: str,
        ask: Callable[..., list[Any]],
        requests: Sequence[Any],
        names: Sequence[str],
        settings: Mapping[str, Any],
    ) -> dict[str, Any]:
        found = dict(zip(names, ask(list(requests), **settings), strict=True))
        for name, about in self._asked.items():  # of which the model has not told by itself
            self.answers.keep(name, found[name], about)
        self._asked = {}
        return found


def request_name(kind: str, arguments: Sequence[Any]) -> str:
    """Sixteen hexadecimal digits for a request: the same for the same kind, context, and continuation or settings."""
    text = json.dumps([kind, *arguments], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_drawn(kind: str, arguments: Sequence[Any]) -> bool:
    return kind == "generate_until" and bool(arguments[1].get("do_sample", False))


def _as_given(kind: str, answer: Any) -> Any:
    """An answer as the model gives it: JSON has no tuples."""
    return tuple(answer) if kind == "loglikelihood" else answer
