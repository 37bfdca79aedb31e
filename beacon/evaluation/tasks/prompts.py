"""How a text and questions about it become tokens, and answers text."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.evaluation.harness.answers import end_ids
from beacon.evaluation.methods import Dialogue, Method
from beacon.evaluation.text import encode, split_question

MARKS = ("beacon-text-1", "beacon-text-2", "beacon-text-3")  # stand for text where a chat template is asked


@dataclass(frozen=True)
class Frame:
    """What stands around text, questions and answers.

    Args:
        before: Token ids before the text.
        after: What follows a question, up to its answer.
        between: What stands between an answer and the next question.
        chat: Whether they are those of a chat template.
    """

    before: tuple[int, ...]
    after: str = ""
    between: str = ""
    chat: bool = False


def frame(tokenizer: Any, chat_template: bool) -> Frame:
    """The frame of a tokenizer's chat template, or of plain text (just the tokens it puts before any text).

    Args:
        tokenizer: The model's tokenizer.
        chat_template: Whether text and question are what a user says.

    Raises:
        ValueError: The tokenizer has no chat template, or one that changes what is said.
    """
    if not chat_template:
        return Frame(opening(tokenizer))
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"chat_template=True needs a tokenizer with a chat template, got none in {type(tokenizer).__name__}; leave "
            "the option out or take an instruction-tuned model."
        )
    talk = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), MARKS, strict=True)]
    asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    if asked.count(MARKS[0]) != 1 or any(whole.count(mark) != 1 for mark in MARKS):
        raise ValueError("the chat template must render what is said once and unchanged, got another one; ask plainly.")
    before, after = asked.split(MARKS[0])
    between = whole[whole.index(MARKS[1]) + len(MARKS[1]) : whole.index(MARKS[2])]
    return Frame(tuple(encode(tokenizer, before).tolist()), after, between, True)


def opening(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that the tokenizer puts before any text, such as a beginning of sequence."""
    whole, alone = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return tuple(whole[:start])
    return ()


def openings(tokenizer: Any) -> list[tuple[int, ...]]:
    """Token ids that stand before any text, and those before what a user says first where there is a chat template."""
    from jinja2.exceptions import TemplateError

    found = [opening(tokenizer)]
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(TemplateError, ValueError):  # templates with rules of their own
            found.append(frame(tokenizer, True).before)
    return found


def plain_question(tokenizer: Any, question: str, answer: str) -> torch.Tensor:
    """Token ids of a question that its answer continues; see :func:`beacon.evaluation.text.split_question`."""
    return torch.tensor(split_question(tokenizer, question, answer)[0], dtype=torch.int64)


def ask(
    method: Method,
    model: Any,
    tokenizer: Any,
    text: torch.Tensor,
    questions: Sequence[torch.Tensor],
    new_tokens: int | Sequence[int],
) -> list[str]:
    """Let a method answer questions about one text, greedily.

    Args:
        method: How the text is read, once for all questions where the method can.
        model: A wrapped model.
        tokenizer: Its tokenizer.
        text: Token ids ``[T]``.
        questions: Token ids ``[q]`` of each question.
        new_tokens: Tokens of an answer at most, the same for all or one for each.

    Returns:
        What it wrote to each.
    """
    ends = _ends(model, tokenizer)
    device = model.device
    rooms = [new_tokens] * len(questions) if isinstance(new_tokens, int) else list(new_tokens)
    answers = method.answers(model, text.to(device), [q.to(device) for q in questions], max(rooms), end_ids=ends)
    if len(answers) != len(questions):
        raise RuntimeError(f"{method.name} must answer each of {len(questions)} questions, got {len(answers)} answers.")
    return [
        tokenizer.decode(list(answer)[:room], skip_special_tokens=True)
        for answer, room in zip(answers, rooms, strict=True)
    ]


def ask_on(dialogue: Dialogue, model: Any, tokenizer: Any, question: torch.Tensor, new_tokens: int) -> str:
    """Let a method answer a question after all that a dialogue has read, greedily; the dialogue stays as it is.

    Args:
        dialogue: What has been read.
        model: A wrapped model.
        tokenizer: Its tokenizer.
        question: Token ids ``[q]``.
        new_tokens: Tokens of the answer at most.

    Returns:
        What it wrote.
    """
    answer = dialogue.answer(question.to(model.device), new_tokens, _ends(model, tokenizer))
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text


def _ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end any answer."""
    return tuple(end_ids(model, tokenizer))
