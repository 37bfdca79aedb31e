"""However a text is cut into calls and passes, and whichever path computes it: the same logits and gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2 import modeling_qwen2

import beacon
from beacon import modules, reading, segments
from tests.readers import close, configs, fixed, wrapped
from tests.tiny_models import random_ids


def read(model: Any, calls: tuple[torch.Tensor, ...], **span: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of all calls and the gradients of the loss over the whole text."""
    model.zero_grad()
    cache, logits, loss, past = None, [], torch.zeros(()), 0
    total = sum(ids.numel() for ids in calls) - calls[0].shape[0]
    for ids in calls:
        past += ids.shape[1]
        out = model(
            ids,
            torch.ones(ids.shape[0], past),  # over all columns: these are new
            past_key_values=cache,
            labels=ids,
            use_cache=True,
            logits_to_keep=torch.arange(ids.shape[1]),
            num_items_in_batch=total,
            **span,
        )
        cache, loss = out.past_key_values, loss + out.loss
        logits.append(out.logits)
    loss.backward()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}
    return torch.cat(logits, dim=1).detach(), gradients


def agree(first: Any, second: Any, tolerance: float, what: str) -> None:
    close(first[0], second[0], tolerance, f"logits, {what}")
    assert first[1].keys() == second[1].keys(), what
    for name, gradient in first[1].items():
        scale = second[1][name].norm().clamp(min=1e-3)
        assert (gradient - second[1][name]).norm() / scale < tolerance, f"gradient of {name}, {what}"


@given(configs(), st.integers(2, 45), st.lists(st.integers(1, 44), max_size=3, unique=True), st.data())
@settings(max_examples=30)
def test_cuts_segments_and_paths_agree(config: Any, length: int, cuts: list[int], data: Any) -> None:
    """In float64, so that nothing hides in rounding."""
    span: dict[str, int] = {}
    if not config.sink:
        span["keep_first"] = data.draw(st.sampled_from([0, 3]))
        if data.draw(st.booleans()):
            span["keep_from"] = span["keep_first"] + config.stride * data.draw(st.integers(0, 5))
    ids = random_ids(1, length)
    bounds = [0, *sorted(cut for cut in cuts if cut < length), length]
    calls = tuple(ids[:, low:high] for low, high in pairwise(bounds))
    variants = {
        "reference, one window per pass": ("reference", 1, (ids,)),
        "sdpa, all windows in one pass": ("sdpa", None, (ids,)),
        "sdpa, two windows per pass": ("sdpa", 2, (ids,)),
        f"sdpa, cut at {bounds}": ("sdpa", None, calls),
        f"reference, two windows per pass, cut at {bounds}": ("reference", 2, calls),
    }
    results = {}
    for name, (path, segment, given_calls) in variants.items():
        model = wrapped(config.replace(attention_path=path, segment=segment), dtype=torch.float64)
        results[name] = read(model, given_calls, **span)
    first = next(iter(results.values()))
    for name, result in results.items():
        agree(result, first, 1e-9, name)


@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_segments_agree_in_float32(placement: str) -> None:
    config = fixed(16, 4, placement=placement)
    ids = random_ids(2, 200)
    results = [read(wrapped(config.replace(segment=segment), "llama3"), (ids,)) for segment in (1, 3, None)]
    agree(results[1], results[0], 2e-5, "segment 3")
    agree(results[2], results[0], 2e-5, "all in one pass")


def test_without_gradients_long_texts_are_read_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default number of windows per pass bounds the activations; progress says how far it is."""
    monkeypatch.setattr(segments, "CPU_PASS_TOKENS", 100)
    model, ids, seen = wrapped(fixed(16, 8)), random_ids(2, 250), []
    cache = model.compress(ids, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 500) for done in (96, 192, 288, 384, 480, 500)]
    assert [row["text_tokens"] for row in cache.stats()] == [250, 250]


class SmallMemory:
    """`run_pass` on a device that holds some tokens at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.tokens, self.passes, self.run = tokens, [], reading.run_pass
        monkeypatch.setattr(reading, "run_pass", self)

    def __call__(self, model: Any, ids: torch.Tensor, beacon_pass: Any) -> torch.Tensor:
        self.passes.append(len(ids))
        out = self.run(model, ids, beacon_pass)
        if len(ids) > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out


def test_out_of_memory_halves_the_segment_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = wrapped(fixed(16, 4), dtype=torch.float64), random_ids(2, 200)
    with torch.no_grad():
        whole = model(ids)
        memory = SmallMemory(monkeypatch, 100)
        cache = model.compress(ids[:, :64])
        halves = model(ids, past_key_values=cache)
    assert memory.passes == [128, 64, 64, 272, 144, 64, 64, 64, 64, 16]
    assert "out of memory reading 18 windows at once; going on with 9 a pass" in caplog.text
    close(halves.logits, whole.logits[:, 64:], 1e-10)
    assert halves.past_key_values.stats() == whole.past_key_values.stats()


