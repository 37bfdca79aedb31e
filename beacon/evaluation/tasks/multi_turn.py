"""A dialogue about one text that grows turn by turn; every answer is judged."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from beacon.config import check_whole
from beacon.evaluation.methods import Dialogue, Method
from beacon.evaluation.suite import Item, Result
from beacon.evaluation.tasks.hiding import NAMES, WORDINGS, Prompt, choose_wording, draw_needles, hide, question
from beacon.evaluation.tasks.judging import contains
from beacon.evaluation.tasks.measuring import now
from beacon.evaluation.tasks.needle import new_tokens
from beacon.evaluation.tasks.options import TextTask, check_flag
from beacon.evaluation.tasks.prompts import ask_on, frame
from beacon.evaluation.text import encode


@dataclass(frozen=True)
class Talk:
    """A text and all turns of the dialogue about it.

    Args:
        text: Token ids ``[T]``.
        questions: Token ids ``[q]`` of what each turn asks.
        told: Token ids ``[n]`` of each question with its right answer, as later turns find them.
        answers: What is right.
    """

    text: torch.Tensor
    questions: tuple[torch.Tensor, ...]
    told: tuple[torch.Tensor, ...]
    answers: tuple[str, ...]


@dataclass(kw_only=True, eq=False)
class MultiTurnTask(TextTask):
    """Numbers under several names, asked for one by one; each question comes after all earlier ones and their answers.

    The earlier answers are the right ones, so that every method is asked the same. ``length`` is that of the text with
    the longest question; the dialogue comes on top. ``first_turn_seconds`` is the time of reading the text and of the
    first answer, ``turn_seconds`` that of a later turn: of what is new since the one before, and of the answer. It is
    short where a method holds what it has read (:meth:`beacon.evaluation.Method.dialogue`). A turn with which a run
    goes on within a dialogue has neither.

    Args:
        samples: Dialogues of each length; each is about another stretch of text.
        turns: Questions of a dialogue.
        wording: As in :class:`beacon.evaluation.tasks.needle.NeedleTask`.
        chat_template: Ask in the tokenizer's chat format.
    """

    samples: int = 6
    turns: int = 4
    wording: str | None = None
    chat_template: bool = False

    name = "multi-turn"
    in_turns = True
    metrics = MappingProxyType({"found": True, "first_turn_seconds": False, "turn_seconds": False})

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

    def talk(self, tokenizer: Any, item: Item) -> Talk:
        """The whole dialogue that an item is a turn of: the same for every turn and method."""
        around, words = frame(tokenizer, self.chat_template), WORDINGS[self.wording or ""]
        length, sample = item.place["length"], item.content["sample"]
        rng = random.Random(f"{self.name}, seed {self.seed}, length {length}, sample {sample}")
        needles = draw_needles(rng, self.turns)
        hidden = [words.told.format(name=needle.name, value=needle.value) for needle in needles]
        depths = [(number + rng.random()) / len(needles) for number in range(len(needles))]
        rng.shuffle(needles)
        asked, told = [], []
        for needle in needles:
            plain, user = words.asked.format(name=needle.name), words.user.format(name=needle.name)
            asked.append(question(tokenizer, around, plain, user, needle.value))
            whole = f"\n\n{user}{around.after}{needle.value}{around.between}" if around.chat else plain + needle.value
            told.append(encode(tokenizer, whole))
        text = hide(
            tokenizer,
            self.haystack,
            around,
            length=length,
            stretch=item.content["stretch"],
            lines=list(zip(depths, hidden, strict=True)),
            questions=asked,
        )
        return Talk(text, tuple(asked), tuple(told), tuple(needle.value for needle in needles))

    def prompt(self, tokenizer: Any, item: Item) -> Prompt:
        """What an item asks, as one question with the dialogue before it: the same for every method."""
        talk, turn = self.talk(tokenizer, item), item.place["turn"]
        dialogue = torch.cat([*talk.told[: turn - 1], talk.questions[turn - 1]])
        return Prompt(talk.text, (dialogue,), (talk.answers[turn - 1],))

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        return next(self.run_series(method, model, tokenizer, [item]))

    def run_series(self, method: Method, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Result]:
        """As :meth:`Task.run_series`: one dialogue, in which each turn reads what is new. Answers are not handed on."""
        dialogue: Dialogue | None = None
        series, done = None, 0
        for item in items:
            talk, turn = self.talk(tokenizer, item), item.place["turn"]
            rooms = [new_tokens(tokenizer, [answer], self.chat_template) for answer in talk.answers]
            method.load(model)
            goes_on = dialogue is not None and item.series == series and turn - 1 >= done
            if dialogue is None or not goes_on:
                whole = len(talk.text) + sum(map(len, talk.told)) + max(rooms)
                dialogue, series, done = method.dialogue(model, whole), item.series, 0
            new = torch.cat([*([] if goes_on else [talk.text]), talk.text[:0], *talk.told[done : turn - 1]])
            start = now(model)
            dialogue.read(new.to(model.device))
            output = ask_on(dialogue, model, tokenizer, talk.questions[turn - 1], rooms[turn - 1])
            seconds, done = now(model) - start, turn - 1
            scores = {"found": float(contains(output, talk.answers[turn - 1]))}
            if goes_on or turn == 1:
                scores["turn_seconds" if goes_on else "first_turn_seconds"] = seconds
            yield Result(scores, output)
