"""What `beacon eval` measures, in three words: a task has items, and every method reads every item.

A task makes items (a text, what is asked of it), and scores what a method (:class:`beacon.evaluation.Method`) does with
one. Items are independent of methods, so that all of them answer the same questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beacon.evaluation.methods import Method


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Args:
        name: Names it within its task, the same in every run of the same task.
        place: Where it belongs in tables and figures, for example ``{"length": 4096, "depth": 0.5}``; JSON values.
        content: What the task needs to run it (texts, token ids, answers).
        series: Names the items that are run one after the other, in their order and by one process, for what a method
            holds is handed on from each to the next (turns of a dialogue). None: it is run by itself.
        cluster: Names the text that it has in common with other items, which are then not independent of each other
            where means get intervals. None: with none.
    """

    name: str
    place: Mapping[str, Any]
    content: Mapping[str, Any] = field(default_factory=dict)
    series: str | None = None
    cluster: str | None = None


@dataclass(frozen=True)
class Result:
    """What a method made of an item.

    Args:
        scores: By metric.
        output: What it wrote, if anything.
    """

    scores: Mapping[str, float]
    output: str | None = None


class Task(ABC):
    """A way to measure methods.

    Attributes:
        name: As the command names it.
        metrics: Metrics by name, each with whether more of it is better; the first is the main one.
    """

    name: str
    metrics: Mapping[str, bool]

    @abstractmethod
    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        """What is measured, in the order of running.

        Raises:
            FileNotFoundError: Data are missing; says how to get them and where to put them.
            ValueError: The tokenizer, or the text, cannot do what the options ask for.
        """

    @abstractmethod
    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        """Let a method read one item.

        Raises:
            CannotRun: It cannot, and why.
        """

    def run_series(self, method: Method, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Result]:
        """Let a method read items of one series; what it holds of one may serve the next.

        Args:
            method: What reads.
            model: A wrapped model.
            tokenizer: Its tokenizer.
            items: Items of the series in their order. There may be others before the first and between them, which were
                run already.

        Returns:
            A result for each, made when it is asked for.

        Raises:
            CannotRun: It cannot read an item, and why; no further result comes then.
        """
        for item in items:
            yield self.run(method, model, tokenizer, item)
