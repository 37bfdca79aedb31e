"""Several needles in a haystack, all of which are asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from beacon.config import check_whole
from beacon.evaluation.methods import Method
from beacon.evaluation.suite import Item, Result
from beacon.evaluation.tasks.hiding import (
    NAMES,
    WORDINGS,
    Prompt,
    choose_wording,
    draw_needles,
    hide,
    listed,
    question,
)
from beacon.evaluation.tasks.judging import contains
from beacon.evaluation.tasks.needle import new_tokens
from beacon.evaluation.tasks.options import TextTask, check_flag
from beacon.evaluation.tasks.prompts import Frame, ask, frame


@dataclass(kw_only=True, eq=False)
class MultiNeedleTask(TextTask):
    """Numbers under several names, spread over the text; the score is the share found.

    Args:
        needles: How many are hidden and asked for.
        together: Ask for all at once; else a question each, after one reading of the text where the method can.
        wording: As in :class:`beacon.evaluation.tasks.needle.NeedleTask`.
        chat_template: Ask in the tokenizer's chat format.
    """

    samples: int = 6
    needles: int = 5
    together: bool = False
    wording: str | None = None
    chat_template: bool = False

    name = "multi-needle"
    metrics = MappingProxyType({"found": True, "all_found": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("needles", self.needles, 1)
        if self.needles > len(NAMES):
            raise ValueError(f"needles must be at most {len(NAMES)}, got {self.needles}; hide fewer.")
        check_flag("together", self.together)
        check_flag("chat_template", self.chat_template)
        self.wording = choose_wording(self.wording, self.haystack)

    def cells(self) -> Iterator[dict[str, Any]]:
        yield {"needles": self.needles}

    def prompt(self, tokenizer: Any, item: Item) -> Prompt:
        """What an item asks: the same for every method."""
        around, words = frame(tokenizer, self.chat_template), WORDINGS[self.wording or ""]
        rng = random.Random(self.drawn_from(item))
        needles = draw_needles(rng, item.place["needles"])
        told = [words.told.format(name=needle.name, value=needle.value) for needle in needles]
        depths = [(number + rng.random()) / len(needles) for number in range(len(needles))]
        rng.shuffle(needles)
        questions = tuple(
            self._asked(tokenizer, around, some) for some in ([needles] if self.together else zip(needles))
        )
        text = hide(
            tokenizer,
            self.haystack,
            around,
            length=item.place["length"],
            stretch=item.content["stretch"],
            lines=list(zip(depths, told, strict=True)),
            questions=questions,
        )
        return Prompt(text, questions, tuple(needle.value for needle in needles))

    def _asked(self, tokenizer: Any, around: Frame, needles: Any) -> Any:
        words, names = WORDINGS[self.wording or ""], listed([needle.name for needle in needles])
        plain, user = (words.together, words.user_together) if self.together else (words.asked, words.user)
        values = listed([needle.value for needle in needles])
        return question(tokenizer, around, plain.format(name=names), user.format(name=names), values)

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        prompt = self.prompt(tokenizer, item)
        answers = [listed(prompt.answers)] if self.together else list(prompt.answers)
        room = new_tokens(tokenizer, answers, self.chat_template)
        outputs = ask(method, model, tokenizer, prompt.text, prompt.questions, room)
        pairs = zip(outputs * len(prompt.answers) if self.together else outputs, prompt.answers, strict=True)
        found = [contains(output, answer) for output, answer in pairs]
        scores = {"found": sum(found) / len(found), "all_found": float(all(found))}
        return Result(scores, json.dumps(outputs, ensure_ascii=False))
