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
from benchmarks.models import ON_CPU, SCALES, Scale, random_llama

__all__ = ["ON_CPU", "SCALES", "SEED", "Scale", "Setting", "build_base", "draw_ratios"]

SEED = 5  # its draw of seven ratios has 0.239 beacons per raw token; the multiset's mean is 0.234


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
        ratios = ",".join(map(str, self.ratios))
        return f"tokens={self.tokens} window={self.scale.window} ratios={ratios} {self.scale} batch=1"

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
        own = ("q", "k", "v", "o")
        return self.scale.shape(own, trainable=own)

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
    model = random_llama(setting.scale, setting.tokens, setting.device, setting.dtype)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model
