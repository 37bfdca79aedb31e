"""Adapters on disk: what is written, what is read back, and every way a file can be wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import beacon
from beacon import saving
from beacon import weights as weights_module
from beacon.weights import beacon_parameters
from tests.tiny_models import assert_same, fingerprint, random_ids, randomize, tiny_model

CONFIG = beacon.BeaconConfig(window=16, ratios=(4, 8), ratio_policy="fixed", sink=1)
IDS = random_ids(2, 40)
WEIGHTS, SETTINGS = "beacon_model.safetensors", "beacon_config.json"
K1 = "model.layers.1.self_attn.beacon_k_proj.weight"


def trained(name: str = "llama3", config: beacon.BeaconConfig = CONFIG, **changes: Any) -> Any:
    """A wrapped model whose beacon weights are not the initial ones."""
    return randomize(beacon.wrap(tiny_model(name, **changes), config), seed=4, only="beacon_")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return beacon.save_adapter(trained(), tmp_path / "adapter")


def edit_settings(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**values, **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def refuses(folder: Any, error: type[BaseException], match: str, model: Any = None, **overrides: Any) -> None:
    """Loading fails, says why, and leaves the model a stock one."""
    model = tiny_model() if model is None else model
    before = fingerprint(model)
    with pytest.raises(error, match=match):
        beacon.load_adapter(model, folder, **overrides)
    assert_same(before, fingerprint(model))


# -- what is written and read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "qwen2", "phi3-longrope", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(tmp_path, name, dtype):
    model = trained(name, dtype=dtype)
    folder = beacon.save_adapter(model, tmp_path / "new" / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [SETTINGS, WEIGHTS]
    assert set(load_file(folder / WEIGHTS)) == set(beacon_parameters(model))
    loaded = beacon.load_adapter(tiny_model(name, dtype=dtype), str(folder))
    assert loaded.beacon_config == CONFIG
    assert torch.equal(logits(loaded), logits(model))


def test_settings_say_which_base_and_format(adapter):
    values = json.loads((adapter / SETTINGS).read_text())
    assert values["format_version"] == 1
    assert values["base"] == {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 96,
    }


def test_fewer_projections(tmp_path):
    model = trained(config=CONFIG.replace(projections=("k", "v")))
    loaded = beacon.load_adapter(tiny_model(), beacon.save_adapter(model, tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_configuration_can_be_overridden(adapter):
    model = beacon.load_adapter(tiny_model(), adapter, ratios=(8,), attention_path="reference")
    assert model.beacon_config == CONFIG.replace(ratios=(8,), attention_path="reference")
    refuses(adapter, ValueError, "window", window=16 * 1024)
    refuses(adapter, TypeError, "colour", colour="red")


def test_hub_id_is_downloaded_without_pickles(adapter, monkeypatch):
    asked = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options["allow_patterns"]))
        return str(adapter)

    monkeypatch.setattr(saving, "snapshot_download", download)
    model = beacon.load_adapter(tiny_model(), "someone/an-adapter")
    assert torch.equal(logits(model), logits(trained()))
    assert asked == [("someone/an-adapter", ["*.json", "*.safetensors"])]


def test_saving_again_replaces_the_adapter(adapter):
    model = randomize(trained(), seed=9, only="beacon_")
    beacon.save_adapter(model, adapter)
    assert torch.equal(logits(beacon.load_adapter(tiny_model(), adapter)), logits(model))


# -- the reference's files ---------------------------------------------------------------------------------------------


def _as_reference(model: Any, folder: Path, layout: str) -> Path:
    """All weights of a model as the reference implementation stores them, base included."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if layout == "file":
        save_file(state, folder / "anything.safetensors")
        return folder / "anything.safetensors"
    if layout == "folder":
        save_file(state, folder / "model.safetensors")
        return folder
    names = sorted(state)
    index = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: state[name] for name in names[number::3]}, folder / shard)
        index.update(dict.fromkeys(names[number::3], shard))
    if layout == "shards with index":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("layout", ["file", "folder", "shards", "shards with index"])
