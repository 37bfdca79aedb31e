"""Training through memory under gradient checkpointing: the recomputation sees the same plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.readers import close, fixed, wrapped
from tests.tiny_models import random_ids

CONFIGS = {
    "all windows in one pass": fixed(8, 2, sink=1),
    "short first calls": fixed(16, 2),
    "one window per pass": fixed(8, 2, segment=1),
    "interleave, two per pass": fixed(
        8, 2, placement="interleave", attention="full-coverage", attend_beacons=True, segment=2
    ),
}


def checkpoint(model: Any, **options: Any) -> None:
    """Under its new name where transformers has that."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def train(model: Any, ids: torch.Tensor, calls: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    if calls == 1:
        loss = model(ids, labels=ids).loss
    else:
        cache, past, loss = None, 0, torch.zeros(())
        for part in ids.tensor_split(calls, dim=1):
            past += part.shape[1]
            mask = torch.ones(len(ids), past)
            out = model(part, mask, past_key_values=cache, labels=part, use_cache=True, num_items_in_batch=100)
            cache, loss = out.past_key_values, loss + out.loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("calls", [1, 4])
def test_loss_and_gradients_are_those_without(name: str, calls: int) -> None:
    model, ids, recomputed = wrapped(CONFIGS[name]), random_ids(2, 45), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: recomputed.append(1))
    loss, gradients = train(model, ids, calls)
    passes = len(recomputed)
    checkpoint(model, use_reentrant=False)
    again, others = train(model, ids, calls)
    assert len(recomputed) == 3 * passes  # once forward, once more for the backward pass
    assert torch.equal(loss, again) and gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        close(others[key], gradient, 1e-5, key)
    assert any("layers.0.self_attn.beacon_v" in key and gradient.any() for key, gradient in gradients.items())


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients() -> None:
    """It computes a layer's new memory without a graph, so nothing could flow into it from a later pass or call."""
    model, ids = wrapped(fixed(8, 2, segment=1)), random_ids(1, 45)
    checkpoint(model, use_reentrant=True)
    model.train()
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        model(ids, labels=ids)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(ids, labels=ids).loss)
