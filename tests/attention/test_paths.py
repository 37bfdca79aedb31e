"""Every attention path that can run here, against the definition."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

import beacon
from beacon.attention import MemoryParts, choose_path, flash, flex, kernels, load_path, load_rotation, reference, sdpa
from beacon.attention.inputs import AttentionInputs, Outputs
from beacon.config import ATTENTION_PATHS
from beacon.modules import Rotary, _OnDevice, _Pool, rotate
from beacon.plan import Keys, Plan
from tests.attention.plans import CASES, INTERLEAVE, Case, leaves, tensors

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
BY_NAME = {case.name: case for case in CASES}
DTYPES = (torch.float32, torch.float64)


def varlen_in_plain_pytorch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> torch.Tensor:
    """What flash-attn 2.7 documents: packed sequences, causal mask aligned at the bottom right, 0 for empty rows."""
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for cu_seqlens, packed, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(packed) and cu_seqlens.diff().max() == longest
    assert dropout_p == 0.0 and softmax_scale is not None and causal
    out = []
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True):
        keys, values = (x[k0:k1].to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[q0:q1].to(dtype), keys) * softmax_scale
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        out.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(~mask, -torch.inf).softmax(-1), values))
    return torch.cat(out).to(q.dtype)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait for it where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A ``flash_attn`` that computes on any device."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", loader=None)
    module.flash_attn_varlen_func = varlen_in_plain_pytorch
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def quick_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, and PyTorch's unfused flex_attention without its tracing (seconds for every new shape)."""
    monkeypatch.setattr(flex, "BLOCK", 8)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def compare(
    attend: Any, case: Case, dtype: torch.dtype, *, heads: int = 4, gradients: bool, beacons: bool = True
) -> None:
    """Outputs (and gradients) of every call: at most twice the reference's error in the same dtype, and rounding."""
    for plan, memory in case.plans():
        results = []
        for path, kind in ((reference.attend, torch.float64), (reference.attend, dtype), (attend, dtype)):
            inputs = tensors(plan, memory, kind, heads=heads, gradients=gradients)
            inputs = inputs if beacons else replace(inputs, beacon_q=None)
            raw, beacon_out = path(inputs, plan)
            assert (beacon_out is None) == (not beacons)
            found = [raw, *([] if beacon_out is None else [beacon_out])]
            if gradients:
                weights = torch.linspace(-1, 1, raw[0].numel(), dtype=kind).view(raw[0].shape)
                sum((out * weights).sum() for out in found).backward()
                found += [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves(inputs)]
            results.append(found)
        for exact, theirs, ours in zip(*results, strict=True):
            assert ours.shape == exact.shape and ours.dtype == dtype
            if len(exact):
                rounding = 16 * torch.finfo(dtype).eps * exact.abs().max()
                assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("beacons", [True, False], ids=["all", "last-layer"])
def test_sdpa(case: Case, beacons: bool) -> None:
    compare(sdpa.attend, case, torch.float32, gradients=False, beacons=beacons)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("beacons", [True, False], ids=["all", "last-layer"])
def test_sdpa_with_gradients(case: Case, beacons: bool) -> None:
    compare(sdpa.attend, case, torch.float64, gradients=True, beacons=beacons)


def attend_in_parts(inputs: AttentionInputs, plan: Plan) -> Outputs:
    """The kernels, with the memory as a pass hands it over: earlier rows, and what it commits in one piece."""
    old_k, new_k, old_v, new_v = [], [], [], []
    for k, v, count in zip(inputs.memory_k, inputs.memory_v, plan.commit_counts, strict=True):
        for old, new, both in ((old_k, new_k, k), (old_v, new_v, v)):
            old.append(both[: len(both) - count])
            new.append(both[len(both) - count :])
    return kernels.attend(replace(inputs, parts=MemoryParts(old_k, old_v, torch.cat(new_k), torch.cat(new_v))), plan)


@INTERPRETED
@pytest.mark.parametrize("name", ["overlapping-windows-and-sinks", "segmentation", "kept-head-and-tail", "interleave"])
def test_triton(name: str) -> None:
    """From a plan and its stores to the kernels; these themselves are compared on every case in tests/kernels."""
    compare(attend_in_parts, BY_NAME[name], torch.float32, gradients=True, beacons=True)


@INTERPRETED
@pytest.mark.parametrize("name", ["overlapping-windows-and-sinks", "interleave", "raw-only"])
def test_triton_without_gradients(name: str) -> None:
    """Single tokens take the decoding kernel; the last layer has no beacon queries."""
    compare(kernels.attend, BY_NAME[name], torch.float32, gradients=False, beacons=False)
    compare(attend_in_parts, replace(BY_NAME[name], cuts=((9, 9), (3, 3), (1, 0))), torch.float16, gradients=False)


