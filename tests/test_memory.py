"""Memory at rest: in eight bits, on the CPU; what attention reads is the same however a text is cut into passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import beacon
from beacon.memory import MemoryFormat, Packed, Quantized, join
from tests.readers import close, configs, fixed, pad, wrapped
from tests.tiny_models import random_ids

FORMATS = [{"memory_dtype": "int8"}, {"memory_dtype": "float8_e4m3fn"}, {"offload_memory": True}]
BOTH = [*FORMATS, {"memory_dtype": "int8", "offload_memory": True}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_err_as_stated(dtype: torch.dtype) -> None:
    entries = torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(0))
    entries *= torch.logspace(-4, 1, 50)[:, None, None]
    entries[7] = 0.0
    entries = entries.to(dtype)
    largest = entries.float().abs().amax(-1, keepdim=True)
    own = entries.float().abs() * torch.finfo(dtype).eps + 1e-7  # of the dtype, and of subnormal float16
    error = (Quantized.of(entries, "int8").dense().float() - entries.float()).abs()
    assert (error <= largest / 254 + own).all() and error.max() > 0
    error = (Quantized.of(entries, "float8_e4m3fn").dense().float() - entries.float()).abs()
    assert (error <= torch.maximum(entries.float().abs() / 16, largest / 458752) + own).all()
    assert Quantized.of(entries, "int8").nbytes == entries.numel() + 50 * 3 * 4


def test_chunks_are_few_and_in_order() -> None:
    parts = [torch.randn(n, 2, 4) for n in (3, 1, 1, 2, 8, 1, 1, 1, 5)]
    form = MemoryFormat("int8")
    packed = Packed((form.chunk(parts[0]),), torch.device("cpu"), form)
    for number, part in enumerate(parts[1:], start=1):
        before = packed
        packed = packed.then(form.chunk(part))
        torch.testing.assert_close(packed.dense(), torch.cat(parts[: number + 1]), atol=0.02, rtol=0)
        assert len(before) == sum(map(len, parts[:number]))  # what was there stays as it was
    assert len(packed) == 23 and packed.nbytes == 23 * (8 + 2 * 4)
    for _ in range(100):
        packed = packed.then(form.chunk(torch.randn(1, 2, 4)))
    assert len(packed.chunks) < 10


@pytest.mark.parametrize("changes", BOTH)
@given(config=configs(), cut=st.integers(1, 60))
@settings(max_examples=15)
def test_results_do_not_depend_on_passes(changes: dict[str, Any], config: beacon.BeaconConfig, cut: int) -> None:
    """One pass, a window at a time, two calls: the same logits and states.

    Not where a text begins with windows of ratio 0: a call that reads no more is the stock model's and rounds nothing.
    """
    assume(config.ratios[0] > 0)
    ids = random_ids(1, 61)
    outputs = []
    for segment in (None, 1, 2):
        model = wrapped(config.replace(segment=segment, **changes), dtype=torch.float64)
        with torch.no_grad():
            outputs.append(model(ids, use_cache=True))
    with torch.no_grad():
        cache = model.compress(ids[:, :cut])
        outputs.append(model(ids[:, cut:], past_key_values=cache))
    for out in outputs[1:]:
        tail = out.logits.shape[1]
        close(out.logits, outputs[0].logits[:, -tail:], 1e-6)
        assert out.past_key_values.stats()[0]["beacons"] == outputs[0].past_key_values.stats()[0]["beacons"]


@pytest.mark.parametrize("changes", BOTH)
def test_near_to_memory_as_it_is(changes: dict[str, Any]) -> None:
    """Ragged rows, ratios and sinks; decoding included. Memory on the CPU changes nothing at all."""
    config = fixed(window=8, ratio=2, sink=1)
    rows = [random_ids(1, length, seed=length)[0] for length in (70, 9, 33)]
    ids, mask = pad(rows)
    logits, held = [], []
    for own in ({}, changes):
        model = wrapped(config.replace(**own), num_hidden_layers=3)
        with torch.no_grad():
            out = model(ids, mask, use_cache=True, ratios=[2, 0, 4, 2, 1, 8, 2, 2, 2])
            more = model(random_ids(3, 5, seed=4), past_key_values=out.past_key_values, use_cache=True)
        logits.append(torch.cat([out.logits[mask.bool()], more.logits.flatten(0, 1)]))
        held.append([row["bytes"] for row in out.past_key_values.stats()])
    if "memory_dtype" not in changes:
        assert torch.equal(*logits) and held[0] == held[1]
        return
    difference = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert 1e-5 < difference < (0.1 if "float8" in changes["memory_dtype"] else 0.02)
    assert held[1][0] < 0.6 * held[0][0]


@pytest.mark.parametrize("changes", BOTH)
def test_forks_and_rows_share_and_stay_apart(changes: dict[str, Any]) -> None:
    model = wrapped(fixed(**changes))
    with torch.no_grad():
        cache = model.compress(random_ids(2, 40))
        fork = cache.fork()
        before = cache.stats()
        model(random_ids(2, 30, seed=3), past_key_values=fork)
        assert cache.stats() == before
        assert fork.stats()[0]["beacons"] > before[0]["beacons"]
        alone = model(random_ids(1, 9, seed=5), past_key_values=cache.select([1])).logits
        both = model(random_ids(1, 9, seed=5).repeat(2, 1), past_key_values=cache.fork()).logits
        close(alone[0], both[1], 1e-6)
        moved = model(random_ids(1, 9, seed=5), past_key_values=cache.select([1]).to("cpu")).logits
        assert torch.equal(alone, moved)


@pytest.mark.parametrize("changes", FORMATS)
def test_text_goes_on_from_a_short_one(changes: dict[str, Any]) -> None:
    """Raw entries that the stock attention cached become memory at rest too."""
    ids, logits = random_ids(1, 40), []
    for own in ({}, changes):
        model = wrapped(fixed(ratios=(0, 2), ratio_policy="sequence", **own), dtype=torch.float64)
        with torch.no_grad():
            cache = model.compress(ids[:, :9])
            assert cache.stock is not None and cache.states[0].memory == 8
            logits.append(model(ids[:, 9:], past_key_values=cache).logits)
    assert all(isinstance(row, Packed) for store in cache.stores for row in store.memory_v)
    close(*logits, 0.3 if "memory_dtype" in changes else 1e-9)


@pytest.mark.parametrize("changes", BOTH)
def test_training_takes_memory_as_it_is(changes: dict[str, Any]) -> None:
    ids, gradients = random_ids(1, 40), []
    for own in ({}, changes):
        model = wrapped(fixed(**own)).train()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.beacon_k_proj.weight.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_training_goes_on_from_packed_memory() -> None:
    model = wrapped(fixed(memory_dtype="int8")).train()
    cache = model.compress(random_ids(1, 40))
    ids = random_ids(1, 24, seed=2)
    out = model(ids, labels=ids, past_key_values=cache, use_cache=True)
    out.loss.backward()
    assert model.model.layers[0].self_attn.beacon_v_proj.weight.grad.abs().max() > 0
    with torch.no_grad():  # and back to eight bits
        model(ids, past_key_values=cache)
    assert all(isinstance(row, Packed) for store in cache.stores for row in store.memory_k)


@pytest.mark.parametrize("changes", BOTH)
def test_generate_reads_memory_at_rest(changes: dict[str, Any]) -> None:
    model = wrapped(fixed(**changes))
    ids = random_ids(2, 30)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
        step, wanted = ids, []
        cache = None
        for _ in range(20):
            result = model(step, past_key_values=cache, use_cache=True)
            cache, step = result.past_key_values, result.logits[:, -1:].argmax(-1)
            wanted.append(step)
    assert torch.equal(out[:, 30:], torch.cat(wanted, dim=1))


@pytest.mark.parametrize("after", [*BOTH, {}])
@pytest.mark.parametrize("before", [*BOTH, {}])
def test_memory_goes_on_in_another_format(before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    """Through a file: all entries are there, in the new format, and further ones are added."""
    first, second = (wrapped(fixed(sink=1, **own)) for own in (before, after))
    cache = first.compress(random_ids(2, 40))
    loaded = beacon.load_cache(second, beacon.save_cache(cache, first, tmp_path / "text.safetensors"))
    for seed in (3, 4):
        ids = random_ids(2, 20, seed=seed)
        with torch.no_grad():
            ours, theirs = second(ids, past_key_values=loaded).logits, first(ids, past_key_values=cache).logits
        assert (ours - theirs).norm() < 0.1 * theirs.norm()
    sizes = [[len(row) for row in store.memory_k] for store in loaded.stores]
    assert sizes == [[state.memory for state in loaded.states]] * len(loaded.stores)
    again = beacon.load_cache(second, beacon.save_cache(loaded, second, tmp_path / "text.safetensors"))
    assert again.stats() == loaded.stats()


def test_only_chunks_of_one_kind_are_joined() -> None:
    plain = torch.randn(2, 2, 4)
    with pytest.raises(TypeError, match="of one kind"):
        join([plain, Quantized.of(plain, "int8")])


@pytest.mark.gpu
@pytest.mark.parametrize("changes", BOTH)
def test_memory_at_rest_on_a_gpu(changes: dict[str, Any], tmp_path: Path) -> None:
    """Several passes, decoding, a file: what the same model gives on the CPU."""
    config = fixed(sink=1, segment=1, attention_path="sdpa", **changes)
    texts, logits = [random_ids(2, 60), random_ids(2, 1, seed=2), random_ids(2, 30, seed=3)], []
    for device in ("cpu", "cuda"):
        model, cache, parts = wrapped(config, num_hidden_layers=4).to(device), None, []
        with torch.no_grad():
            for ids in texts:
                out = model(ids.to(device), past_key_values=cache, use_cache=True)
                parts.append(out.logits.cpu())
                file = beacon.save_cache(out.past_key_values, model, tmp_path / "text.safetensors")
                cache = beacon.load_cache(model, file)
        logits.append(torch.cat(parts, dim=1))
    close(logits[1], logits[0], 1e-3)


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match="memory_dtype must be one of auto, int8, float8_e4m3fn, got 'int4'"):
        beacon.BeaconConfig(memory_dtype="int4")
    with pytest.raises(TypeError, match="offload_memory must be a bool, got 'cpu'"):
        beacon.BeaconConfig(offload_memory="cpu")  # type: ignore[arg-type]
