"""The end-to-end benchmark: its baselines compute what they claim, what breaks is a row, a tiny run goes through."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import beacon

pytest.importorskip("triton")  # the stamp names its version

from beacon.training.flops import StepFlops
from benchmarks import end_to_end, models
from benchmarks.gpu.attempts import Unavailable
from benchmarks.inference import (
    aims,
    contenders,
    decode,
    floor,
    flops,
    kvpress_process,
    parts,
    published,
    report,
    run,
    tasks,
)
from benchmarks.inference.contenders import (
    CUDNN,
    FULL,
    FULL_STATIC,
    KVPRESS,
    LOOP,
    NAMES,
    PUBLISHED,
    SLIDING,
    STATIC,
    contender,
)
from benchmarks.inference.full import FullDynamic
from benchmarks.inference.ours import BeaconStatic
from benchmarks.inference.readers import GENERATE, LEAN
from benchmarks.inference.setting import LONG, TEXTS, Setting, Text
from benchmarks.inference.sliding import SlidingWindow, sharing
from benchmarks.inference.tasks import DECODE, DECODE_PARTS, PREFILL, PREFILL_PARTS, Task
from benchmarks.machine import Stamp
from benchmarks.measure import Spread
from benchmarks.models import FUSED, SCALES, Scale, fuse, random_llama
from benchmarks.results import OURS, Results, Row, read
from tests.tiny_models import randomize

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Scale(32, 48, 2, 4, 2, 96, 16, 128)
TEXT = Text(80, 4)


def setting(*texts: Text) -> Setting:
    return Setting("tiny", SMALL, CPU, torch.float32, texts or (TEXT,), new_tokens=4)


@pytest.fixture
def base() -> Any:
    """Weights large enough for attention to be uneven."""
    model = random_llama(SMALL, 256, CPU, torch.float32)
    return randomize(model).requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- baselines ---------------------------------------------------------------------------------------------------------


def reading(name: str, base: Any, length: int) -> tuple[torch.Tensor, Any]:
    cell = setting()
    with contender(name, base, cell) as ready:
        found = ready.read(cell.ids(length), TEXT.ratio)
        assert found.ids.shape == (1, length + 1)
        assert ready.cache_bytes(found.cache) > 0
        return found.logits, found.cache


@pytest.mark.parametrize("length", [75, 80])
def test_the_loop_and_the_published_schedule_compute_our_function(base: Any, length: int) -> None:
    logits, ours = reading(OURS, base, length)
    other, loop = reading(LOOP, base, length)
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-5)
    theirs, memory = reading(PUBLISHED, base, length)
    torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-5)
    entries = length // SMALL.window * (SMALL.window // TEXT.ratio)
    table = beacon.modules.Rotary(base.model.rotary_emb.inv_freq).table(torch.arange(entries), torch.float32)
    for mine, single, (k, v) in zip(ours.stores, loop.stores, memory, strict=True):
        for name in ("memory_k", "memory_v", "open_k", "open_v"):
            torch.testing.assert_close(getattr(single, name)[0], getattr(mine, name)[0], rtol=1e-4, atol=1e-5)
        rotated = beacon.modules.rotate(k[0].transpose(0, 1), table)
        torch.testing.assert_close(rotated, mine.memory_k[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v[0].transpose(0, 1), mine.memory_v[0], rtol=1e-4, atol=1e-5)


def test_the_published_schedule_gives_our_hidden_states(base: Any) -> None:
    cell = setting()
    ids = cell.ids(75)
    beacon.wrap(base, cell.config())
    hidden, _ = published.read(base, ids, TEXT.ratio)
    logits = base(ids, ratios=TEXT.ratio).logits[:, -hidden.shape[1] :]
    assert hidden.shape[1] == 75 % SMALL.window
    torch.testing.assert_close(base.lm_head(hidden), logits, rtol=1e-4, atol=1e-5)
    beacon.unwrap(base)
    beacon.wrap(base, cell.config().replace(sink=1))
    with pytest.raises(NotImplementedError, match="first version alone"):
        published.read(base, ids, TEXT.ratio)


@pytest.mark.parametrize("piece", [16, 33, 128])
def test_full_attention_in_pieces_is_the_stock_model(base: Any, piece: int) -> None:
    ids = setting().ids(80)
    ready = FullDynamic(base, piece)
    found = ready.read(ids, 0)
    torch.testing.assert_close(found.logits, base(ids).logits[:, -1], rtol=1e-4, atol=1e-5)
    assert ready.cache_bytes(found.cache) == 2 * 4 * SMALL.layers * SMALL.kv_heads * 8 * 80
    assert base.config._attn_implementation == "sdpa"


def test_the_sliding_window_is_a_band(base: Any) -> None:
    ids = setting().ids(80)
    ready = SlidingWindow(sharing(base, SMALL.window))
    ready.piece = 24
    found = ready.read(ids, 0)
    number = torch.arange(80)
    seen = (number <= number[:, None]) & (number > number[:, None] - SMALL.window)
    mask = torch.zeros(1, 1, 80, 80).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(found.logits, base(ids, attention_mask=mask).logits[:, -1], rtol=1e-4, atol=1e-5)
    assert ready.cache_bytes(found.cache) == 2 * 4 * SMALL.layers * SMALL.kv_heads * 8 * (SMALL.window - 1)
    assert ready.model.model.layers[0].mlp.up_proj.weight is not None
    shared = ready.model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert shared == base.model.layers[0].mlp.up_proj.weight.data_ptr()


def decoded(name: str, way: str, base: Any, rows: int) -> torch.Tensor:
    cell = setting()
    with contender(name, base, cell) as ready:
        assert way in ready.ways
        more = ready.decoder(way, found := ready.repeated(ready.read(cell.ids(80), TEXT.ratio), rows))
        tokens = torch.cat([more(3), more(5)], dim=1)
        assert found.ids.shape == (rows, 80 + 1 + 8)
        torch.testing.assert_close(found.ids[:, 81:], tokens)
        return tokens


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "same", [[(OURS, GENERATE), (STATIC, LEAN), (STATIC, GENERATE)], [(FULL, GENERATE), (FULL_STATIC, LEAN)]]
)
def test_all_ways_of_decoding_give_the_same_tokens(base: Any, rows: int, same: list[tuple[str, str]]) -> None:
    first, *others = (decoded(name, way, base, rows) for name, way in same)
    assert first.shape == (rows, 8)
    assert all(torch.equal(row, first[0]) for row in first)
    for tokens in others:
        torch.testing.assert_close(tokens, first)


def test_stock_decoding_goes_on_where_the_text_ended(base: Any) -> None:
    ids = setting().ids(80)
    whole = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    torch.testing.assert_close(decoded(FULL, GENERATE, base, 1), whole[:, 81:])
    torch.testing.assert_close(decoded(FULL_STATIC, GENERATE, base, 1), whole[:, 81:])


def test_contenders_give_the_base_back(base: Any) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in set(NAMES) - {KVPRESS}:
        with contender(name, base, setting()):
            pass
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert type(base).__name__ == "LlamaForCausalLM" and not hasattr(base, "beacon_wrapping")


def test_what_is_missing_is_unavailable(base: Any) -> None:
    with pytest.raises(Unavailable, match="static_cache"):
        BeaconStatic(base, 8).read(setting().ids(32), TEXT.ratio)
    with contender(CUDNN, base, setting()) as ready, pytest.raises(Unavailable, match="CUDA"):
        ready.read(setting().ids(32), 0)


# -- FLOPs and the floor -----------------------------------------------------------------------------------------------


def test_flops_of_one_layer_by_hand() -> None:
    """Window 4, ratio 2, 6 tokens: one full window with two beacons, then two tokens that see these."""
    shape = Scale(8, 16, 1, 2, 1, 10, 4, 6).shape(("q", "k", "v", "o"))
    kept, layer = 8 * 4 + 8 * 4, 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16
    found = flops.condensed(shape, 4, Text(6, 2))
    assert (found.raw_tokens, found.beacons, found.head) == (6, 2, 2 * 8 * 10)
    assert found.matrices == 2 * ((6 + 2) * kept + layer - kept)  # the only layer is the last
    assert found.attention == 4 * 2 * 4 * (2 + 2)  # the last token: two beacons, the token before and itself
    assert found.model == found.matrices + found.attention + found.head
    two = Scale(8, 16, 2, 2, 1, 10, 4, 6).shape(("q", "k", "v", "o"))
    pairs = (1 + 2 + 3 + 4) + (2 + 1 + 2 + 2) + (2 + 1) + (4 + 1)  # raw, raw after two beacons, the beacons
    assert flops.condensed(two, 4, Text(6, 2)).attention == 4 * 2 * 4 * (pairs + 4)
    assert flops.condensed(two, 4, Text(6, 2)).matrices == found.matrices + 2 * (6 + 2) * layer
    assert flops.full(two, Text(6, 2)).attention == 4 * 2 * 4 * (21 + 6)
    assert flops.full(two, Text(6, 2)).matrices == 2 * (6 * layer + 6 * kept + layer - kept)
    assert flops.sliding(two, 4, Text(6, 2)).attention == 4 * 2 * 4 * (1 + 2 + 3 + 4 + 4 + 4 + 4)


@pytest.mark.parametrize("length", [16 * 5, 16 * 5 + 7])
def test_flops_follow_the_plan(length: int) -> None:
    """A token more ends the text in a window of its own, or in the open one: its keys are known."""
    cell, text = setting(), Text(length, 4)
    found = flops.condensed(cell.model_shape, SMALL.window, text)
    step = StepFlops.of(cell.model_shape, cell.config(), [length + 1], 4)
    beacons = length // SMALL.window * 4
    further = beacons + length % SMALL.window + 1
    last = further - 1 or SMALL.window
    if length % SMALL.window == 0:
        last = SMALL.window + beacons - 4
    pairs = (SMALL.layers - 1) * (step.raw_pairs - further + step.beacon_pairs) + last
    assert (step.beacons, found.beacons) == (beacons, beacons)
    assert found.attention == 4 * SMALL.hidden * pairs


def test_the_floor_multiplies_what_ours_multiplies(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, text = setting(), Text(87, 4)
    monkeypatch.setattr("beacon.segments.CPU_PASS_TOKENS", 2 * SMALL.window)  # so that there are several passes

    def products(call: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    with contender(OURS, base, cell) as ready:
        ours = products(lambda: ready.read(cell.ids(text.length), text.ratio))
        warm = products(lambda: floor._pass(ready.model, cell, text.ratio, 2 * SMALL.window, last=True))
        assert products(lambda: floor.products_seconds(ready.model, cell, text)) - warm == ours
        monkeypatch.setattr(floor, "MOST_TOKENS", 2 * SMALL.window)
        assert floor.products_seconds(ready.model, cell, text) > 0


# -- tasks, budget and memory ------------------------------------------------------------------------------------------


def runner(base: Any, folder: Path, deadline: float = math.inf, **changes: Any) -> run.Run:
    results = Results(folder / "x.csv", Stamp("CPU", "1", "2", "3", "4", "no", "5"))
    return run.Run(base, setting(), results, deadline, lambda line: None, **changes)


def test_out_of_memory_is_a_row_and_the_run_goes_on(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(FullDynamic, "read", full)
    ran = runner(base, tmp_path)
    ran.run([Task(PREFILL, FULL, TEXT), Task(DECODE, FULL, TEXT, (1, 2)), Task(PREFILL, OURS, TEXT)])
    rows = read(ran.results.path)
    assert [(row["impl"], row["status"]) for row in rows[:3]] == [(FULL, "failed")] * 3
    assert all("2 GiB" in row["reason"] for row in rows[:3]) and "batch 2" in rows[2]["case"]
    assert {row["status"] for row in rows[3:]} == {"ok"} and not ran.problems
    monkeypatch.setattr("benchmarks.inference.ours.Beacon.read", full)
    ran.run([Task(DECODE, OURS, TEXT, (1, 2))])
    assert not ran.problems  # how many rows fit is a result
    ran.run([Task(PREFILL, OURS, TEXT)])
    assert len(ran.problems) == 1


def test_one_batch_that_breaks_does_not_end_the_others(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = FullDynamic.repeated

    def two_do_not_fit(self: Any, reading: Any, rows: int) -> Any:
        if rows == 2:
            raise torch.OutOfMemoryError("no room")
        return repeated(self, reading, rows)

    monkeypatch.setattr(FullDynamic, "repeated", two_do_not_fit)
    ran = runner(base, tmp_path)
    ran.run([Task(DECODE, FULL, TEXT, (2, 1))])
    status = {row["case"].split(" batch ")[1][0]: row["status"] for row in read(ran.results.path)}
    assert status == {"2": "failed", "1": "ok"}


def test_what_cannot_fit_is_not_tried(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = setting()
    needed = contenders.least_bytes(FULL, cell, TEXT, 8)
    kept = 4 * 2 * SMALL.layers * SMALL.kv_heads * 8 * TEXT.length
    assert needed - contenders.least_bytes(FULL, cell, TEXT) == 7 * kept
    assert contenders.least_bytes(OURS, cell, TEXT, 8) == contenders.least_bytes(OURS, cell, TEXT)
    monkeypatch.setattr(decode, "device_bytes", lambda device: int(needed / decode.CERTAIN) - 1)
    ran = runner(base, tmp_path)
    ran.run([Task(DECODE, FULL, TEXT, (1, 8))])
    rows = read(ran.results.path)
    assert rows[-1]["status"] == "failed" and "not tried" in rows[-1]["reason"]
    assert rows[0]["status"] == "ok"
    sizes = SCALES["7b"]
    seven = Setting("7b", sizes, CPU, torch.bfloat16, LONG)
    assert contenders.least_bytes(FULL, seven, LONG[3]) == pytest.approx(13.5e9 + 214.7e9, rel=0.01)


def test_the_budget_skips_what_does_not_fit(base: Any, tmp_path: Path) -> None:
    ran = runner(base, tmp_path, deadline=time.monotonic())
    ran.run([Task(PREFILL, OURS, TEXT), Task(DECODE, STATIC, TEXT, (1, 2))])
    rows = read(ran.results.path)
    assert [(row["status"], row["reason"]) for row in rows] == [("skipped", "time budget")] * 3
    assert not ran.problems


def test_contenders_that_disagree_are_a_problem(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ALIKE", {"float32": -1.0})
    ran = runner(base, tmp_path)
    ran.run([Task(PREFILL, OURS, TEXT), Task(PREFILL, PUBLISHED, TEXT)])
    assert len(ran.problems) == 1 and "published differs from beacon by" in ran.problems[0]


def test_the_order_of_tasks() -> None:
    seven, eight = tasks.tasks("7b"), tasks.tasks("8b")
    assert [(t.kind, t.impl, t.text.length) for t in seven[:4]] == [
        *((PREFILL, impl, 100 * 1024) for impl in (OURS, FULL, LOOP)),
        (PREFILL, OURS, 32 * 1024),
    ]
    assert {task.text for task in seven} == {task.text for task in eight} == set(LONG)
    assert {task.impl for task in seven} == set(NAMES)
    assert [(t.impl, t.text) for t in eight[-3:]] == [(FULL, LONG[3]), (FULL, LONG[3]), (FULL, LONG[4])]
    assert set(eight) < set(seven) and {task.impl for task in eight} == set(tasks.CORE)
    assert len(set(seven)) == len(seven)
    assert {task.kind for task in seven} == set(tasks.KINDS)
    cell = Setting("7b", SCALES["7b"], torch.device("cuda"), torch.bfloat16, LONG, 64)
    assert [tasks.repeats(cell, text) for text in LONG] == [5, 5, 2, 1, 1]
    seconds = [tasks.expected_seconds(Task(PREFILL, OURS, text), cell) for text in LONG]
    assert seconds[0] < 10 < seconds[3] < 60


# -- where the time goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, group",
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", parts.PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", parts.PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16>", parts.PRODUCTS),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", parts.ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", parts.ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", parts.ATTENTION),
        ("decode_kernel", parts.ATTENTION),
        ("combine_kernel", parts.ATTENTION),
        ("rotate_commit_kernel", parts.ROTARY),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "elementwise",
        ),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", parts.COPIES),
        ("void at::native::CatArrayBatchedCopy<at::native::OpaqueType<2u>>", parts.COPIES),
        ("Memcpy HtoD (Pageable -> Device)", parts.COPIES),
        ("aten::mm", parts.PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", parts.ATTENTION),
        ("aten::silu", "elementwise"),
        ("aten::select", parts.OTHER),
    ],
)
def test_groups_of_kernels(name: str, group: str) -> None:
    assert parts.group_of(name) == group


def test_marks_tell_our_kernels_apart(base: Any) -> None:
    assert parts.group_of("forward_kernel") == parts.ATTENTION
    assert parts.group_of("rotate_commit_kernel") == parts.ROTARY
    assert parts.group_of("aten::bmm", parts.ATTENTION) == parts.ATTENTION
    assert parts.group_of("aten::cat", parts.ROTARY) == parts.ROTARY
    before = beacon.reading.load_path, beacon.reading.load_rotation, beacon.modules.rotate
    cell = setting()
    with contender(OURS, base, cell) as ready:
        wall, found = parts.parts(lambda: ready.read(cell.ids(80), TEXT.ratio), CPU)
    assert (beacon.reading.load_path, beacon.reading.load_rotation, beacon.modules.rotate) == before
    assert found.keys() == set(parts.GROUPS)
    assert sum(found.values()) == pytest.approx(wall, rel=1e-6)
    assert all(found[group] > 0 for group in (parts.PRODUCTS, parts.ATTENTION, parts.ROTARY, parts.HOST))


def test_kernels_of_a_gpu_belong_to_the_mark_they_run_in() -> None:
    def event(name: str, start: float, stop: float, annotation: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=stop, elapsed_us=lambda: stop - start)
        kind = DeviceType.CUDA if name != "aten::mm" else DeviceType.CPU
        return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=annotation)

    attention, rotation = parts.MARKS
    events = [
        event("aten::mm", 0, 1000),
        event("nvjet", 0, 10),
        event(rotation, 10, 40, True),
        event("rotate_commit_kernel", 10, 30),
        event("Memcpy HtoD", 30, 40),
        event(attention, 40, 100, True),
        event("forward_kernel", 40, 100),
        event("gemm", 100, 107),
        event("another annotation", 0, 107, True),
    ]
    found = parts._on_gpu(events)
    spent = {group: round(1e6 * seconds) for group, seconds in found.items() if seconds}
    assert spent == {parts.PRODUCTS: 17, parts.ROTARY: 30, parts.ATTENTION: 60}


def test_fused_parts_have_cases_of_their_own(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(call) or call)
    fuse(base, "none")
    assert not compiled
    fuse(base, "compile")
    assert len(compiled) == 3 * SMALL.layers
    assert end_to_end.FUSED == FUSED
    fused = dataclasses.replace(setting(), fused="compile")
    assert fused.case("prefill", TEXT) == setting().case("prefill", TEXT) + " compile"
    assert aims.sizes_of(fused.case("decode", TEXT, 8)) == (80, 8)


# -- kvpress -----------------------------------------------------------------------------------------------------------


def test_kvpress_where_it_is_not(tmp_path: Path, base: Any) -> None:
    with pytest.raises(Unavailable, match="--kvpress-python"):
        kvpress_process.kvpress_rows(setting(), TEXT, None, math.inf)
    with pytest.raises(Unavailable, match="cannot be run"):
        kvpress_process.kvpress_rows(setting(), TEXT, str(tmp_path / "none"), math.inf)
    ran = runner(base, tmp_path)
    ran.run([Task(PREFILL, KVPRESS, TEXT)])
    assert read(ran.results.path)[0]["status"] == "unavailable"


def test_kvpress_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {
        "press": "SnapKVPress",
        "kvpress": "1",
        "transformers": "5.2",
        "torch": "2",
        "seconds": [2.0, 4.0],
        "first_s": 1.0,
        "cache_mb": 3.0,
        "peak_mb": None,
        "tokens_per_s": 5.0,
    }
    asked = []

    def answered(command: list[str], **_: Any) -> Any:
        asked.append(json.loads(command[2]))
        return subprocess.CompletedProcess(command, 0, "noise\n" + json.dumps(answer) + "\n", "")

    monkeypatch.setattr(kvpress_process.subprocess, "run", answered)
    rows = kvpress_process.kvpress_rows(setting(), TEXT, "python", 10.0)
    found = {row.metric: row.value.p50 for row in rows if row.value is not None}
    assert found["ttft_s"] == 3.0 and found["cache_mb"] == 3.0 and found["eager_tokens_per_s"] == 5.0
    assert "peak_mb" not in found and "transformers=5.2" in rows[0].shape
    assert asked[0]["scale"]["hidden"] == 32 and asked[0]["ratio"] == TEXT.ratio
    answer["failed"] = "out of memory"
    with pytest.raises(torch.OutOfMemoryError):
        kvpress_process.kvpress_rows(setting(), TEXT, "python", 10.0)
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nModuleNotFoundError: No module named 'kvpress'")
    monkeypatch.setattr(kvpress_process.subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(Unavailable, match="No module named 'kvpress'"):
        kvpress_process.kvpress_rows(setting(), TEXT, "python", 10.0)


# -- the command -------------------------------------------------------------------------------------------------------


def files() -> set[Path]:
    return {path for path in end_to_end.RESULTS.rglob("*") if path.is_file()}


def test_tiny_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    arguments = ["--dry-run", "--threads", "1", "--commit", "here", "--out", str(tmp_path)]
    assert end_to_end.main(arguments) == 0
    rows = read(tmp_path / end_to_end.FILE)
    assert files() == before
    bad = {(row["impl"], row["status"]) for row in rows if row["status"] != "ok"}
    assert bad == {(CUDNN, "unavailable"), (KVPRESS, "unavailable")}
    values = [float(row[name]) for row in rows if row["status"] == "ok" for name in ("p20", "p50", "p80")]
    assert all(math.isfinite(value) for value in values)
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows if row["p50"])
    found = {(row["case"].split()[0], row["impl"], row["metric"]) for row in rows if row["status"] == "ok"}
    every = ("ttft_s", "prefill_tokens_per_s", "tflops", "cache_mb", "first_s")
    readers = (OURS, LOOP, PUBLISHED, FULL, SLIDING)
    assert found >= {(PREFILL, name, metric) for name in readers for metric in every}
    assert found >= {(PREFILL, name, "matmul_floor_x") for name in (OURS, LOOP, PUBLISHED)}
    assert found >= {(PREFILL, name, "difference") for name in (LOOP, PUBLISHED)}
    decoding = ((OURS, GENERATE), (STATIC, LEAN), (STATIC, GENERATE), (FULL, GENERATE), (FULL_STATIC, LEAN))
    assert found >= {(DECODE, name, f"{way}_tokens_per_s") for name, way in decoding}
    shares = {f"share_{group}" for group in parts.GROUPS}
    assert found >= {(PREFILL_PARTS, OURS, share) for share in shares}
    assert found >= {(DECODE_PARTS, STATIC, share) for share in shares}
    assert {row["case"].split()[2] for row in rows} == {str(text.length) for text in TEXTS["tiny"]}
    assert any("ratio 8 batch 2" in row["case"] for row in rows)
    printed = capsys.readouterr().out
    assert "matrix products alone" in printed and "not judged here" in printed


def test_without_a_folder_a_cpu_run_writes_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    arguments = ["--scale", "tiny", "--cpu", "--only", OURS, "--kinds", PREFILL, "--lengths", "128"]
    assert end_to_end.main(arguments) == 0
    assert files() == before
    assert "benchmarks-" in capsys.readouterr().out.splitlines()[-1]


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(models, "random_llama", full)
    assert end_to_end.main(["--scale", "tiny", "--cpu"]) == 1
    assert "the weights of tiny do not fit" in capsys.readouterr().out


def test_a_device_that_is_lost_ends_the_run(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "alive", lambda device: False)
    monkeypatch.setattr(FullDynamic, "read", lambda *_: 1 / 0)
    ran = runner(base, tmp_path)
    ran.run([Task(PREFILL, FULL, TEXT), Task(PREFILL, OURS, TEXT)])
    assert ran.problems == [run.LOST]
    assert [row["reason"] for row in read(ran.results.path)] == ["ZeroDivisionError: division by zero"]


def test_large_scales_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_to_end.main(["--cpu"]) == 2
    assert "7b 8b needs a CUDA GPU" in capsys.readouterr().err


def test_the_commands_names_are_the_packages() -> None:
    assert end_to_end.CONTENDERS == NAMES
    assert contenders.MEANING.keys() == set(NAMES)
    assert end_to_end.KINDS == tasks.KINDS
    assert set(end_to_end.SCALES) == TEXTS.keys() <= models.SCALES.keys()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", ["benchmarks.gpu", "end_to_end.py", "neither"])
def test_make_runs_both_whatever_becomes_of_one(tmp_path: Path, fails: str) -> None:
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{fails}*) exit 3;; esac\n')
    python.chmod(0o755)
    command = ["make", "bench-gpu", f"GPU_PYTHON={python}", "ARGS=--commit here --budget-seconds 5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    kernels, whole = log.read_text().splitlines()
    assert kernels == "-m benchmarks.gpu bench --commit here --budget-seconds 5"
    assert whole == "benchmarks/end_to_end.py --commit here --budget-seconds 5"
    assert (done.returncode == 0) == (fails == "neither"), done.stderr
    own = [*command, "END_TO_END_ARGS=--budget-seconds 7"]
    subprocess.run(own, cwd=ROOT, capture_output=True, text=True, check=False)
    assert log.read_text().splitlines()[-1] == "benchmarks/end_to_end.py --budget-seconds 7"


# -- aims --------------------------------------------------------------------------------------------------------------


def measured(folder: Path, machine: str, loop: float = 4.0) -> list[dict[str, str]]:
    """What an H200 might give at 100K and after it."""
    results = Results(folder / f"{machine[:8]}{loop}.csv", Stamp(machine, "1", "2", "3", "4", "no", "5"))
    cell = Setting("7b", SCALES["7b"], CPU, torch.bfloat16, LONG)

    def row(kind: str, text: Text, impl: str, metric: str, value: float, batch: int | None = None) -> Row:
        return Row(cell.case(kind, text, batch), impl, "", "bfloat16", metric, Spread(value, value, value))

    four, _, hundred, four_hundred, _ = LONG
    results.append(
        [
            row(PREFILL, hundred, OURS, "ttft_s", 3.0),
            row(PREFILL, hundred, OURS, "prefill_tokens_per_s", 34_000.0),
            row(PREFILL, four, OURS, "prefill_tokens_per_s", 36_000.0),
            row(PREFILL, hundred, OURS, "matmul_floor_x", 1.5),
            row(PREFILL, hundred, OURS, "peak_mb", 20_000.0),
            row(PREFILL, four_hundred, OURS, "peak_mb", 20_500.0),
            row(PREFILL, hundred, LOOP, "ttft_s", loop),
            row(PREFILL, hundred, FULL, "ttft_s", 9.0),
            row(PREFILL, hundred, CUDNN, "ttft_s", 7.5),
            Row(cell.case(PREFILL, four_hundred), FULL, "", "bfloat16", status="failed", reason="out of memory"),
            *(row(DECODE, text, STATIC, "lean_tokens_per_s", 210.0, 1) for text in (four, hundred, four_hundred)),
            *(row(DECODE, text, STATIC, "generate_tokens_per_s", 160.0, 1) for text in (four, hundred, four_hundred)),
        ]
    )
    return read(results.path)


def test_aims(tmp_path: Path) -> None:
    lines = report.verdicts(measured(tmp_path, "NVIDIA H200"), "7b", "NVIDIA H200")
    expected = [
        "34000 at 102400: below (2 of 4 lengths measured)",
        "1.5 at 102400: above (1 of 4",
        "2.5: below",  # of the faster kernel
        "1.333 at 102400: met (1 of 4",
        "-: not measured",
        "20.97: met",
        "0.5243: met",
        "210 at 4096: met",
        "160 at 4096: below",
        "1: met",
    ]
    assert len(lines) == len(aims.AIMS)
    assert all(f": {verdict}" in line for verdict, line in zip(expected, lines, strict=True)), lines
    other = report.verdicts(measured(tmp_path, "NVIDIA A100"), "7b", "NVIDIA A100-SXM4-80GB")
    judged = ["not judged here" not in line for line in other]
    assert judged == [not aim.absolute for aim in aims.AIMS]
    processor = report.verdicts(measured(tmp_path, "EPYC"), "7b", "AMD EPYC")
    assert all("not judged here" in line for line in processor)
    assert report.verdicts(measured(tmp_path, "NVIDIA", 3.5), "8b", "NVIDIA H200") == [
        "aims: not judged here (they are for 7b)"
    ]


def test_the_report(tmp_path: Path) -> None:
    rows = measured(tmp_path, "NVIDIA H200")
    text = report.report(rows)
    lines = text.splitlines()
    assert any(line.split()[:5] == ["7b", "102400", "ratio", "32", OURS] and " 1.00 " in line for line in lines)
    assert "failed: out of memory" in text
    generate = next(line for line in lines if STATIC in line and GENERATE in line)
    assert " 160.0 " in generate and " 1.31 " in generate  # its time over the lean loop's