def test_load_reference(tmp_path, layout):
    model = trained()
    path = _as_reference(model, tmp_path, layout)
    other = beacon.wrap(tiny_model(), CONFIG)
    assert beacon.load_reference(other, path) is other
    assert torch.equal(logits(other), logits(model))


def test_load_reference_refuses_and_leaves_weights_alone(tmp_path, adapter):
    with pytest.raises(TypeError, match=r"beacon\.wrap first"):
        beacon.load_reference(tiny_model(), adapter)
    model = beacon.wrap(tiny_model(), CONFIG)
    before = fingerprint(model)
    edit_weights(adapter, lambda weights: weights.update({K1: weights[K1][:-1].clone()}))
    with pytest.raises(ValueError, match=r"beacon_k_proj.weight must have shape \[16, 32\], got \[15, 32\]"):
        beacon.load_reference(model, adapter)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        beacon.load_reference(model, tmp_path / "nowhere")
    assert_same(before, fingerprint(model))


def test_missing_shard_and_bad_index(tmp_path):
    path = _as_reference(trained(), tmp_path, "shards with index")
    model = beacon.wrap(tiny_model(), CONFIG)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        beacon.load_reference(model, path)
    for broken in ("{", "[]", "{}", '{"weight_map": ["a"]}'):
        (path / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(ValueError, match="index"):
            beacon.load_reference(model, path)


# -- another base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, changes, what",
    [
        ("llama3", {"vocab_size": 97}, r"vocab_size 96 \(this model has 97\)"),
        ("llama3", {"hidden_size": 64}, "hidden_size 32"),
        ("llama3", {"num_hidden_layers": 2}, "num_hidden_layers 3"),
        ("llama3", {"num_key_value_heads": 4}, "num_key_value_heads 2"),
        ("mistral", {"num_hidden_layers": 3, "head_dim": 8}, "model_type llama"),
    ],
)
def test_adapter_for_another_base_is_refused(adapter, name, changes, what):
    refuses(adapter, ValueError, f"another base: .*{what}", tiny_model(name, **changes))


@pytest.mark.parametrize("base", [None, {}, "llama", ["llama"]])
def test_adapter_that_names_no_base_is_refused(adapter, base):
    edit_settings(adapter, base=base)
    refuses(adapter, ValueError, "another base: model_type None")


def test_wrapped_or_unsupported_models_are_refused(adapter):
    refuses(adapter, ValueError, "wrapped already", trained())
    with pytest.raises(TypeError, match="causal LM"):
        beacon.load_adapter(torch.nn.Linear(2, 2), adapter)


# -- damaged files -----------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_truncated_weights(adapter, size):
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    refuses(adapter, ValueError, "damaged")


def test_nothing_is_unpickled(adapter, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "went off"))
    (adapter / WEIGHTS).write_bytes(bomb)
    refuses(adapter, ValueError, "nothing is unpickled")
    (adapter / WEIGHTS).unlink()
    for name in ("pytorch_model.bin", "beacon.pt", "adapter.pkl"):
        (adapter / name).write_bytes(bomb)
        refuses(adapter, ValueError, "must be safetensors")
        with pytest.raises(ValueError, match="must be safetensors"):
            beacon.load_reference(trained(), adapter / name)
        (adapter / name).unlink()
    assert not (tmp_path / "went off").exists()


def test_missing_files(adapter, tmp_path):
    refuses(tmp_path / "nowhere", FileNotFoundError, "nowhere")
    refuses(str(tmp_path / "nowhere"), FileNotFoundError, "nowhere")
    refuses(adapter / WEIGHTS, FileNotFoundError, "folder")
    (adapter / WEIGHTS).rename(adapter / "elsewhere")
    refuses(adapter, FileNotFoundError, "no safetensors file")
    (adapter / SETTINGS).unlink()
    refuses(adapter, FileNotFoundError, SETTINGS)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"window"', "\x00\x01"])
