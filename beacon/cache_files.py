"""Caches on disk: a text read once is asked again later, by another process. One safetensors file, nothing pickled."""

from __future__ import annotations

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
from beacon.identity import base_fingerprint, home_of
from beacon.memory import CPU, EIGHT_BITS, AtRest, Chunk, MemoryFormat, Packed, Quantized
from beacon.model import BeaconModel
from beacon.modules import LayerStore
from beacon.plan import Ratios, RowState, Span
from beacon.weights import is_spread, sample_weights, whole

FORMAT_VERSION = 1
# Fields of the configuration that decide what a cache holds; the others may differ from file to model.
HELD = ("window", "stride", "placement", "attention", "attend_memory", "attend_beacons", "sink", "projections")
KINDS = ("memory_k", "memory_v", "open_k", "open_v")
TOLERANCE = 0.01  # between samples of the same weights in other dtypes: two roundings to bfloat16 make 0.008


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
        NotImplementedError: The model is spread over processes.
        ValueError: The cache of another model, or nothing has been read.
    """
    _check_model(model, "save_cache")
    if not isinstance(cache, BeaconCache):
        raise TypeError(f"save_cache() takes a BeaconCache, got {type(cache).__name__}; read with model.compress(...).")
    if cache.owner != model.beacon_wrapping.owner:
        raise ValueError("the cache was made by another model, got this one beside it; pass the model that read it.")
    if not cache.is_initialized:
        raise ValueError("a cache to save must have read something, got an empty one; call model.compress(...) first.")
    _check_whole(model, "save_cache")
    cache = cache.fork()  # out of the buffers of a static one
    ids, mask = cache.columns.read()
    tensors = {"ids": ids, "mask": mask, "beacons": sample_weights(model)}
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
        model: A wrapped model with the same base and beacon weights as the one that made it (of the base only the
            shapes are compared); its dtype, devices and memory format may be others.
        path: The file.

    Returns:
        The cache, to be passed as ``past_key_values``.

    Raises:
        FileNotFoundError: No such file.
        NotImplementedError: The model is spread over processes.
        TypeError: ``model`` is not wrapped.
        ValueError: A damaged file, or one of a base of another shape, other beacon weights, another configuration.
    """
    _check_model(model, "load_cache")
    _check_whole(model, "load_cache")
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
    try:
        _check_content(model, content, tensors["beacons"], path)
        cache = _build(model, content, tensors)
    except (AttributeError, KeyError, TypeError) as err:
        raise ValueError(f"{path} must be a whole cache, got a damaged one ({err!r}); read the text again.") from err
    _check_sizes(cache, path)
    return cache


def _build(model: Any, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> BeaconCache:
    config = model.beacon_config
    cache = BeaconCache(config, model.beacon_wrapping.owner, len(content["states"]))
    cache.states = [
        RowState(**{**state, "ratios": reduce(Ratios.then, state["ratios"], Ratios())}) for state in content["states"]
    ]
    cache.columns.append(tensors["ids"], tensors["mask"])
    cache.span = Span(**content["span"])
    ratios = content["ratios"]
    cache.ratios = tuple(ratios) if isinstance(ratios, list) else ratios
    cache.expected_length, cache.attention_path = content["expected_length"], content["attention_path"]
    dtype, memory = model.model.embed_tokens.weight.dtype, MemoryFormat(config.memory_dtype, config.offload_memory)
    rows = range(len(cache.states))
    hidden, last = (tensors.get(f"last_hidden.{row}") for row in rows), home_of(model.model.norm)
    cache.last_hidden = [None if h is None else h.to(last, dtype) for h in hidden]
    homes = [home_of(layer) for layer in model.model.layers]
    for layer in range(content["layers"]):
        names = ([f"layers.{layer}.{kind}.{row}" for row in rows] for kind in KINDS)
        memory_k, memory_v, open_k, open_v = ([_chunk(tensors, name, dtype) for name in of_kind] for of_kind in names)
        kept_k, kept_v = ([_at_rest(chunk, memory, homes[layer]) for chunk in of] for of in (memory_k, memory_v))
        here_k, here_v = ([_here(chunk, homes[layer]) for chunk in of] for of in (open_k, open_v))
        cache.stores.append(LayerStore(kept_k, kept_v, here_k, here_v))
    if content["stock_layers"] is None:
        cache.stock = None
        return cache
    cache.stock = DynamicCache()
    for number in range(content["stock_layers"]):
        held = (tensors[f"stock.{number}.{kind}"].to(homes[number], dtype) for kind in ("keys", "values"))
        cache.stock.update(*held, number)
    cache.stock_positions = [tensors["stock_positions"].to(homes[0])]
    return cache


def _check_model(model: Any, name: str) -> None:
    if not isinstance(model, BeaconModel):
        raise TypeError(f"{name}() takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")


def _check_whole(model: Any, name: str) -> None:
    if any(map(is_spread, model.parameters())):
        raise NotImplementedError(
            f"{name}() takes a model that is whole in this process, got one spread over several; read the text again "
            "with the model in one process, and keep that."
        )


def _check_content(model: Any, content: dict[str, Any], samples: torch.Tensor, path: Path) -> None:
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION}, got {version!r}; read the text again, or use the "
            "version of this package that wrote it."
        )
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
    ours = sample_weights(model)
    if ours.shape != samples.shape or not torch.allclose(ours, samples, rtol=TOLERANCE, atol=1e-6):
        raise ValueError(f"{path} was made with other beacon weights; load the adapter that was in use, or read again.")


def _check_sizes(cache: BeaconCache, path: Path) -> None:
    """Refuse a file whose tensors hold more or fewer entries than its states say."""
    for store in cache.stores:
        for row, state in enumerate(cache.states):
            opens = state.open_raw + state.open_beacons
            for kind, wanted in zip(KINDS, (state.memory, state.memory, opens, opens), strict=True):
                found = len(getattr(store, kind)[row])
                if found != wanted:
                    raise ValueError(
                        f"{path} must hold {wanted} entries of {kind} in row {row}, got {found}; it is damaged, read "
                        "the text again."
                    )


def _as_tensors(name: str, kept: AtRest) -> dict[str, torch.Tensor]:
    chunk = kept.whole() if isinstance(kept, Packed) else kept
    if isinstance(chunk, Quantized):
        return {f"{name}.codes": chunk.codes, f"{name}.scales": chunk.scales}
    return {name: chunk}


def _chunk(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> Chunk:
    if name in tensors:
        return tensors[name].to(dtype)
    return Quantized(tensors[f"{name}.codes"], tensors[f"{name}.scales"], dtype)


def _here(chunk: Chunk, home: torch.device) -> torch.Tensor:
    return (chunk.dense() if isinstance(chunk, Quantized) else chunk).to(home)


def _at_rest(chunk: Chunk, memory: MemoryFormat, home: torch.device) -> AtRest:
    """What a file holds, in the format the model wants, without passing by the GPU where it rests on the CPU."""
    coded = chunk.codes.dtype if isinstance(chunk, Quantized) else None
    if coded is not None and memory.dtype in EIGHT_BITS and EIGHT_BITS[memory.dtype][0] == coded:
        return Packed((memory.chunk(chunk),), CPU, memory).to(home)
    return memory.rest(_here(chunk, CPU), CPU).to(home)
