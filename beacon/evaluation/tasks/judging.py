"""Whether an answer is right: words are compared, not their case, punctuation or spacing."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Chinese characters: written without spaces
WORD = re.compile(rf"\d+(?:\.\d+)+|[{SIGNS}]|[^\W_{SIGNS}]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and the commas within numbers.

    Characters of scripts without spaces are words of their own, and a text of nothing but signs is one word or several.
    """
    plain = THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
    return WORD.findall(plain) or plain.split()


def exact(output: str, answer: str) -> bool:
    """Whether an output is the answer and nothing else: as many lines are looked at as the answer has."""
    said, wanted = _compared(first_lines(output, answer), answer)
    return said == wanted


def contains(output: str, answer: str) -> bool:
    """Whether the answer's words stand in the output, whole and one after the other (``48213`` not in ``482134``)."""
    return place(output, answer) is not None


def place(output: str, answer: str) -> int | None:
    """Number of the word at which the answer begins in the output, None where it does not stand there."""
    said, wanted = _compared(output, answer)
    starts = range(len(said) - len(wanted) + 1)
    return next((start for start in starts if said[start : start + len(wanted)] == wanted), None)


def f1(output: str, answer: str) -> float:
    """Harmonic mean of the shares of words that output and answer have in common, over as many lines as in exact."""
    said, wanted = _compared(first_lines(output, answer), answer)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def first_mentioned(output: str, wanted: str, among: Sequence[str]) -> bool:
    """Whether of several phrases the wanted one is what the output names first."""
    found = {phrase: at for phrase in among if (at := place(output, phrase)) is not None}
    return wanted in found and found[wanted] == min(found.values())


def first_lines(output: str, answer: str) -> str:
    """The first lines of an output that are not blank, as many as the answer has: models without a chat go on."""
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n".join(lines[: max(1, sum(bool(line.strip()) for line in answer.splitlines()))])


def _compared(output: str, answer: str) -> tuple[list[str], list[str]]:
    """Words of both, without articles where the answer has other words (``A`` may be the letter of a choice)."""
    said, wanted = words(output), words(answer)
    if not wanted:
        raise ValueError(f"an answer must have at least one word, got {answer!r}; correct the data.")
    if set(wanted) <= ARTICLES:
        return said, wanted
    return [word for word in said if word not in ARTICLES], [word for word in wanted if word not in ARTICLES]
