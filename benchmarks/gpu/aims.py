"""What the kernels are to reach (issue and GOALS), as data, and how far they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.gpu.ceilings import COPY, HOST
from benchmarks.gpu.implementations import DENSE, GRAPH
from benchmarks.results import OURS

ANY = (0.0, float("inf"))
HOPPER = ("H100", "H200")  # absolute aims are for these
MB = 1e6


@dataclass(frozen=True)
class Aim:
    """One aim: a value of at least ``least``.

    Args:
        kernel: Which cells it is for, the first word of their case.
        value: ``tflops`` (ours), ``plan`` (50 ms over ours), ``copy`` (ours over the copy bandwidth), ``dense`` (ours
            over the best dense causal kernel's) or a peer's name (ours over the peer's).
        least: Where it is met.
        ratios: Least and largest ratio of the cells.
        length: Least length.
        bytes: Least (and one more than the largest) bytes of keys and values.
    """

    kernel: str
    value: str
    least: float
    ratios: tuple[float, float] = ANY
    length: int = 0
    bytes: tuple[float, float] = ANY

    def holds_for(self, case: str, sizes: Mapping[str, str], machine: str) -> bool:
        """Whether a cell is one that the aim is about."""
        if self.value == "tflops" and not any(name in machine for name in HOPPER):
            return False
        if case.split()[0] != self.kernel:
            return False
        low, high = self.ratios
        least, end = self.bytes
        read = stored_bytes(sizes) if self.kernel == "decode" else 0
        return low <= float(sizes["ratio"]) <= high and int(sizes["length"]) >= self.length and least <= read < end


AIMS = (
    Aim("forward", "flex", 1.2),
    Aim("forward", "dense", 0.75),
    Aim("forward", "tflops", 470, ratios=(2, 2), length=32 * 1024),
    Aim("backward", "flex", 1.2, ratios=(8, float("inf"))),
    Aim("backward", "dense", 0.75),
    Aim("backward", "tflops", 350),
    Aim("decode", "copy", 0.85, bytes=(256 * MB, float("inf"))),
    Aim("decode", "sdpa", 1.0, bytes=(0, 256 * MB)),
    Aim("host", "plan", 1.0),
)


def sizes_of(shape: str) -> dict[str, str]:
    """A row's shape, taken apart."""
    return dict(part.split("=", 1) for part in shape.split())


def stored_bytes(sizes: Mapping[str, str], itemsize: int = 2) -> int:
    """Bytes of keys and values that a decoding step in half precision reads."""
    entries = int(sizes["length"]) // int(sizes["ratio"]) + int(sizes["window"])
    return 2 * int(sizes["rows"]) * entries * int(sizes["heads"].split("/")[1]) * int(sizes["head_dim"]) * itemsize


def figures(rows: Iterable[Mapping[str, str]]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by case, implementation and metric; of what went well only."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["p50"]:
            found.setdefault(row["case"], {}).setdefault(row["impl"], {})[row["metric"]] = float(row["p50"])
    return found


def rate(found: Mapping[str, Mapping[str, float]], impl: str) -> float | None:
    """TFLOP/s or GB/s of an implementation."""
    metrics = found.get(impl, {})
    return next((metrics[name] for name in ("tflops", "gbps") if name in metrics), None)


def over(found: Mapping[str, Mapping[str, float]], peer: str) -> float | None:
    """Our rate over a peer's, both of a graph's replay where both have one."""
    for suffix in (GRAPH, ""):
        ours, theirs = rate(found, OURS + suffix), rate(found, peer + suffix)
        if ours is not None and theirs is not None:
            return ours / theirs
    return None


def reached(aim: Aim, case: str, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> float | None:
    """An aim's value at a cell; None where it was not measured."""
    here = found.get(case, {})
    if aim.value == "plan":
        milliseconds = found.get(HOST, {}).get(OURS, {}).get("ms")
        return None if milliseconds is None else 50 / milliseconds
    if aim.value == "tflops":
        return rate(here, OURS)
    if aim.value == "copy":
        ours, copy = rate(here, OURS + GRAPH) or rate(here, OURS), rate(found.get(COPY, {}), "torch")
        return None if ours is None or copy is None else ours / copy
    peers = DENSE if aim.value == "dense" else (aim.value,)
    return min((value for peer in peers if (value := over(here, peer)) is not None), default=None)
