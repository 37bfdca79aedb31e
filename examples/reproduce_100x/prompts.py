"""What is hidden in a text and asked for again: passkeys, numbers under a name, topics of sections."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beacon.evaluation import passkey_line

NUM_DIGITS = 5
WORDS = Path(__file__).with_name("names.txt").read_text().split()


@dataclass(frozen=True)
class Needle:
    """A line to hide, whose beginning is the question for its end.

    Args:
        question: The line up to the answer.
        answer: Its end.
    """

    question: str
    answer: str

    @property
    def line(self) -> str:
        """The whole line, without line feeds."""
        return self.question + self.answer


def draw_needles(rng: np.random.Generator, kind: str, count: int) -> list[Needle]:
    """Draw needles of one kind that answer different questions.

    Args:
        rng: Source of randomness.
        kind: ``passkey`` (one needle), ``number`` (of a name; natural language or code) or ``topic`` (of a section).
        count: How many; 1 for passkeys.
    """
    if kind == "passkey":
        wording = passkey_line("")[:-1] if rng.random() < 0.8 else "PASS_KEY = "
        return [Needle(wording, _digits(rng)) for _ in range(count)]
    if kind == "number":
        wording = ("# the number of {} is ", 'NUMBERS["{}"] = ')[int(rng.random() < 0.4)]
        names = rng.choice(WORDS, count, replace=False)
        return [Needle(wording.format(name), _digits(rng)) for name in names]
    if kind == "topic":
        topics = rng.choice(WORDS, (count, 2), replace=False)
        return [Needle(f"# section {n + 1}: ", " and ".join(pair)) for n, pair in enumerate(topics)]
    raise ValueError(f"kind must be passkey, number or topic, got {kind!r}; choose one of them.")


def draw_mixture(rng: np.random.Generator, count: int) -> list[Needle]:
    """Draw needles of all kinds, in any order, that answer different questions.

    Args:
        rng: Source of randomness.
        count: How many; mostly one of them is a passkey, of the others a third are topics.
    """
    drawn = draw_needles(rng, "passkey", 1) if rng.random() < 0.7 or count == 1 else []
    topics = int(rng.binomial(count - len(drawn), 1 / 3))
    drawn += draw_needles(rng, "topic", topics)
    drawn += draw_needles(rng, "number", count - len(drawn))
    return [drawn[int(place)] for place in rng.permutation(count)]


def _digits(rng: np.random.Generator) -> str:
    return "".join(map(str, rng.integers(0, 10, NUM_DIGITS)))
