"""Llamas with random weights, by the names of their sizes: speed does not depend on the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.training.flops import ModelShape


@dataclass(frozen=True)
class Scale:
    """Sizes of a Llama and of the text it reads."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    window: int
    tokens: int

    def shape(self, own: Sequence[str] = (), trainable: Sequence[str] = ()) -> ModelShape:
        """Sizes for counting FLOPs.

        Args:
            own: Projections of which beacons have their own copy.
            trainable: Those of them that get gradients.
        """
        return ModelShape(
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocab=self.vocab,
            own=tuple(own),
            trainable=tuple(trainable),
        )

    def __str__(self) -> str:
        return (
            f"layers={self.layers} hidden={self.hidden} intermediate={self.intermediate} "
            f"heads={self.heads}/{self.kv_heads} vocab={self.vocab}"
        )


SCALES = {
    "7b": Scale(4096, 11008, 32, 32, 32, 32000, 1024, 8192),  # Llama-2-7B
    "8b": Scale(4096, 14336, 32, 32, 8, 128256, 1024, 8192),  # Llama-3-8B
    "1b": Scale(2048, 5632, 22, 32, 4, 32000, 1024, 8192),  # TinyLlama-1.1B
    "small": Scale(512, 1376, 4, 8, 8, 4000, 256, 2048),
    "tiny": Scale(64, 176, 2, 4, 4, 256, 64, 512),
}
ON_CPU = ("small", "tiny")


def random_llama(scale: Scale, positions: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A stock Llama, frozen, its weights drawn on the device.

    Args:
        scale: Its sizes.
        positions: Tokens that it is said to be trained for.
        device: Where it is made.
        dtype: Of the weights.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=scale.vocab,
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):  # random numbers are drawn there as well
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False)


FUSED = ("none", "compile", "liger")


def fuse(model: Any, how: str) -> None:
    """Compute norms and SwiGLU of a stock Llama in fused kernels, in place.

    Args:
        model: The model.
        how: ``compile`` (``torch.compile`` of each norm and feed-forward network), ``liger`` (Liger-Kernel's, what
            ``training.use_liger_kernel`` turns on), or ``none``.
    """
    if how == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        ours = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy"), False)
        _apply_liger_kernel_to_instance(model=model, rms_norm=True, swiglu=True, **ours)
    elif how == "compile":
        for layer in model.model.layers:
            for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                part.forward = torch.compile(part.forward, dynamic=True)
