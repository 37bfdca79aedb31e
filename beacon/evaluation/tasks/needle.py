"""A needle in a haystack: one line somewhere in ordinary text, asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from beacon.evaluation.methods import Method
from beacon.evaluation.suite import Item, Result
from beacon.evaluation.tasks.hiding import WORDINGS, Prompt, choose_wording, draw_needles, hide, question
from beacon.evaluation.tasks.judging import contains
from beacon.evaluation.tasks.options import TextTask, check_depths, check_flag
from beacon.evaluation.tasks.prompts import ask, frame
from beacon.evaluation.text import encode

SLACK = 4  # tokens beyond the answer: a number that goes on is a wrong one
CHATTER = 32  # tokens around an answer in a chat


@dataclass(kw_only=True, eq=False)
class NeedleTask(TextTask):
    """Numbers under a name, by length and depth.

    Args:
        depths: Where the line stands, 0 the start of the text and 1 its end.
        wording: ``comment`` (a comment line, for source code) or ``prose`` (a sentence); None for what suits the text.
        chat_template: Ask in the tokenizer's chat format.
    """

    depths: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
    wording: str | None = None
    chat_template: bool = False

    name = "needle"
    metrics = MappingProxyType({"found": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.depths = check_depths(self.depths)
        check_flag("chat_template", self.chat_template)
        self.wording = choose_wording(self.wording, self.haystack)

    def cells(self) -> Iterator[dict[str, Any]]:
        for depth in self.depths:
            yield {"depth": depth}

    def prompt(self, tokenizer: Any, item: Item) -> Prompt:
        """What an item asks: the same for every method."""
        around, words = frame(tokenizer, self.chat_template), WORDINGS[self.wording or ""]
        needle = draw_needles(random.Random(self.drawn_from(item)), 1)[0]
        told = words.told.format(name=needle.name, value=needle.value)
        asked, user = words.asked.format(name=needle.name), words.user.format(name=needle.name)
        questions = (question(tokenizer, around, asked, user, needle.value),)
        text = hide(
            tokenizer,
            self.haystack,
            around,
            length=item.place["length"],
            stretch=item.content["stretch"],
            lines=[(item.place["depth"], told)],
            questions=questions,
        )
        return Prompt(text, questions, (needle.value,))

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        prompt = self.prompt(tokenizer, item)
        room = new_tokens(tokenizer, prompt.answers, self.chat_template)
        output = ask(method, model, tokenizer, prompt.text, prompt.questions, room)[0]
        return Result({"found": float(contains(output, prompt.answers[0]))}, output)


def new_tokens(tokenizer: Any, answers: Sequence[str], chat: bool) -> int:
    """Tokens that an answer may have."""
    return max(len(encode(tokenizer, " " + answer)) for answer in answers) + (CHATTER if chat else SLACK)
