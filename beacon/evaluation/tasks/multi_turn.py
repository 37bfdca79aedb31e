"""A dialogue about one text that grows turn by turn; every answer is judged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from beacon.config import check_whole
from beacon.evaluation.methods import Method
from beacon.evaluation.suite import Item, Result
from beacon.evaluation.tasks.hiding import NAMES, WORDINGS, Prompt, choose_wording, draw_needles, hide, question
from beacon.evaluation.tasks.judging import contains
from beacon.evaluation.tasks.measuring import now
from beacon.evaluation.tasks.needle import new_tokens
from beacon.evaluation.tasks.options import TextTask, check_flag
from beacon.evaluation.tasks.prompts import ask, frame
from beacon.evaluation.text import encode


@dataclass(kw_only=True, eq=False)
class MultiTurnTask(TextTask):
    """Numbers under several names, asked for one by one; each question comes after all earlier ones and their answers.

    The earlier answers are the right ones, so that every method is asked the same. ``length`` is that of the text with
    the longest question; the dialogue comes on top. ``turn_seconds`` is the time of a turn up to the end of its answer,
    the text's reading included (methods have no dialogue that goes on from call to call).

    Args:
        turns: Questions of a dialogue.
        wording: As in :class:`beacon.evaluation.tasks.needle.NeedleTask`.
        chat_template: Ask in the tokenizer's chat format.
    """

    turns: int = 4
    wording: str | None = None
    chat_template: bool = False

    name = "multi-turn"
    metrics = MappingProxyType({"found": True, "turn_seconds": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("turns", self.turns, 1)
        if self.turns > len(NAMES):
            raise ValueError(f"turns must be at most {len(NAMES)}, got {self.turns}; ask less.")
        check_flag("chat_template", self.chat_template)
        self.wording = choose_wording(self.wording, self.haystack)

    def cells(self) -> Iterator[dict[str, Any]]:
        for turn in range(1, self.turns + 1):
            yield {"turn": turn}

    def prompt(self, tokenizer: Any, item: Item) -> Prompt:
        """What an item asks, the dialogue before it included: the same for every method."""
        around, words = frame(tokenizer, self.chat_template), WORDINGS[self.wording or ""]
        length, turn, sample = item.place["length"], item.place["turn"], item.content["sample"]
        rng = random.Random(
            f"{self.name}, seed {self.seed}, length {length}, sample {sample}"
        )  # the same text each turn
        needles = draw_needles(rng, self.turns)
        told = [words.told.format(name=needle.name, value=needle.value) for needle in needles]
        depths = [(number + rng.random()) / len(needles) for number in range(len(needles))]
        rng.shuffle(needles)
        asked, answers = [], []
        for needle in needles:
            plain, user = words.asked.format(name=needle.name), words.user.format(name=needle.name)
            asked.append(question(tokenizer, around, plain, user, needle.value))
            whole = f"\n\n{user}{around.after}{needle.value}{around.between}" if around.chat else plain + needle.value
            answers.append(encode(tokenizer, whole))
        text = hide(
            tokenizer,
            self.haystack,
            around,
            length=length,
            sample=sample,
            lines=list(zip(depths, told, strict=True)),
            questions=asked,
        )
        dialogue = torch.cat([*answers[: turn - 1], asked[turn - 1]])
        return Prompt(text, (dialogue,), (needles[turn - 1].value,))

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        prompt = self.prompt(tokenizer, item)
        room = new_tokens(tokenizer, prompt.answers, self.chat_template)
        start = now(model)
        output = ask(method, model, tokenizer, prompt.text, prompt.questions, room)[0]
        seconds = now(model) - start
        return Result({"found": float(contains(output, prompt.answers[0])), "turn_seconds": seconds}, output)
