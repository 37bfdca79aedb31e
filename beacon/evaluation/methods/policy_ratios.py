"""Condensed reading by a policy that the model was not configured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.cache import BeaconCache
from beacon.config import POLICIES, check_choice
from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.condensed import Beacon
from beacon.evaluation.methods.dialogue import Dialogue
from beacon.evaluation.methods.greedy import Ids, prompts
from beacon.evaluation.methods.held import beacon_bytes
from beacon.evaluation.methods.interface import Method, Outcome, Progress
from beacon.plan import RowState, Span, schedule
from beacon.reading import ratio_chooser
from beacon.retrieval import retrieval_ratios


@dataclass(frozen=True)
class BeaconPolicy(Method):
    """Condensed reading with the ratios that a policy gives the windows of a text.

    Args:
        policy: One of the configuration's ratio policies. ``retrieval`` keeps detail where a question points, so it
            reads a context anew for every question.

    Raises:
        ValueError: Unknown policy.
    """

    policy: str

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, POLICIES)

    @property
    def name(self) -> str:  # type: ignore[override]
        """With the policy."""
        return f"beacon, {self.policy}"

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        """As :meth:`Method.read`.

        Raises:
            CannotRun: ``retrieval``, which needs a question.
        """
        return Beacon(self._ratios(model, len(ids))).read(model, ids, keep, progress)

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        """As :meth:`Method.continue_text`.

        Raises:
            CannotRun: ``retrieval``, which needs a question.
        """
        return Beacon(self._ratios(model, len(ids) + count)).continue_text(model, ids, count)

    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """As :meth:`Method.answers`; the length that a policy goes by is that with the longest question.

        Raises:
            CannotRun: ``retrieval`` without the package that scores windows.
        """
        context, questions = prompts(model, context_ids, question_ids_list)
        if self.policy != "retrieval":
            longest = len(context) + max(map(len, questions), default=0) + max_new_tokens
            method = Beacon(self._ratios(model, longest))
            return method.answers(model, context, questions, max_new_tokens, end_ids)
        answers = []
        for question in questions:
            length = len(context) + len(question) + max_new_tokens
            try:
                ratios = retrieval_ratios(context, question, model.beacon_config, expected_length=length)
            except ImportError as err:
                raise CannotRun(str(err)) from err
            method = Beacon(tuple(ratios))
            answers += method.answers(model, context, [question], max_new_tokens, end_ids)
        return answers

    def dialogue(self, model: Any, expected_length: int | None = None) -> Dialogue:
        """As :meth:`Method.dialogue`, with the ratios of a text of ``expected_length`` tokens.

        Longer ones are refused with a ValueError. All is read anew without an expected length, and by ``retrieval``,
        whose ratios are those of a question.
        """
        if self.policy == "retrieval" or expected_length is None:
            return super().dialogue(model)
        return Beacon(self._ratios(model, expected_length)).dialogue(model, expected_length)

    def held_bytes(self, model: Any, length: int) -> int:
        """As :meth:`Method.held_bytes`; of ``retrieval`` where a question points at as many windows as it may."""
        if self.policy == "retrieval":
            ratios = retrieval_ratios(range(length), [0], model.beacon_config, scorer=lambda them, _: [1.0] * len(them))
            return beacon_bytes(model, length, ratios)
        return beacon_bytes(model, length, list(self._ratios(model, length)))

    def _ratios(self, model: Any, length: int) -> tuple[int, ...]:
        """The ratio of every window that a text of ``length`` tokens begins."""
        if self.policy == "retrieval":
            raise CannotRun("retrieval keeps detail where a question points, and this asks none")
        wrapping = model.beacon_wrapping
        config = wrapping.config.replace(ratio_policy=self.policy)
        cache = BeaconCache(config, wrapping.owner, 1)
        choose = ratio_chooser(cache, 0, length, None, wrapping.native_context)
        ratios: dict[int, int] = {}

        def note(state: RowState) -> int:
            return ratios.setdefault(len(state.ratios), choose(state))

        schedule(config, cache.states[0], length, note, row=0, span=Span())
        return tuple(ratios.values())
