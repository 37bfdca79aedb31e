"""The stock model, which reads everything at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from beacon.evaluation.methods.greedy import Ids, decode_greedily, generate_greedily, prompts
from beacon.evaluation.methods.held import stock_bytes
from beacon.evaluation.methods.interface import Method, Outcome, Progress
from beacon.identity import Wrapping, disabled


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
            return generate_greedily(model, ids, count)

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
