"""The rival without training: a stock model whose rotary embedding is rescaled reads the whole text at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.dialogue import Dialogue
from beacon.evaluation.methods.greedy import Ids, prompts
from beacon.evaluation.methods.held import native_context, stock_bytes
from beacon.evaluation.methods.interface import Method, Outcome, Progress
from beacon.evaluation.methods.stock import Stock

KINDS = {"linear": "position interpolation", "dynamic": "dynamic NTK", "yarn": "YaRN"}  # Hugging Face's rope types


class NotRescalable(CannotRun, NotImplementedError):
    """The model's rotary embedding is a scaled one already."""


@dataclass(frozen=True)
class RopeScaled(Method):
    """Full attention with the rotary embedding rescaled by one of Hugging Face's rope types.

    Source: position interpolation, arXiv 2306.15595, section 3.2; YaRN, arXiv 2309.00071, section 3, dynamic NTK in
    its section 3.3.

    Args:
        kind: ``linear`` divides positions by the factor, ``yarn`` those of slow frequencies only, and sharpens
            attention; ``dynamic`` raises the base of the frequencies with the length read so far.
        factor: At least 1. None: what the text needs, its length (with what is decoded after it) over the native
            context; for ``dynamic`` 1, for it follows the length by itself.

    Raises:
        ValueError: Unknown kind, or factor below 1.
    """

    kind: Literal["linear", "dynamic", "yarn"]
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}; choose one of them.")
        if self.factor is not None and not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be at least 1 and finite, got {self.factor}; leave it out or raise it.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """As the literature has it, with the factor where it is given."""
        name = KINDS[self.kind]
        return name if self.factor is None else f"{name}, factor {self.factor:g}"

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        """As :meth:`Method.read`.

        Raises:
            NotRescalable: The model's rope type is not ``default``.
        """
        return Stock().read(self._rescaled(model, len(ids)), ids, keep, progress)

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        """As :meth:`Method.continue_text`.

        Raises:
            NotRescalable: The model's rope type is not ``default``.
        """
        return Stock().continue_text(self._rescaled(model, len(ids) + count), ids, count)

    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """As :meth:`Method.answers`; questions share what is read of a context where they have the same factor.

        ``dynamic`` shares nothing: its frequencies are those of the whole text.

        Raises:
            NotRescalable: The model's rope type is not ``default``.
        """
        context, questions = prompts(model, context_ids, question_ids_list)
        lengths = [len(context) + len(question) + max_new_tokens for question in questions]
        if self.kind == "dynamic":
            texts = [torch.cat([context, question]) for question in questions]
            twins = [self._rescaled(model, length) for length in lengths]
            return [Stock().answers(t, x[:0], [x], max_new_tokens, end_ids)[0] for t, x in zip(twins, texts)]
        alike: dict[float, list[int]] = {}
        for number, length in enumerate(lengths):
            alike.setdefault(self._factor(length, native_context(model)), []).append(number)
        answers: dict[int, list[int]] = {}
        for numbers in alike.values():
            twin = self._rescaled(model, lengths[numbers[0]])
            asked = [questions[number] for number in numbers]
            answers |= zip(numbers, Stock().answers(twin, context, asked, max_new_tokens, end_ids))
        return [answers[number] for number in range(len(questions))]

    def dialogue(self, model: Any, expected_length: int | None = None) -> Dialogue:
        """As :meth:`Method.dialogue`; read anew unless the factor is given, for else it changes with the length.

        Raises:
            NotRescalable: The model's rope type is not ``default``.
        """
        if self.kind == "dynamic" or self.factor is None:
            return super().dialogue(model)
        return Stock().dialogue(self._rescaled(model, native_context(model)))

    def held_bytes(self, model: Any, length: int) -> int:
        return stock_bytes(model, length)

    def _rescaled(self, model: Any, length: int) -> Any:
        """The model with another rotary embedding; the caller's object stays as it is."""
        body, native = model.model, native_context(model)
        rope = model.config.rope_parameters
        if rope["rope_type"] != "default":
            raise NotRescalable(
                f"the rope type must be 'default' to be rescaled, got {rope['rope_type']!r}; read with Stock(), "
                "Truncated() or SlidingWindow(...)."
            )
        config = copy.deepcopy(model.config)
        config.rope_parameters = {**rope, "rope_type": self.kind, "factor": self._factor(length, native)}
        config.max_position_embeddings = native  # from where on "dynamic" adapts
        if self.kind == "yarn":
            config.rope_parameters["original_max_position_embeddings"] = native
            if hasattr(config, "original_max_position_embeddings"):  # Phi-3; it would win
                config.original_max_position_embeddings = native
        rotary = type(body.rotary_emb)(config).to(body.rotary_emb.inv_freq.device)
        return _twin(model, model=_twin(body, rotary_emb=rotary))

    def _factor(self, length: int, native: int) -> float:
        if self.factor is not None:
            return float(self.factor)
        return 1.0 if self.kind == "dynamic" else max(1.0, length / native)


def _twin(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A second object with the same parameters and children but for those given."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **children}
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, bound to the first object
        twin.__dict__.pop(name, None)
    return twin
