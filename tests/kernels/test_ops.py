"""The kernels as operators of PyTorch: checked by opcheck, kept whole by torch.compile, right beyond 2^31 elements."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from beacon_kernels.beacon_attention import beacon_attention, beacon_decode
from beacon_kernels.beacon_attention.autograd import attention, attention_backward, decoding
from beacon_kernels.rotate_commit import build_gather, rotate_commit
from beacon_kernels.rotate_commit.autograd import rotate_commit_backward_op, rotate_commit_into_op, rotate_commit_op
from tests.kernels.test_beacon_attention import INTERPRETED, Call, draw

RUNS = torch.tensor([[[0] * 6 + [2] * 6, [9] * 12], [[0] * 6 + [6] * 6, list(range(1, 13))]])


def call() -> Call:
    return draw(RUNS, [9, 12], [0, 6]).to(torch.float32)


def forward_arguments(example: Call, *, gradients: bool) -> tuple[Any, ...]:
    schedule = example.schedule(gradients=gradients)
    dq, dkv = schedule.dq, schedule.dkv
    q, keys, values = (
        example.q.requires_grad_(gradients),
        *([tensor.requires_grad_(gradients) for tensor in store] for store in (example.keys, example.values)),
    )
    tile = list(astuple(schedule.forward.tile))
    common = (q, keys, values, schedule.runs, schedule.forward.items, tile, 1, 0.25)
    if dq is None or dkv is None:
        return *common, None, None, None, [], [], 1
    return *common, dq.items, dkv.items, schedule.key_runs, list(astuple(dq.tile)), list(astuple(dkv.tile)), 2


@INTERPRETED
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_of_the_forward_operator(gradients: bool) -> None:
    torch.library.opcheck(attention, forward_arguments(call(), gradients=gradients))


@INTERPRETED
def test_opcheck_of_the_backward_operator() -> None:
    q, keys, values, runs, _, _, packed, scale, dq, dkv, key_runs, dq_tile, dkv_tile, splits = forward_arguments(
        call(), gradients=True
    )
    stores = [[tensor.detach() for tensor in store] for store in (keys, values)]
    out, lse = attention(*forward_arguments(call(), gradients=False))
    arguments = (torch.randn_like(out), torch.randn_like(lse), q.detach(), *stores, out, lse)
    torch.library.opcheck(
        attention_backward, (*arguments, runs, dq, dkv, key_runs, dq_tile, dkv_tile, packed, splits, scale)
    )


@INTERPRETED
def test_decode_as_an_operator() -> None:
    example = call()
    runs = example.runs.int()
    torch.library.opcheck(decoding, (example.q, example.keys, example.values, runs, 2, 0.25, 3))

    def step(q: torch.Tensor) -> torch.Tensor:
        return beacon_decode(q + 1, example.keys, example.values, runs, num_splits=2)[0] * 2

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(example.q), step(example.q))


@INTERPRETED
def test_opcheck_of_rotate_commit() -> None:
    gather = build_gather(torch.tensor([4, 0, 1, 4]), 5)
    keys, values = ([torch.randn(size, 2, 16, requires_grad=True) for size in (2, 3)] for _ in range(2))
    cos, sin = torch.randn(2, 4, 8).unbind()
    torch.library.opcheck(rotate_commit_op, (keys, values, gather.index, cos, sin, gather.offsets, gather.order))
    torch.library.opcheck(rotate_commit_op, (keys, [], None, *torch.randn(2, 5, 8).unbind(), None, None))
    dk, dv = torch.randn(2, 4, 2, 16).unbind()
    torch.library.opcheck(rotate_commit_backward_op, (dk, dv, [2, 3], gather.offsets, gather.order, cos, sin))
    frozen = [[source.detach() for source in sources] for sources in (keys, values)]
    outs = torch.zeros(2, 4, 2, 16).unbind()
    for places in (None, torch.tensor([2, 0, 3, 1])):
        written = [out.clone() for out in outs]
        torch.library.opcheck(rotate_commit_into_op, (*frozen, gather.index, cos, sin, places, *written))


@INTERPRETED
def test_compile_keeps_rotation_whole() -> None:
    gather = build_gather(torch.tensor([4, 0, 1, 4]), 5)
    keys, values = ([torch.randn(size, 2, 16) for size in (2, 3)] for _ in range(2))
    cos, sin = torch.randn(2, 4, 8).unbind()
    cache = torch.zeros(2, 9, 2, 16)

    def commit(cache: torch.Tensor) -> torch.Tensor:
        rotate_commit(keys, values, gather, cos, sin, k_out=cache[0, 2:6], v_out=cache[1, 2:6])
        return cache * 2

    whole = torch.compile(commit, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(cache.clone()), commit(cache.clone()))
    k, v = rotate_commit(keys, values, gather, cos, sin)
    assert v is not None and torch.equal(commit(cache)[:, 2:6], torch.stack([k, v]) * 2)


@INTERPRETED
def test_compile_keeps_the_graph_whole() -> None:
    example = call()
    schedule = example.schedule(gradients=True)
    leaves = [tensor.requires_grad_() for tensor in (example.q, *example.keys, *example.values)]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        q, k0, k1, v0, v1 = tensors
        return beacon_attention(q * 2, [k0, k1], [v0, v1], schedule)[0].sin()

    whole = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, whole):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_results_are_the_same_bit_by_bit() -> None:
    example = call()
    schedule = example.schedule(gradients=True)
    leaves = [tensor.requires_grad_() for tensor in (example.q, *example.keys, *example.values)]
    found = []
    for _ in range(2):
        out, _ = beacon_attention(leaves[0], leaves[1:3], leaves[3:], schedule)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_shapes_of_more_than_2_to_the_31_elements() -> None:
    """On meta tensors: nothing is computed, but shapes and strides are."""
    n, heads, dim = 2**20, 32, 128
    q = torch.empty(n, heads, dim, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(n, heads, dim, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    assert q.numel() > 2**31
    ints = [torch.empty(shape, device="meta", dtype=torch.int32) for shape in ((4, 2, n), (1, 14), (1, 14), (1, 7))]
    runs, tiles, dq, dkv = ints
    key_runs = torch.empty(2, n, device="meta", dtype=torch.int32)
    sizes = [128, 64, 8, 2, 0]
    out, lse = attention(q, [k], [v], runs, tiles, sizes, 1, 0.1, dq, dkv, key_runs, sizes, sizes, 1)
    assert out.shape == q.shape and out.stride() == (heads * dim, dim, 1) and lse.shape == (heads, n)
    gradients = torch.autograd.grad(out, [q, k, v], torch.empty_like(out))
    assert all(gradient.shape == q.shape for gradient in gradients)


@INTERPRETED
def test_addresses_beyond_2_to_the_31_elements() -> None:
    """Entries far apart in a store that is only addressed: memory is taken page by page as it is touched."""
    assert not torch.utils.deterministic.fill_uninitialized_memory or not torch.are_deterministic_algorithms_enabled()
    count, stride = 20, 2**31 // 16
    near = draw(torch.tensor([[[0] * count, list(range(1, count + 1))]]), [count], [0], heads=1, kv_heads=1)
    near = near.to(torch.float16)
    schedule = near.schedule(gradients=True)

    def far(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(stride * (count - 1) + 16, dtype=tensor.dtype)
        assert room.numel() > 2**31
        return room.as_strided(tensor.shape, (stride, 16, 1)).copy_(tensor)

    inputs = [near.q, near.keys[0], near.values[0]]
    do = torch.randn(near.q.shape).half()
    results = []
    for q, k, v, gradient in (inputs + [do], [far(tensor) for tensor in (*inputs, do)]):
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out, lse = beacon_attention(q, [k], [v], schedule)
        results.append([out, lse, *torch.autograd.grad(out, leaves, gradient)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
