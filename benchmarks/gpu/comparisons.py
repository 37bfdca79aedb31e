"""A kernel, the same-dtype reference and float64, side by side on small random inputs.

An error is held against twice that of the same-dtype reference plus rounding, the house's rule; a comparison gives the
worst quotient of the two, so 1 is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeAlias

import torch

from beacon_kernels.beacon_attention import Schedule, beacon_attention, beacon_decode, schedule_for
from beacon_kernels.beacon_attention.reference import reference
from beacon_kernels.rotate_commit import build_gather, rotate_commit
from beacon_kernels.rotate_commit.reference import reference as rotated
from benchmarks.gpu.plans import Sight, sights
from tests.attention.plans import Case

Pair: TypeAlias = tuple[torch.Tensor, Any]  # keys and values

RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # limit of norm(error) / norm(truth)


@dataclass(frozen=True)
class Sizes:
    """Heads, channels and dtype of a check."""

    dtype: torch.dtype
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128

    @property
    def name(self) -> str:
        """As rows have it."""
        return f"heads={self.heads}/{self.kv_heads} head_dim={self.head_dim}"


def forward(case: Case, sizes: Sizes, device: torch.device) -> float:
    """Outputs and lse."""
    worst = 0.0
    for sight in _calls(case):
        exact = _tensors(sizes, sight.sizes, sight.runs.shape[-1], device)
        q, _, *stores = (tensor.to(sizes.dtype) for tensor in exact)
        runs, scale = sight.runs.to(device), sizes.head_dim**-0.5
        with torch.no_grad():
            schedule = _schedule(sight, sizes, device, gradients=False)
            found = beacon_attention(q, stores[0::2], stores[1::2], schedule)
            theirs = reference(q, stores[0::2], stores[1::2], runs, scale)
            truth = reference(exact[0], exact[2::2], exact[3::2], runs, scale)
        worst = max(worst, *map(quotient, found, theirs, truth, repeat(sizes.dtype)))
    return worst


def backward(case: Case, sizes: Sizes, device: torch.device) -> float:
    """Gradients of q and of every store; infinite where a second run gives other bits."""
    return max(_backward(sight, sizes, device) for sight in _calls(case))


def _backward(sight: Sight, sizes: Sizes, device: torch.device) -> float:
    exact = _tensors(sizes, sight.sizes, sight.runs.shape[-1], device)
    runs, scale = sight.runs.to(device), sizes.head_dim**-0.5
    schedule = _schedule(sight, sizes, device, gradients=True)

    def definition(q: torch.Tensor, k: list[torch.Tensor], v: list[torch.Tensor]) -> torch.Tensor:
        return reference(q, k, v, runs, scale)[0]

    def kernel(q: torch.Tensor, k: list[torch.Tensor], v: list[torch.Tensor]) -> torch.Tensor:
        return beacon_attention(q, k, v, schedule)[0]

    mine = [tensor.to(sizes.dtype) for tensor in exact]
    found, again = _gradients(kernel, mine), _gradients(kernel, mine)
    if not all(map(torch.equal, found, again)):
        return math.inf
    theirs, truth = _gradients(definition, mine), _gradients(definition, exact)
    return max(map(quotient, found, theirs, truth, repeat(sizes.dtype)))


def decode(seqlen_q: int, sizes: Sizes, device: torch.device) -> float:
    """Rows with much, little and no memory; the raw tail grows with the query."""
    memory, tail = ((1000, 1, 0, 257), (64, 700, 5, 3)) if device.type == "cuda" else ((70, 1, 0), (4, 50, 3))
    lists = []
    for number, entries in enumerate((memory, tail)):
        end = torch.tensor(entries).cumsum(0)
        hi = end[:, None] - (torch.arange(seqlen_q - 1, -1, -1) if number else torch.zeros(seqlen_q, dtype=torch.int64))
        lists.append(torch.stack([(end - torch.tensor(entries)).repeat_interleave(seqlen_q), hi.flatten()]))
    runs = torch.stack(lists).int().to(device)
    exact = _tensors(sizes, (sum(memory), sum(tail)), runs.shape[-1], device)
    q, _, *stores = (tensor.to(sizes.dtype) for tensor in exact)
    scale = sizes.head_dim**-0.5
    with torch.no_grad():
        found = beacon_decode(q, stores[0::2], stores[1::2], runs, seqlen_q=seqlen_q)
        theirs = reference(q, stores[0::2], stores[1::2], runs.long(), scale)
        truth = reference(exact[0], exact[2::2], exact[3::2], runs.long(), scale)
    return max(map(quotient, found, theirs, truth, repeat(sizes.dtype)))


def rotate(sizes: Sizes, device: torch.device) -> float:
    """Entries taken in any order, some twice, some never; results and gradients."""
    counts, taken = ((37, 300, 41), 501) if device.type == "cuda" else ((5, 20, 9), 50)
    index = torch.randint(sum(counts), (taken,))
    gather = build_gather(index, sum(counts)).to(device)
    angles = torch.randn(len(index), sizes.head_dim // 2, device=device)
    tables = angles.cos(), angles.sin()
    exact = _tensors(sizes, counts, 0, device)[2:]
    grads = [torch.randn(len(index), sizes.kv_heads, sizes.head_dim, device=device).to(sizes.dtype) for _ in range(2)]

    def kernel(k: list[torch.Tensor], v: list[torch.Tensor]) -> Pair:
        return rotate_commit(k, v, gather, *tables)

    def definition(k: list[torch.Tensor], v: list[torch.Tensor]) -> Pair:
        wide = (table.to(torch.promote_types(k[0].dtype, table.dtype)) for table in tables)
        return rotated(k, v, index.to(device), *wide)

    def both(function: Callable[..., Pair], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        outs = function(leaves[0::2], leaves[1::2])
        return [*outs, *torch.autograd.grad(outs, leaves, [grad.to(outs[0].dtype) for grad in grads])]

    mine = [tensor.to(sizes.dtype) for tensor in exact]
    found, theirs, truth = both(kernel, mine), both(definition, mine), both(definition, exact)
    return max(map(quotient, found, theirs, truth, repeat(sizes.dtype)))


def quotient(found: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> float:
    """Error over what is allowed; infinite where something is not written or not finite that should be."""
    seen = truth.isfinite()
    if found.shape != truth.shape or not torch.equal(found.isfinite(), seen):
        return math.inf
    if not seen.any():
        return 0.0
    error, theirs_error = ((part.double() - truth)[seen].abs() for part in (found, theirs))
    rounding = 8 * torch.finfo(dtype).eps * max(1.0, float(truth[seen].abs().max()))
    absolute = float(error.max()) / (2 * float(theirs_error.max()) + rounding)
    size = float(truth[seen].norm())
    relative = float(error.norm()) / size / RELATIVE[dtype] if size else 0.0
    return max(absolute, relative)


def _calls(case: Case) -> Iterator[Sight]:
    """Both lists of every plan of a case; of each row's memory two thirds were committed before the pass."""
    for plan, memory in case.plans():
        old = [size * 2 // 3 for size in memory]
        yield from sights(plan, old, [whole - part for whole, part in zip(memory, old, strict=True)])


def _tensors(sizes: Sizes, counts: Sequence[int], queries: int, device: torch.device) -> list[torch.Tensor]:
    """q, a gradient for its output, then keys and values of every store, exact in the dtype, as float64."""
    shapes = [(queries, sizes.heads)] * 2 + [(count, sizes.kv_heads) for count in counts for _ in range(2)]
    drawn = (torch.randn(*shape, sizes.head_dim, device=device) for shape in shapes)
    return [tensor.to(sizes.dtype).double() for tensor in drawn]


def _schedule(sight: Sight, sizes: Sizes, device: torch.device, *, gradients: bool) -> Schedule:
    return schedule_for(
        sight.runs,
        sight.sizes,
        sight.starts,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        dtype=sizes.dtype,
        device=device,
        gradients=gradients,
    )


def _gradients(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the output of a function of q, keys and values with regard to each."""
    q, do, *stores = (tensor.detach().requires_grad_() for tensor in tensors)
    out = function(q, stores[0::2], stores[1::2])
    return list(torch.autograd.grad(out, [q, *stores], do.detach()))
