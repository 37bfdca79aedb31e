"""The kernels as operators of PyTorch: shapes without data, gradients, and graphs that torch.compile keeps whole."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch

from beacon_kernels.beacon_attention.schedule import Schedule
from beacon_kernels.dispatch import launches_directly
from beacon_kernels.tiles import Tile

_FORWARD = (
    "(Tensor q, Tensor[] keys, Tensor[] values, Tensor runs, Tensor tiles, int[] tile, int packed, float scale, "
    "Tensor? dq_tiles, Tensor? dkv_tiles, Tensor? key_runs, int[] dq_tile, int[] dkv_tile, int splits) "
    "-> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor do, Tensor dlse, Tensor q, Tensor[] keys, Tensor[] values, Tensor out, Tensor lse, Tensor runs, "
    "Tensor dq_tiles, Tensor dkv_tiles, Tensor key_runs, int[] dq_tile, int[] dkv_tile, int packed, int splits, "
    "float scale) -> (Tensor, Tensor[], Tensor[])"
)
_DECODE = (
    "(Tensor q, Tensor[] keys, Tensor[] values, Tensor runs, int seqlen_q, float scale, int num_splits) "
    "-> (Tensor, Tensor)"
)


def attend(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], schedule: Schedule, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the operator on validated arguments (see :func:`beacon_kernels.beacon_attention.beacon_attention`)."""
    dq, dkv = schedule.dq, schedule.dkv
    if dq is None and launches_directly(q, *keys, *values):
        from beacon_kernels.beacon_attention.forward import forward

        tile, items = schedule.forward.tile, schedule.forward.items
        return forward(q, keys, values, schedule.runs, items, tile, schedule.packed, scale)
    found: tuple[torch.Tensor, torch.Tensor] = attention(
        q,
        keys,
        values,
        schedule.runs,
        schedule.forward.items,
        list(astuple(schedule.forward.tile)),
        schedule.packed,
        scale,
        None if dq is None else dq.items,
        None if dkv is None else dkv.items,
        schedule.key_runs,
        [] if dq is None else list(astuple(dq.tile)),
        [] if dkv is None else list(astuple(dkv.tile)),
        schedule.splits,
    )
    return found


@torch.library.custom_op("beacon_kernels::attention", mutates_args=(), schema=_FORWARD)
def attention(
    q, keys, values, runs, tiles, tile, packed, scale, dq_tiles, dkv_tiles, key_runs, dq_tile, dkv_tile, splits
):
    """The forward kernel; what only the backward pass reads comes along."""
    from beacon_kernels.beacon_attention.forward import forward

    return forward(q, keys, values, runs, tiles, Tile(*tile), packed, scale)


@attention.register_fake
def _(q, *args):
    n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(heads, n, dtype=torch.float32)


@torch.library.custom_op("beacon_kernels::attention_backward", mutates_args=(), schema=_BACKWARD)
def attention_backward(
    do,
    dlse,
    q,
    keys,
    values,
    out,
    lse,
    runs,
    dq_tiles,
    dkv_tiles,
    key_runs,
    dq_tile,
    dkv_tile,
    packed,
    splits,
    scale,
):
    """The backward kernels."""
    from beacon_kernels.beacon_attention.backward import backward

    tiles = Tile(*dq_tile), Tile(*dkv_tile)
    return backward(
        do, dlse, q, keys, values, out, lse, runs, dq_tiles, dkv_tiles, key_runs, *tiles, packed, splits, scale
    )


@attention_backward.register_fake
def _(do, dlse, q, keys, values, *args):
    return q.new_empty(q.shape), [k.new_empty(k.shape) for k in keys], [v.new_empty(v.shape) for v in values]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, keys, values, runs, _, _, packed, scale, dq_tiles, dkv_tiles, key_runs, dq_tile, dkv_tile, splits = inputs
    ctx.save_for_backward(q, *keys, *values, *output, runs, dq_tiles, dkv_tiles, key_runs)
    ctx.stores, ctx.numbers = len(keys), (dq_tile, dkv_tile, packed, splits, scale)


def _differentiate(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
    q, *stores, out, lse, runs, dq_tiles, dkv_tiles, key_runs = ctx.saved_tensors
    keys, values = stores[: ctx.stores], stores[ctx.stores :]
    do = torch.zeros_like(out) if do is None else do
    dlse = lse.new_zeros(()).expand_as(lse) if dlse is None else dlse
    plan = (runs, dq_tiles, dkv_tiles, key_runs, *ctx.numbers)
    dq, dk, dv = attention_backward(do, dlse, q, keys, values, out, lse, *plan)
    return dq, dk, dv, *[None] * 11


@torch.library.custom_op("beacon_kernels::decode", mutates_args=(), schema=_DECODE)
def decoding(q, keys, values, runs, seqlen_q, scale, num_splits):
    """The decoding kernels; no gradients."""
    from beacon_kernels.beacon_attention.decode import decode

    return decode(q, keys, values, runs, seqlen_q, scale, num_splits)


@decoding.register_fake
def _(q, *args):
    n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(heads, n, dtype=torch.float32)


attention.register_autograd(_differentiate, setup_context=_save)
