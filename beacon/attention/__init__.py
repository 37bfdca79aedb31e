"""Attention paths: implementations of condensed attention, chosen by name or by device and plan."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from beacon.attention.inputs import AttentionInputs, AttentionPath, Outputs
from beacon.plan import Plan

__all__ = ["AttentionInputs", "AttentionPath", "Outputs", "choose_path", "load_path"]


def choose_path(requested: str, device: torch.device, plan: Plan) -> str:
    """The name of the path that computes ``plan`` on ``device``.

    Args:
        requested: ``auto`` or the name of a path; an explicit name is returned unless it cannot serve.
        device: Where the model computes.
        plan: What is to be computed.

    Raises:
        NotImplementedError: The named path cannot compute this plan or is not built yet.
        ImportError: The named path needs a package that is not installed.
    """
    if requested == "auto":
        return "sdpa"
    if requested == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise ImportError(
                "attention_path='flash' needs the flash-attn package, which is not installed; "
                "pip install 'activation-beacon[flash]' or use attention_path='auto'."
            )
        if not plan.plain_causal:
            raise NotImplementedError(
                "attention_path='flash' computes plans in plain causal order (placement='interleave' with "
                f"attention='full-coverage'), got placement={plan.config.placement!r} and "
                f"attention={plan.config.attention!r}; use attention_path='auto'."
            )
    if requested == "triton":
        raise NotImplementedError(
            "attention_path='triton' is not built yet; use attention_path='auto', 'sdpa' or (on a GPU) 'flex'."
        )
    return requested


def load_path(name: str) -> AttentionPath:
    """The function behind the name of a path (imported on first use)."""
    path: AttentionPath = importlib.import_module(f"beacon.attention.{name}").attend
    return path
