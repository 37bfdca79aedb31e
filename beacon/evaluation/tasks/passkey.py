"""A line with digits in ordinary text, asked for at the end, by length and depth."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from beacon.config import check_whole
from beacon.evaluation.methods import Method
from beacon.evaluation.passkey import NUM_DIGITS, QUESTION, PasskeyPrompt, PasskeyScore, build_passkey
from beacon.evaluation.suite import Item, Result
from beacon.evaluation.tasks.options import TextTask, check_depths
from beacon.evaluation.tasks.prompts import ask, opening
from beacon.evaluation.text import split_question

SLACK = 2  # tokens beyond the answer: digits that go on are wrong ones


@dataclass(kw_only=True, eq=False)
class PasskeyTask(TextTask):
    """Passkeys of five digits: whether all are right and no more follow, and the share of digits right at their place.

    Args:
        depths: Where the line stands, 0 the start of the text and 1 its end.
        digits: Digits of a passkey.
    """

    depths: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
    digits: int = NUM_DIGITS

    name = "passkey"
    metrics = MappingProxyType({"found": True, "digits": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.depths = check_depths(self.depths)
        check_whole("digits", self.digits, 1)

    def cells(self) -> Iterator[dict[str, Any]]:
        for depth in self.depths:
            yield {"depth": depth}

    def prompt(self, tokenizer: Any, item: Item) -> tuple[PasskeyPrompt, int]:
        """What an item asks, and how many of its last tokens are the question: the same for every method."""
        length, before = item.place["length"], opening(tokenizer)
        filler = self.haystack.stretch(tokenizer, length, item.content["stretch"])
        seed = random.Random(self.drawn_from(item)).getrandbits(32)
        made = build_passkey(tokenizer, filler, length - len(before), item.place["depth"], seed, self.digits)
        ids = torch.cat([torch.tensor(before, dtype=torch.int64), made.ids])
        asked = len(split_question(tokenizer, "\n" + QUESTION, made.digits)[0])
        return replace(made, ids=ids, start=made.start + len(before)), asked

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        prompt, asked = self.prompt(tokenizer, item)
        text, question = prompt.ids[:-asked], prompt.ids[-asked:]
        output = ask(method, model, tokenizer, text, [question], len(prompt.answer) + SLACK)[0].strip()
        score = PasskeyScore(method.name, len(prompt.ids), prompt.depth, prompt.digits, output)
        ends = not output[self.digits :][:1].isdigit()
        return Result({"found": float(score.exact and ends), "digits": score.digits_right / self.digits}, output)
