"""The decode kernels in Triton's interpreter, and what is refused before a launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from beacon_kernels.beacon_attention import beacon_decode
from beacon_kernels.beacon_attention.reference import reference
from beacon_kernels.tiles import TABLES
from tests.kernels.test_beacon_attention import INTERPRETED, SMALL, Call, draw

Results = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    """Few keys a block and few rows a tile at head_dim 16, so that small stores have many of both."""
    with pytest.MonkeyPatch.context() as patch:
        for itemsize in (2, 4):
            patch.setitem(TABLES["decode"], (16, itemsize), (SMALL, SMALL))
        yield


def cache_runs(lengths: Sequence[int], capacity: int, seqlen_q: int = 1, *, causal: bool = True) -> torch.Tensor:
    """``[2, n]`` for rows of a cache ``[rows, capacity, ...]`` that hold so many entries, the queries' own the last."""
    found = []
    for row, length in enumerate(lengths):
        for query in range(seqlen_q):
            hidden = seqlen_q - 1 - query if causal else 0
            found.append([row * capacity, row * capacity + max(length - hidden, 0)])
    return torch.tensor(found).T


def step(call: Call, dtype: torch.dtype = torch.float32, **options: Any) -> Results:
    """One call; memory that no kernel writes would show as NaN."""
    mine = call.to(dtype)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return beacon_decode(mine.q, mine.keys, mine.values, mine.runs.int(), **options)
    finally:
        torch.use_deterministic_algorithms(False)


def compare(call: Call, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """At most twice the error of the same-dtype reference, measured in float64."""
    scale = options.get("softmax_scale", call.q.shape[2] ** -0.5)
    ours, theirs = step(call, dtype, **options), step(call, dtype, **{**options, "impl": "reference"})
    truth = reference(call.q, call.keys, call.values, call.runs.long(), scale)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for mine, same_dtype, exact in zip(ours, theirs, truth, strict=True):
        seen = exact.isfinite()
        assert mine.shape == exact.shape and torch.equal(mine.isfinite(), seen)
        if seen.any():
            error, allowed = ((found.double() - exact)[seen].abs().max() for found in (mine, same_dtype))
            assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * max(1.0, exact[seen].abs().max())


def equal(ours: Results, theirs: Results) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@INTERPRETED
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (4, 1), (8, 1), (7, 1)])
@pytest.mark.parametrize("seqlen_q, num_splits, dtype", [(1, 2, torch.float32), (3, 1, torch.float16)])
def test_rows_of_different_length(
    heads: int, kv_heads: int, seqlen_q: int, num_splits: int, dtype: torch.dtype
) -> None:
    """Memory that all queries see, and a window of raw tokens in causal order; the last row is empty."""
    memory = cache_runs((40, 3, 0), 48, seqlen_q, causal=False)
    raw = cache_runs((7, 23, 0), 24, seqlen_q)
    call = draw(torch.stack([memory, raw]), [144, 72], [0], heads, kv_heads)
    compare(call, dtype, seqlen_q=seqlen_q, num_splits=num_splits)
    out, lse = step(call, dtype, seqlen_q=seqlen_q, num_splits=num_splits)
    assert not out[-seqlen_q:].any() and bool(lse[:, -seqlen_q:].isneginf().all())


@INTERPRETED
@pytest.mark.parametrize("num_splits", [1, 2, 7, 40, None])
def test_any_number_of_splits(num_splits: int | None) -> None:
    """Blocks 4 + 0 + 1 + 2 of row 0: fewer than splits, and with 40 splits combined in two turns."""
    runs = torch.stack([cache_runs((60, 1), 64), torch.zeros(2, 2), cache_runs((0, 9), 16), cache_runs((20, 0), 24)])
    call = draw(runs.long(), [128, 0, 32, 48], [0])
    compare(call, num_splits=num_splits, softmax_scale=0.5)


@INTERPRETED
def test_more_rows_than_a_tile_has() -> None:
    compare(draw(cache_runs((50, 9), 64, 5)[None], [128], [0], heads=8, kv_heads=1), seqlen_q=5, num_splits=2)


