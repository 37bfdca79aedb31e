"""Evaluation while a model trains: perplexity by length and passkey recall.

The model may be wrapped for data parallelism or sharded, so it is only ever called, and every process makes the same
calls in the same order and comes to the same numbers.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from beacon.config import BeaconConfig, check_ratio, check_whole
from beacon.evaluation import PasskeyPrompt, build_passkey, encode, file_texts, library_texts

logger = logging.getLogger(__name__)

LIBRARY = "python-library"
IGNORED = -100
CANDIDATES = 4  # documents held per text wanted: those with the most bytes need not have the most tokens


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured while a model trains.

    Args:
        source: ``python-library`` (the running interpreter's standard library, files held out from the shipped model's
            training first), a UTF-8 file (consecutive stretches), or a ``.jsonl`` file (the longest of its ``text``).
        lengths: Tokens of text read for perplexity, targets included; empty: no perplexity.
        texts: Texts that are taken together, also to hide passkeys in.
        targets: Last tokens of each text that are counted, the same for every length.
        ratios: Ratios at which everything is measured; None is the configured policy.
        passkey_lengths: Tokens of the prompts that ask for a passkey; empty: none.
        passkey_depths: Where each text hides one, 0 its start and 1 its end: ``texts * len(passkey_depths)`` prompts
            of each length.
        passkey_seed: Draws the digits, the same for every length.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value is not allowed.
    """

    source: str = LIBRARY
    lengths: tuple[int, ...] = ()
    texts: int = 4
    targets: int = 256
    ratios: tuple[int | None, ...] = (None,)
    passkey_lengths: tuple[int, ...] = ()
    passkey_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    passkey_seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise TypeError(f"source must be a str, got {self.source!r}; pass {LIBRARY!r} or the path of a file.")
        check_whole("texts", self.texts, 1)
        check_whole("targets", self.targets, 1)
        check_whole("passkey_seed", self.passkey_seed, 0)
        for name in ("lengths", "ratios", "passkey_lengths", "passkey_depths"):
            object.__setattr__(self, name, _distinct(name, getattr(self, name)))
        for length in self.lengths:
            check_whole("each of lengths", length, 1)
            if length <= self.targets:
                raise ValueError(
                    f"lengths must exceed targets, got {length} and targets={self.targets}; read more or count fewer."
                )
        for length in self.passkey_lengths:
            check_whole("each of passkey_lengths", length, 1)
        for ratio in self.ratios:
            if ratio is not None:
                check_whole("each of ratios", ratio, 0)
        for depth in self.passkey_depths:
            if isinstance(depth, bool) or not isinstance(depth, (int, float)):
                raise TypeError(f"passkey_depths must be numbers, got {depth!r}; pass for example [0.1, 0.5, 0.9].")
            if not 0 <= depth <= 1:
                raise ValueError(f"passkey_depths must lie between 0 and 1, got {depth}; 0 is the start of the text.")
        for name in ("ratios", "passkey_depths"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one value, got an empty list; leave it out.")

    @property
    def longest(self) -> int:
        """Tokens that every text must have; 0 if nothing is measured."""
        return max((*self.lengths, *self.passkey_lengths), default=0)


class MetricName(NamedTuple):
    """Name of a metric, as in ``passkey_exact_4096_ratio_8``.

    Args:
        kind: ``perplexity``, ``passkey`` or ``passkey_exact``.
        length: Tokens of text read.
        ratio: Ratio of every window, or None for the configured policy.
    """

    kind: str
    length: int
    ratio: int | None

    def __str__(self) -> str:
        return f"{self.kind}_{self.length}" + ("" if self.ratio is None else f"_ratio_{self.ratio}")

    @classmethod
    def parse(cls, name: str) -> MetricName | None:
        """The parts of a name, or None if it is none of these."""
        found = re.fullmatch(r"(perplexity|passkey|passkey_exact)_(\d+)(?:_ratio_(\d+))?", name)
        if found is None:
            return None
        kind, length, ratio = found.groups()
        return cls(kind, int(length), None if ratio is None else int(ratio))


class LongContextEvaluation:
    """Measures a wrapped model between training steps.

    Texts and prompts are made once, when they are first needed, and are the same at every step. No random state is
    read or changed.

    Args:
        config: What to measure.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, config: EvaluationConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

    def check(self, beacon_config: BeaconConfig) -> None:
        """Find out before the training whether everything can be measured; makes texts and prompts.

        Args:
            beacon_config: How the model will read.

        Raises:
            FileNotFoundError: ``source`` is no file.
            ValueError: A ratio does not divide the stride, None is asked of a policy that needs the caller's ratios,
                the texts are too short, or a passkey does not fit.
        """
        for ratio in self.config.ratios if self.config.longest else ():
            if ratio is None and beacon_config.ratio_policy == "retrieval":
                raise ValueError(
                    "ratios of the evaluation must be numbers where ratio_policy='retrieval', got None (the configured "
                    "policy); name for example [8]."
                )
            if ratio is not None:
                try:
                    check_ratio(ratio, beacon_config.step)
                except ValueError as err:
                    raise ValueError(f"ratios of the evaluation: {err}") from err
        _ = self._texts, self._prompts  # made when first read

    def __call__(self, model: Any) -> dict[str, float]:
        """Measure.

        **Perplexity** is exp of the mean negative log-likelihood of the targets, over all texts. The last window of a
        text with labels has no beacons; with ``placement="append"`` no target could see them anyway.

        **Passkeys** are asked teacher-forced: prompt and answer are read in one call, and the likeliest token is
        compared with the answer's at each place. ``passkey_exact`` is the share of prompts with all of them right.
        That equals the exact matches of greedy decoding: as long as every token was right, decoding has read the same
        text, and after a wrong one neither matches. (Where decoding forbids the end of the text, the likeliest token
        here may still be that, and counts as wrong; so do the right digits cut into other tokens.) ``passkey``, the
        share of tokens that are right, is conditional on the right ones before them: after a wrong digit it is kinder
        than the share of digits that decoding gets right.

        Args:
            model: A wrapped model, itself wrapped or sharded or not. Only its forward is called, with one text each
                time. Afterwards every module is in the mode (training or not) it was in.

        Returns:
            By name: ``perplexity_4096``, ``perplexity_4096_ratio_8`` at a named ratio, ``passkey_4096`` and
            ``passkey_exact_4096`` from 0 to 1.

        Raises:
            FileNotFoundError: As :meth:`check`.
            ValueError: As :meth:`check`.
        """
        config = self.config
        metrics: dict[str, float] = {}
        if not config.longest:
            return metrics
        texts, prompts = self._texts, self._prompts
        began = time.perf_counter()
        device = next(model.parameters()).device
        with _reading(model):
            for ratio in config.ratios:
                for length in config.lengths:
                    loss = sum(self._loss(model, text[-length:].to(device), ratio) for text in texts) / len(texts)
                    metrics[str(MetricName("perplexity", length, ratio))] = math.inf if loss > 700 else math.exp(loss)
                for length in config.passkey_lengths:
                    right = [_recalled(model, prompt, ratio, device) for prompt in prompts[length]]
                    tokens = [token for answer in right for token in answer]
                    metrics[str(MetricName("passkey", length, ratio))] = sum(tokens) / len(tokens)
                    metrics[str(MetricName("passkey_exact", length, ratio))] = sum(map(all, right)) / len(right)
        logger.debug("evaluated in %.1f s: %s", time.perf_counter() - began, metrics)
        return metrics

    def _loss(self, model: Any, ids: torch.Tensor, ratio: int | None) -> float:
        labels = torch.full_like(ids, IGNORED)
        labels[-self.config.targets :] = ids[-self.config.targets :]
        return float(model(input_ids=ids[None], labels=labels[None], ratios=ratio, use_cache=False).loss)

    @cached_property
    def _fillers(self) -> list[torch.Tensor]:
        """Texts of the longest length that is asked for, on the CPU."""
        config, length = self.config, self.config.longest
        if not length:
            return []
        if config.source == LIBRARY:
            return [text.ids for text in library_texts(self.tokenizer, length, config.texts)]
        path = Path(config.source)
        if not path.is_file():
            raise FileNotFoundError(f"source must be {LIBRARY!r} or a file, got {config.source!r}, which is no file.")
        if path.suffix == ".jsonl":
            texts = _longest_documents(self.tokenizer, path, length, config.texts)
        else:
            texts = [text.ids for text in file_texts(self.tokenizer, path, length, config.texts)]
        enough = [text for text in texts if len(text) == length]
        if len(enough) < config.texts:
            raise ValueError(
                f"{config.source} must give {config.texts} texts of {length} tokens (the longest of lengths and "
                f"passkey_lengths), got {len(enough)} of them and at most {max(map(len, texts), default=0)} tokens; "
                "name shorter lengths, fewer texts or another source."
            )
        return enough

    @cached_property
    def _texts(self) -> list[torch.Tensor]:
        """What perplexity is measured on: in the same document the same targets, however long the passkeys' prompts."""
        end = max(self.config.lengths, default=0)
        return [text[:end] for text in self._fillers]

    @cached_property
    def _prompts(self) -> dict[int, list[PasskeyPrompt]]:
        """Prompts by length."""
        config = self.config
        return {
            length: [
                build_passkey(self.tokenizer, text, length, depth, 1_000_000 * config.passkey_seed + 1000 * row + place)
                for row, text in enumerate(self._fillers)
                for place, depth in enumerate(config.passkey_depths)
            ]
            for length in config.passkey_lengths
        }


# -- parts of a measurement ------------------------------------------------------------------------------------------


@contextmanager
def _reading(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards, come what may, every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _recalled(model: Any, prompt: PasskeyPrompt, ratio: int | None, device: torch.device) -> list[bool]:
    """Which tokens of the answer are the likeliest after the prompt and the answer's tokens before them."""
    answer = torch.tensor(prompt.answer)
    ids = torch.cat([prompt.ids, answer]).to(device)[None]
    # Without labels nothing says that the text ends here, so windows are condensed as they are in decoding.
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1, ratios=ratio, use_cache=False).logits[0]
    right: list[bool] = (logits[:-1].argmax(dim=-1).cpu() == answer).tolist()
    return right


def _longest_documents(tokenizer: Any, path: Path, length: int, count: int) -> list[torch.Tensor]:
    """The first ``length`` tokens of the longest documents, of as many as hold them but at most ``count``.

    If none does, of the longest.
    """
    documents = heapq.nlargest(CANDIDATES * count, _documents(path), key=lambda text: len(text.encode()))
    texts: list[torch.Tensor] = []
    for document in documents:
        ids = encode(tokenizer, document)
        if len(ids) >= length or not texts:
            texts.append(ids[:length])
        if sum(len(text) == length for text in texts) == count:
            break
    return texts


def _documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as err:  # no JSON, or no UTF-8
                raise ValueError(f"{path} must hold one JSON object a line, got line {number}: {err}.") from err
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{path} must have a text column of strings, got line {number} without; rename it.")
            yield text


def _distinct(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list, got {values!r}; write [{values}] even for one.")
    if any(value in values[:at] for at, value in enumerate(values)):
        raise ValueError(f"{name} must name every value once, got {list(values)}; leave out the repeats.")
    return tuple(values)
