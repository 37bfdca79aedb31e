"""Recall of a passkey: a line with digits somewhere in a long text, asked for again at its end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.evaluation.methods import Method
from beacon.evaluation.text import nearest_line_end, split_question

NUM_DIGITS = 5
QUESTION = "# the pass key is "


def passkey_line(digits: str) -> str:
    """The line that hides a passkey, with its line feed; up to the digits it is also the question."""
    return f"{QUESTION}{digits}\n"


@dataclass(frozen=True)
class PasskeyPrompt:
    """A text that holds a passkey and ends in the question for it.

    Args:
        ids: Token ids ``[length]``.
        digits: The passkey.
        answer: Its token ids.
        depth: Where it was asked to be, 0 the start of the text and 1 its end.
        start: Token index at which the passkey line begins (with its line feed).
    """

    ids: torch.Tensor
    digits: str
    answer: tuple[int, ...]
    depth: float
    start: int


@dataclass(frozen=True)
class PasskeyScore:
    """What a method answered to one prompt.

    Args:
        method: Name of the method.
        length: Tokens of the prompt.
        depth: Where the passkey was, 0 the start and 1 the end.
        digits: The passkey.
        answer: The text that was decoded.
    """

    method: str
    length: int
    depth: float
    digits: str
    answer: str

    @property
    def digits_right(self) -> int:
        """Digits that are right at their place."""
        return sum(a == b for a, b in zip(self.digits, self.answer, strict=False))

    @property
    def exact(self) -> bool:
        """Whether all are."""
        return self.digits == self.answer[: len(self.digits)]


@dataclass(frozen=True)
class Recall:
    """Scores taken together.

    Args:
        per_digit: Share of digits that are right.
        exact: Share of prompts whose digits are all right.
        prompts: Number of prompts.
    """

    per_digit: float
    exact: float
    prompts: int


def build_passkey(
    tokenizer: Any, filler: Sequence[int] | torch.Tensor, length: int, depth: float, seed: int, digits: int = NUM_DIGITS
) -> PasskeyPrompt:
    """Hide a passkey in a text.

    Args:
        tokenizer: The model's tokenizer.
        filler: Token ids of ordinary text; its first tokens are used.
        length: Tokens of the prompt, passkey line and question included.
        depth: Where the passkey line goes, 0 the start and 1 the end; it is put at the nearest line end.
        seed: Draws the digits.
        digits: How many.

    Returns:
        The prompt.

    Raises:
        ValueError: ``filler`` too short, ``length`` too small, or ``depth`` outside 0 .. 1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie between 0 and 1, got {depth}; 0 is the start of the text.")
    key = "".join(random.Random(f"passkey-{seed}").choices("0123456789", k=digits))
    question, answer = split_question(tokenizer, "\n" + QUESTION, key)
    line = question + answer
    body = length - len(line) - len(question)
    ids = [int(token) for token in filler[: max(body, 0)]]
    if body < 1 or len(ids) < body:
        raise ValueError(
            f"length must leave room for text and not exceed it, got length={length} with {len(line) + len(question)} "
            f"tokens of passkey and {len(filler)} of filler; change length or give more text."
        )
    start = nearest_line_end(tokenizer, ids, round(depth * body))
    text = [*ids[:start], *line, *ids[start:], *question]
    return PasskeyPrompt(torch.tensor(text), key, tuple(answer), depth, start)


def ask_passkey(model: Any, tokenizer: Any, prompt: PasskeyPrompt, method: Method) -> PasskeyScore:
    """Let a method answer a prompt, greedily.

    Args:
        model: A wrapped model.
        tokenizer: Its tokenizer.
        prompt: The prompt.
        method: How it is read.

    Returns:
        The decoded answer beside the passkey.
    """
    new = method.continue_text(model, prompt.ids.to(model.device), len(prompt.answer))
    answer = tokenizer.decode(new).strip()
    return PasskeyScore(method.name, len(prompt.ids), prompt.depth, prompt.digits, answer)


def recall(scores: Sequence[PasskeyScore]) -> Recall:
    """Take scores together.

    Raises:
        ValueError: There are none.
    """
    if not scores:
        raise ValueError("recall needs at least one score, got none; ask a prompt first.")
    right = sum(score.digits_right for score in scores)
    total = sum(len(score.digits) for score in scores)
    return Recall(right / total, sum(score.exact for score in scores) / len(scores), len(scores))
