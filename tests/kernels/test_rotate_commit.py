"""Gather, rotate and commit in Triton's interpreter, and what is refused before a launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from beacon.modules import Rotary
from beacon.modules import rotate as stock_rotate
from beacon_kernels.rotate_commit import Gather, build_gather, rotate_commit
from beacon_kernels.rotate_commit.reference import reference
from tests.attention.plans import CASES, Case
from tests.kernels.test_aot import compiled

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled")
DTYPES = (torch.float32, torch.float16)


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """What a kernel leaves unwritten of a new tensor is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Call:
    """Arguments of one call, and the gradients that come back to it."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor] | None
    gather: Gather | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    grads: list[torch.Tensor]

    @property
    def sources(self) -> list[torch.Tensor]:
        return [*self.keys, *(self.values or [])]

    def doubled(self) -> Call:
        lists = ([x.double() for x in xs or []] for xs in (self.keys, self.values, self.grads))
        keys, values, grads = lists
        tables = (None if x is None else x.double() for x in (self.cos, self.sin))
        return Call(keys, None if self.values is None else values, self.gather, *tables, grads)

    def run(self, impl: str) -> list[torch.Tensor]:
        """Results and the gradient of every source."""
        leaves = [source.detach().requires_grad_() for source in self.sources]
        keys, values = leaves[: len(self.keys)], leaves[len(self.keys) :] if self.values is not None else None
        if self.keys[0].dtype == torch.float64:
            cos, sin = (x if x is None else x.flatten(0, -2) for x in (self.cos, self.sin))
            out = reference(keys, values, None if self.gather is None else self.gather.index, cos, sin)
        else:
            out = rotate_commit(keys, values, self.gather, self.cos, self.sin, impl=impl)
        results = [x for x in out if x is not None]
        return [x.detach() for x in results] + list(torch.autograd.grad(results, leaves, self.grads))


def draw(
    sizes: Sequence[int],
    index: torch.Tensor | None,
    *,
    heads: int = 2,
    dim: int = 16,
    half: int | None = None,
    values: bool = True,
    dtype: torch.dtype = torch.float32,
    tables: torch.dtype = torch.float32,
    position: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> Call:
    gather = None if index is None else build_gather(index, sum(sizes))
    count = sum(sizes) if index is None else len(index)
    half = dim // 2 if half is None else half
    generator = torch.Generator().manual_seed(count)

    def one(rows: int) -> torch.Tensor:
        return torch.randn(rows, heads, dim, generator=generator).to(dtype)

    cos = sin = None
    if half:
        position = torch.arange(count) % 37 if position is None else position
        cos, sin = Rotary(10000.0 ** -(torch.arange(half) / half), scaling).table(position, tables)
        cos, sin = cos[..., :half], sin[..., :half]  # [m, 1, half], a slice
    keys = [one(size) for size in sizes]
    return Call(
        keys,
        [one(size) for size in sizes] if values else None,
        gather,
        cos,
        sin,
        [one(count) for _ in range(1 + values)],
    )


def compare(call: Call) -> None:
    """At most twice the error of the same-dtype reference, measured in float64; results and every gradient."""
    with filled_with_nan():
        ours = call.run("triton")
    theirs, truths = call.run("reference"), call.doubled().run("reference")
    dtype = call.keys[0].dtype
    for mine, other, truth in zip(ours, theirs, truths, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
        if truth.numel():
            error, allowed = ((x.double() - truth).abs().max() for x in (mine, other))
            assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max()


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_of_every_kind(case: Case) -> None:
    """Window slots and commits of every pass, and its queries; with stride < window entries are used several times."""
    cached = several = 0
    for number, (plan, _) in enumerate(case.plans()):
        sizes = [cached, len(plan.raw), len(plan.beacon)]
        for keys in (plan.raw_slots, plan.beacon_slots, plan.commits):
            several += len(keys.pool) - len(keys.pool.unique())
            compare(draw(sizes, keys.pool, position=keys.position, dtype=DTYPES[number % 2]))
        compare(draw([len(plan.raw)], None, heads=3, position=plan.raw.position, values=False))
        cached = sum(plan.open_counts)
    assert bool(several) == ("stride" not in case.config)  # a case with windows of its own has stride = window


@INTERPRETED
@settings(max_examples=25)
@given(data=st.data())
def test_any_index(data: st.DataObject) -> None:
    """Whatever is taken, nothing and empty sources included, in every width."""
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    pool = sum(sizes)
    taken = st.lists(st.integers(0, pool - 1), max_size=150) if pool else st.just([])
    index = data.draw(st.none() | taken)
    dim = data.draw(st.sampled_from([2, 6, 16, 20]))
    kind = data.draw(st.sampled_from([torch.int32, torch.int64]))
    compare(
        draw(
            sizes,
            None if index is None else torch.tensor(index, dtype=kind),
            heads=data.draw(st.integers(1, 3)),
            dim=dim,
            half=data.draw(st.integers(0, dim // 2)),
            values=data.draw(st.booleans()),
            dtype=data.draw(st.sampled_from(DTYPES)),
        )
    )


@INTERPRETED
@pytest.mark.parametrize("dim, half", [(256, 128), (128, 64), (96, 16), (80, 40), (64, 0)])
@pytest.mark.parametrize("tables", DTYPES)
def test_head_dims_partial_rotary_and_scaled_tables(dim: int, half: int, tables: torch.dtype) -> None:
    index = torch.tensor([8, 0, 3, 3, 12, 5, 3, 20, 19, 1])
    compare(draw([9, 4, 8], index, dim=dim, half=half, dtype=torch.float16, tables=tables, scaling=1.3))


@INTERPRETED
def test_programs_may_take_several_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw([200, 90], torch.randint(0, 290, (300,)), heads=5)
    expected = call.run("triton")
    for programs in (1, 7):
        monkeypatch.setattr("beacon_kernels.rotate_commit.forward.PROGRAMS", programs)
        assert all(torch.equal(a, b) for a, b in zip(call.run("triton"), expected, strict=True))


def test_reference_is_what_the_library_does() -> None:
    call = draw([5, 7], torch.tensor([11, 0, 4, 5, 5, 2]), half=6).doubled()
    assert call.gather is not None and call.values is not None and call.cos is not None and call.sin is not None
    k, v = reference(call.keys, call.values, call.gather.index, call.cos[:, 0], call.sin[:, 0])
    taken = [torch.cat(source)[call.gather.index.long()] for source in (call.keys, call.values)]
    tables = tuple(torch.cat([table, table], dim=-1) for table in (call.cos, call.sin))
    assert v is not None and torch.equal(v, taken[1])
    torch.testing.assert_close(k, stock_rotate(taken[0], tables), rtol=0, atol=1e-15)
    leaves = [x.requires_grad_() for x in call.keys]
    assert torch.autograd.gradcheck(
        lambda *x: reference(x, None, call.gather.index, call.cos[:, 0], call.sin[:, 0])[0], leaves
    )


@INTERPRETED
def test_sliced_sources_and_any_gradient_layout() -> None:
    """Slices of a fused projection as sources; sliced, transposed and expanded gradients: the same bits."""
    index = torch.tensor([0, 6, 6, 2, 9, 6, 3, 11])
    call = draw([7, 5], index)
    assert call.values is not None
    fused = [torch.cat([k, v], dim=1) for k, v in zip(call.keys, call.values, strict=True)]
    assert call.cos is not None and not call.cos.is_contiguous()
    sliced = replace(call, keys=[x[:, :2] for x in fused], values=[x[:, 2:] for x in fused], cos=call.cos.contiguous())
    assert not sliced.keys[0].is_contiguous()
    expected = call.run("triton")
    assert all(torch.equal(a, b) for a, b in zip(sliced.run("triton"), expected, strict=True))

    shape = call.grads[0].shape
    row, head, channel = torch.randn(1, *shape[1:]), torch.randn(shape[0], 1, shape[2]), torch.randn(*shape[:2], 1)
    layouts = [
        torch.randn(*shape[:2], 2 * shape[2])[..., : shape[2]],
        torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1),
        torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2),
        torch.randn(*shape[:2], 2 * shape[2])[..., ::2],
        *(part.expand(shape) for part in (row, head, channel, torch.tensor(1.0))),
    ]
    for layout in layouts:
        strided, plain = (replace(call, grads=[grad, grad]) for grad in (layout, layout.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(strided.run("triton"), plain.run("triton"), strict=True))
        compare(strided)


@INTERPRETED
def test_the_same_bits_every_time() -> None:
    call = draw([30, 20], torch.randint(0, 50, (400,)), dtype=torch.float16)
    first = call.run("triton")
    assert all(torch.equal(a, b) for a, b in zip(call.run("triton"), first, strict=True))


@INTERPRETED
@pytest.mark.parametrize("frozen", [(0, 1), (2, 3), (0, 2), (1,)])
def test_gradients_only_where_wanted(frozen: tuple[int, ...]) -> None:
    """Frozen keys, frozen values, a frozen source."""
    call = draw([4, 6], torch.tensor([9, 1, 1, 0, 5]))
    expected = call.run("triton")[2:]
    leaves = [source.clone().requires_grad_(i not in frozen) for i, source in enumerate(call.sources)]
    results = rotate_commit(leaves[:2], leaves[2:], call.gather, call.cos, call.sin)
    torch.autograd.backward([x for x in results if x is not None], call.grads)
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, expected[i])


@INTERPRETED
@pytest.mark.parametrize("used", [0, 1])
def test_results_that_nobody_reads(used: int) -> None:
    """Gradients of keys, or of values, are zero."""
    call = draw([4, 6], torch.tensor([9, 1, 1, 0, 5]))
    expected = call.run("triton")[2:]
    leaves = [source.clone().requires_grad_() for source in call.sources]
    result = rotate_commit(leaves[:2], leaves[2:], call.gather, call.cos, call.sin)[used]
    assert result is not None
    result.backward(call.grads[used])
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, expected[i] if i // 2 == used else torch.zeros_like(leaf))


@INTERPRETED
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("values", [True, False])
def test_written_into_a_slice_of_a_buffer(impl: str, values: bool) -> None:
    """Only the slice changes, autograd sees the write, and heads may come before entries."""
    call = draw([7, 5], torch.tensor([0, 6, 2, 11, 11]), values=values)
    expected = call.run(impl)
    rows, heads_first = torch.zeros(20, 2, 16), torch.zeros(2, 20, 16).transpose(0, 1)
    for k_buffer, v_buffer in ((rows, heads_first), (heads_first, rows)):
        k_cache, v_cache = k_buffer.clone(), v_buffer.clone() if values else None
        before = k_cache._version
        k_out, v_out = k_cache[9:14], None if v_cache is None else v_cache[9:14]
        k, v = rotate_commit(
            call.keys, call.values, call.gather, call.cos, call.sin, k_out=k_out, v_out=v_out, impl=impl
        )
        assert k is k_out and v is v_out and k_cache._version > before
        for cache, want in zip((k_cache, v_cache), expected, strict=False):
            if cache is not None:
                assert torch.equal(cache[9:14], want)
                assert not cache[:9].any() and not cache[14:].any()


@INTERPRETED
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_written_to_places_that_the_device_knows(impl: str, values: bool, dtype: torch.dtype) -> None:
    """Rows of a buffer in any order; the others keep what they hold."""
    call = draw([7, 5], torch.tensor([0, 6, 2, 11, 11]), values=values)
    expected = call.run(impl)
    places = torch.tensor([17, 0, 9, 3, 12], dtype=dtype)
    k_cache, v_cache = torch.ones(20, 2, 16), torch.ones(2, 20, 16).transpose(0, 1) if values else None
    k, v = rotate_commit(
        *(call.keys, call.values, call.gather, call.cos, call.sin),
        k_out=k_cache,
        v_out=v_cache,
        places=places,
        impl=impl,
    )
    assert k is k_cache and v is v_cache
    others = [row for row in range(20) if row not in places.tolist()]
    for cache, want in zip((k_cache, v_cache), expected, strict=False):
        if cache is not None:
            assert torch.equal(cache[places.long()], want)
            assert bool((cache[others] == 1).all())


@INTERPRETED
def test_commits_within_one_buffer() -> None:
    """Open entries may lie in the buffer that is written to, beside what is written."""
    cache = torch.randn(20, 2, 16)
    before = cache.clone()
    rotate_commit([cache[10:]], None, build_gather(torch.tensor([3, 1, 0]), 10), None, None, k_out=cache[:3])
    assert torch.equal(cache[:3], before[[13, 11, 10]]) and torch.equal(cache[3:], before[3:])
    for source in (cache[2:], cache[1:5]):
        gather = build_gather(torch.tensor([2, 1, 0]), len(source))
        with pytest.raises(ValueError, match="k_out must not share entries with a source"):
            rotate_commit([source], None, gather, None, None, k_out=cache[:3])


@INTERPRETED
def test_offsets_beyond_32_bits() -> None:
    """Rows 2**30 elements apart: sources, results in place, gradients. Memory that is not touched costs nothing."""
    space = [torch.empty(2**31 + 64, dtype=torch.float16) for _ in range(2)]
    far, out = (x.as_strided([3, 2, 16], [2**30, 16, 1]) for x in space)
    index = torch.tensor([2, 0, 1])
    call = draw([3], index, dtype=torch.float16)
    assert call.values is not None
    far.copy_(call.keys[0])
    expected = call.run("triton")
    wide = replace(call, keys=[far])
    assert all(torch.equal(a, b) for a, b in zip(wide.run("triton"), expected, strict=True))
    rotate_commit([far], None, call.gather, call.cos, call.sin, k_out=out)
    assert torch.equal(out, expected[0])
    out.copy_(call.grads[0])
    wide = replace(call, grads=[out, call.grads[1]])
    assert all(torch.equal(a, b) for a, b in zip(wide.run("triton"), expected, strict=True))


@settings(max_examples=25)
@given(data=st.data())
def test_gather_lists_who_takes_each_entry(data: st.DataObject) -> None:
    pool = data.draw(st.integers(1, 20))
    index = data.draw(st.lists(st.integers(0, pool - 1), max_size=40))
    gather = build_gather(torch.tensor(index, dtype=torch.int64), pool).to("cpu")
    assert gather.offsets is not None and gather.order is not None and len(gather) == len(index)
    assert {x.dtype for x in (gather.index, gather.offsets, gather.order)} == {torch.int32}
    bounds = gather.offsets.tolist()
    for entry in range(pool):
        rows = gather.order[bounds[entry] : bounds[entry + 1]].tolist()
        assert rows == [row for row, taken in enumerate(index) if taken == entry]


def test_what_a_gather_refuses() -> None:
    for index, message in (([0, 5], "got 5"), ([2, -1], "got -1")):
        with pytest.raises(ValueError, match=rf"index must lie in \[0, 5\), {message}; build it for"):
            build_gather(torch.tensor(index), 5)
    for index in (
        torch.zeros(2),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"index must be int32 or int64 of shape \[m\] on the CPU"):
            build_gather(index, 5)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 entries, got pool=2147483648"):
        build_gather(torch.tensor([0]), 2**31)


def test_what_is_refused() -> None:
    call = draw([4, 3], torch.tensor([0, 6, 2]))
    keys, values, cos = call.keys, call.values, call.cos
    assert values is not None and cos is not None
    out = torch.zeros(3, 2, 16)

    def wrong(message: str, error: type[Exception] = ValueError, **changes: object) -> None:
        arguments = {name: getattr(call, name) for name in ("gather", "cos", "sin")}
        arguments = {"k_sources": keys, "v_sources": values, **arguments, **changes}
        with pytest.raises(error, match=message):
            rotate_commit(**arguments)

    wrong("impl must be one of triton, reference, got 'cuda'", impl="cuda")
    wrong("must be 1 to 3 tensors and v_sources as many or None, got 0 and 0", k_sources=[], v_sources=[])
    wrong("got 4 and 4", k_sources=keys * 2, v_sources=values * 2)
    wrong("got 2 and 1", v_sources=values[:1])
    wrong(r"must have shape \[entries, heads, head_dim\]", k_sources=[keys[0][0], keys[1]])
    wrong(r"got \[3, 1, 16\] in v_sources\[1\]", v_sources=[values[0], values[1][:, :1]])
    wrong(r"must have as many entries, got 3 and 2", v_sources=[values[0], values[1][:2]])
    wrong(
        "must share one of float32, float16 and bfloat16, got torch.float16 in k_sources",
        k_sources=[keys[0], keys[1].half()],
    )
    wrong("must share one of", k_sources=[k.double() for k in keys], v_sources=None)
    wrong("sources must be on one device", v_sources=[values[0], values[1].to("meta")])
    wrong("head_dim must be contiguous, got stride 2", k_sources=[torch.zeros(4, 2, 32)[..., ::2], keys[1]])
    for dim in (15, 258):
        wrong(
            f"head_dim must be even and in \\[2, 256\\], got {dim}", k_sources=[torch.zeros(7, 2, dim)], v_sources=None
        )
    wrong("must be for these 8 entries on cpu, got one for 7", k_sources=[keys[0], *[keys[0]]], v_sources=None)
    wrong("cos and sin must come together", sin=None)
    wrong(r"with m=3, got \[2, 1, 8\]", cos=cos[:2])
    wrong(r"with m=7, got \[3, 1, 8\]", gather=None)
    wrong(r"with m=3, got \[3, 2, 8\]", cos=cos.expand(3, 2, 8))
    wrong(r"rotary_dim <= head_dim=16, got 16 in cos; pass table", cos=cos.repeat(1, 1, 2), sin=cos.repeat(1, 1, 2))
    wrong("got 4 in sin", sin=cos[..., :4])
    wrong("cos and sin must share one of", sin=cos.half())
    wrong("cos must be contiguous along its channels", cos=cos.repeat(1, 1, 2)[..., ::2])
    wrong("sin must not require gradients", sin=cos.clone().requires_grad_())
    wrong("v_out must be given exactly when k_out and v_sources are, got none", k_out=out)
    wrong("got one", v_out=out)
    wrong("got one", k_out=out, v_out=out.clone(), v_sources=None)
    wrong(
        r"k_out must be \[3, 2, 16\] in torch.float32 on cpu, got \[4, 2, 16\]", k_out=torch.zeros(4, 2, 16), v_out=out
    )
    wrong(r"v_out must be .* in torch.float16", k_out=out, v_out=out.half())
    wrong("must be contiguous along head_dim and not expanded", k_out=out[:1].expand(3, 2, 16), v_out=out)
    wrong("places say where rows of k_out are written, got no k_out", places=torch.arange(3))
    for places in (torch.arange(4), torch.zeros(3), torch.arange(6)[::2]):
        wrong(r"places must be contiguous int32 or int64 of shape \[3\]", k_out=out, v_out=out.clone(), places=places)
    wrong("must not require gradients; detach", k_out=out.clone().requires_grad_(), v_out=out)
    wrong("k_out must not share entries with a source or the other output", k_out=out, v_out=out)
    leaves = [k.clone().requires_grad_() for k in keys]
    wrong("has no gradients; leave them out", NotImplementedError, k_sources=leaves, k_out=out, v_out=out.clone())
    inference = build_gather(torch.tensor([0, 6, 2]), 7, gradients=False)
    wrong("built with gradients=False", k_sources=leaves, gather=inference)
    with torch.no_grad():
        rotate_commit(leaves, values, inference, cos, cos, k_out=out, v_out=out.clone(), impl="reference")


@INTERPRETED
def test_what_the_interpreter_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw([4], None)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        rotate_commit([call.keys[0].bfloat16()], None, None, None, None)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu; use impl='reference'"):
        rotate_commit(call.keys, None, None, None, None)


def test_compiled_ahead_of_time() -> None:
    """Nothing spilled, no shared memory, and registers for at least four programs per multiprocessor."""
    names = ("rotate_commit", "rotate_commit_backward")
    found = compiled(
        [(name, dim, "bf16", chip, 1, True) for name in names for dim in (64, 80, 256) for chip in (80, 90)]
    )
    assert len(found) == 12
    for one in found:
        assert one["spilled"] == 0 and one["shared"] == 0 and one["registers"] <= 128, one
