"""Caches on disk: a text read once is asked again later, by another process. One safetensors file, nothing pickled."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from beacon.cache import BeaconCache
from beacon.identity import base_fingerprint
from beacon.memory import CPU, AtRest, Packed, Quantized
from beacon.model import BeaconModel
from beacon.modules import LayerStore
from beacon.plan import Ratios, RowState, Span
from beacon.weights import collect_weights, is_tensor_parallel, whole

FORMAT_VERSION = 1
# Fields of the configuration that decide what a cache holds; the others may differ from file to model.
HELD = ("window", "stride", "placement", "attention", "attend_memory", "attend_beacons", "sink", "projections")
KINDS = ("memory_k", "memory_v", "open_k", "open_v")
SAMPLES = 64  # numbers of every beacon weight that its digest is made of


def save_cache(cache: BeaconCache, model: Any, path: str | os.PathLike[str]) -> Path:
    """Write what a wrapped model has read (written whole, then renamed).

    Args:
        cache: The cache, with any rows.
        model: The model that made it.
        path: File to write, usually ``*.safetensors``; its folder is made if missing.

    Returns:
        The file.

    Raises:
        TypeError: Not a cache, or not a wrapped model.
        NotImplementedError: Tensor parallelism has spread the cache over processes.
        ValueError: The cache of another model, or nothing has been read.
    """
    _check_model(model, "save_cache")
    if not isinstance(cache, BeaconCache):
        raise TypeError(f"save_cache() takes a BeaconCache, got {type(cache).__name__}; read with model.compress(...).")
    if cache.owner != model.beacon_wrapping.owner:
        raise ValueError("the cache was made by another model, got this one beside it; pass the model that read it.")
    if not cache.is_initialized:
        raise ValueError("a cache to save must have read something, got an empty one; call model.compress(...) first.")
    if any(map(is_tensor_parallel, model.parameters())):
        raise NotImplementedError("this cache is spread over processes (tensor parallelism); save it from one process.")
    ids, mask = cache.columns.read()
    tensors = {"ids": ids, "mask": mask}
    for layer, store in enumerate(cache.stores):
        for kind in KINDS:
            for row, kept in enumerate(getattr(store, kind)):
                tensors |= _as_tensors(f"layers.{layer}.{kind}.{row}", kept)
    if cache.stock is not None:
        for number, held in enumerate(cache.stock.layers):
            tensors |= {f"stock.{number}.keys": held.keys, f"stock.{number}.values": held.values}
        tensors["stock_positions"] = torch.cat([p.expand(len(cache.states), -1) for p in cache.stock_positions], dim=1)
    hidden = {f"last_hidden.{row}": state for row, state in enumerate(cache.last_hidden) if state is not None}
    content = {
        "format_version": FORMAT_VERSION,
        "config": {name: getattr(cache.config, name) for name in HELD},
        "base": base_fingerprint(model),
        "beacons": _digest(model),
        "layers": len(cache.stores),
        "stock_layers": None if cache.stock is None else len(cache.stock.layers),
        "states": [{**asdict(state), "ratios": list(state.ratios)} for state in cache.states],
        "span": asdict(cache.span),
        "ratios": cache.ratios,
        "expected_length": cache.expected_length,
        "attention_path": cache.attention_path,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    copied = {name: tensor.detach().to(CPU).contiguous().clone() for name, tensor in (tensors | hidden).items()}
    with whole(path) as file:
        save_file(copied, file, metadata={"beacon_cache": json.dumps(content)})
    return path


def load_cache(model: Any, path: str | os.PathLike[str]) -> BeaconCache:
    """Read a cache that :func:`save_cache` wrote.

    Args:
        model: A wrapped model with the same base and beacon weights as the one that made it; its dtype and devices may
            be others.
        path: The file.

    Returns:
        The cache, to be passed as ``past_key_values``.

    Raises:
        FileNotFoundError: No such file.
        NotImplementedError: Tensor parallelism has spread the model over processes.
        TypeError: ``model`` is not wrapped.
        ValueError: A damaged file, or one of another base, other beacon weights, another configuration.
    """
    _check_model(model, "load_cache")
    if any(map(is_tensor_parallel, model.parameters())):
        raise NotImplementedError("a file holds whole caches, this model is spread over processes; use one process.")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; pass one that beacon.save_cache wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("beacon_cache")
            content = None if text is None else json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, json.JSONDecodeError) as err:
        raise ValueError(f"{path} must be a cache in safetensors, got a damaged or other file ({err}).") from err
    if content is None:
        raise ValueError(f"{path} must be a cache, got another safetensors file; pass one that save_cache wrote.")
    _check_content(model, content, path)
    try:
        return _build(model, content, tensors)
    except KeyError as err:
        raise ValueError(f"{path} must hold {err.args[0]}, got a damaged file without it; save it again.") from err


def _build(model: Any, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> BeaconCache:
    cache = BeaconCache(model.beacon_config, model.beacon_wrapping.owner, len(content["states"]))
    cache.states = [
        RowState(**{**state, "ratios": reduce(Ratios.then, state["ratios"], Ratios())}) for state in content["states"]
    ]
    cache.columns.append(tensors["ids"], tensors["mask"])
    cache.span = Span(**content["span"])
    ratios = content["ratios"]
    cache.ratios = tuple(ratios) if isinstance(ratios, list) else ratios
    cache.expected_length, cache.attention_path = content["expected_length"], content["attention_path"]
    weight = model.model.embed_tokens.weight
    rows = range(len(cache.states))
    hidden = (tensors.get(f"last_hidden.{row}") for row in rows)
    cache.last_hidden = [None if h is None else h.to(model.lm_head.weight.device, weight.dtype) for h in hidden]
    for layer in range(content["layers"]):
        home = _home(model.model.layers[layer])
        kinds = (
            [_from_tensors(tensors, f"layers.{layer}.{kind}.{row}", home, weight.dtype) for row in rows]
            for kind in KINDS
        )
        cache.stores.append(LayerStore(*kinds))  # type: ignore[arg-type]
    if content["stock_layers"] is None:
        cache.stock = None
        return cache
    cache.stock = DynamicCache()
    for number in range(content["stock_layers"]):
        home = _home(model.model.layers[number])
        held = (tensors[f"stock.{number}.{kind}"].to(home, weight.dtype) for kind in ("keys", "values"))
        cache.stock.update(*held, number)
    cache.stock_positions = [tensors["stock_positions"].to(weight.device)]
    return cache


def _check_model(model: Any, name: str) -> None:
    if not isinstance(model, BeaconModel):
        raise TypeError(f"{name}() takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")


def _check_content(model: Any, content: dict[str, Any], path: Path) -> None:
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} must have format_version {FORMAT_VERSION}, got {version!r}; upgrade this package.")
    mine, base = base_fingerprint(model), content["base"]
    wrong = [f"{key} {base.get(key)} (here {mine[key]})" for key in mine if base.get(key) != mine[key]]
    if wrong:
        raise ValueError(f"{path} was made with another base: {', '.join(wrong)}; load it for the model that made it.")
    config = json.loads(json.dumps({name: getattr(model.beacon_config, name) for name in HELD}))
    theirs = content["config"]
    wrong = [
        f"{name}={theirs.get(name)!r} (here {config[name]!r})" for name in HELD if theirs.get(name) != config[name]
    ]
    if wrong:
        raise ValueError(f"{path} was made with {', '.join(wrong)}; wrap the model as it was, or read the text again.")
    if content["beacons"] != _digest(model):
        raise ValueError(f"{path} was made with other beacon weights; load the adapter that was in use, or read again.")


def _home(layer: torch.nn.Module) -> torch.device:
    """Where a decoder layer computes, also while accelerate has offloaded its weights."""
    hook = getattr(layer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return next(layer.parameters()).device if device is None else torch.device(device)


def _digest(model: Any) -> str:
    """A digest of some numbers of every beacon weight, rounded to bfloat16: the same on any device."""
    digest = hashlib.sha256()
    for name, weight in sorted(collect_weights(model).items()):
        flat = weight.flatten()
        some = flat[torch.arange(SAMPLES) * (len(flat) - 1) // (SAMPLES - 1)]
        digest.update(name.encode() + some.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _as_tensors(name: str, kept: AtRest) -> dict[str, torch.Tensor]:
    if not isinstance(kept, Packed):
        return {name: kept}
    quantized = [chunk for chunk in kept.chunks if isinstance(chunk, Quantized)]
    if not quantized:
        return {name: torch.cat([chunk for chunk in kept.chunks if isinstance(chunk, torch.Tensor)])}
    codes, scales = ([getattr(chunk, part).to(CPU) for chunk in quantized] for part in ("codes", "scales"))
    return {f"{name}.codes": torch.cat(codes), f"{name}.scales": torch.cat(scales)}


def _from_tensors(tensors: dict[str, torch.Tensor], name: str, home: torch.device, dtype: torch.dtype) -> AtRest:
    if name in tensors:
        return tensors[name].to(home, dtype)
    return Packed((Quantized(tensors[f"{name}.codes"].to(home), tensors[f"{name}.scales"].to(home, dtype)),), home)