@INTERPRETED
@pytest.mark.parametrize("dim, dtype", [(64, torch.float16), (96, torch.float32), (128, torch.float16)])
def test_tiles_of_the_table(dim: int, dtype: torch.dtype) -> None:
    compare(draw(cache_runs((150, 201), 210)[None], [420], [0], heads=4, kv_heads=1, dim=dim), dtype, num_splits=3)


@INTERPRETED
@settings(max_examples=20)
@given(data=st.data())
def test_any_runs(data: st.DataObject) -> None:
    """Whatever each query sees, nothing included, inside of the stores or not."""
    rows, seqlen_q = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4))
    count = rows * seqlen_q
    runs = [
        [data.draw(st.lists(st.integers(-5, size + 5), min_size=count, max_size=count)) for _ in range(2)]
        for size in sizes
    ]
    compare(draw(torch.tensor(runs), sizes, [0]), seqlen_q=seqlen_q, num_splits=data.draw(st.integers(1, 5)))


@INTERPRETED
def test_runs_are_clamped_to_their_store() -> None:
    """Stores lie in the middle of NaN, which a key too many would bring in."""
    far = 2**31 - 1
    runs = torch.tensor([[[-far - 1, 0, 12, 19], [far, 25, far, far]], [[-3, 4, far, 5], [7, far, far, -1]]])
    call = draw(runs, [20, 6], [0])
    bounds = torch.tensor([20, 6])[:, None, None]
    expected = step(replace(call, runs=torch.minimum(runs.clamp(min=0), bounds)), num_splits=2)
    stores = [
        [
            torch.full((len(t) + 40, *t.shape[1:]), float("nan")).index_copy(0, torch.arange(len(t)) + 20, t.float())
            for t in of
        ]
        for of in (call.keys, call.values)
    ]
    guarded = [[t[20:-20] for t in of] for of in stores]
    found = step(Call(call.q, *guarded, runs, [0]), num_splits=2)
    assert equal(found, expected) and bool(found[0].isfinite().all())


@INTERPRETED
def test_what_no_query_sees_may_be_anything() -> None:
    call = draw(cache_runs((17, 5), 40)[None], [80], [0]).to(torch.float32)
    expected = step(call, num_splits=2)
    for tensor in (*call.keys, *call.values):
        tensor.view(2, 40, 2, 16)[0, 17:] = float("nan")
        tensor.view(2, 40, 2, 16)[1, 5:] = float("nan")
    assert equal(step(call, num_splits=2), expected)


@INTERPRETED
def test_any_layout_and_the_same_bits_every_time() -> None:
    call = draw(torch.stack([cache_runs((30, 11), 32), cache_runs((4, 9), 16)]), [64, 32], [0]).to(torch.float32)
    expected = step(call, num_splits=3)
    assert equal(step(call, num_splits=3), expected)

    def in_fused(tensor: torch.Tensor) -> torch.Tensor:
        """As a slice of a fused projection."""
        return torch.cat([tensor, tensor, tensor], dim=1)[:, : tensor.shape[1]]

    def heads_first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    runs = torch.stack([call.runs, call.runs], dim=-1).int()[..., 0]
    assert not runs.is_contiguous()
    keys, values = [in_fused(k) for k in call.keys], [heads_first(v) for v in call.values]
    assert equal(beacon_decode(in_fused(call.q), keys, values, runs, num_splits=3), expected)


@INTERPRETED
def test_runs_that_grow_in_place() -> None:
    """What a CUDA graph replays: the same tensors and the same splits, other numbers on the device."""
    call = draw(cache_runs((1, 30), 64)[None], [128], [0])
    mine, runs = call.to(torch.float32), call.runs.int()
    for _ in range(3):
        now = replace(call, runs=runs.clone())
        compare(now, num_splits=4)
        assert equal(beacon_decode(mine.q, mine.keys, mine.values, runs, num_splits=4), step(now, num_splits=4))
        runs[0, 1] += 17


