"""Where a call of any op goes: refused, through PyTorch's dispatcher as an operator, or straight to its kernel."""

from __future__ import annotations

import os

import torch

IMPLEMENTATIONS = ("triton", "reference")
PLAIN = (torch.Tensor, torch.nn.Parameter)


def launches_directly(*tensors: torch.Tensor) -> bool:
    """Whether nobody needs the operator: nothing is recorded, traced or faked.

    An operator costs tens of microseconds on the host, as much as a decoding kernel on the device.
    """
    if torch.compiler.is_compiling():
        return False
    records = torch.is_grad_enabled()
    return all(type(tensor) in PLAIN and not (records and tensor.requires_grad) for tensor in tensors)


def check_device(like: torch.Tensor) -> None:
    """Check that kernels run where the tensors are.

    Args:
        like: One of them.

    Raises:
        ValueError: Neither a GPU nor Triton's interpreter, or bfloat16 in the interpreter.
    """
    if like.is_cuda:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs CUDA tensors, got {like.device}; use impl='reference', or set TRITON_INTERPRET=1 "
            "before Triton is imported to run it in the interpreter."
        )
    if like.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there.")


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Integers of the host where they are read; a GPU's host does not wait for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
