"""The kernels as operators of PyTorch: shapes without data, gradients, and graphs that torch.compile keeps whole."""

from __future__ import annotations

from typing import Any

import torch

from beacon_kernels.dispatch import launches_directly
from beacon_kernels.rotate_commit.gather import Gather

_SOURCES = "(Tensor[] k_sources, Tensor[] v_sources, Tensor? index, Tensor? cos, Tensor? sin, "
_FORWARD = _SOURCES + "Tensor? offsets, Tensor? order) -> Tensor[]"
_INTO = _SOURCES + "Tensor? places, Tensor(a!) k_out, Tensor(b!)? v_out) -> ()"
_BACKWARD = (
    "(Tensor dk_out, Tensor? dv_out, int[] source_sizes, Tensor? offsets, Tensor? order, Tensor? cos, Tensor? sin) "
    "-> Tensor[]"
)


def gathered(
    k_sources: list[torch.Tensor],
    v_sources: list[torch.Tensor],
    gather: Gather | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Differentiable call on validated arguments: keys, and values if there are any."""
    index, offsets, order = (None, None, None) if gather is None else (gather.index, gather.offsets, gather.order)
    if launches_directly(*k_sources, *v_sources):
        from beacon_kernels.rotate_commit.forward import forward

        return forward(k_sources, v_sources, index, cos, sin)
    found: list[torch.Tensor] = rotate_commit_op(k_sources, v_sources, index, cos, sin, offsets, order)
    return found


@torch.library.custom_op("beacon_kernels::rotate_commit", mutates_args=(), schema=_FORWARD)
def rotate_commit_op(k_sources, v_sources, index, cos, sin, offsets, order):
    """The forward kernel; what only the backward pass reads comes along."""
    from beacon_kernels.rotate_commit.forward import forward

    return forward(k_sources, v_sources, index, cos, sin)


@rotate_commit_op.register_fake
def _(k_sources, v_sources, index, cos, sin, offsets, order):
    rows = sum(source.shape[0] for source in k_sources) if index is None else index.shape[0]
    return [k_sources[0].new_empty(rows, *k_sources[0].shape[1:]) for _ in range(1 + bool(v_sources))]


@torch.library.custom_op("beacon_kernels::rotate_commit_into", mutates_args=("k_out", "v_out"), schema=_INTO)
def rotate_commit_into_op(k_sources, v_sources, index, cos, sin, places, k_out, v_out):
    """The forward kernel, writing into buffers that are there."""
    from beacon_kernels.rotate_commit.forward import forward_into

    forward_into(k_sources, v_sources, index, places, cos, sin, k_out, v_out)


def written(
    k_sources: list[torch.Tensor],
    v_sources: list[torch.Tensor],
    gather: Gather | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    places: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
) -> None:
    """Call on validated arguments that writes into buffers that are there."""
    index = None if gather is None else gather.index
    if launches_directly(*k_sources, *v_sources, k_out):
        from beacon_kernels.rotate_commit.forward import forward_into

        forward_into(k_sources, v_sources, index, places, cos, sin, k_out, v_out)
        for out in (k_out, v_out):
            if out is not None and not out.is_inference():
                torch.autograd.graph.increment_version(out)
    else:
        rotate_commit_into_op(k_sources, v_sources, index, cos, sin, places, k_out, v_out)


@torch.library.custom_op("beacon_kernels::rotate_commit_backward", mutates_args=(), schema=_BACKWARD)
def rotate_commit_backward_op(dk_out, dv_out, source_sizes, offsets, order, cos, sin):
    """The backward kernel."""
    from beacon_kernels.rotate_commit.backward import backward

    return backward(dk_out, dv_out, source_sizes, offsets, order, cos, sin)


@rotate_commit_backward_op.register_fake
def _(dk_out, dv_out, source_sizes, offsets, order, cos, sin):
    grads = [grad for grad in (dk_out, dv_out) if grad is not None]
    return [grad.new_empty(size, *grad.shape[1:]) for grad in grads for size in source_sizes]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    k_sources, v_sources, _, cos, sin, offsets, order = inputs
    ctx.save_for_backward(offsets, order, cos, sin)  # the map is linear in the sources: they are not needed
    ctx.sizes, ctx.has_values = [source.shape[0] for source in k_sources], bool(v_sources)


def _differentiate(ctx: Any, grads: list[torch.Tensor]) -> Any:
    offsets, order, cos, sin = ctx.saved_tensors
    dk_out, dv_out = (*grads, None)[:2]
    found = rotate_commit_backward_op(dk_out, dv_out, ctx.sizes, offsets, order, cos, sin)
    count = len(ctx.sizes)
    return found[:count], found[count:], *[None] * 5


rotate_commit_op.register_autograd(_differentiate, setup_context=_save)
