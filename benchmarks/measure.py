"""Take the time and the memory of a call.

On a GPU the device's own events are read, after warm-up and with the L2 cache flushed before every repeat. The flushes
also keep the device busy while the host prepares the next call, so what the host takes is not part of the time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20  # several times any L2 cache
FLUSHES = 4  # about 0.4 ms of work for the device while the host prepares a call
REPEATS = (5, 200)  # at least, at most
PATIENCE_MS = 300.0  # for all repeats of one call
SLOW_MS = 500.0  # a call that takes longer is repeated twice

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """20 %, 50 % and 80 % quantiles of a measurement."""

    p20: float
    p50: float
    p80: float

    def rate(self, work: float) -> Spread:
        """Work per time; the fastest times are the highest rates."""
        return Spread(work / self.p80, work / self.p50, work / self.p20)


def spread(samples: list[float]) -> Spread:
    """The quantiles of some samples."""
    return Spread(*(float(q) for q in np.quantile(samples, (0.2, 0.5, 0.8))))


def time_call(call: Call, device: torch.device) -> Spread:
    """Milliseconds that the device takes for a call."""
    if device.type == "cpu":
        return time_on_host(call, device, repeats=1)
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    once = _events(call, scratch, 2)[-1]
    repeats = 2 if once > SLOW_MS else int(min(max(PATIENCE_MS / once, REPEATS[0]), REPEATS[1]))
    _events(call, scratch, repeats // 4)
    return spread(_events(call, scratch, repeats))


def time_on_host(call: Call, device: torch.device, *, repeats: int = 5) -> Spread:
    """Milliseconds from calling to the end of all its work, by the host's clock."""
    return spread([first_call(call, device) * 1e3 for _ in range(repeats)])


def first_call(call: Call, device: torch.device) -> float:
    """Seconds of one call by the host's clock: for a first one, compilation is what counts."""
    settle(device)
    begin = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - begin


def peak_mb(call: Call, device: torch.device) -> float | None:
    """MiB that a call takes at its peak beside what was allocated before; None where nobody counts."""
    if device.type == "cpu":
        return None
    settle(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    settle(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of a call (whose results the graph keeps alive)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def settle(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def alive(device: torch.device) -> bool:
    """Whether the device still computes in this process; an illegal access ends that for good."""
    try:
        torch.zeros(1, device=device).add_(1)
        settle(device)
    except Exception:
        return False
    return True


def _events(call: Call, scratch: torch.Tensor, repeats: int) -> list[float]:
    """Milliseconds of every repeat, by the device's events."""
    pairs = []
    for _ in range(repeats):
        for _ in range(FLUSHES):
            scratch.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(scratch.device)
    return [begin.elapsed_time(end) for begin, end in pairs]
