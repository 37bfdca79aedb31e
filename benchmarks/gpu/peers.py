"""What our forward and backward kernels are measured against: the same plan, or dense causal attention as large.

Peers of the same plan get their keys and values concatenated beforehand; ours reads the stores as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from beacon.attention import AttentionInputs, load_path
from beacon.attention.reference import visible
from benchmarks.gpu.attempts import Attempt, Unavailable
from benchmarks.gpu.cases import FLOPS
from benchmarks.gpu.plans import Reading

MASKED_LENGTH = 32 * 1024  # a materialised mask of more tokens is 14 GB and up
REFUSALS = ("No available kernel", "No viable backend")  # how scaled_dot_product_attention says so
EVEN = 128  # dense causal lengths are multiples of it, which suits every kernel


def _flops(reading: Reading, pairs: int) -> float:
    cell = reading.cell
    return FLOPS[cell.kernel] * pairs * cell.head_dim * cell.heads


def _attempt(
    reading: Reading,
    run: Callable[[], list[torch.Tensor]],
    leaves: list[torch.Tensor],
    pairs: int,
    **more: Any,
) -> Attempt:
    """An attempt at a cell; random gradients where a peer's outputs are its own."""
    if reading.cell.kernel != "backward":
        return Attempt(run, _flops(reading, pairs), "tflops", **more)
    for leaf in leaves:
        leaf.requires_grad_()
    more.setdefault("grads", [torch.randn_like(leaves[0])])
    return Attempt(run, _flops(reading, pairs), "tflops", leaves, **more)


def project_path(reading: Reading) -> Attempt:
    """The project's ``sdpa`` path: PyTorch's attention window by window."""
    leaves = [leaf.detach() for leaf in reading.leaves]
    raw_q, beacon_q, memory_k, memory_v, raw_k, raw_v, beacon_k, beacon_v = leaves
    slots = (raw_k, raw_v, beacon_k, beacon_v)
    inputs = AttentionInputs(raw_q, beacon_q, *slots, [memory_k], [memory_v], scale=reading.inputs.scale)
    path = load_path("sdpa")

    def run() -> list[torch.Tensor]:
        raw, beacon = path(inputs, reading.plan)
        assert beacon is not None
        return [raw, beacon]

    return _attempt(reading, run, leaves, reading.pairs, grads=reading.grads, ours=list)


def dense(backend: SDPBackend) -> Callable[[Reading], Attempt]:
    """Dense causal attention of as many visible pairs by one of PyTorch's kernels."""

    def build(reading: Reading) -> Attempt:
        q, k, v = (part.transpose(1, 2) for part in _square(reading))
        gqa = q.shape[1] != k.shape[1]

        def run() -> list[torch.Tensor]:
            with _only(backend):
                return [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)]

        return _attempt(reading, run, [q, k, v], _square_pairs(q.shape[2]))

    return build


def package(module: str) -> Callable[[Reading], Attempt]:
    """Dense causal attention of as many visible pairs by a package of flash-attn, where it is installed."""

    def build(reading: Reading) -> Attempt:
        try:
            function = importlib.import_module(module).flash_attn_func
        except ImportError as err:
            raise Unavailable(f"{module} is not installed") from err
        q, k, v = _square(reading)

        def run() -> list[torch.Tensor]:
            out = function(q, k, v, causal=True)
            return [out[0] if isinstance(out, tuple) else out]

        return _attempt(reading, run, [q, k, v], _square_pairs(q.shape[1]))

    return build


def masked(reading: Reading) -> Attempt:
    """PyTorch's attention with the plan as a materialised mask; the heads of k and v are expanded beforehand."""
    cell, plan, i = reading.cell, reading.plan, reading.inputs
    if cell.length > MASKED_LENGTH:
        raise Unavailable(f"a mask of {cell.length} tokens is not materialised, the limit is {MASKED_LENGTH}")
    assert i.beacon_q is not None
    stores = ([len(i.memory_k[0])], len(i.raw_k), len(i.beacon_k))
    mask = torch.cat([visible(queries, *stores) for queries in (plan.raw, plan.beacon)])

    def whole(*parts: torch.Tensor) -> torch.Tensor:
        joined = torch.cat(parts)
        return joined.repeat_interleave(cell.heads // joined.shape[1], dim=1).transpose(0, 1)[None]

    q = whole(i.raw_q, i.beacon_q)
    k = whole(i.memory_k[0], i.raw_k, i.beacon_k)
    v = whole(i.memory_v[0], i.raw_v, i.beacon_v)
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]

    def run() -> list[torch.Tensor]:
        with _only(*fused, *[SDPBackend.MATH] * (not q.is_cuda)):
            return [F.scaled_dot_product_attention(q, k, v, attn_mask=mask)]

    return _attempt(reading, run, [q, k, v], reading.pairs)


@contextmanager
def _only(*backends: SDPBackend) -> Iterator[None]:
    """These kernels of PyTorch's alone; a call that none of them serves is :class:`Unavailable`."""
    with sdpa_kernel(list(backends)):
        try:
            yield
        except RuntimeError as err:
            if isinstance(err, torch.OutOfMemoryError) or not any(words in str(err) for words in REFUSALS):
                raise
            raise Unavailable("PyTorch has no such kernel for this call") from err


def _square(reading: Reading) -> list[torch.Tensor]:
    """Random q, k, v ``[1, n, heads, head_dim]`` whose causal attention has about as many pairs as the plan."""
    cell = reading.cell
    length = square_length(reading.pairs)
    shapes = [(1, length, heads, cell.head_dim) for heads in (cell.heads, cell.kv_heads, cell.kv_heads)]
    return [torch.randn(shape, device=reading.device).to(cell.torch_dtype) for shape in shapes]


def square_length(pairs: int) -> int:
    """The n whose n (n + 1) / 2 comes nearest to ``pairs``; a multiple of ``EVEN`` from 8 times that on."""
    length = max(round(((8 * pairs + 1) ** 0.5 - 1) / 2), 1)
    return round(length / EVEN) * EVEN if length >= 8 * EVEN else length


def _square_pairs(length: int) -> int:
    return length * (length + 1) // 2
