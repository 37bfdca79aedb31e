"""Decoding: one more token per row against memory and the raw tail, ours and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from beacon_kernels.beacon_attention import beacon_decode
from benchmarks.gpu.attempts import Attempt, Unavailable
from benchmarks.gpu.cases import Cell


@dataclass(frozen=True)
class Step:
    """One decoding step of a batch.

    Args:
        cell: Its sizes.
        q: ``[rows, heads, head_dim]``.
        keys: Memory, and the raw tail: ``[rows * entries, kv_heads, head_dim]`` each.
        values: Likewise.
        entries: Per row, of memory and of the raw tail.
    """

    cell: Cell
    q: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    entries: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Of keys and values: read once per step."""
        return sum(store.numel() * store.element_size() for store in (*self.keys, *self.values))

    def attempt(self, run: Callable[[], torch.Tensor]) -> Attempt:
        """Of a run that gives ``[rows, heads, head_dim]`` in some shape."""
        return Attempt(
            lambda: [run()], self.bytes, "gbps", ours=lambda outs: [out.reshape(self.q.shape) for out in outs]
        )


def draw(cell: Cell, device: torch.device) -> Step:
    """Random tensors for a step after ``length`` tokens."""
    generator = torch.Generator(device).manual_seed(cell.length + cell.ratio)

    def tensor(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, cell.head_dim, generator=generator, device=device).to(cell.torch_dtype)

    entries = (cell.length // cell.ratio, cell.window)
    keys, values = ([tensor(cell.rows * count, cell.kv_heads) for count in entries] for _ in range(2))
    return Step(cell, tensor(cell.rows, cell.heads), keys, values, entries)


def ours(step: Step) -> Attempt:
    """The decode kernel on the two stores as they are."""
    row = torch.arange(step.cell.rows, device=step.q.device)
    runs = torch.stack([torch.stack([row * count, (row + 1) * count]) for count in step.entries]).int()
    return step.attempt(lambda: beacon_decode(step.q, step.keys, step.values, runs)[0])


def sdpa(step: Step) -> Attempt:
    """PyTorch's choice of kernel, keys and values concatenated beforehand."""
    k, v = (_joined(step, stores).transpose(1, 2).contiguous() for stores in (step.keys, step.values))
    q, gqa = step.q[:, :, None], step.q.shape[1] != k.shape[1]
    return step.attempt(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa))


def flash_attn(step: Step) -> Attempt:
    """The flash-attn package's decoding, where it is installed."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as err:
        raise Unavailable("flash_attn is not installed") from err
    k, v = (_joined(step, stores) for stores in (step.keys, step.values))
    return step.attempt(lambda: flash_attn_with_kvcache(step.q[:, None], k, v))


def _joined(step: Step, stores: list[torch.Tensor]) -> torch.Tensor:
    """``[rows, entries, kv_heads, head_dim]``, memory and raw tail one after the other."""
    return torch.cat([store.unflatten(0, (step.cell.rows, -1)) for store in stores], dim=1)
