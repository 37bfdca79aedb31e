"""What reading and decoding with Llama-2-7B are to reach, as data, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu.aims import HOPPER, figures
from benchmarks.inference.contenders import CUDNN, FULL, LOOP, PUBLISHED, STATIC
from benchmarks.inference.setting import LONG
from benchmarks.inference.tasks import DECODE, PREFILL
from benchmarks.results import OURS

SCALE = "7b"  # the aims are about this one
FOUR, THIRTY_TWO, HUNDRED, FOUR_HUNDRED, _ = (text.length for text in LONG)
UP_TO = (FOUR, THIRTY_TWO, HUNDRED, FOUR_HUNDRED)
GB_PER_MIB = 2**20 / 1e9


def sizes_of(case: str) -> tuple[int, int]:
    """Tokens of a case's text, and rows of its batch (0 where it names none)."""
    words = case.split()
    return int(words[2]), int(words[words.index("batch") + 1]) if "batch" in words else 0


class Medians:
    """Medians of one scale's rows that went well.

    Args:
        rows: Rows of a result file.
        scale: Name of the scale.
    """

    def __init__(self, rows: Iterable[Mapping[str, str]], scale: str) -> None:
        self._found: dict[tuple[str, int, int], dict[str, dict[str, float]]] = {}
        for case, found in figures(rows).items():
            kind, name = case.split()[:2]
            if name == scale:
                self._found[kind, *sizes_of(case)] = found

    def of(self, kind: str, length: int, impl: str, metric: str, batch: int = 0) -> float | None:
        """A median; None where there is none."""
        return self._found.get((kind, length, batch), {}).get(impl, {}).get(metric)

    def times(self, length: int, *impls: str) -> float | None:
        """The time to the first token of the fastest of some contenders over ours."""
        ours = self.of(PREFILL, length, OURS, "ttft_s")
        theirs = [value for impl in impls if (value := self.of(PREFILL, length, impl, "ttft_s")) is not None]
        return min(theirs) / ours if ours is not None and theirs else None

    def decoded(self, length: int, way: str, *impls: str) -> float | None:
        """Tokens per second of the fastest of some contenders, one row."""
        found = [self.of(DECODE, length, impl, f"{way}_tokens_per_s", 1) for impl in impls]
        return max((value for value in found if value is not None), default=None)


@dataclass(frozen=True)
class Aim:
    """One aim; where it is about several lengths, the worst of them counts.

    Args:
        what: What is to be reached, in words.
        bound: Where it is met.
        value: Of a length; None where it was not measured.
        lengths: Tokens of the texts.
        most: Whether the bound is from above.
        absolute: Judged on an H100 or H200 alone; else on any NVIDIA GPU.
    """

    what: str
    bound: float
    value: Callable[[Medians, int], float | None]
    lengths: Sequence[int] = UP_TO
    most: bool = False
    absolute: bool = False

    def line(self, found: Medians, machine: str, scale: str) -> str:
        """The verdict."""
        values = {length: value for length in self.lengths if (value := self.value(found, length)) is not None}
        shown, judged = "-", "not measured"
        if values:
            at = (max if self.most else min)(values, key=lambda length: values[length])
            where = f" at {at}" if len(self.lengths) > 1 else ""
            shown = format(values[at], ".0f" if values[at] >= 1000 else ".4g") + where
            judged = "met" if self._holds(values[at]) else "above" if self.most else "below"
            if len(values) < len(self.lengths):
                judged += f" ({len(values)} of {len(self.lengths)} lengths measured)"
        if scale != SCALE or not any(name in machine for name in (HOPPER if self.absolute else ("NVIDIA",))):
            where = "an H100 or H200" if self.absolute else "an NVIDIA GPU"
            judged = f"not judged here (the aim is for {SCALE} on {where})"
        return f"aim: {self.what} {'<=' if self.most else '>='} {self.bound:g}: {shown}: {judged}"

    def _holds(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound


AIMS = (
    Aim("prefill tok/s", 35e3, lambda m, n: m.of(PREFILL, n, OURS, "prefill_tokens_per_s"), absolute=True),
    Aim("x matrix products alone", 1.4, lambda m, n: m.of(PREFILL, n, OURS, "matmul_floor_x"), most=True),
    Aim("full attention's time over ours at 100K", 2.7, lambda m, n: m.times(n, FULL, CUDNN), (HUNDRED,)),
    Aim("our loop's time (segment=1) over ours", 1.25, lambda m, n: m.times(n, LOOP)),
    Aim("published schedule's time over ours", 2.0, lambda m, n: m.times(n, PUBLISHED)),
    Aim("peak GB at 100K", 21.0, lambda m, n: _peak(m, n), (HUNDRED,), most=True, absolute=True),
    Aim("peak GB at 400K beyond that at 100K", 2.0, lambda m, n: _growth(m, n), (FOUR_HUNDRED,), most=True),
    Aim(
        "decoded tok/s, lean loop, batch 1",
        200.0,
        lambda m, n: m.decoded(n, "lean", STATIC),
        (FOUR, HUNDRED, FOUR_HUNDRED),
        absolute=True,
    ),
    Aim(
        "decoded tok/s, generate, batch 1",
        170.0,
        lambda m, n: m.decoded(n, "generate", STATIC, OURS),
        (FOUR, HUNDRED, FOUR_HUNDRED),
        absolute=True,
    ),
    Aim("decoding after 400K over that after 4K (equal: 10 %)", 0.9, lambda m, n: _same(m, n), (FOUR_HUNDRED,)),
)


def _peak(found: Medians, length: int) -> float | None:
    peak = found.of(PREFILL, length, OURS, "peak_mb")
    return None if peak is None else peak * GB_PER_MIB


def _growth(found: Medians, length: int) -> float | None:
    long, short = _peak(found, length), _peak(found, HUNDRED)
    return None if long is None or short is None else long - short


def _same(found: Medians, length: int) -> float | None:
    long, short = (found.decoded(n, "lean", STATIC) for n in (length, FOUR))
    return None if long is None or short is None else long / short
