"""A folder with the stock weights of a wrapped model, for another process to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from beacon.evaluation.failures import CannotRun
from beacon.weights import is_beacon_weight, is_sharded


def stock_folder(model: Any, folder: Path) -> Path:
    """Where the stock weights of a model are: where it was loaded from if that is here and the same, else saved anew.

    Args:
        model: A wrapped model.
        folder: Where they are saved if need be.

    Raises:
        CannotRun: The weights are quantised, spread, offloaded, or have LoRA layers around them.
    """
    source = Path(str(model.config.name_or_path or "."))
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_beacon_weight(name)}
    if (source / "config.json").is_file() and _same(state, source):
        return source
    odd = [name for name, tensor in state.items() if tensor.is_meta or is_sharded(tensor)]
    if odd or getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "is_quantized", False):
        raise CannotRun(
            "kvpress reads with plain weights, got a model that is quantised, spread over devices, offloaded or has "
            "LoRA layers; load it on one device as it is."
        )
    PreTrainedModel.save_pretrained(model, folder, state_dict=state)  # not ours, which adds the beacons
    return folder


def _same(state: dict[str, torch.Tensor], source: Path) -> bool:
    """Whether a folder has these weights, by the first row of each."""
    there: set[str] = set()
    try:
        for file in source.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if is_beacon_weight(name):
                        continue
                    kept, mine = opened.get_slice(name), state.get(name)
                    if mine is None or list(mine.shape) != kept.get_shape():
                        return False
                    if mine.is_meta or is_sharded(mine) or not torch.equal(kept[:1].to(mine.dtype), mine[:1].cpu()):
                        return False
                    there.add(name)
    except (OSError, SafetensorError):
        return False
    places = {state[name].data_ptr() for name in there}
    return all(tensor.data_ptr() in places for tensor in state.values())  # tied weights are kept once
