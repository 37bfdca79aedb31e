"""Lines hidden in ordinary text and asked for again: their wording, their places, and the prompt they make."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.config import check_choice
from beacon.evaluation.tasks.haystack import Haystack
from beacon.evaluation.tasks.prompts import Frame, plain_question
from beacon.evaluation.text import encode, nearest_line_end

NUM_DIGITS = 5
NEAR = 64  # tokens: where no line ends so near, a line is put into the middle of another
# Common words, each a token of its own for most tokenizers, the shipped model's included.
WORDS = (
    "acorn amber anchor apple arrow autumn badger bamboo barley basket birch bishop blossom breeze bridge bronze "
    "butter cactus camel candle canyon castle cedar cherry cinder citrus clover cobalt comet copper coral cotton "
    "crane crystal dagger daisy desert dragon eagle ember engine falcon feather fennel flint forest fossil garden "
    "garnet ginger glacier granite hammer harbor hazel heron honey indigo island ivory jacket jungle kettle ladder "
    "lagoon lantern lemon lily lotus magnet mango maple marble meadow melon mirror mountain mustard nectar nettle "
    "oasis ocean olive onion orchid otter oyster pearl pebble pepper pigeon pillow planet plum poppy quartz rabbit "
    "raven ribbon river rocket saddle saffron salmon shadow silver sparrow spider sunset temple thistle thunder "
    "tiger timber tulip turtle valley velvet violet walnut walrus willow winter zebra"
)
NAMES = tuple(WORDS.split())


@dataclass(frozen=True)
class Wording:
    """How a number under a name is told and asked for.

    Args:
        told: The line that is hidden, with ``{name}`` and ``{value}``.
        asked: Plain text up to the value.
        together: The same where several are asked for at once; ``{name}`` then stands for all names.
        user: What a user of a chat asks.
        user_together: The same for several.
    """

    told: str
    asked: str
    together: str
    user: str = "What is the secret number of {name}? Answer with the number alone."
    user_together: str = "What are the secret numbers of {name}? Answer with the numbers alone, in this order."


WORDINGS = {
    "comment": Wording(
        "# the number of {name} is {value}", "\n# the number of {name} is ", "\n# the numbers of {name} are "
    ),
    "prose": Wording(
        "The secret number of {name} is {value}.",
        "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is ",
        "\n\nQuestion: What are the secret numbers of {name}?\nAnswer: The secret numbers of {name} are ",
    ),
}


@dataclass(frozen=True)
class Needle:
    """A number that is told under a name."""

    name: str
    value: str


@dataclass(frozen=True)
class Prompt:
    """A text and what is asked about it.

    Args:
        text: Token ids ``[T]``.
        questions: Token ids ``[q]`` of each question.
        answers: What is right.
    """

    text: torch.Tensor
    questions: tuple[torch.Tensor, ...]
    answers: tuple[str, ...]


def choose_wording(name: str | None, haystack: Haystack) -> str:
    """The name of a wording: comments among sources, sentences elsewhere, unless it is chosen.

    Raises:
        ValueError: There is no such wording.
    """
    if name is None:
        return "comment" if haystack.path is None else "prose"
    check_choice("wording", name, tuple(WORDINGS))
    return name


def draw_needles(rng: random.Random, count: int) -> list[Needle]:
    """Needles of different names and numbers."""
    names = rng.sample(NAMES, count)
    values: list[str] = []
    while len(values) < count:
        value = "".join(rng.choices("0123456789", k=NUM_DIGITS))
        if value not in values:
            values.append(value)
    return [Needle(*pair) for pair in zip(names, values, strict=True)]


def listed(parts: Sequence[str]) -> str:
    """Parts as a sentence lists them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def question(tokenizer: Any, frame: Frame, plain: str, user: str, answer: str) -> torch.Tensor:
    """Token ids of a question: what a user says in a chat, elsewhere plain text that the answer continues."""
    if frame.chat:
        return encode(tokenizer, f"\n\n{user}{frame.after}")
    return plain_question(tokenizer, plain, answer)


def hide(
    tokenizer: Any,
    haystack: Haystack,
    frame: Frame,
    *,
    length: int,
    stretch: int,
    lines: Sequence[tuple[float, str]],
    questions: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Put lines into a stretch of text.

    Args:
        tokenizer: The model's tokenizer.
        haystack: Ordinary text.
        frame: What stands before it.
        length: Tokens of the result with the longest question.
        stretch: Which stretch of the haystack.
        lines: Where each line goes (0 the start of the text, 1 its end; nearest line end) and the line.
        questions: Token ids of the questions.

    Returns:
        Token ids ``[length - longest question]``.

    Raises:
        ValueError: ``length`` leaves no room for text.
    """
    pieces = [(depth, encode(tokenizer, "\n" + line).tolist()) for depth, line in lines]
    taken = len(frame.before) + sum(len(ids) for _, ids in pieces) + max(map(len, questions))
    if taken >= length:
        raise ValueError(
            f"lengths must leave room for text, got {length} with {taken} tokens of question and of what is hidden; "
            "take longer ones or hide less."
        )
    ids = haystack.stretch(tokenizer, length - taken, stretch).tolist()
    placed = [(*_place(tokenizer, ids, depth), line) for depth, line in sorted(pieces, key=lambda piece: piece[0])]
    feed = encode(tokenizer, "\n").tolist()
    ids = ids[: len(ids) - len(feed) * sum(inside for _, inside, _ in placed)]
    text, done = list(frame.before), 0
    for at, inside, line in placed:
        at = min(max(at, done), len(ids))  # in the order of their depths
        text += [*ids[done:at], *line, *(feed if inside else [])]
        done = at
    return torch.tensor([*text, *ids[done:]], dtype=torch.int64)


def _place(tokenizer: Any, ids: Sequence[int], depth: float) -> tuple[int, bool]:
    """Index of the token that a line goes before, and whether that is inside another line (none ends near)."""
    wanted = round(depth * len(ids))
    at = nearest_line_end(tokenizer, ids, wanted)
    ends = at < len(ids) and tokenizer.decode([ids[at]]).startswith("\n")
    near = abs(at - wanted) <= max(NEAR, len(ids) // 20)
    return (at, False) if ends and near else (wanted, True)