class Recorder:
    """Stands in for a kernel and keeps the grids it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *args, **options: None


@INTERPRETED
@pytest.mark.parametrize(
    "rows, kv_heads, capacity, seqlen_q, grid",
    [
        (1, 8, 131072, 1, (8, 33, 1)),  # 264 programs: two per multiprocessor
        (1, 8, 1024, 1, (8, 8, 1)),  # 128 keys a split
        (1, 8, 100, 1, (8, 1, 1)),
        (64, 8, 4096, 1, (512, 1, 1)),  # rows enough
        (3, 2, 65536, 16, (6, 44, 1)),
        (2, 1, 256, 24, (2, 2, 2)),  # 96 rows of a tile: two chunks
    ],
)
def test_grid_follows_from_shapes(
    monkeypatch: pytest.MonkeyPatch, rows: int, kv_heads: int, capacity: int, seqlen_q: int, grid: tuple[int, ...]
) -> None:
    """With tensors that have no values: reading one would raise."""
    from beacon_kernels.beacon_attention import decode
    from beacon_kernels.beacon_attention.decode_api import _splits

    kernel, combine = Recorder(), Recorder()
    monkeypatch.setattr(decode, "decode_kernel", kernel)
    monkeypatch.setattr(decode, "combine_kernel", combine)
    n = rows * seqlen_q
    with FakeTensorMode():
        q = torch.empty(n, 4 * kv_heads, 128, dtype=torch.float16)
        store = torch.empty(rows * capacity, kv_heads, 128, dtype=torch.float16)
        runs, splits = torch.empty(1, 2, n, dtype=torch.int32), _splits(rows, [store], q.device)
        out, lse = decode.decode(q, [store], [store], runs, seqlen_q, 0.1, splits)
    assert out.shape == q.shape and lse.shape == (4 * kv_heads, n)
    assert kernel.grids == [grid]
    assert combine.grids == ([(n, 4 * kv_heads)] if grid[1] > 1 else [])


@INTERPRETED
def test_no_queries() -> None:
    out, lse = step(draw(torch.zeros(1, 2, 0), [5], [0]))
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw(torch.tensor([[[0] * 4, [5] * 4]]), [5], [0]).to(torch.float32)
    right = {"q": call.q, "keys": call.keys, "values": call.values, "runs": call.runs.int()}

    def wrong(message: str, error: type[Exception] = ValueError, **changes: object) -> None:
        with pytest.raises(error, match=message):
            beacon_decode(**{**right, **changes})

    wrong("impl must be one of triton, reference, got 'cuda'", impl="cuda")
    wrong("must share one of float32, float16 and bfloat16", q=call.q.double())
    wrong("head_dim must be the same, got 16 in keys and 8 in q", q=call.q[..., :8])
    wrong("one shape and the same kv_heads", values=[call.values[0][:4]])
    wrong("at least one, got 0 and 0", keys=[], values=[])
    wrong("heads must be a multiple of kv_heads, got 3 heads and 2 kv_heads", q=call.q[:, :3])
    wrong(r"runs must have shape .* got \[1, 2, 3\] for 1 stores and 4 queries", runs=right["runs"][..., :3])
    wrong("with at most 4 stores", keys=call.keys * 5, values=call.values * 5, runs=right["runs"].expand(5, -1, -1))
    wrong("runs must be int32 on cpu, got torch.int64 on cpu", runs=call.runs)
    wrong("runs must be int32 on cpu, got torch.int32 on meta", runs=right["runs"].to("meta"))
    wrong("seqlen_q must divide the number of queries, got seqlen_q=3 for 4 queries", seqlen_q=3)
    wrong("seqlen_q must divide", seqlen_q=0)
    wrong("num_splits must be from 1 to 65535, got 0", num_splits=0)
    wrong("no gradients, .* use beacon_attention", NotImplementedError, q=call.q.clone().requires_grad_())
    wrong("no gradients", NotImplementedError, keys=[call.keys[0].clone().requires_grad_()], impl="reference")
    wide = {name: [torch.zeros(5, 2, 288)] for name in ("keys", "values")}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wrong("head_dim must be from 1 to 256, got 288 in q", q=torch.zeros(4, 4, 288), **wide)
    low = call.to(torch.bfloat16)
    wrong("computes bfloat16 wrongly", q=low.q, keys=low.keys, values=low.values)
    monkeypatch.delenv("TRITON_INTERPRET")
    wrong("needs CUDA tensors, got cpu")
    with torch.no_grad(), pytest.raises(ValueError, match="needs CUDA tensors"):
        beacon_decode(call.q.clone().requires_grad_(), call.keys, call.values, right["runs"])
