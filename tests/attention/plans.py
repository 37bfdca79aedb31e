"""Small plans with every feature, and random queries, keys and values for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from beacon import BeaconConfig
from beacon.attention import AttentionInputs
from beacon.plan import Plan, RowState, Span, build_plan, schedule

# New tokens per row in each call: several windows at once from rows of different length, a row that reads nothing,
# single tokens, calls that begin and end in the middle of a window.
CUTS = ((29, 10), (1, 0), (1, 1), (2, 23), (7, 41))
INTERLEAVE = {"placement": "interleave", "attention": "full-coverage", "attend_beacons": True}


@dataclass(frozen=True)
class Case:
    """One way to read two rows."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    ratios: tuple[int, ...] = (4, 2, 0, 8)
    span: Span = field(default_factory=Span)
    cuts: tuple[tuple[int, ...], ...] = CUTS

    def plans(self) -> Iterator[tuple[Plan, list[int]]]:
        """The plan of every call, and the memory sizes it leaves."""
        config = BeaconConfig(**{"window": 16, "stride": 8, "ratios": (8,), **self.config})
        states = [RowState(row) for row in range(len(self.cuts[0]))]
        for cut in self.cuts:
            steps = [
                schedule(
                    config,
                    states[row],
                    count,
                    lambda at, row=row: self.ratios[(len(at.ratios) + row) % len(self.ratios)],
                    row=row,
                    span=self.span,
                )
                for row, count in enumerate(cut)
            ]
            ends = [row[-1][1] if row else states[number] for number, row in enumerate(steps)]
            plan = build_plan(config, states, [[step for step, _ in row] for row in steps], ends)
            yield plan, [end.memory for end in ends]
            states = ends


CASES = (
    Case("step-expansion", {"stride": 16}),
    Case("overlapping-windows-and-sinks", {"sink": 3}),
    Case("segmentation", {"attention": "segmentation"}),
    Case("full-coverage", {"attention": "full-coverage", "sink": 1}),
    Case("sisters", {"attend_beacons": True}),
    Case("beacons-without-memory", {"attend_memory": False}),
    Case("raw-only", ratios=(0,)),
    Case("kept-head-and-tail", span=Span(keep_first=5, keep_from=21)),
    Case("interleave", {"stride": 16, **INTERLEAVE, "sink": 2}, ratios=(4, 2, 8)),
    Case("interleave-with-ratio-0", {"stride": 16, **INTERLEAVE}),
    Case("interleave-without-memory", {"stride": 16, **INTERLEAVE, "attend_memory": False}, ratios=(4, 2)),
    Case("interleave-step-expansion", {"stride": 16, "placement": "interleave"}, ratios=(4, 2)),
)


def tensors(
    plan: Plan, memory: list[int], dtype: torch.dtype, *, heads: int = 4, kv_heads: int = 2, gradients: bool = False
) -> AttentionInputs:
    """Random inputs of one layer; the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(len(plan.raw))

    def draw(count: int, width: int) -> torch.Tensor:
        values = torch.randn(count, width, 16, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_(gradients)

    stores = [draw(len(keys), kv_heads) for keys in (plan.raw_slots, plan.raw_slots, *[plan.beacon_slots] * 2)]
    return AttentionInputs(
        draw(len(plan.raw), heads),
        draw(len(plan.beacon), heads),
        *stores,
        [draw(size, kv_heads) for size in memory],
        [draw(size, kv_heads) for size in memory],
        scale=0.3,
    )


def leaves(inputs: AttentionInputs) -> list[torch.Tensor]:
    """All tensors of the inputs."""
    own = (inputs.raw_q, inputs.beacon_q, inputs.raw_k, inputs.raw_v, inputs.beacon_k, inputs.beacon_v)
    return [*(tensor for tensor in own if tensor is not None), *inputs.memory_k, *inputs.memory_v]
