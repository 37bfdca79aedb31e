"""From a cell to a plan, to what each query sees of each store, and to random tensors for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from beacon import BeaconConfig
from beacon.attention import AttentionInputs
from beacon.attention.kernels import query_runs
from beacon.plan import Plan, RowState, Span, build_plan, schedule
from benchmarks.gpu.cases import Cell


@dataclass(frozen=True)
class Sight:
    """What one list of queries (raw tokens, or beacons) sees.

    Args:
        runs: Integers ``[4, 2, n]`` on the CPU, half-open, of the stores: memory committed before, memory that this
            pass commits, raw slots, beacon slots.
        sizes: Entries of each store.
        starts: First query of every window.
    """

    runs: torch.Tensor
    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key."""
        return int((self.runs[:, 1] - self.runs[:, 0]).clamp(min=0).sum())


def read_text(cell: Cell) -> Plan:
    """The plan that reads a new text in one pass."""
    config = BeaconConfig(window=cell.window, ratios=(cell.ratio,), ratio_policy="fixed")
    state = RowState(0)
    steps = schedule(config, state, cell.length, lambda at: cell.ratio, row=0, span=Span())
    return build_plan(config, [state], [[step for step, _ in steps]], [steps[-1][1]])


def sights(plan: Plan, old: Sequence[int], new: Sequence[int]) -> list[Sight]:
    """What raw tokens and (if there are any) beacons see.

    Args:
        plan: Who sees whom, on the CPU.
        old: Entries per row of memory committed before the pass.
        new: Entries per row that the pass commits.
    """
    sizes = (sum(old), sum(new), len(plan.raw_slots), len(plan.beacon_slots))
    found = []
    for queries, which in ((plan.raw, "raw_queries"), (plan.beacon, "beacon_queries")):
        if len(queries):
            parts = [getattr(block, which) for block in plan.blocks]
            starts = tuple(part.start for part in parts if part.stop > part.start)
            found.append(Sight(query_runs(queries, list(old), list(new)), sizes, starts))
    return found


@dataclass(frozen=True)
class Reading:
    """A cell ready to run: all implementations read the same tensors.

    Args:
        cell: Its sizes.
        plan: Who sees whom, on the device.
        sights: The same for the kernels, on the CPU.
        inputs: Random queries, keys and values.
        grads: Random gradients of the outputs, raw tokens' and beacons'.
    """

    cell: Cell
    plan: Plan
    sights: list[Sight]
    inputs: AttentionInputs
    grads: list[torch.Tensor]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.inputs.raw_q.device

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key."""
        return sum(sight.pairs for sight in self.sights)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What gets gradients: queries, then keys and values of each store."""
        i = self.inputs
        assert i.beacon_q is not None
        return [i.raw_q, i.beacon_q, i.memory_k[0], i.memory_v[0], i.raw_k, i.raw_v, i.beacon_k, i.beacon_v]


def draw(cell: Cell, device: torch.device) -> Reading:
    """Build the plan of a cell and draw its tensors."""
    plan = read_text(cell)
    generator = torch.Generator(device).manual_seed(cell.length + cell.ratio)

    def tensor(count: int, heads: int) -> torch.Tensor:
        shape = (count, heads, cell.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(cell.torch_dtype)

    memory, raw, beacon = len(plan.commits), len(plan.raw_slots), len(plan.beacon_slots)
    inputs = AttentionInputs(
        raw_q=tensor(len(plan.raw), cell.heads),
        beacon_q=tensor(len(plan.beacon), cell.heads),
        raw_k=tensor(raw, cell.kv_heads),
        raw_v=tensor(raw, cell.kv_heads),
        beacon_k=tensor(beacon, cell.kv_heads),
        beacon_v=tensor(beacon, cell.kv_heads),
        memory_k=[tensor(memory, cell.kv_heads)],
        memory_v=[tensor(memory, cell.kv_heads)],
        scale=cell.head_dim**-0.5,
    )
    grads = [tensor(len(plan.raw), cell.heads), tensor(len(plan.beacon), cell.heads)]
    return Reading(cell, plan.to(device), sights(plan, [0], [memory]), inputs, grads)
