"""LoRA layers on the base beside the beacons, through transformers' own PEFT integration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beacon.weights import beacon_parameters

FILE = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


def add_lora(model: Any, settings: dict[str, Any]) -> None:
    """Put LoRA layers on a wrapped model; beacons train on.

    Args:
        model: A wrapped model.
        settings: Fields of ``peft.LoraConfig``.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: Unknown fields.
    """
    try:
        from peft import LoraConfig
    except ImportError as err:
        raise ImportError("model.lora needs PEFT; pip install peft, or leave it out.") from err
    trained = {name: parameter.requires_grad for name, parameter in beacon_parameters(model).items()}
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except TypeError as err:
        raise TypeError(f"model.lora must hold fields of peft.LoraConfig, got {settings} ({err}).") from err
    model.add_adapter(config)
    for name, parameter in beacon_parameters(model).items():
        parameter.requires_grad_(trained[name])  # PEFT freezes all but its own


def has_lora(model: Any) -> bool:
    """Whether transformers' PEFT integration has put layers on the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """The base without its LoRA layers inside the block, whoever put them there; no ``requires_grad`` flag changes."""
    layers = [module for module in model.modules() if isinstance(getattr(module, "_disable_adapters", None), bool)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def save_lora(model: Any, folder: Path, *, writes: bool) -> None:
    """Write the LoRA layers in PEFT's format; every process calls, one writes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=model.active_adapters()[0]).items()
    }
    if writes:
        save_file(weights, folder / FILE, metadata={"format": "pt"})
        model.peft_config[model.active_adapters()[0]].save_pretrained(folder)


def load_lora(model: Any, folder: Path) -> None:
    """Copy LoRA layers that :func:`save_lora` wrote into a model that has such layers.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: They do not fit.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}; it was written without model.lora.")
    found: Any = set_peft_model_state_dict(model, load_file(folder / FILE), adapter_name=model.active_adapters()[0])
    if found.unexpected_keys:
        raise ValueError(f"{folder / FILE} does not fit this model's LoRA layers; use the same model.lora settings.")
