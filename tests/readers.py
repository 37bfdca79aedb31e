"""Tiny wrapped models and random ways to cut and pad texts, shared by the tests that read."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import beacon
from tests.tiny_models import randomize, tiny_model

SHAPES = [
    ("append", "step-expansion", False),
    ("append", "step-expansion", True),
    ("append", "segmentation", False),
    ("append", "full-coverage", False),
    ("append", "full-coverage", True),
    ("interleave", "full-coverage", True),
    ("interleave", "step-expansion", False),
]


def wrapped(config: beacon.BeaconConfig, name: str = "qwen2", dtype: torch.dtype = torch.float32, **own: Any) -> Any:
    """A tiny model with random beacon weights, the same for the same arguments."""
    model = beacon.wrap(tiny_model(name, dtype=dtype, **own), config)
    return randomize(model, seed=1, only="beacon_")


def fixed(window: int = 8, ratio: int = 2, **changes: Any) -> beacon.BeaconConfig:
    """A configuration without surprises."""
    return beacon.BeaconConfig(**{"window": window, "ratios": (ratio,), "ratio_policy": "fixed", **changes})


@st.composite
def configs(draw: Any) -> beacon.BeaconConfig:
    """Any placement, attention, stride, sink, with ratios in sequence."""
    placement, attention, attend_beacons = draw(st.sampled_from(SHAPES))
    window = draw(st.sampled_from([4, 6, 12]))
    stride = window if placement == "interleave" else draw(st.sampled_from([window, window // 2]))
    divisors = [0] + [ratio for ratio in range(1, stride + 1) if stride % ratio == 0]
    return beacon.BeaconConfig(
        window=window,
        stride=stride,
        ratios=tuple(draw(st.lists(st.sampled_from(divisors), min_size=1, max_size=4))),
        ratio_policy="sequence",
        placement=placement,
        attention=attention,
        attend_beacons=attend_beacons,
        attend_memory=draw(st.booleans()),
        sink=draw(st.integers(0, 2)),
    )


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference relative to the largest entry (or 1)."""
    assert ours.shape == theirs.shape, what
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item() if ours.numel() else 0.0
    assert error < tolerance, f"{what}: {error:.2e}"


def pad(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of different lengths."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask
