"""Who takes the training step: the same base weights in turn under four ways to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import beacon
from beacon.loss import IGNORED, chunked_cross_entropy
from beacon.training.flops import StepFlops
from beacon.weights import beacon_parameters
from benchmarks.results import OURS
from benchmarks.training.published import published_loss
from benchmarks.training.setting import Setting

LOOP, FULL, PUBLISHED = "loop", "full", "published"
NAMES = (OURS, LOOP, FULL, PUBLISHED)
MEANING = {
    OURS: "all windows in one pass",
    LOOP: "window by window (segment=1), same kernels",
    FULL: "full attention, q k v o of the base trained",
    PUBLISHED: "window by window, keys rotated anew, SDPA with a mask",
}
LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class Contender:
    """A model ready for steps.

    Args:
        name: One of `NAMES`.
        loss: The forward pass.
        parameters: What trains, by name; float32.
        flops: Of a step.
        optimizer: Of the parameters.
        setting: The cell.
    """

    name: str
    loss: Callable[[], torch.Tensor]
    parameters: dict[str, nn.Parameter]
    flops: StepFlops
    optimizer: torch.optim.Optimizer
    setting: Setting

    def gradients(self) -> torch.Tensor:
        """Forward and backward pass; returns the loss."""
        device, dtype = self.setting.device.type, self.setting.dtype
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def step(self) -> torch.Tensor:
        """A whole step; returns the loss."""
        loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


@contextmanager
def contender(name: str, base: Any, setting: Setting) -> Iterator[Contender]:
    """Prepare a contender on the stock ``base``, which is as before afterwards."""
    ids = setting.ids
    with _full(base) if name == FULL else _wrapped(base, setting, name) as parameters:
        losses: dict[str, Callable[[], torch.Tensor]] = {
            OURS: lambda: base(ids, labels=ids, ratios=list(setting.ratios)).loss,
            LOOP: lambda: base(ids, labels=ids, ratios=list(setting.ratios)).loss,
            PUBLISHED: lambda: published_loss(base, ids, setting.ratios),
            FULL: lambda: _full_loss(base, ids),
        }
        fused = True if setting.device.type == "cuda" else None
        optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=fused)
        flops = setting.full_flops if name == FULL else setting.flops
        yield Contender(name, losses[name], parameters, flops, optimizer, setting)


@contextmanager
def _wrapped(base: Any, setting: Setting, name: str) -> Iterator[dict[str, nn.Parameter]]:
    config = setting.config
    beacon.wrap(base, config.replace(segment=1) if name == LOOP else config)
    try:
        parameters = beacon_parameters(base)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        yield parameters
    finally:
        beacon.unwrap(base)


@contextmanager
def _full(base: Any) -> Iterator[dict[str, nn.Parameter]]:
    """Trainable copies take the place of q, k, v and o; the base's own wait on the host."""
    chosen = {
        f"model.layers.{number}.self_attn.{name}_proj": getattr(layer.self_attn, f"{name}_proj")
        for number, layer in enumerate(base.model.layers)
        for name in "qkvo"
    }
    waiting = {}
    try:
        for name, linear in chosen.items():
            waiting[name] = linear.weight, linear.weight.data.cpu()
            linear.weight = nn.Parameter(linear.weight.data.float().clone())
            waiting[name][0].data = waiting[name][0].data.new_empty(0)
        yield {f"{name}.weight": linear.weight for name, linear in chosen.items()}
    finally:
        for name, (weight, values) in waiting.items():
            device = chosen[name].weight.device
            chosen[name].weight = weight
            weight.data = values.to(device)


def _full_loss(base: Any, ids: torch.Tensor) -> torch.Tensor:
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    targets = torch.full_like(ids[0], IGNORED)
    targets[:-1] = ids[0, 1:]
    return chunked_cross_entropy(hidden, targets, base.lm_head)
