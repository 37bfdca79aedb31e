"""What is found again: passkeys by depth and length, three of ten numbers, topics of sections."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

import beacon
from beacon.evaluation import Beacon, Method, SlidingWindow, Truncated
from corpus import Corpus
from prompts import draw_needles
from records import Record
from scales import WINDOW
from sequences import Sequences

DEPTHS = tuple((n + 0.5) / 10 for n in range(10))
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 51200)
NEEDLE_LENGTHS = (2048, 4096, 8192, 16384)
NEEDLES, ASKED = 10, 3
LONGEST = {8: 8192, 32: 16384, 128: 51200}  # ratio -> the longest text it is asked about
SINKS = 4


class Pointed(Method):
    """Condensed reading with retrieval-guided ratios: raw where the question points, the largest elsewhere.

    Args:
        question: Token ids at the end of the text that are the query.
    """

    name = "beacon, retrieval"

    def __init__(self, question: int) -> None:
        self.question = question

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Any = None) -> Any:
        end = len(ids) - keep + 1  # what is kept beyond the question is the answer
        query = ids[end - self.question : end]
        text, config = ids[: end - self.question], model.beacon_config
        ratios = beacon.retrieval_ratios(text, query, config, low=0, expected_length=len(ids))
        return Beacon(tuple(ratios)).read(model, ids, keep, progress)

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        raise NotImplementedError("recall reads question and answer at once; use read.")


def found(model: Any, method: Method, ids: torch.Tensor, answer: int) -> bool:
    """Whether greedy decoding after the question gives the whole answer.

    Args:
        model: The wrapped model.
        method: How the text is read.
        ids: Token ids of text, question and answer ``[T]``.
        answer: How many of the last ones are the answer.
    """
    logits = method.read(model, ids[:-1], answer).logits
    return bool((logits.argmax(-1) == ids[-answer:]).all())


def measure_passkeys(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Corpus,
    results: Path,
    keys: int,
    longest: int,
) -> Path:
    """Passkeys by method, length and depth; rows that are there already are not measured again.

    Args:
        model: The wrapped model.
        tokenizer: Its tokenizer.
        held_out: Packages that were not trained on.
        results: Folder for ``passkey.json``.
        keys: Passkeys of every length and depth.
        longest: Tokens of the longest text, question and answer included.

    Returns:
        The result file.
    """
    what = "passkeys of five digits found whole"
    record = Record(results / "passkey.json", what, {"keys": keys, "haystack": held_out.names})
    for length in (length for length in LENGTHS if length <= longest):
        for number, depth in enumerate(DEPTHS):
            prompts = _passkeys(held_out, tokenizer, length, depth, keys, seed=1000 * number + length)
            for method in _methods(prompts[0][2], length):
                if not record.has(method=method.name, length=length, depth=depth):
                    right = sum(found(model, method, ids.to(model.device), answer) for ids, answer, _ in prompts)
                    record.add(method=method.name, length=length, depth=depth, found=right, asked=keys)
    return record.file


def _passkeys(
    held_out: Corpus, tokenizer: PreTrainedTokenizerFast, length: int, depth: float, count: int, seed: int
) -> list[tuple[torch.Tensor, int, int]]:
    """(ids, tokens of the answer, tokens of the question) of texts in the trained wording."""
    sequences = Sequences(held_out, tokenizer, np.random.default_rng(seed))
    prompts = []
    for _ in range(count):
        needle = next(n for n in iter(lambda: draw_needles(sequences.rng, "passkey", 1)[0], None) if "#" in n.question)
        line, answer = sequences.encode(needle)
        code = sequences.code(length - 2 * len(line))
        ids = sequences.insert(code, [(depth, line, False), (1.0, line, False)])[0]
        prompts.append((torch.from_numpy(ids), answer, len(line) - answer))
    return prompts


def find_passkeys(
    model: Any, tokenizer: PreTrainedTokenizerFast, held_out: Corpus, length: int, method: Method, keys: int
) -> tuple[int, int]:
    """Passkeys at all depths of one length: how many one method finds, and of how many."""
    right = 0
    for number, depth in enumerate(DEPTHS):
        for ids, answer, _ in _passkeys(held_out, tokenizer, length, depth, keys, seed=1000 * number + length):
            right += found(model, method, ids.to(model.device), answer)
    return right, keys * len(DEPTHS)


def _methods(question: int, length: int) -> list[Method]:
    ratios = [Beacon(ratio) for ratio, longest in LONGEST.items() if length <= longest]
    return [*ratios, Pointed(question)]


def measure_needles(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Corpus,
    results: Path,
    texts: int,
    longest: int,
) -> Path:
    """Three of ten numbers, and topics of ten sections, beside a sliding window and truncation.

    Args:
        model: The wrapped model.
        tokenizer: Its tokenizer.
        held_out: Packages that were not trained on.
        results: Folder for ``needles.json``.
        texts: Texts of every kind and length, with three questions each.
        longest: Tokens of the longest text, question and answer included.

    Returns:
        The result file.
    """
    record = Record(results / "needles.json", "answers to three of ten needles, right as a whole", {"texts": texts})
    for kind in ("number", "topic"):
        for length in (length for length in NEEDLE_LENGTHS if length <= longest):
            haystacks = _haystacks(held_out, tokenizer, kind, length, texts)
            for name in ("beacon, ratio 8", "beacon, ratio 32", "beacon, retrieval", "sliding window", "truncated"):
                if record.has(method=name, kind=kind, length=length):
                    continue
                right = sum(_answered(model, name, haystack) for haystack in haystacks)
                record.add(method=name, kind=kind, length=length, found=right, asked=texts * ASKED)
    return record.file


@dataclass(frozen=True)
class Haystack:
    """A text and what it is asked.

    Args:
        text: Token ids ``[T]``.
        questions: Token ids of each question with its answer, and how many of the last ones are the answer.
    """

    text: torch.Tensor
    questions: list[tuple[torch.Tensor, int]]


@torch.no_grad()
def _answered(model: Any, name: str, haystack: Haystack) -> int:
    """Questions of one text that a method answers; beacons at one ratio read it once for all of them."""
    right, text = 0, haystack.text.to(model.device)
    cache = model.compress(text[None], ratios=int(name.split()[-1])) if "ratio" in name else None
    for line, answer in haystack.questions:
        line = line.to(model.device)
        if cache is None:
            rivals = {"sliding window": SlidingWindow(WINDOW, SINKS), "truncated": Truncated()}
            method = rivals.get(name) or Pointed(len(line) - answer)
            right += found(model, method, torch.cat([text, line]), answer)
        else:
            mask = line.new_ones(1, len(text) + len(line) - 1)
            logits = model(line[None, :-1], past_key_values=cache.fork(), attention_mask=mask).logits
            right += bool((logits[0, -answer:].argmax(-1) == line[-answer:]).all())
    return right


def _haystacks(
    held_out: Corpus, tokenizer: PreTrainedTokenizerFast, kind: str, length: int, count: int
) -> list[Haystack]:
    """Texts with ten needles, three of which are asked for; about ``length`` tokens with a question and its answer."""
    sequences = Sequences(held_out, tokenizer, np.random.default_rng(length))
    haystacks = []
    for _ in range(count):
        lines = [sequences.encode(needle) for needle in draw_needles(sequences.rng, kind, NEEDLES)]
        places = (np.arange(NEEDLES) + sequences.rng.random(NEEDLES)) / NEEDLES * (1 - 10 / length)
        longest = max(len(line) for line, _ in lines)
        code = sequences.code(length - sum(len(line) for line, _ in lines) - longest)
        hidden = [(place, line, False) for place, (line, _) in zip(places, lines, strict=True)]
        text = torch.from_numpy(sequences.insert(code, hidden)[0])
        asked = [lines[n] for n in sequences.rng.choice(NEEDLES, ASKED, replace=False)]
        haystacks.append(Haystack(text, [(torch.tensor(line), answer) for line, answer in asked]))
    return haystacks