def test_which_passes_take_the_decoding_kernel() -> None:
    case = replace(BY_NAME["interleave"], cuts=((29, 10), (1, 0), (1, 1), (2, 23), (3, 3), (17, 17)))
    assert [kernels.decoded(plan) for plan, _ in case.plans()] == [0, 1, 1, 0, 3, 0]


def kinds(plan: Plan) -> list[Keys]:
    return [plan.raw_slots, plan.beacon_slots, plan.commits]


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rotation_by_kernels(case: Case) -> None:
    """Keys gathered and rotated in one launch are those of plain PyTorch, and so are gradients."""
    for plan, _ in case.plans():
        pool = (
            sum(plan.open_counts)
            if not len(plan.raw)
            else 1 + int(torch.cat([keys.pool for keys in kinds(plan)]).max())
        )
        results = []
        for path in (None, load_rotation("triton")):
            here = _OnDevice(plan, Rotary(torch.linspace(1.0, 0.1, 8)), CPU, torch.float32)
            sources = [
                torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(count)) for count in (2, pool, 1)
            ]
            leaves = [source.requires_grad_() for source in sources]
            both = _Pool(leaves[:1], *leaves[1:])
            keys = here.keys(both) if path is None else path.keys(both.kinds, plan, here.key_table, here.memo)
            q = leaves[0][:1].expand(len(plan.raw), -1, -1)
            turned = rotate(q, here.tables["raw"]) if path is None else path.queries(q, here.tables["raw"])
            found = [*keys, turned]
            assert both.kinds == leaves
            sum(out.square().sum() * (i + 1) + out.sum() for i, out in enumerate(found)).backward()
            results.append([*found, *(leaf.grad for leaf in leaves)])
        for plain, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick_flex")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("beacons", [True, False], ids=["all", "last-layer"])
def test_flex(case: Case, dtype: torch.dtype, beacons: bool) -> None:
    compare(flex.attend, case, dtype, gradients=False, beacons=beacons)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["interleave", "interleave-with-ratio-0", "raw-only"])
@pytest.mark.parametrize("beacons", [True, False], ids=["all", "last-layer"])
def test_flash(flash_attn: Any, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, beacons: bool) -> None:
    monkeypatch.setattr(flash, "DTYPES", DTYPES)
    compare(flash.attend, BY_NAME[name], dtype, gradients=True, beacons=beacons)


@pytest.mark.parametrize("path", [sdpa, flex, flash], ids=lambda path: path.__name__)
def test_as_many_key_heads_as_query_heads(
    path: Any, flash_attn: Any, quick_flex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "DTYPES", DTYPES)
    compare(path.attend, BY_NAME["interleave"], torch.float32, heads=2, gradients=False, beacons=True)


