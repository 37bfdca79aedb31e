"""A long conversation about one topic after the other, and which topic it was that came first, second, ..."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from beacon.config import check_whole
from beacon.evaluation.methods import Method
from beacon.evaluation.suite import Item, Result
from beacon.evaluation.tasks.hiding import NAMES, Prompt, choose_wording, hide, question
from beacon.evaluation.tasks.judging import first_mentioned
from beacon.evaluation.tasks.needle import new_tokens
from beacon.evaluation.tasks.options import TextTask, check_flag, check_many
from beacon.evaluation.tasks.prompts import ask, frame

TOPICS = (
    "baking rye bread",
    "beekeeping in cities",
    "the tides of the sea",
    "growing tomatoes",
    "medieval bridges",
    "learning to juggle",
    "the moons of Jupiter",
    "repairing bicycles",
    "chess openings",
    "knitting winter socks",
    "the migration of storks",
    "how glaciers move",
    "watercolour painting",
    "night trains",
    "folk songs of the mountains",
    "how locks are picked",
    "training for a marathon",
    "the history of tea",
    "building kites",
    "volcanoes under the ice",
    "sign languages",
    "old typewriters",
    "the making of cheese",
    "maps of imaginary islands",
    "caring for house plants",
    "lighthouse keepers",
    "the invention of zero",
    "dogs that herd sheep",
    "restoring wooden boats",
    "mushrooms in autumn",
    "the sound of violins",
    "deserts in bloom",
    "how paper is made",
    "puppet theatre",
    "solar eclipses",
    "the rules of curling",
    "hot air balloons",
    "writing crosswords",
    "windmills and watermills",
    "the sleep of dolphins",
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
TOLD = {
    "comment": "# section {number}: {topic}",
    "prose": "User: Let us talk about {topic} now.\nAssistant: Gladly. This is what I can say about {topic}.",
}
ASKED = {
    "comment": "\n# section {number}: ",
    "prose": "\n\nUser: What was the {ordinal} topic that we talked about?\nAssistant: The {ordinal} topic was ",
}
USER = "What was the {ordinal} topic in this conversation? Answer with the topic alone."


@dataclass(kw_only=True, eq=False)
class TopicsTask(TextTask):
    """Topics by length; right is an answer that names the asked one before any other.

    Args:
        topics: How many topics the conversation has; each gets as much text.
        asked: Which of them is asked for, counted from 1.
        wording: ``prose`` (a conversation in which the topics have no numbers) or ``comment`` (numbered headings of two
            words each, for source code); None for what suits the text.
        chat_template: Ask in the tokenizer's chat format.
    """

    samples: int = 3
    topics: int = 8
    asked: Sequence[int] = (1, 4)
    wording: str | None = None
    chat_template: bool = False

    name = "topics"
    metrics = MappingProxyType({"found": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("topics", self.topics, 1)
        self.asked = check_many("asked", self.asked, 1)
        if self.topics > len(TOPICS):
            raise ValueError(f"topics must be at most {len(TOPICS)}, got {self.topics}; take fewer.")
        most = min(self.topics, len(ORDINALS))
        if max(self.asked) > most:
            raise ValueError(f"asked must be at most {most} of {self.topics} topics, got {max(self.asked)}; ask less.")
        check_flag("chat_template", self.chat_template)
        self.wording = choose_wording(self.wording, self.haystack)

    def cells(self) -> Iterator[dict[str, Any]]:
        for number in self.asked:
            yield {"topics": self.topics, "asked": number}

    def prompt(self, tokenizer: Any, item: Item) -> tuple[Prompt, list[str]]:
        """What an item asks, and all topics of the conversation: the same for every method."""
        around, wording = frame(tokenizer, self.chat_template), self.wording or ""
        rng = random.Random(self.drawn_from(item))
        topics = draw_topics(rng, wording, item.place["topics"])
        number = item.place["asked"]
        right, named = topics[number - 1], {"number": number, "ordinal": ORDINALS[number - 1]}
        questions = (question(tokenizer, around, ASKED[wording].format(**named), USER.format(**named), right),)
        depths = [(at + 0.3 * rng.random()) / len(topics) for at in range(len(topics))]
        told = [TOLD[wording].format(number=at + 1, topic=topic) for at, topic in enumerate(topics)]
        text = hide(
            tokenizer,
            self.haystack,
            around,
            length=item.place["length"],
            stretch=item.content["stretch"],
            lines=list(zip(depths, told, strict=True)),
            questions=questions,
        )
        return Prompt(text, questions, (right,)), topics

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        prompt, topics = self.prompt(tokenizer, item)
        room = new_tokens(tokenizer, topics, self.chat_template)  # of all topics: its length does not give one away
        output = ask(method, model, tokenizer, prompt.text, prompt.questions, room)[0]
        return Result({"found": float(first_mentioned(output, prompt.answers[0], topics))}, output)


def draw_topics(rng: random.Random, wording: str, count: int) -> list[str]:
    """Topics of a conversation, or two words for each section of source code."""
    if wording == "prose":
        return rng.sample(TOPICS, count)
    names = rng.sample(NAMES, 2 * count)
    return [f"{one} and {other}" for one, other in zip(names[::2], names[1::2])]
