"""Integers made on the host, on their way to where they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Bring tensors of one dtype to a device in one copy, which a GPU's host does not wait for.

    From ordinary memory the copy of more than a few KB would wait until the GPU has done all it was given before.

    Args:
        tensors: On the CPU.
        device: Where they go.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
