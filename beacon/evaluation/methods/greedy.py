"""Greedy answers: what is read, the likeliest tokens after it, and where they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig

from beacon.identity import home_of

Ids: TypeAlias = "torch.Tensor | Sequence[int]"  # token ids [T]


def prompts(model: Any, context: Ids, questions: Sequence[Ids]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A context and questions as int64 tensors ``[T]`` where the model reads them, no question empty.

    Raises:
        ValueError: Ids of another shape, or nothing to read: an empty question after an empty context.
    """
    device = home_of(model.get_input_embeddings())
    text, *asked = (torch.as_tensor(ids, dtype=torch.int64).to(device) for ids in (context, *questions))
    wrong = next((ids for ids in (text, *asked) if ids.dim() != 1), None)
    if wrong is not None:
        raise ValueError(f"token ids must be [T], one text, got {list(wrong.shape)}; pass a row, as in ids[0].")
    if not all(map(len, asked)):
        if not len(text):
            raise ValueError("context or question must have a token, got none in both; ask with some text.")
        return text[:-1], [torch.cat([text[-1:], question]) for question in asked]
    return text, asked


def decode_greedily(
    logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, count: int, ends: Sequence[int]
) -> list[int]:
    """The likeliest tokens after a text.

    Args:
        logits: Reads the next tokens ``[n]`` and gives what it foresees after the last, ``[vocab]``.
        ids: The first tokens to read.
        count: Tokens at most.
        ends: Tokens that end it.

    Returns:
        Token ids, without the one that ended it.
    """
    answer: list[int] = []
    while len(answer) < count:
        token = int(logits(ids).argmax())
        if token in ends:
            break
        answer.append(token)
        ids = ids.new_tensor([token])
    return answer


@contextmanager
def neutral_decoding(model: Any) -> Iterator[None]:
    """Where ``generate`` obeys its call alone.

    A checkpoint's own settings (a repetition penalty, a temperature, end tokens) reach only those methods that decode
    by ``generate``, and whatever a call leaves open is taken from them; so they are set aside, and put back.
    """
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def eos_ids(*sources: Any) -> set[int]:
    """End tokens that tokenizers and configurations name."""
    ids: set[int] = set()
    for source in sources:
        given = getattr(source, "eos_token_id", None)
        ids.update([given] if isinstance(given, int) else given or [])
    return ids


def cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens before the first of ``ends``."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]


def all_columns(ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """A mask over all columns ``[1, n]``: says that ids given with a cache are new, whatever they begin with."""
    return ids.new_ones(1, len(ids) + (0 if cache is None else cache.get_seq_length()))


def generate_greedily(model: Any, ids: torch.Tensor, count: int, **settings: Any) -> list[int]:
    """Greedy continuation of exactly ``count`` tokens, end tokens as good as any."""
    with neutral_decoding(model):
        out = model.generate(
            ids[None],
            attention_mask=all_columns(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            **settings,
        )
    new: list[int] = out[0, -count:].tolist()
    return new
