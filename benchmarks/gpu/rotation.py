"""Rotate and commit: every key of a pass in its frames and every value in its place, ours and eager PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from beacon.modules import Rotary, rotate
from beacon_kernels.rotate_commit import build_gather, rotate_commit
from benchmarks.gpu.attempts import Attempt
from benchmarks.gpu.cases import Cell
from benchmarks.gpu.plans import read_text

BASE = 10_000.0


@dataclass(frozen=True)
class Commit:
    """Keys and values of a pass, raw tokens' and beacons', and where they go.

    Args:
        cell: Its sizes.
        keys: Before rotation: ``[n, kv_heads, head_dim]`` each.
        values: Likewise.
        index: Which entry of both together each result takes: new memory, raw slots, beacon slots; on the CPU.
        table: cos and sin of every result, ``[m, 1, head_dim]``, both halves alike.
    """

    cell: Cell
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    index: torch.Tensor
    table: tuple[torch.Tensor, torch.Tensor]

    def attempt(self, run: object) -> Attempt:
        """Bytes: every entry read once, every result written once, and half of each table's row."""
        assert callable(run)
        entry = self.keys[0][0].numel() * self.keys[0].element_size()
        pool = sum(len(source) for source in self.keys)
        table = self.table[0].numel() * self.table[0].element_size()
        return Attempt(run, 2 * entry * (pool + len(self.index)) + table, "gbps", ours=list)


def draw(cell: Cell, device: torch.device) -> Commit:
    """Random keys and values of a new text read in one pass."""
    plan = read_text(cell)
    generator = torch.Generator(device).manual_seed(cell.length + cell.ratio)

    def tensor(count: int) -> torch.Tensor:
        shape = (count, cell.kv_heads, cell.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(cell.torch_dtype)

    results = (plan.commits, plan.raw_slots, plan.beacon_slots)
    position = torch.cat([kind.position for kind in results]).to(device)
    inv_freq = BASE ** (-torch.arange(0, cell.head_dim, 2) / cell.head_dim)
    counts = (len(plan.raw), len(plan.beacon))
    return Commit(
        cell,
        [tensor(count) for count in counts],
        [tensor(count) for count in counts],
        torch.cat([kind.pool for kind in results]),
        Rotary(inv_freq).table(position, cell.torch_dtype),
    )


def ours(commit: Commit) -> Attempt:
    """One launch."""
    gather = build_gather(commit.index, sum(map(len, commit.keys)), gradients=False).to(commit.keys[0].device)
    cos, sin = (part[..., : part.shape[-1] // 2] for part in commit.table)
    return commit.attempt(lambda: list(rotate_commit(commit.keys, commit.values, gather, cos, sin)))


def eager(commit: Commit) -> Attempt:
    """Concatenate, take, rotate: what the model does without kernels."""
    index = commit.index.to(commit.keys[0].device)

    def run() -> list[torch.Tensor]:
        k, v = (torch.cat(sources).index_select(0, index) for sources in (commit.keys, commit.values))
        return [rotate(k, commit.table), v]

    return commit.attempt(run)