def test_a_window_too_large_for_memory_fails_and_leaves_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = wrapped(fixed(16, 4)), random_ids(1, 100)
    cache = model.compress(ids[:, :40])
    before = cache.stats()
    memory = SmallMemory(monkeypatch, 8)
    with pytest.raises(torch.OutOfMemoryError):
        model.compress(ids, past_key_values=cache)
    assert memory.passes == [60, 24, 8, 16] and cache.stats() == before


def test_out_of_memory_with_gradients_is_no_matter_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = wrapped(fixed(16, 4)), random_ids(1, 100)
    memory = SmallMemory(monkeypatch, 50)
    with pytest.raises(torch.OutOfMemoryError):
        model(ids, labels=ids)
    assert memory.passes == [100]


@pytest.mark.parametrize("free, windows", [(0, 1), (10 << 20, 19), (1 << 40, 64)])
def test_a_gpu_reads_as_many_windows_as_its_free_memory_holds(
    free: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(fixed(16, 4))
    assert segments.bytes_per_token(model) == 4 * 3 * (4 * 32 + 4 * 32 + 6 * 16) // 2
    monkeypatch.setattr(segments, "_free_bytes", lambda device: free)
    with torch.no_grad():
        assert segments.windows_per_pass(model, torch.device("cuda"), 128, 9000) == windows
    assert segments.windows_per_pass(model, torch.device("cuda"), 128, 9000) == segments.ALL  # with gradients


def test_all_rows_decode_in_one_pass_and_ask_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a pass is: a decoded token is a window of one token in every row."""
    monkeypatch.setattr(segments, "CPU_PASS_TOKENS", 32)
    model = wrapped(fixed(16, 4))
    cache = model.compress(random_ids(9, 50))
    memory = SmallMemory(monkeypatch, 100)
    model.generate(random_ids(9, 1), past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert memory.passes == [9] * 20
    monkeypatch.setattr(segments, "_free_bytes", lambda device: pytest.fail("the device was asked"))
    with torch.no_grad():
        assert segments.windows_per_pass(model, torch.device("cuda"), 16, 9) == segments.ALL


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_rows_share_a_pass(left: list[int], windows: int) -> None:
    taken = segments.share_out(left, windows)
    assert sum(taken) == min(sum(left), windows)
    assert all(0 <= now <= count for now, count in zip(taken, left, strict=True))
    cut = [now for now, count in zip(taken, left, strict=True) if now < count]
    assert max(cut, default=0) - min(cut, default=0) <= 1  # nobody waits while another gets more


def test_use_cache_false_returns_none_and_the_same_logits() -> None:
    model, ids = wrapped(fixed()), random_ids(2, 30)
    out = model(ids, use_cache=False)
    assert out.past_key_values is None
    assert torch.equal(out.logits, model(ids).logits)
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, out.logits) and isinstance(cache, beacon.BeaconCache)


@pytest.mark.parametrize("length", [6, 30])
def test_logits_to_keep(length: int) -> None:
    model, ids = wrapped(fixed()), random_ids(2, length)
    whole = model(ids).logits
    assert whole.shape == (2, length, 96)
    close(model(ids, logits_to_keep=3).logits, whole[:, -3:], 1e-6)
    close(model(ids, logits_to_keep=1000).logits, whole, 1e-6)
    index = torch.tensor([4, 0, -1])
    close(model(ids, logits_to_keep=index).logits, whole[:, index], 1e-6)
    out = model(ids, labels=ids, logits_to_keep=2)
    close(out.logits, whole[:, -2:], 1e-5)
    assert model(ids, labels=ids).logits is None


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_grows_with_the_square_of_the_text(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 2048
    model, ids = wrapped(fixed(64, 16)), random_ids(2, length)
    mask = torch.ones(2, length)
    if padded:
        mask[1, :500] = 0
    masks: list[Any] = []
    make = modeling_qwen2.create_causal_mask

    def spy(*args: Any, **kwargs: Any) -> Any:
        masks.append(make(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr(modeling_qwen2, "create_causal_mask", spy)
    with Largest() as largest:
        model(ids, mask, labels=ids).loss.backward()
        cache = model.compress(ids, mask)
        model.generate(ids[:, -1:], past_key_values=cache, max_new_tokens=2)
    assert largest.numel < length * length / 8
    assert masks and all(mask is None or mask.numel() <= length for mask in masks)


def test_beacons_stop_at_the_last_layers_keys_and_values() -> None:
    model, ids = wrapped(fixed(8, 2)), random_ids(1, 32)
    rows: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, out, name=name: rows.setdefault(name, []).append(
                args[0].shape[-2] if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point() else 0
            )
        )
    model(ids, labels=ids, use_cache=True).loss.backward()
    first, last = "model.layers.0", "model.layers.1"
    assert rows[f"{first}.mlp"] == [32 + 16] and rows[f"{first}.self_attn.beacon_q_proj"] == [16]
    assert rows[f"{last}.mlp"] == [32] and rows["model.norm"] == [32]
    assert rows[f"{last}.self_attn.beacon_k_proj"] == [16] and rows[f"{last}.self_attn.q_proj"] == [32]
    assert rows[f"{last}.self_attn.beacon_q_proj"] == [0] and rows[f"{last}.self_attn.beacon_o_proj"] == [0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("beacon_" in name), name  # engines wait for all of them
        idle = f"{last}.self_attn.beacon_q" in name or f"{last}.self_attn.beacon_o" in name
        assert parameter.grad is None or bool(parameter.grad.any()) != idle, name
    rows.clear()
    model.compress(ids, past_key_values=None)
    assert "lm_head" not in rows


def test_passes_whose_outputs_nobody_reads_skip_the_last_layer() -> None:
    """compress reads only the last token's state: in all other passes the last layer stops at keys and values."""
    model, calls = wrapped(fixed(8, 2, segment=1)), []
    for name in ("mlp", "self_attn.q_proj", "self_attn.k_proj"):
        module = model.model.layers[-1].get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.compress(random_ids(1, 36))
    assert [calls.count(name) for name in ("self_attn.k_proj", "self_attn.q_proj", "mlp")] == [5, 1, 1]


@pytest.mark.gpu
def test_passes_do_not_wait_for_the_gpu() -> None:
    """After a call's first pass (which compiles) the host plans and launches without looking at the device."""
    model = wrapped(fixed(8, 2, sink=1, segment=2), dtype=torch.bfloat16, num_hidden_layers=3, head_dim=16).cuda()
    ids = random_ids(2, 200).cuda()
    model.compress(ids)

    def watch(done: int, total: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < total else "default")

    try:
        model.compress(ids, progress=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_ids_on_the_host_are_copied_pass_by_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """``cpu:0`` stands for a GPU: PyTorch takes it for another device, and computes there."""
    model, ids = wrapped(fixed(8, 2, segment=1)), random_ids(1, 40)
    expected, copied, stock = model.compress(ids), [], reading.upload

    def upload(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        copied.append((tensors[0].tolist(), device))
        return stock(tensors, device)

    monkeypatch.setattr(reading, "home_of", lambda module: torch.device("cpu", 0))
    monkeypatch.setattr(reading, "upload", upload)
    ours = model.compress(ids)
    assert copied == [(ids[0, at : at + 8].tolist(), torch.device("cpu", 0)) for at in range(0, 40, 8)]
    for mine, exact in zip(ours.stores, expected.stores, strict=True):
        assert torch.equal(mine.memory_k[0], exact.memory_k[0])


@pytest.mark.gpu
def test_ids_on_the_host_give_the_memory_of_ids_on_the_gpu() -> None:
    model = wrapped(fixed(8, 2, sink=1, segment=2)).cuda()
    short = random_ids(2, 5)
    assert torch.equal(*(model.compress(ids).stock.layers[0].keys for ids in (short, short.cuda())))
    ids = random_ids(2, 100)
    ours, theirs = model.compress(ids), model.compress(ids.cuda())
    for mine, exact in zip(ours.stores, theirs.stores, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.memory_k, exact.memory_k, strict=True))


@torch.no_grad()
def test_memory_of_a_call_has_one_place_of_its_final_size() -> None:
    """Not one per pass; what forks hold stays as it is."""
    model = wrapped(fixed(8, 2, sink=1, segment=1))
    ids = random_ids(2, 96)
    before = model.compress(ids[:, :35])
    kept = [[row.clone() for row in store.memory_k] for store in before.stores]
    places: set[int] = set()

    def watch(done: int, total: int) -> None:
        places.add(next(iter(watched.values())).data_ptr())

    watched: dict[int, torch.Tensor] = {}
    stock = modules.LayerStore.__init__

    def note(store: Any, memory_k: Any, *args: Any) -> None:
        stock(store, memory_k, *args)
        watched[0] = memory_k[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(modules.LayerStore, "__init__", note)
        after = model.compress(ids[:, 35:], past_key_values=before.fork(), progress=watch)
    assert len(places) == 1
    other = model.compress(random_ids(2, 61, seed=5), past_key_values=before.fork())
    whole = model.compress(ids)
    for store, held, same, mine in zip(after.stores, kept, whole.stores, other.stores, strict=True):
        for row in range(2):
            assert (
                len(store.memory_k[row]) * store.memory_k[row][0].nbytes
                == store.memory_k[row].untyped_storage().nbytes()
            )
            close(store.memory_k[row], same.memory_k[row], 1e-5)
            assert torch.equal(store.memory_k[row][: len(held[row])], held[row])
            assert torch.equal(mine.memory_k[row][: len(held[row])], held[row])
