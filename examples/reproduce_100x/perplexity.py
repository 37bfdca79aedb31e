"""Perplexity of the same 2,048 tokens of held-out packages after more and more text, beside what one would do else."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from beacon.evaluation import Beacon, Method, Outcome, RopeScaled, SlidingWindow, Stock, Truncated, measure_perplexity
from corpus import Corpus
from records import Record
from scales import NATIVE_CONTEXT, STRIDE, WINDOW

CONTEXTS = (512, 2048, 8192, 16384, 32768, 49152)  # tokens read before the targets
TARGETS = 2048
SINKS = 4
RECENT = 256  # tokens before the targets that keep a low ratio, where a text is condensed at mixed ratios
LONGEST = {8: 8192, 32: 32768}  # ratio -> the most tokens read at it: about twice the native context in memory
QUADRATIC_TEXTS = {512: 8, 2048: 8, 8192: 4, 16384: 2}  # of methods with full attention; 1 beyond


class Mixed(Method):
    """Condensed reading at mixed ratios: a low one for the targets and what is near them, a high one before.

    Args:
        low: Ratio of the last windows.
        high: Ratio of all before.
        recent: Tokens at the end that are read at the low ratio.
    """

    def __init__(self, low: int, high: int = 128, recent: int = TARGETS + RECENT) -> None:
        self.low, self.high, self.recent = low, high, recent
        self.name = f"beacon, ratio {high}, then {low}"

    def ratios(self, length: int) -> tuple[int, ...]:
        """One ratio per window of a text of ``length`` tokens."""
        windows = -(-length // STRIDE)
        near = -(-self.recent // STRIDE)
        return tuple([self.high] * max(windows - near, 0) + [self.low] * min(near, windows))

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Any = None) -> Outcome:
        return Beacon(self.ratios(len(ids) + 1)).read(model, ids, keep, progress)

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        return Beacon(self.ratios(len(ids) + count)).continue_text(model, ids, count)


def long_texts(held_out: Corpus, length: int, count: int) -> list[tuple[str, torch.Tensor]]:
    """Disjoint stretches of held-out packages, spread evenly over all that are long enough: name and ids."""
    places = [
        (index, start)
        for index in range(len(held_out))
        for start in range(0, len(held_out.document(index)) - length + 1, length)
    ]
    if len(places) < count:
        raise ValueError(f"held-out packages hold {len(places)} stretches of {length} tokens, got {count} asked.")
    chosen = [places[int((n + 0.5) * len(places) / count)] for n in range(count)]
    texts = [held_out.document(i)[start : start + length].astype(np.int64) for i, start in chosen]
    names = [f"{held_out.names[i]}[{start}:]" for i, start in chosen]
    return list(zip(names, map(torch.from_numpy, texts), strict=True))


def measure(model: Any, held_out: Corpus, results: Path, texts: int, longest: int) -> Path:
    """Perplexity by method and context; rows that are there already are not measured again.

    Args:
        model: The wrapped model.
        held_out: Packages that were not trained on.
        results: Folder for ``perplexity.json``.
        texts: How many; methods with full attention read fewer of the long ones.
        longest: Tokens of the longest text, targets included.

    Returns:
        The result file.
    """
    contexts = [context for context in CONTEXTS if context + TARGETS <= longest]
    drawn = long_texts(held_out, max(contexts) + TARGETS, texts)
    settings = {"targets": TARGETS, "texts": [name for name, _ in drawn], "sinks": SINKS}
    record = Record(results / "perplexity.json", "perplexity of the last 2,048 tokens of each text", settings)
    for context in contexts:
        for method, count in _methods(context, texts):
            for name, ids in drawn[:count]:
                if not record.has(method=method.name, context=context, text=name):
                    ids = ids[-(context + TARGETS) :].to(model.device)
                    found = measure_perplexity(model, [ids], len(ids), TARGETS, method)
                    entries = round(found.entries)
                    record.add(
                        method=method.name, context=context, text=name, loss=round(found.loss, 5), entries=entries
                    )
    return record.file


def _methods(context: int, texts: int) -> list[tuple[Method, int]]:
    ratios = [ratio for ratio in (8, 32, 128) if context <= LONGEST.get(ratio, context)]
    beacons: list[Method] = [Beacon(), *map(Beacon, ratios), Mixed(4), Mixed(8)]
    same = SlidingWindow(NATIVE_CONTEXT - SINKS, SINKS)
    others: list[Method] = [SlidingWindow(WINDOW, SINKS), same, Truncated(0), Truncated(NATIVE_CONTEXT // 2)]
    scaled: list[Method] = [Stock(), *(RopeScaled(kind) for kind in ("linear", "dynamic", "yarn"))]
    few = min(texts, QUADRATIC_TEXTS.get(context, 1))
    return [*((method, texts) for method in (*beacons, *others)), *((method, few) for method in scaled)]
