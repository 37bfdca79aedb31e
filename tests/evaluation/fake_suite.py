"""Tasks and methods that read nothing, so that what is around them can be tested: running, results, reports.

torchrun --standalone --nproc-per-node 2 -m tests.evaluation.fake_suite FOLDER
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods import Method
from beacon.evaluation.suite import Item, Result, Task


@dataclass
class FakeMethod(Method):
    """Answers by chance: well at first, worse the longer the text is."""

    name: str
    skill: float = 1.0
    longest: int | None = None
    closed: int = 0

    def read(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is read here")

    def continue_text(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is read here")

    def close(self, model: Any) -> None:
        self.closed += 1

    def quality(self, place: dict[str, Any]) -> float:
        """Between 0 and 1."""
        length = place["length"]
        if self.longest is not None and length > self.longest:
            raise CannotRun(f"{length} tokens exceed the {self.longest} that {self.name} can read")
        return max(0.0, min(1.0, self.skill * (1.15 - 0.06 * (length.bit_length() - 9))))


@dataclass
class FakeNeedle(Task):
    """A grid of lengths and depths."""

    lengths: Sequence[int] = (1024, 4096, 16384)
    depths: Sequence[float] = (0.0, 0.5, 1.0)
    samples: int = 2
    name: str = "needle"
    metrics: dict[str, bool] = field(default_factory=lambda: {"accuracy": True, "f1": True})
    broken: str | None = None

    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        for length, depth, sample in itertools.product(self.lengths, self.depths, range(self.samples)):
            place = {"length": length, "depth": depth}
            yield Item(f"length {length}, depth {depth}, sample {sample}", place, cluster=f"text {sample}")

    def run(self, method: Any, model: Any, tokenizer: Any, item: Item) -> Result:
        quality = method.quality(dict(item.place)) - 0.25 * (item.place["depth"] == 0.5)
        if self.broken == item.name:
            raise KeyError(item.name)
        right = float(random.random() < quality)
        return Result({"accuracy": right, "f1": max(right, 0.3 * float(torch.rand(())))}, f"it is {right}")


@dataclass
class FakePerplexity(Task):
    """Perplexity by length."""

    lengths: Sequence[int] = (1024, 4096, 16384)
    samples: int = 8
    name: str = "perplexity"
    metrics: dict[str, bool] = field(default_factory=lambda: {"perplexity": False, "nll": False, "entries": False})

    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        for length, sample in itertools.product(self.lengths, range(self.samples)):
            yield Item(f"length {length}, sample {sample}", {"length": length}, cluster=f"text {sample}")

    def run(self, method: Any, model: Any, tokenizer: Any, item: Item) -> Result:
        quality = method.quality(dict(item.place))
        loss = 2.2 + 3 * (1 - quality) + 0.2 * random.random()
        return Result({"perplexity": float(torch.tensor(loss).exp()), "nll": loss, "entries": item.place["length"] / 8})


@dataclass
class FakeCost(Task):
    """Time and memory."""

    lengths: Sequence[int] = (1024, 4096, 16384)
    name: str = "cost"
    metrics: dict[str, bool] = field(
        default_factory=lambda: {"read_seconds": False, "decode_tokens_per_second": True, "cache_bytes": False}
    )

    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        for length in self.lengths:
            yield Item(f"length {length}", {"length": length})

    def run(self, method: Any, model: Any, tokenizer: Any, item: Item) -> Result:
        length = item.place["length"] * (1.5 - method.quality(dict(item.place)))
        return Result(
            {
                "read_seconds": length**1.5 / 4e4,
                "decode_tokens_per_second": 4e4 / length,
                "cache_bytes": length * 2048.0,
            }
        )


@dataclass
class FakeTurns(Task):
    """Dialogues of three turns; what is answered in each depends on chance and its place alone."""

    samples: int = 3
    name: str = "turns"
    metrics: dict[str, bool] = field(default_factory=lambda: {"found": True})
    asked: list[list[str]] = field(default_factory=list)  # items of each call
    errors: dict[str, Exception] = field(default_factory=dict)  # by item

    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        for turn, sample in itertools.product(
            (1, 2, 3), range(self.samples)
        ):  # turns of one are not next to each other
            place = {"length": 1024, "turn": turn}
            yield Item(f"turn {turn}, sample {sample}", place, series=f"sample {sample}", cluster=f"stretch {sample}")

    def run(self, method: Any, model: Any, tokenizer: Any, item: Item) -> Result:
        if item.name in self.errors:
            raise self.errors[item.name]
        return Result({"found": random.random() * method.quality(dict(item.place))}, str(float(torch.rand(()))))

    def run_series(self, method: Any, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Result]:
        self.asked.append([item.name for item in items])
        yield from super().run_series(method, model, tokenizer, items)


def methods() -> dict[str, FakeMethod]:
    made = [
        FakeMethod("stock", 0.4, longest=4096),
        FakeMethod("sliding-window", 0.6),
        FakeMethod("beacon", 0.95),
        FakeMethod("beacon:8", 0.9),
    ]
    return {method.name: method for method in made}


def tasks() -> list[Task]:
    return [FakePerplexity(), FakeNeedle(), FakeCost()]


def fake_model() -> Any:
    import beacon
    from tests.evaluation.tiny import tiny_llama

    return beacon.wrap(tiny_llama(), beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8))


def main() -> None:
    from beacon.evaluation.running import run_suite

    torch.set_num_threads(1)
    run_suite(fake_model(), None, [*tasks(), FakeTurns()], methods(), sys.argv[1])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
