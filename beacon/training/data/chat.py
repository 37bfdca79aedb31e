"""Chats as tokens, of which only the assistant's count in the loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ASSISTANT = "assistant"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]


def check_template(tokenizer: Any) -> None:
    """Make sure that a tokenizer renders chats.

    Raises:
        ValueError: It has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer must have a chat template for rows of messages, got none in {type(tokenizer).__name__}; "
            "set tokenizer.chat_template, take the tokenizer of an instruction-tuned model, or train on text instead."
        )


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Tokens of a chat, and where the assistant speaks.

    A template with ``{% generation %}`` says itself which tokens are the assistant's. For others the beginnings of the
    chat are rendered too: up to an assistant's message with the prompt that asks for it, and with the message. What the
    second has beyond the first is what the model would have to write.

    Args:
        tokenizer: The model's tokenizer, with a chat template.
        messages: ``{role, content}``; keys whose value is None are left out.

    Returns:
        Token ids, and ``(message, start, stop)`` for each message of the assistant.

    Raises:
        ValueError: No chat template, messages that are none, or a template that renders a chat's beginning differently
            when more follows.
    """
    check_template(tokenizer)
    chat = [_checked(message) for message in messages]
    turns = [index for index, message in enumerate(chat) if message["role"] == ASSISTANT]
    if getattr(tokenizer, "is_fast", False) and GENERATION.search(tokenizer.get_chat_template()):
        return _marked(tokenizer, chat, turns)
    ids = _render(tokenizer, chat)
    spans = []
    for turn in turns:
        start = _prefix(tokenizer, chat, ids, turn, add_generation_prompt=True)
        stop = _prefix(tokenizer, chat, ids, turn + 1, add_generation_prompt=False)
        spans.append((turn, start, stop))
    return ids, spans


def _marked(tokenizer: Any, chat: list[Message], turns: list[int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    encoded = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    mask = [0, *encoded["assistant_masks"], 0]
    starts = [i for i in range(len(mask) - 1) if mask[i] < mask[i + 1]]
    stops = [i for i in range(len(mask) - 1) if mask[i] > mask[i + 1]]
    if len(starts) != len(turns):
        raise ValueError(
            f"the chat template must mark each of {len(turns)} messages of the assistant with one {{% generation %}}, "
            f"got {len(starts)} marked stretches; mark at least the end of each, and leave the beginning out."
        )
    return list(encoded["input_ids"]), list(zip(turns, starts, stops, strict=True))


def _render(tokenizer: Any, chat: list[Message], **options: bool) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
    )
    return list(encoded["input_ids"])


def _prefix(tokenizer: Any, chat: list[Message], ids: list[int], count: int, *, add_generation_prompt: bool) -> int:
    """Tokens of the first ``count`` messages, which have to be what the whole chat begins with."""
    if count == 0:
        begun: list[int] = []  # most templates refuse an empty chat: all that it renders to then counts
    elif count == len(chat) and not add_generation_prompt:
        return len(ids)
    else:
        begun = _render(tokenizer, chat[:count], add_generation_prompt=add_generation_prompt)
    if ids[: len(begun)] != begun:
        prompt = " and the prompt for the next" if add_generation_prompt else ""
        raise ValueError(
            f"the chat template must be prefix-consistent, got one that renders {count} of {len(chat)} messages"
            f"{prompt} to something with which the whole chat does not begin (it drops or changes earlier ones); "
            "mark the assistant's words in the template with {% generation %} and {% endgeneration %}."
        )
    return len(begun)


def _checked(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        keys = ", ".join(map(str, message)) if isinstance(message, dict) else repr(message)
        raise ValueError(f"a message must have a role and a content, got {keys}; rename the keys.")
    kept = {key: value for key, value in message.items() if value is not None}
    if len(kept) == 1:
        raise ValueError(f"a message must have a content, got only the role {message['role']!r}; drop such chats.")
    return kept
