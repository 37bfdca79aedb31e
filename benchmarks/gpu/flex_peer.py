"""FlexAttention with the same plan's block mask, compiled for this cell's shapes alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from beacon.attention.flex import BLOCK, block_mask
from benchmarks.gpu.attempts import Attempt, Unavailable
from benchmarks.gpu.cases import FLOPS
from benchmarks.gpu.plans import Reading
from benchmarks.measure import time_on_host


def flex(reading: Reading) -> Attempt:
    """One fused call over both lists; building the mask is timed apart, compiling is the first call's."""
    cell, i = reading.cell, reading.inputs
    gradients = cell.kernel == "backward"
    if gradients and reading.device.type == "cpu":
        raise Unavailable("FlexAttention computes no gradients on a CPU")
    assert i.beacon_q is not None
    sizes = [len(i.memory_k[0]), len(i.raw_k), len(i.beacon_k)]
    q = _packed([torch.cat([i.raw_q, i.beacon_q])], gradients)
    k = _packed([i.memory_k[0], i.raw_k, i.beacon_k], gradients)
    v = _packed([i.memory_v[0], i.raw_v, i.beacon_v], gradients)

    def mask() -> Any:
        with torch.set_grad_enabled(gradients):
            return block_mask(reading.plan, sizes, beacons=True)

    built, kernel = mask(), _compiled(reading.device.type)

    def run() -> list[torch.Tensor]:
        return [kernel(q, k, v, block_mask=built, scale=i.scale, enable_gqa=cell.heads != cell.kv_heads)]

    counts = [len(i.raw_q), len(i.beacon_q)]

    def ours(results: list[torch.Tensor]) -> list[torch.Tensor]:
        flat = [result[0].transpose(0, 1) for result in results]
        queries = flat[0][: sum(counts)].split(counts)
        stores = [part for pair in zip(*(_unpacked(store, sizes) for store in flat[1:]), strict=True) for part in pair]
        return [*queries, *stores]

    return Attempt(
        run,
        FLOPS[cell.kernel] * reading.pairs * cell.head_dim * cell.heads,
        "tflops",
        [q, k, v] if gradients else [],
        [_packed([torch.cat(reading.grads)], False)],
        {"mask_ms": time_on_host(mask, reading.device, repeats=3)},
        ours,
    )


def _compiled(device: str) -> Callable[..., Any]:
    """flex_attention, compiled anew: fixed shapes are what it does best."""
    if device == "cpu":
        return flex_attention
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # else a compiled backward pass runs only once
    torch.compiler.reset()  # a new cell's shapes must not make the last one's dynamic
    compiler: Any = torch.compile
    limit = {"recompile_limit": 8} if "recompile_limit" in inspect.signature(compiler).parameters else {}
    compiled: Callable[..., Any] = compiler(flex_attention, fullgraph=True, dynamic=False, **limit)
    return compiled


def _packed(stores: list[torch.Tensor], gradients: bool) -> torch.Tensor:
    """Stores one after the other, each filled up to whole blocks with zeros: ``[1, heads, n, head_dim]``."""
    parts = []
    for store in stores:
        parts += [store, store.new_zeros(-len(store) % BLOCK, *store.shape[1:])]
    return torch.cat(parts).transpose(0, 1)[None].detach().requires_grad_(gradients)


def _unpacked(packed: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The stores again, from ``[n, heads, head_dim]``."""
    filled = [size + -size % BLOCK for size in sizes]
    return [part[:size] for part, size in zip(packed.split(filled), sizes, strict=True)]
