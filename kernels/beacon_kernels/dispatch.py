"""Whether a call goes through PyTorch's dispatcher, as an operator, or straight to its kernel."""

from __future__ import annotations

import torch


def launches_directly(*tensors: torch.Tensor) -> bool:
    """Whether nobody needs the operator: nothing is recorded, traced or faked.

    An operator costs tens of microseconds on the host, as much as a decoding kernel on the device.
    """
    if torch.compiler.is_compiling():
        return False
    records = torch.is_grad_enabled()
    return all(type(tensor) in PLAIN and not (records and tensor.requires_grad) for tensor in tensors)


PLAIN = (torch.Tensor, torch.nn.Parameter)
