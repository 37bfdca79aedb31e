"""What a wrapped model remembers of itself, what an adapter asks of a base, and whether beacons are switched off."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from beacon.config import BeaconConfig
from beacon.families import Family

_here = threading.local()


@dataclass(frozen=True)
class Wrapping:
    """What a wrapped model remembers of being wrapped.

    Args:
        config: The beacon configuration.
        family: The family's row of the table.
        native_context: Longest position the base model serves.
        owner: Identity; caches name it. A deep copy of a model gets its own.
        flags: ``requires_grad`` of every base parameter before, by name.
    """

    config: BeaconConfig
    family: Family
    native_context: int
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    flags: dict[str, bool] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Wrapping:
        """A copied model is a model of its own: caches and ``disabled`` tell the two apart."""
        return replace(self, owner=uuid.uuid4().hex)


def base_fingerprint(model: Any) -> dict[str, Any]:
    """What an adapter needs its base to be: model type, shapes, tokenizer size."""
    config = model.config
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }


def home_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes, also while accelerate has offloaded its weights."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(parameter.device for parameter in module.parameters())


def is_disabled(model: Any) -> bool:
    """Whether ``model`` is the stock model in this thread just now (see :func:`beacon.disabled`)."""
    return model.beacon_wrapping.owner in getattr(_here, "owners", ())


@contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """Make a wrapped model exactly the stock model inside the block, for this thread only.

    Args:
        model: A wrapped model.

    Yields:
        The model.

    Raises:
        TypeError: ``model`` is not wrapped.
    """
    if not isinstance(getattr(model, "beacon_wrapping", None), Wrapping):
        raise TypeError(f"disabled() takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")
    before = getattr(_here, "owners", ())
    _here.owners = (*before, model.beacon_wrapping.owner)
    try:
        yield model
    finally:
        _here.owners = before
