"""A cache that went through a file goes on as the one in memory does; what does not belong together is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import beacon
from tests.readers import fixed, pad, wrapped
from tests.tiny_models import random_ids

SETTINGS: list[dict[str, Any]] = [
    {},
    {"sink": 2, "stride": 4},
    {"placement": "interleave", "attention": "full-coverage", "attend_beacons": True},
    {"memory_dtype": "int8"},
    {"memory_dtype": "float8_e4m3fn", "offload_memory": True},
    {"offload_memory": True},
]


def read(model: Any) -> Any:
    """Two rows of different lengths, with windows that are open."""
    ids, mask = pad([random_ids(1, 45, seed=1)[0], random_ids(1, 13, seed=2)[0]])
    return model.compress(ids, mask)


@pytest.mark.parametrize("changes", SETTINGS)
def test_a_text_goes_on_from_a_file(changes: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped(fixed(**changes))
    cache = read(model)
    file = beacon.save_cache(cache, model, tmp_path / "new" / "text.safetensors")
    other = wrapped(fixed(**changes, segment=1))  # the same weights in another process
    loaded = beacon.load_cache(other, file)
    assert loaded.stats() == cache.stats() and repr(loaded) == repr(cache)
    more = random_ids(2, 20, seed=3)
    with torch.no_grad():
        ours = other(more, past_key_values=loaded, labels=more, logits_to_keep=20)
        theirs = model(more, past_key_values=cache, labels=more, logits_to_keep=20)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert loaded.stats() == cache.stats()


def test_short_texts_and_explicit_ratios_are_kept(tmp_path: Path) -> None:
    """The stock attention's cache, and ratios that later calls have to repeat."""
    model = wrapped(fixed(window=16))
    for number, cache in enumerate(
        (model.compress(random_ids(1, 9)), model.compress(random_ids(1, 60), ratios=[4] * 9))
    ):
        file = beacon.save_cache(cache, model, tmp_path / f"{number}.safetensors")
        loaded = beacon.load_cache(model, file)
        assert (loaded.stock is None) == (cache.stock is None) and loaded.ratios == cache.ratios
        with torch.no_grad():
            ours, theirs = (model(random_ids(1, 30, seed=5), past_key_values=c).logits for c in (loaded, cache))
        assert torch.equal(ours, theirs)
        assert loaded.stats() == cache.stats()


def test_answers_are_generated_from_a_file(tmp_path: Path) -> None:
    model = wrapped(fixed())
    text, question = random_ids(1, 50), random_ids(1, 6, seed=7)
    file = beacon.save_cache(model.compress(text), model, tmp_path / "text.safetensors")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(question, past_key_values=beacon.load_cache(model, file), **settings)
    whole = model.generate(torch.cat([text, question], dim=1), **settings)
    assert torch.equal(ours, whole[:, 50:])


def test_another_dtype_takes_it(tmp_path: Path) -> None:
    model = wrapped(fixed(memory_dtype="int8"))
    cache = model.compress(random_ids(1, 50))
    file = beacon.save_cache(cache, model, tmp_path / "text.safetensors")
    with torch.no_grad():
        theirs = model(random_ids(1, 9, seed=2), past_key_values=cache.fork()).logits
        for dtype in (torch.bfloat16, torch.float16):
            half = wrapped(fixed(memory_dtype="int8")).to(dtype)
            ours = half(random_ids(1, 9, seed=2), past_key_values=beacon.load_cache(half, file)).logits
            assert ours.dtype == dtype and (ours - theirs).norm() < 0.05 * theirs.norm()


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    model = wrapped(fixed())
    cache = read(model)
    file = beacon.save_cache(cache, model, tmp_path / "text.safetensors")
    other = wrapped(fixed())
    with torch.no_grad():
        other.model.beacon_embed_tokens.weight[0, -1] += 1
    with pytest.raises(ValueError, match="made by another model"):
        beacon.save_cache(cache, other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other beacon weights"):
        beacon.load_cache(other, file)
    with pytest.raises(ValueError, match=r"made with window=8 .here 4., stride=8 .here 4.; wrap the model as it was"):
        beacon.load_cache(wrapped(fixed(window=4)), file)
    with pytest.raises(ValueError, match=r"another base: model_type qwen2 .here llama."):
        beacon.load_cache(wrapped(fixed(), "llama2"), file)
    with pytest.raises(TypeError, match="takes a wrapped model"):
        beacon.load_cache(beacon.unwrap(wrapped(fixed())), file)
    with pytest.raises(TypeError, match="takes a BeaconCache, got dict"):
        beacon.save_cache({}, model, file)
    with pytest.raises(ValueError, match="got an empty one"):
        beacon.save_cache(model.beacon_cache(None, 1), model, file)
    assert beacon.load_cache(model, file).stats() == cache.stats()  # untouched by all that


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = wrapped(fixed())
    file = beacon.save_cache(read(model), model, tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        beacon.load_cache(model, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or other file"):
        beacon.load_cache(model, tmp_path / "cut.safetensors")
    save_file(load_file(file), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="must be a cache, got another safetensors file"):
        beacon.load_cache(model, tmp_path / "bare.safetensors")
    tensors = load_file(file)
    del tensors["layers.1.memory_v.0"]
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, tmp_path / "less.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"got a damaged one .KeyError..layers\.1\.memory_v\.0"):
        beacon.load_cache(model, tmp_path / "less.safetensors")
    tensors["layers.1.memory_v.0"] = torch.zeros(3, 2, 8)
    save_file(tensors, tmp_path / "less.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="must hold 20 entries of memory_v in row 0, got 3"):
        beacon.load_cache(model, tmp_path / "less.safetensors")
    for changed, what in (
        ({"states": [7]}, "damaged"),
        ({"base": []}, "damaged"),
        ({"format_version": 2}, "must have"),
    ):
        content = {**json.loads(metadata["beacon_cache"]), **changed}
        save_file(load_file(file), tmp_path / "less.safetensors", metadata={"beacon_cache": json.dumps(content)})
        with pytest.raises(ValueError, match=what):
            beacon.load_cache(model, tmp_path / "less.safetensors")


def test_weights_may_be_offloaded(tmp_path: Path) -> None:
    """accelerate keeps them elsewhere; memory goes where the modules compute."""
    accelerate = pytest.importorskip("accelerate")
    model = wrapped(fixed())
    cache = model.compress(random_ids(1, 50))
    file = beacon.save_cache(cache, model, tmp_path / "text.safetensors")
    away = accelerate.cpu_offload(wrapped(fixed()), execution_device=torch.device("cpu"))
    ids = random_ids(1, 20, seed=2)
    with torch.no_grad():
        ours = away(ids, past_key_values=beacon.load_cache(away, file), labels=ids)
        theirs = model(ids, past_key_values=cache, labels=ids)
    torch.testing.assert_close(ours.loss, theirs.loss)
