"""Adapters on disk: beacon weights and configuration, safetensors and JSON only. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from beacon.config import BeaconConfig
from beacon.identity import base_fingerprint
from beacon.model import BeaconModel
from beacon.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    beacon_parameters,
    check_finite,
    collect_weights,
    is_beacon_weight,
    is_spread,
    is_tensor_parallel,
    some,
    spread_like,
    write_adapter,
)
from beacon.wrapping import new_parameter_shapes, unwrap, wrap

CHECKPOINT_FILE = "model.safetensors"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def save_adapter(model: Any, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
    """Write the beacon weights and configuration of a wrapped model (written whole, then renamed).

    Args:
        model: A wrapped model. Offloaded weights are brought in; sharded ones (``fully_shard``) are gathered, so every
            process must call, and the first one writes.
        folder: Where to; made if missing.
        dtype: Of the weights in the file; None keeps the parameters' (float32 while they train as master weights).

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` is not wrapped.
        ValueError: A weight is NaN or inf, or the ratio policy is a callable.
    """
    if not isinstance(model, BeaconModel):
        raise TypeError(
            f"save_adapter() takes a wrapped model, got {type(model).__name__}; call beacon.wrap first, or pass "
            "get_base_model() of a PEFT model around a wrapped one."
        )
    manifest = model.beacon_manifest()
    weights = collect_weights(model)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    check_finite(weights)
    folder = Path(folder)
    if any(map(is_spread, beacon_parameters(model).values())) and torch.distributed.get_rank():
        return folder
    write_adapter(folder, manifest, weights)
    return folder


def load_adapter(hf_model: Any, folder_or_hub_id: str | os.PathLike[str], **overrides: Any) -> Any:
    """Wrap a stock model with a saved adapter.

    Args:
        hf_model: The base model that the adapter was trained for.
        folder_or_hub_id: A folder written by :func:`save_adapter` or by ``save_pretrained`` of a wrapped model, or a
            hub id of one.
        **overrides: Fields of the configuration to change, for example ``attention_path="sdpa"``.

    Returns:
        The same object, wrapped.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: Made for another base, damaged files, missing or unknown weights, NaN.
    """
    folder = _resolve(folder_or_hub_id)
    values = _read_json(folder / CONFIG_FILE)
    base = values.pop("base", None)
    config = BeaconConfig.from_dict(values, **overrides)
    shapes = new_parameter_shapes(hf_model, config)
    mine = base_fingerprint(hf_model)
    theirs = base if isinstance(base, dict) else {}
    wrong = [f"{key} {theirs.get(key)} (this model has {mine[key]})" for key in mine if theirs.get(key) != mine[key]]
    if wrong:
        raise ValueError(f"{folder} was made for another base: {', '.join(wrong)}; load it onto the model it is for.")
    weights = _read_weights(folder)
    _check_match(weights, shapes, folder)
    wrap(hf_model, config)
    try:
        _assign(hf_model, weights)
    except BaseException:
        unwrap(hf_model)
        raise
    return hf_model


def load_reference(model: Any, path: str | os.PathLike[str]) -> Any:
    """Take beacon weights under the reference implementation's parameter names into a wrapped model.

    Args:
        model: A wrapped model whose ``projections`` match the checkpoint.
        path: A safetensors file, or a folder with one or several (sharded, with or without index).

    Returns:
        The model.

    Raises:
        FileNotFoundError: No such file.
        TypeError: ``model`` is not wrapped.
        ValueError: Missing, unknown or misshapen beacon weights, damaged files, pickles, NaN.
    """
    if not isinstance(model, BeaconModel):
        raise TypeError(f"load_reference() takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")
    load_weights(model, Path(path))
    return model


def load_weights(model: Any, path: Path) -> None:
    """Copy beacon weights from a file or folder into a wrapped model, whatever configuration lies beside them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Missing, unknown or misshapen beacon weights, damaged files, pickles, NaN.
    """
    weights = _read_weights(path)
    shapes = {name: tuple(p.shape) for name, p in beacon_parameters(model).items()}
    _check_match(weights, shapes, path)
    _assign(model, weights)


def _resolve(source: str | os.PathLike[str]) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or isinstance(source, os.PathLike) or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, got {source}.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as err:
        raise FileNotFoundError(
            f"there is no folder {source!r} here, and the hub gave no adapter of that name ({err}); pass a folder "
            "written by beacon.save_adapter, or a hub id owner/name."
        ) from err


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; pass a folder written by beacon.save_adapter.")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as err:
        raise ValueError(f"{path} must be JSON, got a damaged file ({err}); save or download it again.") from err
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}; save or download it again.")
    return values


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    for name in (WEIGHTS_FILE, CHECKPOINT_FILE):
        if (path / name).exists():
            return [path / name]
    index = path / f"{CHECKPOINT_FILE}.index.json"
    if index.exists():
        shards = _read_json(index).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{index} must have a weight_map from names to files; save or download it again.")
        return [path / name for name in sorted(set(names))]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [file.name for file in path.iterdir() if file.suffix in PICKLES]
        if pickles:
            raise ValueError(
                f"weights must be safetensors, got {pickles[0]} in {path}; convert it, nothing is unpickled."
            )
        raise FileNotFoundError(f"{path} has no safetensors file; pass a folder written by beacon.save_adapter.")
    return files


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All beacon weights in a file or folder, on the CPU."""
    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(path):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; save or download the folder again.")
        if file.suffix in PICKLES:
            raise ValueError(f"weights must be safetensors, got {file}; convert it, nothing is unpickled.")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if is_beacon_weight(name):
                        weights[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise ValueError(
                f"{file} must be a safetensors file, got a damaged or other one ({err}); save or download it again "
                "(nothing is unpickled)."
            ) from err
    return weights


def _check_match(weights: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    missing, unknown = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing:
        raise ValueError(f"{source} must hold every beacon weight, {some(missing)} not there; check projections.")
    if unknown:
        raise ValueError(f"{source} holds beacon weights this model has not: {some(unknown)}; check projections.")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, got {list(weights[name].shape)} in {source}; "
                "the adapter is for another base."
            )
        if weights[name].dtype not in FLOATS:
            raise ValueError(
                f"{name} must be float32, float16, bfloat16 or float64, got {weights[name].dtype} in {source}; "
                "save it anew."
            )
    check_finite(weights)


def _assign(model: Any, weights: dict[str, torch.Tensor]) -> None:
    parameters = beacon_parameters(model)
    away = [n for n, p in parameters.items() if p.is_meta or (is_spread(p) and not is_tensor_parallel(p))]
    if away:
        raise ValueError(f"{some(away)} are offloaded or sharded; load the weights before that is done to the model.")
    with torch.no_grad():
        cast = {name: weights[name].to(parameter.dtype) for name, parameter in parameters.items()}
        check_finite(cast)  # what a float16 base cannot hold becomes inf
        for name, parameter in parameters.items():
            parameter.copy_(spread_like(cast[name], parameter))
