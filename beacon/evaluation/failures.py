"""What is told of an exception."""

from __future__ import annotations

import torch


def out_of_memory(err: Exception) -> bool:
    """Whether memory ran out; on the CPU PyTorch tells by a RuntimeError."""
    return isinstance(err, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(err)


def one_line(err: BaseException) -> str:
    """A message in one line, without pages of details."""
    text = " ".join(str(err).split())
    return text if len(text) <= 500 else text[:497] + "..."
