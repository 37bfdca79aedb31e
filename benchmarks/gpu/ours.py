"""Our attention kernels on a cell."""

from __future__ import annotations

import torch

from beacon_kernels.beacon_attention import Schedule, beacon_attention, schedule_for
from benchmarks.gpu.attempts import Attempt
from benchmarks.gpu.cases import FLOPS
from benchmarks.gpu.plans import Reading, Sight
from benchmarks.measure import time_on_host

RAW, BEACONS = 0, 1


def attention(reading: Reading, lists: tuple[int, ...] = (RAW, BEACONS)) -> Attempt:
    """Forward or backward pass, one call per list of queries.

    Args:
        reading: The cell's tensors.
        lists: Which lists are computed (the tuner times beacons alone).
    """
    cell = reading.cell
    gradients = cell.kernel == "backward"
    leaves = [leaf.detach().requires_grad_(gradients) for leaf in reading.leaves]
    queries, stores = leaves[:2], leaves[2:]
    empty = stores[0].detach()[:0]
    keys, values = [empty, *stores[0::2]], [empty, *stores[1::2]]
    schedules = {number: schedule(reading, reading.sights[number]) for number in lists}

    def run() -> list[torch.Tensor]:
        return [beacon_attention(queries[i], keys, values, schedules[i])[0] for i in lists]

    pairs = sum(reading.sights[number].pairs for number in lists)
    wanted = [*(queries[number] for number in lists), *stores] if gradients else []
    host = time_on_host(lambda: [schedule(reading, reading.sights[i]) for i in lists], reading.device, repeats=3)
    return Attempt(
        run,
        FLOPS[cell.kernel] * pairs * cell.head_dim * cell.heads,
        "tflops",
        wanted,
        [reading.grads[number] for number in lists],
        {"schedule_ms": host},
        list,
    )


def schedule(reading: Reading, sight: Sight) -> Schedule:
    """The schedule of one list, with the table's tiles, on the device."""
    cell = reading.cell
    return schedule_for(
        sight.runs,
        sight.sizes,
        sight.starts,
        heads=cell.heads,
        kv_heads=cell.kv_heads,
        head_dim=cell.head_dim,
        dtype=cell.torch_dtype,
        device=reading.device,
        gradients=cell.kernel == "backward",
    )
