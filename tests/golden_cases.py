"""Read golden cases: vectors recorded from the public reference implementation (see tests/golden/README.md)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import beacon

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden"
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def case_folders() -> list[Path]:
    """All cases at hand: the whole collection where it lies beside the repository, else the shipped selection."""
    root = Path(os.environ.get("BEACON_GOLDEN", SHARED))
    folder = root if root.is_dir() else HERE
    return sorted(path for path in folder.iterdir() if (path / "case.json").exists())


@dataclass
class Case:
    """One golden case."""

    folder: Path
    spec: dict[str, Any]
    io: dict[str, torch.Tensor]

    @classmethod
    def load(cls, folder: Path) -> Case:
        return cls(folder, json.loads((folder / "case.json").read_text()), load_file(folder / "io.safetensors"))

    @property
    def version(self) -> str:
        return "v1" if self.spec["reference"].startswith("V1") else "v2"

    @property
    def call(self) -> dict[str, int]:
        """keep_first and keep_from."""
        names = {"beacon_skip_first": "keep_first", "beacon_skip_last": "keep_from"}
        given = self.spec.get("forward_kwargs") or {}
        return {names[key]: value for key, value in given.items() if value is not None}

    def config(self, **overrides: Any) -> beacon.BeaconConfig:
        """The reference's settings under this package's names."""
        ref = self.spec["beacon_config"]
        stride = ref["beacon_stride"]
        own = {
            "window": ref["beacon_window"],
            "stride": stride[0] if isinstance(stride, list) else stride,
            "ratios": tuple(r for r in ref["beacon_ratio"]),
            "ratio_policy": "fixed",
            "attention": ref["beacon_attn"],
            "placement": ref.get("beacon_pos", "append"),
            "attend_memory": ref.get("beacon_attend_previous", True),
            "attend_beacons": ref.get("beacon_attend_prev", False),
            "sink": ref.get("beacon_sink_size", 0),
            "projections": tuple(ref["beacon_param"]),
        }
        return beacon.BeaconConfig(**{**own, **overrides})

    def stock(self, dtype: torch.dtype = torch.float32) -> Any:
        """The stock model with the recorded weights."""
        config_class, model_class = CLASSES[self.spec["family"]]
        model = model_class(config_class(**self.spec["stock_config"]))
        model.load_state_dict(load_file(self.folder / "base.safetensors"))
        return model.eval().to(dtype)

    def model(self, **overrides: Any) -> Any:
        """The wrapped model with the recorded beacon weights."""
        model = beacon.wrap(self.stock(), self.config(**overrides))
        return beacon.load_reference(model, self.folder / "beacon.safetensors")
