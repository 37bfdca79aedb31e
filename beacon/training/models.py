"""The model a recipe names, wrapped: base in its dtype or quantised and frozen, beacons in theirs."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from beacon.assets import default_model
from beacon.config import BeaconConfig
from beacon.saving import load_weights
from beacon.training.lora import add_lora
from beacon.weights import beacon_parameters
from beacon.wrapping import wrap

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("4bit", "8bit", "int8", "float8")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which base is trained for, and in which dtypes.

    Args:
        name: Folder, hub id, or ``default`` for the shipped model.
        adapter: Folder or file of beacon weights to go on from; None begins with copies of the base's projections.
        dtype: Of the base: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (the checkpoint's).
        beacon_dtype: Of the beacon parameters and so of their gradients and optimizer state; ``float32`` are master
            weights (with ``training.bf16`` they compute in bfloat16).
        saved_dtype: Of the adapter that the run leaves behind; None takes the base's.
        quantization: Of the base: ``4bit`` or ``8bit`` (bitsandbytes), ``int8`` or ``float8`` (torchao, weights only).
        lora: Fields of ``peft.LoraConfig`` for LoRA layers on the base; None for none.
        attention: Attention of the base on short texts (``attn_implementation``); None chooses.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value is not allowed.
    """

    name: str
    adapter: str | None = None
    dtype: str = "bfloat16"
    beacon_dtype: str = "float32"
    saved_dtype: str | None = None
    quantization: str | None = None
    lora: dict[str, Any] | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"model: name must be a folder, a hub id or default, got {self.name!r}.")
        if self.lora is not None and not isinstance(self.lora, dict):
            raise TypeError(f"model: lora must hold fields of peft.LoraConfig, got {self.lora!r}.")
        for name, allowed in (
            ("dtype", (*DTYPES, "auto")),
            ("beacon_dtype", tuple(DTYPES)),
            ("saved_dtype", (*DTYPES, None)),
            ("quantization", (*QUANTIZATIONS, None)),
        ):
            if getattr(self, name) not in allowed:
                wanted = ", ".join(str(value) for value in allowed)
                raise ValueError(f"model: {name} must be one of {wanted}, got {getattr(self, name)!r}.")


def load_tokenizer(config: ModelConfig) -> Any:
    """The base's tokenizer; without a padding token it pads with eos (padding is never read)."""
    tokenizer = AutoTokenizer.from_pretrained(_source(config.name), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, beacon_config: BeaconConfig) -> Any:
    """Load the base, wrap it, and make the beacons what trains.

    Args:
        config: What to load.
        beacon_config: How it reads.

    Returns:
        The wrapped model in training mode.

    Raises:
        FileNotFoundError: No such folder or adapter.
        ImportError: A package for the quantisation or LoRA is missing.
        ValueError: What :func:`beacon.wrap` refuses; adapter weights that do not fit.
    """
    options: dict[str, Any] = {} if config.attention is None else {"attn_implementation": config.attention}
    if config.quantization is not None:
        options["quantization_config"] = _quantization(config)
        options["device_map"] = {"": _device()}
    dtype: Any = "auto" if config.dtype == "auto" else DTYPES[config.dtype]
    model = AutoModelForCausalLM.from_pretrained(_source(config.name), dtype=dtype, trust_remote_code=False, **options)
    model.config.use_cache = False
    wrap(model, beacon_config)
    if config.adapter is not None:
        load_weights(model, _folder(config.adapter))
    for parameter in beacon_parameters(model).values():
        parameter.data = parameter.data.to(DTYPES[config.beacon_dtype])
    if config.lora is not None:
        add_lora(model, config.lora)
    return model.train()


def saved_dtype(config: ModelConfig, model: Any) -> torch.dtype:
    """Dtype of the adapter that a run leaves behind."""
    if config.saved_dtype is not None:
        return DTYPES[config.saved_dtype]
    dtype: torch.dtype = model.model.embed_tokens.weight.dtype
    return dtype


def _quantization(config: ModelConfig) -> Any:
    compute = DTYPES.get(config.dtype, torch.bfloat16)
    if config.quantization in ("4bit", "8bit"):
        from transformers import BitsAndBytesConfig

        if config.quantization == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    from transformers import TorchAoConfig

    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as err:
        raise ImportError("model.quantization int8 and float8 need torchao; pip install torchao.") from err
    return TorchAoConfig(Int8WeightOnlyConfig() if config.quantization == "int8" else Float8WeightOnlyConfig())


def _device() -> Any:
    return int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"


def _source(name: str) -> str | Path:
    return default_model() if name == "default" else str(Path(name).expanduser()) if name.startswith("~") else name


def _folder(adapter: str) -> Path:
    if adapter == "default":
        return default_model() / "adapter"
    return Path(adapter).expanduser()
