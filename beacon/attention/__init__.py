"""Attention paths: implementations of condensed attention, chosen by name or by device and plan.

Each takes :class:`AttentionInputs` and a plan and returns the outputs of raw tokens and of beacons:

========== ================================================================================================
reference  The definition: one dense mask, float64-capable, for tests.
triton     This project's kernels (`beacon.attention.kernels`). ``auto`` on CUDA (Ampere and later) in float16 and
           bfloat16, up to 256 channels per head.
flex       FlexAttention, all windows in one fused call. ``auto`` on CUDA where triton does not serve, for more than
           a block of queries; on a CPU unfused and without gradients, for tests.
sdpa       PyTorch's scaled_dot_product_attention, window by window. Any device; ``auto`` everywhere else.
flash      The flash-attn package, for plans in plain causal order. CUDA, float16 and bfloat16.
========== ================================================================================================
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch

from beacon.attention.inputs import AttentionInputs, AttentionPath, Entries, MemoryParts, Outputs, Rotation, Table
from beacon.config import ATTENTION_PATHS
from beacon.plan import Plan
from beacon_kernels.tiles import HEAD_DIMS

__all__ = [
    "AttentionInputs",
    "AttentionPath",
    "Entries",
    "MemoryParts",
    "Outputs",
    "Rotation",
    "Table",
    "check_path",
    "check_triton",
    "choose_path",
    "load_path",
    "load_rotation",
    "slot_path",
]

# Up to one block of queries (decoding above all) flex would compute one row of blocks: sdpa needs no block mask.
FLEX_QUERIES = 129
FLEX_HEAD_DIM = 16
TRITON_HEAD_DIM = HEAD_DIMS[-1]
TRITON_CAPABILITY = (8, 0)  # Ampere
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODULES = {"triton": "kernels"}  # a file triton.py would shadow the package

logger = logging.getLogger(__name__)


def choose_path(requested: str, plan: Plan, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the path that computes ``plan``.

    Args:
        requested: ``auto`` or the name of a path; an explicit name is returned unless it cannot serve.
        plan: What is to be computed.
        device: Where the model computes.
        dtype: The dtype it computes in.
        head_dim: Channels per head.

    Raises:
        ImportError: The named path needs a package that is not installed.
        NotImplementedError: The named path cannot compute this plan here.
        ValueError: There is no path of that name.
    """
    check_path(requested)
    if requested == "auto":
        chosen = "sdpa"
        if _triton_serves(device, dtype, head_dim):
            chosen = "triton"
        elif _flex_serves(plan, device, dtype, head_dim):
            chosen = "flex"
        _announce(chosen, device.type)
        return chosen
    if requested == "flash":
        _check_flash(plan, device)
    if requested == "triton":
        _check_triton(device, dtype, head_dim)
    return requested


def slot_path(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The path that reads slots (:mod:`beacon.attention.slots`), ``triton`` or ``sdpa``.

    Raises:
        ImportError: The named path needs a package that is not installed.
        NotImplementedError: The named path reads no slots, or cannot serve here.
    """
    check_path(requested)
    if requested not in ("auto", "triton", "sdpa"):
        raise NotImplementedError(
            f"a static cache is read by attention_path='triton' or 'sdpa', got {requested!r}; use 'auto', or the "
            "ordinary cache that compress returns."
        )
    if requested == "triton":
        _check_triton(device, dtype, head_dim)
    if requested != "auto":
        return requested
    return "triton" if _triton_serves(device, dtype, head_dim) else "sdpa"


def check_path(requested: str) -> None:
    """Refuse the name of a path that can serve nowhere here.

    Raises:
        ImportError: It needs a package that is not installed.
        ValueError: There is no path of that name.
    """
    if requested not in ATTENTION_PATHS:
        raise ValueError(f"attention_path must be one of {', '.join(ATTENTION_PATHS)}, got {requested!r}.")
    if requested == "triton" and importlib.util.find_spec("triton") is None:
        raise ImportError(
            "attention_path='triton' needs the triton package, which is not installed; "
            "pip install 'activation-beacon[kernels]' or use attention_path='auto'."
        )
    if requested == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "attention_path='flash' needs the flash-attn package, which is not installed; "
            "pip install 'activation-beacon[flash]' or use attention_path='auto'."
        )


@cache
def load_path(name: str) -> AttentionPath:
    """The function behind the name of a path (imported on first use)."""
    path: AttentionPath = _module(name).attend
    return path


@cache
def load_rotation(name: str) -> Rotation | None:
    """How the path of that name rotates; None for plain PyTorch."""
    rotation: Rotation | None = getattr(_module(name), "ROTATION", None)
    return rotation


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"beacon.attention.{MODULES.get(name, name)}")


def _triton_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None  # no tile was ever compiled for AMD's chips
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= TRITON_HEAD_DIM
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY
    )


def check_triton(dtype: torch.dtype, head_dim: int) -> None:
    """Refuse what the kernels can serve on no device.

    Raises:
        NotImplementedError: Another dtype, or more channels per head than any tile has.
    """
    if dtype not in TRITON_DTYPES or head_dim > TRITON_HEAD_DIM or head_dim % 2:
        raise NotImplementedError(
            "attention_path='triton' computes in float32, float16 or bfloat16 with an even head_dim of at most "
            f"{TRITON_HEAD_DIM}, got {str(dtype).removeprefix('torch.')} and head_dim={head_dim}; use "
            "attention_path='auto'."
        )


def _check_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    check_triton(dtype, head_dim)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        raise NotImplementedError(
            "attention_path='triton' needs a GPU of compute capability 8.0 (Ampere) or later, got "
            f"{torch.cuda.get_device_name(device)}; use attention_path='auto'."
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError(
            f"attention_path='triton' needs a CUDA device, got {device.type!r}; move the model to a GPU, use "
            "attention_path='auto', or set TRITON_INTERPRET=1 before Triton is imported (slow, for tests)."
        )


def _flex_serves(plan: Plan, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        device.type == "cuda"
        and len(plan.raw) + len(plan.beacon) >= FLEX_QUERIES
        and head_dim >= FLEX_HEAD_DIM
        and dtype != torch.float64
        and importlib.util.find_spec("triton") is not None
    )


def _check_flash(plan: Plan, device: torch.device) -> None:
    if device.type != "cuda":
        raise NotImplementedError(
            f"attention_path='flash' needs a CUDA device, got {device.type!r}; move the model to a GPU or use "
            "attention_path='auto'."
        )
    if not plan.plain_causal:
        config = plan.config
        raise NotImplementedError(
            "attention_path='flash' computes plans in plain causal order (placement='interleave' with "
            f"attention='full-coverage' and attend_memory=True), got placement={config.placement!r}, "
            f"attention={config.attention!r} and attend_memory={config.attend_memory}; use attention_path='auto'."
        )


@cache
def _announce(chosen: str, device: str) -> None:
    logger.info("attention_path='auto' takes %r on %s", chosen, device)
