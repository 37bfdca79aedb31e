"""PyTorch's scaled_dot_product_attention, one call per group of equal windows: no masked-out block is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from beacon.attention.inputs import AttentionInputs, Outputs, part, within
from beacon.plan import Block, Plan, Queries


def attend(inputs: AttentionInputs, plan: Plan) -> Outputs:
    """Condensed attention, window by window; windows of equal shape in different rows form one batch.

    Returns:
        Outputs ``[n_raw, heads, head_dim]`` and ``[n_beacon, heads, head_dim]`` (None if not asked for).
    """
    windows = _Windows(inputs, plan)
    raw: list[torch.Tensor] = [inputs.raw_q] * len(plan.blocks)
    beacon: list[torch.Tensor] = [inputs.raw_q[:0]] * len(plan.blocks)
    place = {id(block): number for number, block in enumerate(plan.blocks)}
    for group in plan.groups:
        numbers = [place[id(block)] for block in group]
        k, v = windows.keys(numbers), windows.values(numbers)
        q = _stack([windows.raw_q[number] for number in numbers])
        mask = _mask(inputs, plan.raw, group[0], "raw_queries")
        for number, out in zip(numbers, _call(q, k, v, mask, inputs.scale).unbind(), strict=True):
            raw[number] = out
        if windows.beacon_q is None or group[0].step.beacon_lo == group[0].step.beacon_hi:
            continue
        q = _stack([windows.beacon_q[number] for number in numbers])
        mask = _mask(inputs, plan.beacon, group[0], "beacon_queries")
        for number, out in zip(numbers, _call(q, k, v, mask, inputs.scale).unbind(), strict=True):
            beacon[number] = out
    return _cat(raw), None if inputs.beacon_q is None else _cat(beacon)


class _Windows:
    """The stores cut into windows.

    One split per store: its backward is one concatenation, where a slice per window would fill and add a zero tensor
    of the whole store each.
    """

    def __init__(self, inputs: AttentionInputs, plan: Plan) -> None:
        self._inputs, self._blocks = inputs, plan.blocks
        slots = [_length(block.raw_slots) for block in plan.blocks]
        beacon_slots = [_length(block.beacon_slots) for block in plan.blocks]
        self._keys = _split(inputs.raw_k, slots), _split(inputs.beacon_k, beacon_slots)
        self._values = _split(inputs.raw_v, slots), _split(inputs.beacon_v, beacon_slots)
        self.raw_q = _split(inputs.raw_q, [_length(block.raw_queries) for block in plan.blocks])
        queries = [_length(block.beacon_queries) for block in plan.blocks]
        self.beacon_q = None if inputs.beacon_q is None else _split(inputs.beacon_q, queries)

    def keys(self, numbers: list[int]) -> torch.Tensor:
        """Memory, raw and beacon keys of some windows of equal shape: ``[batch, keys, kv_heads, head_dim]``."""
        return self._gather(self._inputs.memory_k, *self._keys, numbers)

    def values(self, numbers: list[int]) -> torch.Tensor:
        """Their values, likewise."""
        return self._gather(self._inputs.memory_v, *self._values, numbers)

    def _gather(
        self,
        memory: list[torch.Tensor],
        raw: tuple[torch.Tensor, ...],
        beacon: tuple[torch.Tensor, ...],
        numbers: list[int],
    ) -> torch.Tensor:
        steps = [self._blocks[number].step for number in numbers]
        seen = [memory[step.row][: step.memory] for step in steps]
        parts = [(m, raw[n], beacon[n]) for m, n in zip(seen, numbers, strict=True)]
        return _stack([_cat([part for part in window if len(part)]) for window in parts])


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _split(store: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    return (store,) if len(sizes) == 1 else store.split(sizes)


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Like ``torch.cat``, without a copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Like ``torch.stack``, without a copy of a single one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _mask(inputs: AttentionInputs, queries: Queries, block: Block, which: str) -> torch.Tensor | None:
    """The mask that all windows of a shape share, ``[queries, keys]``; None where everything is visible."""
    key = (which, block.shape)
    if key not in inputs.memo:
        inputs.memo[key] = None if _sees_all(block, which) else _added(_visible(queries, block, which), inputs.raw_q)
    mask: torch.Tensor | None = inputs.memo[key]
    return mask


def _sees_all(block: Block, which: str) -> bool:
    """Whether the block is one raw token beside no beacons: it sees all there is."""
    return which == "raw_queries" and block.step.raw_hi - block.step.raw_lo == 1 and block.step.beacon_hi == 0


def _added(visible: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What SDPA adds to the logits; of a bool mask it would make that anew in every call."""
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


def _visible(queries: Queries, block: Block, which: str) -> torch.Tensor:
    q = part(queries, getattr(block, which))
    raw, beacon = block.raw_slots, block.beacon_slots
    memory = within(torch.zeros_like(q.memory), q.memory, 0, block.step.memory)
    own = within(q.raw_lo, q.raw_hi, raw.start, raw.stop)
    return torch.cat([memory, own, within(q.beacon_lo, q.beacon_hi, beacon.start, beacon.stop)], dim=1)


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """``[batch, seqlen, heads, head_dim]`` in and out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)
