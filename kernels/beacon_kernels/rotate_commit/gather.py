"""Which pool entries are taken, in which order, and the inverse: who takes each entry. Integers, on the host.

The *pool* is up to three sources one after the other; it is never materialised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from beacon_kernels.dispatch import upload

MAX_POOL = 2**31 - 1  # entries are numbered in int32


@dataclass(frozen=True)
class Gather:
    """Entries to take from a pool. All tensors int32.

    Args:
        index: ``[m]``: the entry that row i of the result takes; any order, repeats allowed.
        pool: Entries of the pool it was built for.
        offsets: ``[pool + 1]``, and
        order: ``[m]``: rows ``order[offsets[p] : offsets[p + 1]]``, ascending, take entry p. Both None where no
            gradients are wanted.
    """

    index: torch.Tensor
    pool: int
    offsets: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    def to(self, device: torch.device | str) -> Gather:
        """The same gather on another device."""
        moved = (
            None if tensor is None else upload(tensor, device) for tensor in (self.index, self.offsets, self.order)
        )
        index, offsets, order = moved
        assert index is not None
        return replace(self, index=index, offsets=offsets, order=order)


def build_gather(index: torch.Tensor, pool: int, *, gradients: bool = True) -> Gather:
    """Check an index once per pass, and sort it by entry for the backward pass.

    Args:
        index: int32 or int64 ``[m]`` on the CPU, every value in ``[0, pool)``.
        pool: Entries of all sources together.
        gradients: Whether anybody will differentiate; False saves the sort.

    Raises:
        ValueError: Another dtype, shape or device, an entry outside the pool, or 2**31 entries or more.
    """
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64) or index.device.type != "cpu":
        raise ValueError(
            f"index must be int32 or int64 of shape [m] on the CPU, got {index.dtype} of shape {list(index.shape)} on "
            f"{index.device}; build the gather where the plan is built and move it with to()."
        )
    if not 0 <= pool <= MAX_POOL or len(index) > MAX_POOL:
        raise ValueError(
            f"a pool and what is taken from it must have fewer than 2**31 entries, got pool={pool} and "
            f"{len(index)} taken; split the pass."
        )
    if len(index):
        low, high = (int(end) for end in torch.aminmax(index))
        if low < 0 or high >= pool:
            raise ValueError(
                f"index must lie in [0, {pool}), got {low if low < 0 else high}; build it for this pool's sources."
            )
    if not gradients:
        return Gather(index.int(), pool)
    offsets = torch.zeros(pool + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(index, minlength=pool), 0, dtype=torch.int32, out=offsets[1:])
    return Gather(index.int(), pool, offsets, index.argsort(stable=True).int())
