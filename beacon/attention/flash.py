"""The ``flash-attn`` package, for plans in plain causal order: one variable-length sequence per window and row.

Queries of a window are its new raw tokens and beacons in interleaved order. Its keys are the memory before it, then
all its raw tokens and beacons in the same order, those read by earlier calls included; the causal mask is aligned at
the bottom right, so a call that starts in the middle of a window needs nothing else:

    memory m0 m1, window a0 a1 b1 | a2 a3 b2     (ratio 2; the bar: what this call adds)
    a2  1 1   1 1 1   1 . .
    a3  1 1   1 1 1   1 1 .
    b2  1 1   1 1 1   1 1 1

Windows of one pass share the memory before them, and a variable-length sequence is one stretch of keys: so one gather
copies the prefix for every window, G windows that see m entries each cost G * m rows of keys and values per layer (at
8 windows of 1024 and 8K entries, eight times the memory's own size). A paged cache would serve prefixes without copies
(``block_table``), but in pages of 256 entries, in the forward pass only, and with every layer's memory kept in pages;
the ``triton`` path is meant to do that better.

In the last layer beacons ask nothing, yet their keys stand between the raw ones: zero queries keep their places, at a
cost of ``1 / ratio`` more rows there. The gather's backward adds into the memory with atomics: gradients with this path
are not the same bit by bit from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from beacon.attention.inputs import AttentionInputs, Outputs
from beacon.plan import Plan

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Sequences:
    """Where every sequence's queries and keys come from.

    Args:
        queries: Order of the queries over ``[raw | beacons]``.
        places: The inverse: where each raw token, then each beacon ended up.
        keys: Order of the keys over ``[memory rows | raw slots | beacon slots]``.
        cu_seqlens_q: Cumulative query counts, int32 ``[windows + 1]``.
        cu_seqlens_k: Cumulative key counts, int32 ``[windows + 1]``.
        max_seqlen_q: Longest query stretch.
        max_seqlen_k: Longest key stretch.
    """

    queries: torch.Tensor
    places: torch.Tensor
    keys: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def attend(inputs: AttentionInputs, plan: Plan) -> Outputs:
    """Condensed attention of all windows in one variable-length call.

    Returns:
        Outputs ``[n_raw, heads, head_dim]`` and ``[n_beacon, heads, head_dim]`` (None if not asked for).

    Raises:
        ValueError: The model computes in another dtype than float16 or bfloat16.
    """
    from flash_attn import flash_attn_varlen_func

    dtype = inputs.raw_q.dtype  # only known here: autocast may have changed it since the model was loaded
    if dtype not in DTYPES:
        raise ValueError(
            f"attention_path='flash' computes in float16 or bfloat16, got {str(dtype).removeprefix('torch.')}; "
            "load the model with dtype=torch.bfloat16 or use attention_path='auto'."
        )
    if "flash" not in inputs.memo:
        inputs.memo["flash"] = sequences(plan, [len(store) for store in inputs.memory_k])
    s: _Sequences = inputs.memo["flash"]
    raw, beacons = len(inputs.raw_q), len(plan.beacon)
    silent = inputs.raw_q.new_zeros(beacons, *inputs.raw_q.shape[1:])
    q = torch.cat([inputs.raw_q, silent if inputs.beacon_q is None else inputs.beacon_q])
    out = flash_attn_varlen_func(
        q[s.queries],
        torch.cat([*inputs.memory_k, inputs.raw_k, inputs.beacon_k])[s.keys],
        torch.cat([*inputs.memory_v, inputs.raw_v, inputs.beacon_v])[s.keys],
        cu_seqlens_q=s.cu_seqlens_q,
        cu_seqlens_k=s.cu_seqlens_k,
        max_seqlen_q=s.max_seqlen_q,
        max_seqlen_k=s.max_seqlen_k,
        softmax_scale=inputs.scale,
        causal=True,
    )[s.places]
    return out[:raw], None if inputs.beacon_q is None else out[raw:]


def sequences(plan: Plan, memory_sizes: list[int]) -> _Sequences:
    """Lay a plan in plain causal order out as one sequence per window.

    Args:
        plan: Who sees whom (``plain_causal``).
        memory_sizes: Memory entries of every row, those of this pass included.
    """
    memory_at = np.cumsum([0, *memory_sizes])
    slots_at = int(memory_at[-1])
    beacon_slots_at = slots_at + len(plan.raw_slots)
    seen = plan.config.placement == "interleave" and plan.config.attention == "full-coverage"
    queries, keys = [], []
    for block in plan.blocks:
        step = block.step
        start = int(memory_at[step.row])
        raw = np.arange(block.raw_slots.start, block.raw_slots.stop) + slots_at
        beacon = np.arange(block.beacon_slots.start, block.beacon_slots.stop if seen else block.beacon_slots.start)
        window = _interleaved(raw, beacon + beacon_slots_at, step.ratio, 0)
        keys.append(np.concatenate([np.arange(start, start + step.memory), window]))
        raw = np.arange(block.raw_queries.start, block.raw_queries.stop)
        beacon = np.arange(block.beacon_queries.start, block.beacon_queries.stop) + len(plan.raw)
        queries.append(_interleaved(raw, beacon, step.ratio, step.raw_lo))
    order = np.concatenate(queries)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    device = plan.raw.row.device

    def move(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    lengths_q, lengths_k = [len(part) for part in queries], [len(part) for part in keys]
    return _Sequences(
        move(order),
        move(places),
        move(np.concatenate(keys)),
        move(np.cumsum([0, *lengths_q], dtype=np.int32)),
        move(np.cumsum([0, *lengths_k], dtype=np.int32)),
        max(lengths_q),
        max(lengths_k),
    )


def _interleaved(raw: np.ndarray, beacon: np.ndarray, ratio: int, begun: int) -> np.ndarray:
    """Entries of one window in order: a beacon after every ``ratio`` raw tokens, ``begun`` of which came before."""
    if not len(beacon):
        return raw
    first = begun // ratio * ratio + ratio - begun  # raw tokens up to and with the one that a beacon follows
    return np.insert(raw, first + ratio * np.arange(len(beacon)), beacon)
