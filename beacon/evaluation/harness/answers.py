"""Answers decoded after contexts that have been read, up to a stop string or any of the end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from beacon.evaluation.harness.reading import Reading
from beacon.evaluation.methods.greedy import cut, eos_ids, neutral_decoding

ANSWER = "beacon-answer"  # stands for an answer where the chat template is asked what follows one


class StopAtText(StoppingCriteria):
    """Ends a row as soon as what was decoded holds one of the strings.

    Args:
        tokenizer: The model's tokenizer.
        stops: The strings, none empty.
        begin: Columns before the first decoded token.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], begin: int) -> None:
        self.tokenizer, self.stops, self.begin = tokenizer, list(stops), begin
        self.reach = max(len(stop.encode()) for stop in self.stops) + 2  # a token has a byte at least

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, bool ``[batch]``."""
        tails = input_ids[:, max(self.begin, input_ids.shape[1] - self.reach) :].tolist()
        ended = [any(stop in self.tokenizer.decode(tail) for stop in self.stops) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: those of tokenizer and model, and what the chat template puts after one.

    A chat model's turn often ends with a token that its tokenizer does not call eos.

    Args:
        model: The model.
        tokenizer: Its tokenizer.

    Returns:
        Token ids, sorted.
    """
    ids = eos_ids(tokenizer, getattr(model, "generation_config", None), model.config)
    turn = end_of_turn(tokenizer)
    return sorted(ids if turn is None else {*ids, turn})


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an answer, if there is one."""
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except (TemplateError, ValueError):  # templates with rules of their own, or several without a default
        return None
    after = text.rpartition(ANSWER)[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    added = tokenizer.added_tokens_decoder
    return int(ids[0]) if ids and ids[0] in added and added[ids[0]].special else None


def special_id(tokenizer: Any, text: str) -> int | None:
    """The special token that a stop string names, if it is one: it would be gone from the decoded text."""
    return next(
        (i for i, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) == text), None
    )


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    reading: Reading,
    rows: Sequence[int],
    *,
    max_new_tokens: int,
    stops: Sequence[str],
    ends: Sequence[int],
    **settings: Any,
) -> list[list[int]]:
    """Decode after contexts.

    Args:
        model: A wrapped model.
        tokenizer: Its tokenizer.
        reading: The contexts.
        rows: Number of the context that each answer belongs to.
        max_new_tokens: Tokens of an answer at most.
        stops: Strings that end an answer.
        ends: Token ids that end an answer.
        **settings: Further settings of ``generate``; what is not set here is neutral, whatever the checkpoint says.

    Returns:
        The tokens of each answer, without the token that ended it (a stop string is still there).
    """
    ids = torch.tensor([[reading.last(row)] for row in rows], device=model.device)
    known = reading.mask[list(rows)]
    seen = torch.cat([known, torch.ones(len(rows), 1, dtype=torch.bool)], dim=1).long().to(model.device)
    pad = tokenizer.pad_token_id
    if reading.cache is not None:
        settings["past_key_values"] = reading.cache.select(rows)
    if any(stops):
        stop = StopAtText(tokenizer, [text for text in stops if text], ids.shape[1])
        settings["stopping_criteria"] = StoppingCriteriaList([stop])
    with neutral_decoding(model):
        out = model.generate(
            ids,
            attention_mask=seen,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=pad if pad is not None and pad < model.config.vocab_size else 0,
            **reading.settings,
            **settings,
        )
    return [cut(tokens, ends) for tokens in out[:, ids.shape[1] :].tolist()]
