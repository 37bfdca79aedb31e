"""The kernels in Triton's interpreter, output and every gradient, and what is refused before a launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from beacon.attention.kernels import query_runs
from beacon.plan import Plan, Queries
from beacon_kernels.beacon_attention import Schedule, beacon_attention, build_schedule, schedule_for
from beacon_kernels.beacon_attention.reference import reference
from beacon_kernels.tiles import Tile, tile_for
from tests.attention.plans import CASES, Case

SMALL = Tile(16, 16, 4, 1)
LOOPING = Tile(16, 16, 4, 1, programs_per_sm=5)  # persistent programs: each takes several work items
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled")


@dataclass(frozen=True)
class Call:
    """Queries, stores and who sees what; tensors in float64."""

    q: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    runs: torch.Tensor
    starts: list[int]

    def schedule(
        self, packed: int = 1, *, gradients: bool = False, tiles: tuple[Tile, Tile, Tile] | None = None
    ) -> Schedule:
        tile, *backward = (LOOPING, SMALL, LOOPING) if tiles is None else tiles
        sizes, both = [len(k) for k in self.keys], (backward[0], backward[1]) if gradients else None
        schedule = build_schedule(self.runs, sizes, self.starts, tile=tile, packed=packed, backward=both)
        return replace(schedule, splits=packed)  # likewise heads of one group

    def to(self, dtype: torch.dtype) -> Call:
        stores = ([tensor.to(dtype) for tensor in store] for store in (self.keys, self.values))
        return Call(self.q.to(dtype), *stores, self.runs, self.starts)


def draw(
    runs: torch.Tensor, sizes: list[int], starts: list[int], heads: int = 4, kv_heads: int = 2, dim: int = 16
) -> Call:
    generator = torch.Generator().manual_seed(runs.shape[-1])

    def one(count: int, width: int) -> torch.Tensor:
        return torch.randn(count, width, dim, generator=generator, dtype=torch.float64)

    q = one(runs.shape[-1], heads)
    return Call(q, [one(size, kv_heads) for size in sizes], [one(size, kv_heads) for size in sizes], runs, starts)


def calls(case: Case) -> list[Call]:
    """Both lists of every plan of a case; of each row's memory two thirds were committed before this pass."""
    found = []
    for plan, memory in case.plans():
        old = [size * 2 // 3 for size in memory]
        for queries, which in ((plan.raw, "raw_queries"), (plan.beacon, "beacon_queries")):
            if len(queries):
                found.append(_call(plan, queries, which, old, [m - o for m, o in zip(memory, old, strict=True)]))
    return found


def _call(plan: Plan, queries: Queries, which: str, old: list[int], new: list[int]) -> Call:
    slices = [getattr(block, which) for block in plan.blocks]
    starts = [part.start for part in slices if part.stop > part.start]
    return draw(
        query_runs(queries, old, new), [sum(old), sum(new), len(plan.raw_slots), len(plan.beacon_slots)], starts
    )


def compare(
    call: Call,
    dtype: torch.dtype,
    packed: int = 1,
    *,
    gradients: bool = True,
    tiles: tuple[Tile, Tile, Tile] | None = None,
) -> None:
    """At most twice the error of the same-dtype reference, measured in float64."""
    schedule = call.schedule(packed, gradients=gradients, tiles=tiles)
    ours = results(call.to(dtype), schedule, "triton", gradients)
    theirs = results(call.to(dtype), schedule, "reference", gradients)
    truth = results(call, schedule, "reference", gradients)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32 and len(ours) == len(truth)
    for mine, plain, exact in zip(ours, theirs, truth, strict=True):
        seen = exact.isfinite()
        assert mine.shape == exact.shape and torch.equal(mine.isfinite(), seen)
        if seen.any():
            error, allowed = ((found.double() - exact)[seen].abs().max() for found in (mine, plain))
            assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * max(1.0, exact[seen].abs().max())


def results(call: Call, schedule: Schedule, impl: str, gradients: bool) -> list[torch.Tensor]:
    """Output, lse, and the gradients of everything for random gradients of both."""
    leaves = [tensor.clone().requires_grad_(gradients) for tensor in (call.q, *call.keys, *call.values)]
    q, stores = leaves[0], leaves[1:]
    keys, values = stores[: len(call.keys)], stores[len(call.keys) :]
    if impl == "reference":  # float64 too, which the public function refuses
        out, lse = reference(q, keys, values, schedule.runs[: len(keys)].long(), q.shape[2] ** -0.5)
    else:
        out, lse = beacon_attention(q, keys, values, schedule, impl=impl)
    if not gradients:
        return [out, lse]
    generator = torch.Generator().manual_seed(1)
    do, dlse = (torch.randn(found.shape, generator=generator, dtype=torch.float64) for found in (out, lse))
    found = torch.autograd.grad([out, lse], leaves, [do.to(out.dtype), dlse.to(lse.dtype)], materialize_grads=True)
    return [out.detach(), lse.detach(), *found]


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_of_every_kind(case: Case) -> None:
    for number, call in enumerate(calls(case)):
        compare(call, (torch.float32, torch.float16)[number % 2], packed=1 + number % 2)


@INTERPRETED
@settings(max_examples=15)
@given(data=st.data())
def test_any_runs(data: st.DataObject) -> None:
    """Whatever each query sees, nothing included; a backward pass is only for plans."""
    count = data.draw(st.integers(1, 40))
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
    ends = [
        [data.draw(st.lists(st.integers(0, size), min_size=count, max_size=count)) for _ in range(2)] for size in sizes
    ]
    starts = sorted({0, *data.draw(st.lists(st.integers(0, count - 1), max_size=3))})
    compare(
        draw(torch.tensor(ends), sizes, starts),
        torch.float32,
        packed=data.draw(st.sampled_from([1, 2])),
        gradients=False,
    )


@INTERPRETED
@settings(max_examples=6)
@given(data=st.data())
def test_runs_whose_bounds_rise(data: st.DataObject) -> None:
    """Then every key is seen by one run of queries, if by any."""
    count = data.draw(st.integers(1, 40))
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
    ends = [
        [sorted(data.draw(st.lists(st.integers(0, size), min_size=count, max_size=count))) for _ in range(2)]
        for size in sizes
    ]
    starts = sorted({0, *data.draw(st.lists(st.integers(0, count - 1), max_size=3))})
    compare(draw(torch.tensor(ends), sizes, starts), torch.float32, packed=data.draw(st.sampled_from([1, 2])))


@INTERPRETED
@pytest.mark.parametrize("dim", [8, 80, 96])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1)])
def test_head_dims_and_groups(dim: int, heads: int, kv_heads: int) -> None:
    runs = torch.tensor([[[0] * 21, [33] * 21], [list(range(21)), list(range(2, 23))]])
    compare(draw(runs, [33, 23], [0, 9], heads, kv_heads, dim), torch.float32, packed=heads // kv_heads)


def windows(count: int, window: int, beacons: int, old: int, heads: int = 4, kv_heads: int = 2) -> list[Call]:
    """Raw tokens and beacons (step-expansion) of whole windows; ``old`` entries in memory before."""
    a, b = torch.arange(count * window), torch.arange(count * beacons)
    at, own = a // window, b // beacons
    memory, zero = torch.full_like(a, old), torch.zeros_like(a)
    raw = [[zero, memory], [zero, at * beacons], [at * window, a + 1], [zero, zero]]
    read = own * window + (b % beacons + 1) * (window // beacons)
    few = [[0 * b, 0 * b + old], [0 * b, own * beacons], [own * window, read], [b, b + 1]]
    sizes = [old, count * beacons, count * window, count * beacons]
    return [
        draw(torch.stack([torch.stack(run) for run in runs]), sizes, starts, heads, kv_heads)
        for runs, starts in ((raw, list(range(0, len(a), window))), (few, list(range(0, len(b), beacons))))
    ]


@INTERPRETED
@pytest.mark.parametrize(
    "sizes, packed",
    [(((32, 16), (16, 32), (16, 64)), 1), (((16, 64), (32, 16), (64, 16)), 2)],
)
def test_tiles_that_are_not_square(sizes: tuple[tuple[int, int], ...], packed: int) -> None:
    """In one dimension they hold whole blocks and masked ones, in queries and in keys."""
    tiles = tuple(Tile(*size, 4, 1, 3) for size in sizes)
    for number, call in enumerate(windows(2, 128, 8, 37)):
        compare(call, (torch.float32, torch.float16)[number], packed, tiles=tiles)


@INTERPRETED
def test_a_group_of_seven_heads_shares_a_tile() -> None:
    for call in windows(2, 16, 4, 5, heads=7, kv_heads=1):
        compare(call, torch.float32, packed=7, tiles=(Tile(32, 16, 4, 1),) * 3)


@INTERPRETED
def test_stores_of_different_strides() -> None:
    """Then addresses are worked out store by store."""
    call = windows(2, 32, 4, 9)[0].to(torch.float32)
    wide = [torch.cat([k, k], dim=1)[:, :2] if number % 2 else k for number, k in enumerate(call.keys)]
    schedule = call.schedule(gradients=True)
    found = []
    for keys in (call.keys, wide):
        leaves = [
            call.q.requires_grad_(),
            *(k.requires_grad_() for k in keys),
            *(v.requires_grad_() for v in call.values),
        ]
        out, _ = beacon_attention(leaves[0], leaves[1:5], leaves[5:], schedule)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_most_blocks_take_no_mask() -> None:
    call, few = windows(3, 128, 16, 64)
    tile = Tile(32, 16, 4, 1)
    for one, share in ((call, 0.75), (few, 0.3)):
        schedule = one.schedule(gradients=True, tiles=(tile, tile, Tile(16, 32, 4, 1)))
        queries = schedule.forward.items[:, 2:].view(-1, 4, 3)
        whole = (queries[..., 1] - queries[..., 0]).sum() / (queries[..., 2] - queries[..., 0]).sum()
        assert share < whole < 1
        keys = schedule.dkv.items[:, 3:]
        spans = keys[:, 3] - keys[:, 0]
        whole = (keys[:, 2] - keys[:, 1]).sum() / spans.sum()
        assert share / 2 < whole < 1 and bool((spans.diff() <= 0).all())
        # Raw keys of two windows never share a tile: nobody reads both.
        raw = schedule.dkv.items[schedule.dkv.items[:, 0] == 2]
        assert bool((raw[:, 1] // 128 == (raw[:, 2] - 1) // 128).all())


def test_heads_and_shares_that_a_schedule_takes() -> None:
    call, few = windows(8, 1024, 8, 0, heads=1, kv_heads=1)

    def of(one: Call, heads: int, kv_heads: int, **changes: object) -> Schedule:
        fixed = {"head_dim": 128, "dtype": torch.bfloat16, "device": "cpu", "gradients": True}
        sizes = [len(k) for k in one.keys]
        return schedule_for(one.runs, sizes, one.starts, heads=heads, kv_heads=kv_heads, **{**fixed, **changes})

    assert of(call, 32, 8).packed == 1 and of(call, 32, 8).forward.tile.block_m == 128
    assert of(few, 32, 8).packed == 4 and of(few, 32, 8).forward.tile.block_m == 32
    assert of(few, 28, 4).packed == 7 and of(few, 28, 4).forward.tile.block_m == 64
    assert of(few, 128, 1).packed <= 64  # no more than the tile for dq takes
    assert of(call, 32, 32).splits == 1 and of(call, 32, 8).splits > 1  # eight windows: the first keys are read longest
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 32 heads and 0 kv_heads"):
        of(call, 32, 0)


@INTERPRETED
def test_sliced_tensors_need_no_copy() -> None:
    call = draw(torch.tensor([[[0] * 9, list(range(1, 10))]]), [9], [0]).to(torch.float32)
    wide = [torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in (call.q, call.keys[0], call.values[0])]
    assert not wide[0].is_contiguous()
    leaves = [[t.requires_grad_() for t in (call.q, call.keys[0], call.values[0])], [t.requires_grad_() for t in wide]]
    schedule = call.schedule(gradients=True)
    outs = [beacon_attention(q, [k], [v], schedule)[0] for q, k, v in leaves]
    assert torch.equal(*outs)
    gradient = torch.randn(9, 4, 32, generator=torch.Generator().manual_seed(2))[..., ::2]
    for do in (gradient, torch.ones(()).expand_as(outs[0]), gradient[:, :1].expand(-1, 4, -1)):
        dense = torch.autograd.grad(outs[0], leaves[0], do.contiguous(), retain_graph=True)
        sliced = torch.autograd.grad(outs[1], leaves[1], do, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(dense, sliced, strict=True))


def test_tiles_cover_every_query_once_and_costly_ones_come_first() -> None:
    for case in CASES:
        for call in calls(case):
            tiles = call.schedule(packed=2).forward.items.long()
            covered = torch.cat([torch.arange(int(first), int(end)) for first, end in tiles[:, :2]])
            assert torch.equal(covered.sort().values, torch.arange(len(call.q)))
            lo, mid, hi = tiles[:, 2::3], tiles[:, 3::3], tiles[:, 4::3]
            assert bool(((lo <= mid) & (mid <= hi) & ((mid - lo) % SMALL.block_n == 0)).all())
            cost = -(-(hi - lo) // SMALL.block_n)
            assert bool((cost.sum(1).diff() <= 0).all())


def test_what_is_refused() -> None:
    call = draw(torch.tensor([[[0] * 4, [5] * 4]]), [5], [0]).to(torch.float32)
    schedule = call.schedule()

    def wrong(message: str, error: type[Exception] = ValueError, **changes: object) -> None:
        arguments = {"q": call.q, "keys": call.keys, "values": call.values, "schedule": schedule, **changes}
        impl = arguments.pop("impl", "triton")
        with pytest.raises(error, match=message), torch.no_grad():
            beacon_attention(**arguments, impl=impl)

    wrong("impl must be one of triton, reference, got 'cuda'", impl="cuda")
    wrong("must share one of float32, float16 and bfloat16", q=call.q.half())
    wrong("must share one of", q=call.q.double())
    wrong("head_dim must be the same, got 16 in keys and 8 in q", q=call.q[..., :8])
    wrong("heads must be a multiple of kv_heads", q=call.q[:, :3])
    wrong("must have shape", q=call.q[0])
    wrong("built for 5 entries in store 0, got 4", keys=[call.keys[0][:4]], values=[call.values[0][:4]])
    wrong("one shape and the same kv_heads", values=[call.values[0][:, :1]])
    wrong("must be for 3 queries", q=call.q[:3])
    wrong("at least one, got 0 and 0", keys=[], values=[])
    wrong("head_dim must be contiguous, got stride 4 in q", q=call.q.transpose(1, 2).contiguous().transpose(1, 2))
    q = call.q.clone().requires_grad_()
    with pytest.raises(ValueError, match="gradients need a schedule with a backward pass"):
        beacon_attention(q, call.keys, call.values, schedule)
    twice = draw(torch.tensor([[[0, 1, 0], [1, 2, 1]]]), [2], [0])
    with pytest.raises(ValueError, match="one contiguous run of queries, got several for entry 0 of store 0"):
        twice.schedule(gradients=True)
    with pytest.raises(ValueError, match=r"got \[0, 5\) for query 0 in store 0 of 4 entries"):
        replace(call, keys=[call.keys[0][:4]]).schedule()
    for starts in ([1], [0, 0], [0, 9], []):
        with pytest.raises(ValueError, match="starts must begin with 0 and rise below 4"):
            replace(call, starts=starts).schedule()
    with pytest.raises(ValueError, match="packed must be from 1 to block_m, got packed=17 for block_m=16"):
        call.schedule(packed=17)
    wrong("softmax_scale must be positive and finite, got -1.0", softmax_scale=-1.0)
    wrong("can be at most 4 stores, got 5", keys=call.keys * 5, values=call.values * 5)
    empty = [torch.zeros(5, 0, 16)]
    wrong("at least one kv_head, got 0", keys=empty, values=empty)
    other = draw(torch.tensor([[[0] * 40, [5] * 40]]), [5], [0]).schedule()
    wrong("schedule's forward must cover 4 entries, got 40", schedule=replace(schedule, forward=other.forward))
    wrong("schedule's runs must be contiguous int32", schedule=replace(schedule, runs=schedule.runs.long()))
    wrong("splits must divide 2 heads per kv_head, got 3", schedule=replace(schedule, splits=3))
    with pytest.raises(ValueError, match="entries must number at most 2147483647"):
        build_schedule(torch.zeros(1, 2, 1), [2**31], [0], tile=SMALL)
    with pytest.raises(ValueError, match=r"head_dim must be at most 256 .*got head_dim=257"):
        tile_for("forward", 257, 2, 90)
    assert tile_for("forward", 80, 2, 90) == tile_for("forward", 96, 2, 90)
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or more, got 7\.5"):
        tile_for("forward", 64, 2, 75)
