"""Answers to the harness's requests, kept as soon as they are given, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
            about: The task, the name of its document, and which of the requests about that it is.
        """

    def share(self, contexts: Sequence[str]) -> list[bool]:
        """Which of a task's contexts this process answers; all, where it is alone."""

    def expect(self, count: int) -> None:
        """So many answers will be kept now."""


class AnsweredElsewhere(Exception):
    """Other processes answer the rest; what this one had to is kept."""


class KeepingLM:
    """A model of the harness that asks nothing of which the answer is kept.

    Continuations of one context are asked together or not at all: by the longest of them a model may choose how it
    reads. Drawn answers are not kept: they would be the same each time.

    Args:
        lm: The model.
        answers: Where answers are, and go to.
    """

    def __init__(self, lm: Any, answers: AnswerStore) -> None:
        self.lm, self.answers = lm, answers
        self._asked: dict[str, tuple[str, dict[str, Any]]] = {}  # by request: the name of the answer, and what it is of
        lm.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        if name == "lm" or name.startswith("__"):  # copies and pickles are looked at before they are filled
            raise AttributeError(name)
        found = getattr(self.lm, name)
        return partial(self._answered, name, found) if name in KINDS else found

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """What the model calls whenever it has answered a request (the harness's ``CacheHook``)."""
        self._keep(_digest(kind, *arguments), answer)

    def _keep(self, request: str, answer: Any) -> None:
        if request in self._asked:
            name, about = self._asked.pop(request)
            self.answers.keep(name, answer, about)

    def _answered(
        self, kind: str, ask: Callable[..., list[Any]], requests: Sequence[Any], **settings: Any
    ) -> list[Any]:
        """What the harness is given in place of the model's own answers."""
        drawn = [is_drawn(kind, request.args) for request in requests]
        names = request_names(kind, [request.args for request in requests])
        given: dict[str, Any] = {name: self.answers.find(name) for name in names}  # None of those that are drawn
        again = {request.args[0] for request, name in zip(requests, names, strict=True) if given[name] is None}
        mine = self.answers.share([request.args[0] for request in requests])
        left = {
            name: request
            for name, request, own, free in zip(names, requests, mine, drawn, strict=True)
            if own and not free and request.args[0] in again
        }
        if left:
            given |= self._answer(kind, ask, left, settings)
        others = sum(not own and given[name] is None for name, own in zip(names, mine, strict=True))
        if others or (any(drawn) and not all(mine)):
            raise AnsweredElsewhere(f"{others} of {len(requests)} requests")
        free_ones = [request for request, free in zip(requests, drawn, strict=True) if free]
        fresh = iter(ask(free_ones, **settings) if free_ones else [])
        return [next(fresh) if free else _as_given(kind, given[name]) for name, free in zip(names, drawn, strict=True)]

    def _answer(
        self, kind: str, ask: Callable[..., list[Any]], left: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Ask what is left; each answer is kept as it comes."""
        self.answers.expect(len(left))
        keys = {name: _digest(kind, *request.args) for name, request in left.items()}
        self._asked = {
            keys[name]: (name, {"task": request.task_name, "document": document_name(request.doc), "part": request.idx})
            for name, request in left.items()
        }
        found = dict(zip(left, ask(list(left.values()), **settings), strict=True))
        for name, answer in found.items():  # of which the model has not told by itself
            self._keep(keys[name], answer)
        return found


def document_name(document: Mapping[str, Any]) -> str:
    """A fingerprint of a document, the same in every run; after that of its ``context``, if it has one, and a dot."""
    own, context = _digest(document)[:12], document.get("context")
    return f"{_digest(context)[:12]}.{own}" if isinstance(context, str) else own


def request_names(kind: str, arguments: Sequence[Sequence[Any]]) -> list[str]:
    """Sixteen hexadecimal digits for each request: the same for the same kind, context, and settings or continuations.

    Args:
        kind: One of ``KINDS``.
        arguments: Of all requests of a task; those with one context are asked together.
    """
    together: dict[Any, set[str]] = defaultdict(set)
    if kind == "loglikelihood":
        for context, continuation in arguments:
            together[context].add(continuation)
    return [_digest(kind, *some, *sorted(together.get(some[0], ()))) for some in arguments]


def is_drawn(kind: str, arguments: Sequence[Any]) -> bool:
    """Whether an answer is drawn by chance, by settings that the harness completes: a temperature says so, too."""
    if kind != "generate_until":
        return False
    from lm_eval.models.utils import normalize_gen_kwargs

    return bool(normalize_gen_kwargs(dict(arguments[1])).get("do_sample"))


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_given(kind: str, answer: Any) -> Any:
    """An answer as the model gives it: JSON has no tuples."""
    return tuple(answer) if kind == "loglikelihood" else answer
