"""What the device can do at best, and what the host takes to plan: measured once per run."""

from __future__ import annotations

import torch

from benchmarks.gpu import ours, plans
from benchmarks.gpu.attempts import UNITS
from benchmarks.gpu.cases import Cell
from benchmarks.measure import Spread, time_call, time_on_host
from benchmarks.results import OURS, Row

COPY, PRODUCT, HOST = "ceiling copy", "ceiling product", "host plan"
BYTES = 2 * 2**30
SIDE = 8192


def device_ceilings(device: torch.device) -> list[Row]:
    """A large copy, counting bytes read and written, and a square bf16 product of random matrices."""
    small = device.type == "cpu"
    side, count = (64, 2**16) if small else (SIDE, BYTES // 2)
    shapes = (f"bytes={2 * count}", f"side={side}")
    return [
        _row(COPY, shapes[0], "gbps", _copy(count, device).rate(4 * count / UNITS["gbps"])),
        _row(PRODUCT, shapes[1], "tflops", _product(side, device).rate(2 * side**3 / UNITS["tflops"])),
    ]


def _copy(count: int, device: torch.device) -> Spread:
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return time_call(lambda: target.copy_(source), device)


def _product(side: int, device: torch.device) -> Spread:
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return time_call(lambda: a @ b, device)


def host_times(cell: Cell, device: torch.device) -> list[Row]:
    """Milliseconds on one core for the plan, and for the schedules of its two lists of queries with their upload."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = time_on_host(lambda: plans.read_text(cell), device)
        reading = plans.draw(cell, device)
        schedules = time_on_host(lambda: [ours.schedule(reading, sight) for sight in reading.sights], device)
    finally:
        torch.set_num_threads(threads)
    found = {"plan_ms": plan, "schedule_ms": schedules}
    both = Spread(*(getattr(plan, name) + getattr(schedules, name) for name in ("p20", "p50", "p80")))
    return [Row(HOST, OURS, cell.shape, cell.dtype, metric, value) for metric, value in {**found, "ms": both}.items()]


def _row(case: str, shape: str, metric: str, value: Spread) -> Row:
    return Row(case, "torch", shape, "bfloat16", metric, value)
