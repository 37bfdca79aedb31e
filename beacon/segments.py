"""How many windows one pass reads, of which rows: as many as the device's free memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PASS_TOKENS = 8192  # enough for matrix products at full speed; more only takes memory
CPU_PASS_TOKENS = 2048  # enough there, and what a layer makes stays in the cache and in memory that is used again
SHARE = 0.5  # of a GPU's free memory that a pass may take; the rest is for memory and logits
ALL = 1 << 30  # windows


def windows_per_pass(model: Any, device: torch.device, window: int, tokens: int) -> int:
    """Windows in one pass, over all rows: all of them while gradients are recorded, else what memory holds.

    Under tensor parallelism not what each process's memory holds, for they would differ.

    All rows' decoded tokens are one pass, for which the device is not asked.

    Args:
        model: The wrapped model.
        device: Where it computes.
        window: Raw tokens of a full window.
        tokens: Raw tokens of the call, over all rows.
    """
    if torch.is_grad_enabled() or tokens <= window:
        return ALL
    most = CPU_PASS_TOKENS if device.type == "cpu" else PASS_TOKENS
    if device.type == "cuda" and not shares_passes(model):
        most = min(most, int(SHARE * _free_bytes(device)) // bytes_per_token(model))
    return ALL if tokens <= most else max(1, most // window)


def shares_passes(model: Any) -> bool:
    """Whether several processes compute each pass together (tensor parallelism), so that all have to make the same."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def bytes_per_token(model: Any) -> int:
    """Bytes of activations that a raw token of a pass without gradients takes at most, its share of beacons included.

    The larger of attention's (hidden states, queries and keys before and after rotation, values, outputs) and the
    feed-forward network's (hidden states, gate, up, their product), times 1.5 for the beacons of ratio 2.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    queries = config.num_attention_heads * attention.head_dim
    keys = config.num_key_value_heads * attention.head_dim
    most = max(4 * config.hidden_size + 4 * queries + 6 * keys, 3 * config.hidden_size + 3 * config.intermediate_size)
    size: int = model.model.embed_tokens.weight.element_size()
    return most * size * 3 // 2


def share_out(left: Sequence[int], windows: int) -> list[int]:
    """How many windows of each row the next pass reads.

    Rows share alike; what short ones leave goes to the longer ones, so that passes stay full to the end.

    Args:
        left: Windows that each row has still to read.
        windows: Of all rows together, at most.
    """
    taken = [0] * len(left)
    waiting = sorted((row for row, count in enumerate(left) if count), key=lambda row: left[row])
    for place, row in enumerate(waiting[:windows]):
        taken[row] = min(left[row], max(windows // (len(waiting) - place), 1))
        windows -= taken[row]
    return taken


def _free_bytes(device: torch.device) -> int:
    """What a GPU has left for new tensors: free in the driver, or held by PyTorch and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
