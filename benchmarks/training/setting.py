"""What a training step is measured on: model sizes, a text of random tokens, its windows and their ratios."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import beacon
from beacon.config import PAPER_RATIOS
from beacon.training.flops import ModelShape, StepFlops

SEED = 5  # its draw of seven ratios has 0.239 beacons per raw token; the multiset's mean is 0.234


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


SCALES = {
    "7b": Scale(4096, 11008, 32, 32, 32, 32000, 1024, 8192),  # Llama-2-7B
    "1b": Scale(2048, 5632, 22, 32, 4, 32000, 1024, 8192),  # TinyLlama-1.1B
    "small": Scale(512, 1376, 4, 8, 8, 4000, 256, 2048),
    "tiny": Scale(64, 176, 2, 4, 4, 256, 64, 512),
}
ON_CPU = ("small", "tiny")


@dataclass(frozen=True)
class Setting:
    """One cell: a scale, a text, its ratios, where and in which precision.

    Args:
        name: Name of the scale.
        scale: Its sizes.
        tokens: Length of the text.
        ratios: One per window that gets beacons (the one that ends the text gets none).
        device: Where to.
        dtype: bfloat16 means weights in bfloat16, master weights of what trains in float32, autocast.
        attention_path: Of the library's own contenders.
    """

    name: str
    scale: Scale
    tokens: int
    ratios: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    attention_path: str = "auto"

    @property
    def case(self) -> str:
        """The cell's name in the results."""
        return f"train_step {self.name} {self.tokens} {self.precision}"

    @property
    def shape(self) -> str:
        """All sizes."""
        s = self.scale
        return (
            f"tokens={self.tokens} window={s.window} ratios={','.join(map(str, self.ratios))} layers={s.layers} "
            f"hidden={s.hidden} intermediate={s.intermediate} heads={s.heads}/{s.kv_heads} vocab={s.vocab} batch=1"
        )

    @property
    def precision(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def config(self) -> beacon.BeaconConfig:
        """The paper's first version, with this window."""
        ratios = tuple(ratio for ratio in PAPER_RATIOS if self.scale.window % ratio == 0)
        return beacon.BeaconConfig.paper(
            window=self.scale.window, ratios=ratios, native_context=self.tokens, attention_path=self.attention_path
        )

    @property
    def ids(self) -> torch.Tensor:
        """The text, ``[1, tokens]``."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, self.scale.vocab, (1, self.tokens), generator=generator).to(self.device)

    @property
    def model_shape(self) -> ModelShape:
        """Sizes for counting FLOPs."""
        s, own = self.scale, ("q", "k", "v", "o")
        return ModelShape(
            layers=s.layers,
            hidden=s.hidden,
            intermediate=s.intermediate,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.hidden // s.heads,
            vocab=s.vocab,
            own=own,
            trainable=own,
        )

    @property
    def flops(self) -> StepFlops:
        """Of a step with beacons, whoever computes it."""
        return StepFlops.of(self.model_shape, self.config, [self.tokens], self.ratios)

    @property
    def full_flops(self) -> StepFlops:
        """Of a step of full attention that trains q, k, v and o of every raw token."""
        shape, n = self.model_shape, self.tokens
        pairs = n * (n + 1) // 2
        return StepFlops(
            raw_tokens=n,
            beacons=0,
            raw_pairs=pairs,
            beacon_pairs=0,
            matrices=2 * n * shape.layers * shape.layer,
            attention=4 * pairs * shape.layers * shape.heads * shape.head_dim,
            head=2 * n * shape.hidden * shape.vocab,
            weight_gradients=2 * n * shape.layers * sum(shape.projections.values()),
            skipped=2 * n * shape.layers * shape.tail,
            checkpointing=True,
        )


def draw_ratios(scale: Scale, tokens: int, given: Sequence[int] | None, seed: int) -> tuple[int, ...]:
    """One ratio per window but the last, from the paper's multiset or in turn from those given."""
    windows = (tokens - 1) // scale.window
    if given:
        return tuple(given[number % len(given)] for number in range(windows))
    fitting = [ratio for ratio in PAPER_RATIOS if scale.window % ratio == 0]
    drawn = random.Random(seed)
    return tuple(drawn.choice(fitting) for _ in range(windows))


def build_base(setting: Setting) -> Any:
    """A stock Llama with random weights, made where it is needed, with per-layer checkpointing."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    s = setting.scale
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        max_position_embeddings=setting.tokens,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(setting.device):  # random numbers are drawn there as well
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def use_liger(model: Any) -> None:
    """Liger-Kernel's RMSNorm and SwiGLU on this model, what ``training.use_liger_kernel`` turns on."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    ours = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy"), False)
    _apply_liger_kernel_to_instance(model=model, rms_norm=True, swiglu=True, **ours)
