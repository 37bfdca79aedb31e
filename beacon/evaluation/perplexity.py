"""Perplexity of the same target tokens after more and more context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.evaluation.methods import Method, Progress

MAX_LOGITS = 2**24  # logits held in float32 at once


@dataclass(frozen=True)
class Perplexity:
    """How well the last tokens of texts are foreseen.

    Args:
        method: Name of the method.
        context: Length of the text read, targets included, in tokens.
        targets: Tokens counted, over all texts.
        loss: Mean negative log-likelihood of a target, in nats.
        entries: Keys and values held in every layer at the end (mean over the texts).
    """

    method: str
    context: int
    targets: int
    loss: float
    entries: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def negative_log_likelihoods(
    model: Any, ids: torch.Tensor, targets: int, method: Method, progress: Progress | None = None
) -> torch.Tensor:
    """Loss of each of the last tokens of a text.

    Args:
        model: A wrapped model.
        ids: Token ids ``[T]``.
        targets: How many of the last tokens are counted, 1 .. T - 1.
        method: How the text is read.
        progress: As in :meth:`Method.read`.

    Returns:
        Negative log-likelihoods in nats, float32 ``[targets]`` on the CPU, in the order of the text.

    Raises:
        ValueError: ``targets`` out of range.
    """
    return _losses(model, ids, targets, method, progress)[0]


def measure_perplexity(
    model: Any,
    texts: Sequence[torch.Tensor],
    context: int,
    targets: int,
    method: Method,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of the last ``targets`` tokens of texts, each read from ``context`` tokens before its end.

    The targets are the same for every ``context``: only the beginning of what is read moves.

    Args:
        model: A wrapped model.
        texts: Token ids, each ``[T]`` with T >= ``context``.
        context: Tokens read, targets included.
        targets: Tokens counted in each text.
        method: How they are read.
        progress: As in :meth:`Method.read`.

    Returns:
        The result over all texts.

    Raises:
        ValueError: A text is shorter than ``context``, no text, or ``targets`` out of range.
    """
    if not texts or min(map(len, texts)) < context:
        raise ValueError(
            f"every text must have at least {context} tokens, got {[len(text) for text in texts]}; give a longer text."
        )
    losses, entries = zip(*(_losses(model, text[-context:], targets, method, progress) for text in texts), strict=True)
    mean = torch.cat(losses).double().mean().item()
    return Perplexity(method.name, context, targets * len(texts), mean, sum(entries) / len(entries))


def _losses(
    model: Any, ids: torch.Tensor, targets: int, method: Method, progress: Progress | None
) -> tuple[torch.Tensor, int]:
    if not 1 <= targets < len(ids):
        raise ValueError(
            f"targets must lie between 1 and {len(ids) - 1} (the text has {len(ids)} tokens), got {targets}; "
            "ask for fewer."
        )
    # The last token foresees nothing that is counted, so it is not read.
    outcome = method.read(model, ids[:-1], targets, progress)
    wanted = ids[-targets:].to(outcome.logits.device)
    step = max(1, MAX_LOGITS // outcome.logits.shape[1])  # a float32 copy of all logits is not needed
    losses = [
        torch.nn.functional.cross_entropy(logits.float(), some, reduction="none")
        for logits, some in zip(outcome.logits.split(step), wanted.split(step), strict=True)
    ]
    return torch.cat(losses).cpu(), outcome.entries
