"""What reading and decoding cost: time, memory, and the bytes of keys and values that are held, by length.

Ratios are those of the methods that are measured: ``Beacon(8)`` and ``Beacon(32)`` are two.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from beacon.config import check_whole
from beacon.evaluation.methods import Method
from beacon.evaluation.suite import Item, Result
from beacon.evaluation.tasks.measuring import PeakMemory, seconds
from beacon.evaluation.tasks.options import TextTask

METRICS = {
    "read_seconds": False,
    "read_tokens_per_second": True,
    "first_token_seconds": False,
    "decode_tokens_per_second": True,
    "cache_bytes": False,
    "peak_bytes": False,
    "peak_allocated_bytes": False,
}


@dataclass(kw_only=True, eq=False)
class CostTask(TextTask):
    """Cost by length, each time the median of several runs after one that does not count.

    ``read_seconds`` is the time to read a text and foresee what comes next, ``first_token_seconds`` the time to decode
    one token after a text, its reading included, and ``decode_tokens_per_second`` what further tokens cost beyond that.
    ``peak_bytes`` is the most memory in use beyond what was in use after the run that does not count (which may load
    weights and compile): on a GPU what torch has allocated, on a CPU resident memory of the process, which takes in all
    that Python does (so it is a measure for long texts only). ``peak_allocated_bytes`` is the whole, weights included,
    on a GPU. ``cache_bytes`` are the keys and values held when the text has been read. A figure that cannot be had is
    left out, as memory is where a method reads in a process of its own.

    Args:
        new_tokens: Tokens decoded after the first one.
        repeats: Runs of which the median is taken.
    """

    samples: int = 1
    new_tokens: int = 32
    repeats: int = 3

    name = "cost"
    metrics = MappingProxyType(METRICS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("new_tokens", self.new_tokens, 1)
        check_whole("repeats", self.repeats, 1)

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        ids = self.haystack.stretch(tokenizer, item.place["length"], item.content["stretch"]).to(model.device)
        method.continue_text(model, ids, 1 + self.new_tokens)  # loads weights, compiles, fills caches
        peak = None if method.own_process else PeakMemory(model.device)
        read, first, more = [], [], []
        for _ in range(self.repeats):
            read.append(seconds(model, lambda: method.read(model, ids, 1)))
            first.append(seconds(model, lambda: method.continue_text(model, ids, 1)))
            more.append(seconds(model, lambda: method.continue_text(model, ids, 1 + self.new_tokens)))
        scores = {
            "read_seconds": statistics.median(read),
            "read_tokens_per_second": len(ids) / statistics.median(read),
            "first_token_seconds": statistics.median(first),
        }
        decoding = statistics.median(later - sooner for later, sooner in zip(more, first, strict=True))
        if decoding > 0:  # else reading takes so long that its jitter hides the rest
            scores["decode_tokens_per_second"] = self.new_tokens / decoding
        held = method.held_bytes(model, len(ids))
        if held is not None:
            scores["cache_bytes"] = float(held)
        return Result(scores if peak is None else scores | peak.read())