def test_flash_serves_cached_beacons_it_must_not_see(flash_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved step-expansion between two beacons: no query is one, so the plan is causal, but beacons lie there."""
    monkeypatch.setattr(flash, "DTYPES", DTYPES)
    case = replace(BY_NAME["interleave-step-expansion"], cuts=((5, 2), (1, 1)), ratios=(4,))
    (_, _), (plan, memory) = case.plans()
    assert plan.plain_causal and len(plan.beacon_slots)
    inputs = tensors(plan, memory, torch.float64)
    torch.testing.assert_close(flash.attend(inputs, plan)[0], reference.attend(inputs, plan)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_refuses_other_dtypes(flash_attn: Any, dtype: torch.dtype) -> None:
    plan, memory = next(BY_NAME["interleave"].plans())
    with pytest.raises(ValueError, match=f"float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"):
        flash.attend(tensors(plan, memory, dtype), plan)


@pytest.mark.parametrize("dtype", flash.DTYPES, ids=str)
def test_flash_in_half_precision(flash_attn: Any, dtype: torch.dtype) -> None:
    compare(flash.attend, BY_NAME["interleave"], dtype, gradients=False, beacons=True)


# -- the block mask of flex ----------------------------------------------------------------------------------


def dense(mask: torch_flex.BlockMask, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a kernel makes of a block mask: all visible pairs, and which blocks it reads in part and whole."""
    rows, columns = mask.shape[-2], mask.shape[-1]
    pairs = mask.mask_mod(0, 0, torch.arange(rows)[:, None], torch.arange(columns)[None])
    tiles = []
    for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        tile = torch.zeros(rows // block, columns // block, dtype=torch.bool)
        for row, (count, listed) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
            tile[row, listed[:count]] = True
        tiles.append(tile)
    partial, full = tiles
    spread = [tile.repeat_interleave(block, 0).repeat_interleave(block, 1) for tile in tiles]
    return (pairs & spread[0]) | spread[1], partial, full


@pytest.mark.parametrize("beacons", [True, False], ids=["all", "last-layer"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_mask_is_the_plan(case: Case, beacons: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 4
    monkeypatch.setattr(flex, "BLOCK", block)
    for plan, memory in case.plans():
        sizes = [*memory, len(plan.raw_slots), len(plan.beacon_slots)]
        lists = [plan.raw, plan.beacon] if beacons else [plan.raw]
        wanted = torch.cat([reference.visible(queries, memory, *sizes[-2:]) for queries in lists])
        seen, partial, full = dense(flex.block_mask(plan, sizes, beacons=beacons), block)
        real = torch.cat([torch.arange(-(-size // block) * block) < size for size in sizes])
        assert torch.equal(seen[: len(wanted), real], wanted)
        assert not seen[: len(wanted), ~real].any()
        # No block is read in vain, and one that all its queries see whole takes no mask, unless padding is in it.
        padded = torch.zeros(seen.shape, dtype=torch.bool)
        padded[: len(wanted), real] = wanted
        tiles = padded.view(len(seen) // block, block, -1, block)
        assert torch.equal(partial | full, tiles.any(dim=3).any(dim=1))
        complete = len(wanted) // block
        assert torch.equal(full[:complete], tiles.all(dim=3).all(dim=1)[:complete])
        assert not (partial & full).any()


@pytest.mark.parametrize("gradients", [True, False])
def test_block_mask_has_the_backward_lists_where_gradients_are_recorded(gradients: bool) -> None:
    plan, memory = next(CASES[0].plans())
    with torch.set_grad_enabled(gradients):
        mask = flex.block_mask(plan, [*memory, len(plan.raw_slots), len(plan.beacon_slots)], beacons=True)
    assert (mask.q_indices is not None) == gradients


def test_block_mask_reads_as_few_blocks_as_there_are() -> None:
    """16 windows of 256 at ratio 8: what a row of tiles reads grows with the memory, not with the text."""
    windows, window, ratio = 16, 256, 8
    case = Case("long", {"window": window, "stride": window}, ratios=(ratio,), cuts=((windows * window,),))
    plan, memory = next(case.plans())
    mask = flex.block_mask(plan, [*memory, len(plan.raw_slots), len(plan.beacon_slots)], beacons=False)
    memory_blocks = sum(2 * -(-number * (window // ratio) // flex.BLOCK) for number in range(windows))
    own_blocks = windows * 3  # lower triangle of 2 x 2
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == memory_blocks + own_blocks
    assert int(mask.kv_num_blocks.sum()) == 2 * windows + 2 * sum(number % 4 > 0 for number in range(windows))


# -- size, gradients, kernels --------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor made inside the block."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_nothing_is_as_large_as_tokens_by_tokens(flash_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "DTYPES", DTYPES)
    tokens = 4096
    case = Case("long", {"window": 64, "stride": 64, **INTERLEAVE}, ratios=(32,), cuts=((tokens,),))
    plan, memory = next(case.plans())
    inputs = tensors(plan, memory, torch.float32, heads=1, kv_heads=1)
    sizes = [*memory, len(plan.raw_slots), len(plan.beacon_slots)]
    for read in (
        lambda: sdpa.attend(inputs, plan),
        lambda: flex.block_mask(plan, sizes, beacons=True),
        lambda: flash.attend(inputs, plan),
    ):
        with Largest() as largest:
            read()
        assert 0 < largest.numel < tokens**2 / 32
    with Largest() as largest:  # the probe sees what it looks for
        reference.attend(inputs, plan)
    assert largest.numel >= tokens**2


def test_flex_computes_no_gradients_on_a_cpu() -> None:
    plan, memory = next(CASES[0].plans())
    with pytest.raises(NotImplementedError, match="no gradients on a CPU; use attention_path='sdpa'"):
        flex.attend(tensors(plan, memory, torch.float32, gradients=True), plan)


@INTERPRETED
@pytest.mark.parametrize("path", [sdpa, flex, flash, kernels], ids=lambda path: path.__name__)
def test_layers_share_what_follows_from_the_plan(
    path: Any, flash_attn: Any, quick_flex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "DTYPES", DTYPES)
    plan, memory = next(BY_NAME["interleave"].plans())
    inputs = tensors(plan, memory, torch.float32)
    path.attend(inputs, plan)
    made = dict(inputs.memo)
    assert made
    path.attend(inputs, plan)
    assert inputs.memo.keys() == made.keys() and all(inputs.memo[key] is value for key, value in made.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's compiled CPU kernel follows the block lists, as the one on a GPU does (needs a C++ compiler)."""
    compiled = torch.compile(torch_flex.flex_attention, fullgraph=True, dynamic=False)
    monkeypatch.setattr(flex, "_kernel", lambda device: compiled)
    case = Case("compiled", {"window": 256, "stride": 128, "sink": 2}, ratios=(8, 2, 0), cuts=((700, 300),))
    with torch.no_grad():
        compare(flex.attend, case, torch.float32, gradients=False, beacons=True)


@pytest.mark.gpu
@pytest.mark.parametrize("beacons", [True, False], ids=["all", "last-layer"])
def test_flex_on_a_gpu(beacons: bool) -> None:
    case = Case(
        "gpu", {"window": 256, "stride": 128, "sink": 2}, ratios=(8, 2, 0), cuts=((700, 300), (1, 1), (99, 900))
    )
    for plan, memory in case.plans():
        results = []
        for path, device in ((reference.attend, CPU), (flex.attend, GPU)):
            inputs = tensors(plan, memory, torch.float32, gradients=True)
            on = replace(
                inputs,
                **{name: getattr(inputs, name).to(device) for name in ("raw_q", "beacon_q", "raw_k", "raw_v")},
                **{name: getattr(inputs, name).to(device) for name in ("beacon_k", "beacon_v")},
                memory_k=[part.to(device) for part in inputs.memory_k],
                memory_v=[part.to(device) for part in inputs.memory_v],
            )
            outs = path(on if beacons else replace(on, beacon_q=None), plan.to(device))
            found = [out for out in outs if out is not None]
            sum(out.square().sum() for out in found).backward()
            found += [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves(inputs)]
            results.append([tensor.detach().cpu() for tensor in found])
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


# -- choosing ------------------------------------------------------------------------------------------------


def choose(requested: str, case: Case | None = None, *, device: torch.device = CPU, **changes: Any) -> str:
    plan, _ = next((case or BY_NAME["interleave"]).plans())
    return choose_path(requested, plan, **{"device": device, "dtype": torch.float32, "head_dim": 64, **changes})


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, loader=None))


LONG = Case("long", cuts=((200,),))


def test_auto_takes_sdpa_on_a_cpu() -> None:
    assert choose("auto", LONG) == "sdpa"


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose("auto", LONG, device=GPU, dtype=dtype) == "triton"
    assert choose("auto", replace(LONG, cuts=((1,),)), device=GPU, dtype=dtype) == "triton"
    assert choose("auto", LONG, device=GPU, dtype=dtype, head_dim=288) == "flex"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert choose("auto", LONG, device=GPU, dtype=dtype) == "flex"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose("auto", LONG, device=GPU, dtype=dtype) == "flex"


@pytest.mark.usefixtures("triton")
def test_auto_takes_flex_on_a_gpu_where_it_serves() -> None:
    assert choose("auto", LONG, device=GPU) == "flex"
    assert choose("auto", LONG, device=GPU, head_dim=8) == "sdpa"
    assert choose("auto", LONG, device=GPU, dtype=torch.float64) == "sdpa"
    assert choose("auto", replace(LONG, cuts=((1,),)), device=GPU) == "sdpa"
    assert choose("auto", LONG, device=torch.device("mps")) == "sdpa"


def test_auto_takes_sdpa_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose("auto", LONG, device=GPU) == "sdpa"


def test_auto_says_once_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    from beacon.attention import _announce

    _announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="beacon.attention"):
        choose("auto")
        choose("auto")
        choose("sdpa")
    assert [record.getMessage() for record in caplog.records] == ["attention_path='auto' takes 'sdpa' on cpu"]


@pytest.mark.parametrize("name", ["reference", "sdpa", "flex"])
def test_an_explicit_choice_is_taken(name: str) -> None:
    assert choose(name) == name
    assert choose(name, device=GPU, dtype=torch.float64, head_dim=8) == name
    assert load_path(name).__module__ == f"beacon.attention.{name}"


def test_flash_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the flash-attn package"):
        choose("flash", device=GPU)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flash_serves_plain_causal_plans_on_a_gpu(case: Case) -> None:
    if case.name in ("interleave", "interleave-with-ratio-0", "raw-only"):
        assert choose("flash", case, device=GPU) == "flash"
        with pytest.raises(NotImplementedError, match="needs a CUDA device, got 'cpu'"):
            choose("flash", case)
    else:
        with pytest.raises(NotImplementedError, match="plain causal order"):
            choose("flash", case, device=GPU)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose("triton", device=GPU) == "triton"
    for changes in ({"dtype": torch.float64}, {"head_dim": 288}, {"head_dim": 33}):
        with pytest.raises(NotImplementedError, match="even head_dim of at most 256, got"):
            choose("triton", device=GPU, **changes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(NotImplementedError, match=r"compute capability 8\.0 \(Ampere\) or later, got Tesla T4"):
        choose("triton", device=GPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NotImplementedError, match="needs a CUDA device, got 'cpu'"):
        choose("triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the triton package"):
        choose("triton", device=GPU)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=f"one of {', '.join(ATTENTION_PATHS)}, got 'eager'"):
        choose("eager")
    with pytest.raises(ValueError, match="'eager'"):
        beacon.BeaconConfig(attention_path="eager")
