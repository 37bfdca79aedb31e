"""The rival that was trained for it: another model, fully fine-tuned on long texts, in the wrapped model's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.dialogue import Dialogue
from beacon.evaluation.methods.greedy import Ids, eos_ids
from beacon.evaluation.methods.interface import Method, Outcome, Progress
from beacon.evaluation.methods.stock import Stock
from beacon.identity import home_of


@dataclass(eq=False)
class FineTuned(Method):
    """A model of its own reads the whole text at once; it is loaded when it is first asked, beside the wrapped one.

    It is given the token ids of the wrapped model's tokenizer, so it must know them.

    Args:
        path: Its folder or hub id.
    """

    path: str | Path
    _loaded: Any = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        """With the last part of its path."""
        return f"fine-tuned {Path(self.path).name}"

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        """As :meth:`Method.read`.

        Raises:
            CannotRun: It cannot be loaded.
        """
        return Stock().read(self._own(model), ids, keep, progress)

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        """As :meth:`Method.continue_text`.

        Raises:
            CannotRun: It cannot be loaded.
        """
        return Stock().continue_text(self._own(model), ids, count)

    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """As :meth:`Method.answers`; where anything ends an answer, its own end tokens do too.

        Raises:
            CannotRun: It cannot be loaded.
        """
        own = self._own(model)
        return Stock().answers(own, context_ids, question_ids_list, max_new_tokens, _ends(own, end_ids))

    def dialogue(self, model: Any, expected_length: int | None = None) -> Dialogue:
        """As :meth:`Method.dialogue`; its own end tokens end an answer as in :meth:`answers`.

        Raises:
            CannotRun: It cannot be loaded.
        """
        own = self._own(model)
        return _Ending(Stock().dialogue(own), own)

    def held_bytes(self, model: Any, length: int) -> int:
        return Stock().held_bytes(self._own(model), length)

    def load(self, model: Any) -> None:
        self._own(model)

    def close(self, model: Any) -> None:
        self._loaded = None

    def _own(self, model: Any) -> Any:
        """The other model, in the wrapped one's dtype and place."""
        if self._loaded is None:
            base = model.get_input_embeddings()
            try:
                own = AutoModelForCausalLM.from_pretrained(self.path, dtype=base.weight.dtype, trust_remote_code=False)
            except (OSError, ValueError) as err:
                raise CannotRun(f"{self.path} cannot be loaded: {' '.join(str(err).split())[:300]}") from err
            if own.get_input_embeddings().num_embeddings < model.config.vocab_size:
                raise CannotRun(
                    f"{self.path} must know the {model.config.vocab_size} tokens of the wrapped model, got "
                    f"{own.get_input_embeddings().num_embeddings}"
                )
            self._loaded = own.to(home_of(base)).eval()
        return self._loaded


@dataclass(frozen=True)
class _Ending(Dialogue):
    """A dialogue whose answers end by the end tokens of a model, too."""

    inner: Dialogue
    model: Any

    def read(self, ids: Ids) -> None:
        self.inner.read(ids)

    def answer(self, question_ids: Ids, max_new_tokens: int, end_ids: Sequence[int] = ()) -> list[int]:
        return self.inner.answer(question_ids, max_new_tokens, _ends(self.model, end_ids))


def _ends(model: Any, end_ids: Sequence[int]) -> Sequence[int]:
    """Tokens that end an answer, with the model's own where anything is to end it."""
    return sorted({*end_ids, *eos_ids(model.generation_config, model.config)}) if end_ids else ()