def test_damaged_settings(adapter, text):
    (adapter / SETTINGS).write_text(text)
    refuses(adapter, ValueError, SETTINGS)


def test_settings_of_other_versions(adapter):
    edit_settings(adapter, format_version=99)
    refuses(adapter, ValueError, "upgrade")
    edit_settings(adapter, format_version=1, flavour="sweet")
    with pytest.warns(UserWarning, match="flavour"):
        beacon.load_adapter(tiny_model(), adapter)
    edit_settings(adapter, window="wide")
    with pytest.warns(UserWarning, match="flavour"):
        refuses(adapter, TypeError, "window must be an int")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(adapter, tmp_path, value):
    edit_weights(adapter, lambda weights: weights[K1].view(-1)[7:8].fill_(value))
    refuses(adapter, ValueError, K1)
    model = trained()
    model.get_parameter(K1).data[0, 0] = value
    with pytest.raises(ValueError, match=K1):
        beacon.save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_missing_and_unknown_weights(adapter):
    edit_weights(adapter, lambda weights: weights.pop(K1))
    refuses(adapter, ValueError, f"must hold every beacon weight, {K1} not there")
    refuses(adapter, ValueError, "4 more|holds beacon weights this model has not", projections=("q", "v"))
    model = trained(config=CONFIG.replace(projections=("q",)))
    with pytest.raises(ValueError, match=r"and \d+ more; check projections"):
        beacon.load_reference(model, adapter)


def test_failure_after_wrapping_leaves_a_stock_model(adapter, monkeypatch):
    def fail(model: Any, weights: Any) -> None:
        raise KeyboardInterrupt("here")

    monkeypatch.setattr(saving, "_assign", fail)
    refuses(adapter, KeyboardInterrupt, "here")


# -- writing -----------------------------------------------------------------------------------------------------------


def test_failure_while_writing_keeps_the_old_adapter(adapter, monkeypatch):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def fail(weights: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(weights_module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        beacon.save_adapter(randomize(trained(), seed=9, only="beacon_"), adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_callable_policy_is_refused_before_anything_is_written(tmp_path):
    model = trained(config=CONFIG.replace(ratio_policy=lambda request: 4))
    with pytest.raises(ValueError, match="ratio_policy must be a name"):
        beacon.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="ratio_policy must be a name"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"beacon\.wrap first"):
        beacon.save_adapter(tiny_model(), tmp_path / "adapter")


def test_a_full_save_beats_an_adapter_saved_there_before(adapter):
    model = randomize(trained(), seed=9, only="beacon_")
    model.save_pretrained(adapter)
    assert torch.equal(logits(beacon.load_adapter(tiny_model(), adapter)), logits(model))


# -- what a folder may be called and hold ------------------------------------------------------------------------------


def test_home_is_expanded_and_missing_names_are_named(adapter, monkeypatch):
    monkeypatch.setenv("HOME", str(adapter.parent))
    beacon.load_adapter(tiny_model(), "~/adapter")
    refuses("owner/nothing-of-that-name", FileNotFoundError, "no folder 'owner/nothing-of-that-name' here")
    refuses("build/run/adapter", FileNotFoundError, "no folder 'build/run/adapter' here")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_of_another_dtype_are_refused(adapter, dtype):
    edit_weights(adapter, lambda weights: weights.update({K1: weights[K1].to(dtype)}))
    refuses(adapter, ValueError, f"{K1} must be float32, float16, bfloat16 or float64, got {dtype}")


def test_weights_that_overflow_the_base_are_refused(adapter):
    edit_weights(adapter, lambda weights: weights.update({K1: weights[K1] * 1e6}))
    refuses(adapter, ValueError, f"NaN or inf in {K1}", tiny_model(dtype=torch.float16))


def test_window_of_an_adapter_may_be_changed_and_its_stride_follows(adapter):
    model = beacon.load_adapter(tiny_model(), adapter, window=32)
    assert (model.beacon_config.window, model.beacon_config.stride) == (32, 32)
