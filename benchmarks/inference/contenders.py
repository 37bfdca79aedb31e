"""Who reads: the same base weights in turn under every contender, and what each is certain to need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import beacon
from benchmarks.inference import flops
from benchmarks.inference.flops import ReadingFlops
from benchmarks.inference.full import FullCudnn, FullDynamic, FullStatic
from benchmarks.inference.ours import Beacon, BeaconStatic
from benchmarks.inference.published import Published
from benchmarks.inference.readers import Contender
from benchmarks.inference.setting import Setting, Text
from benchmarks.inference.sliding import SlidingWindow, sharing
from benchmarks.results import OURS

STATIC, LOOP, PUBLISHED = "beacon-static", "loop", "published"
FULL, CUDNN, FULL_STATIC, SLIDING, KVPRESS = "full-dynamic", "full-cudnn", "full-static", "sliding-window", "kvpress"
NAMES = (OURS, STATIC, LOOP, PUBLISHED, FULL, CUDNN, FULL_STATIC, SLIDING, KVPRESS)
CONDENSED = (OURS, STATIC, LOOP, PUBLISHED)
WHOLE = (FULL, CUDNN, FULL_STATIC, KVPRESS)  # kvpress drops entries after full attention has read them
MEANING = {
    OURS: "windows in passes of many",
    STATIC: "the same with a cache of fixed size: generate, and the lean loop that replays CUDA graphs",
    LOOP: "window by window (segment=1), same kernels",
    PUBLISHED: "window by window, keys rotated anew, SDPA with a mask",
    FULL: "stock model, DynamicCache, SDPA with the kernel that PyTorch chooses (flash where a text is read in pieces)",
    CUDNN: "the same with cuDNN's kernel",
    FULL_STATIC: "stock model, StaticCache: generate (compiled on a GPU), and a CUDA graph of a step replayed",
    SLIDING: "Mistral with these weights, its window ours, SDPA with a mask",
    KVPRESS: "stock model read whole, then SnapKV drops as much as the ratio says; greedy loop",
}


@contextmanager
def contender(name: str, base: Any, setting: Setting) -> Iterator[Contender]:
    """Prepare a contender on the stock ``base``, which is as before afterwards."""
    if name in CONDENSED:
        beacon.wrap(base, setting.config(segment=1 if name == LOOP else None))
        try:
            yield _condensing(name, base, setting)
        finally:
            beacon.unwrap(base)
    elif name == SLIDING:
        yield SlidingWindow(sharing(base, setting.scale.window))
    elif name == FULL_STATIC:
        try:
            yield FullStatic(base, setting.room)
        finally:
            base.__dict__.pop("_compiled_call", None)
            torch.compiler.reset()  # gives back what its graphs hold
    else:
        yield (FullCudnn if name == CUDNN else FullDynamic)(base)


def _condensing(name: str, base: Any, setting: Setting) -> Contender:
    if name == STATIC:
        return BeaconStatic(base, setting.room)
    return Published(base) if name == PUBLISHED else Beacon(base)


def flops_of(name: str, setting: Setting, text: Text) -> ReadingFlops:
    """What a contender is credited with for reading a text."""
    shape, window = setting.model_shape, setting.scale.window
    if name in CONDENSED:
        return flops.condensed(shape, window, text)
    return flops.sliding(shape, window, text) if name == SLIDING else flops.full(shape, text)


def least_bytes(name: str, setting: Setting, text: Text, rows: int = 1) -> int:
    """A lower bound of what a cell takes: weights and, under full attention, keys and values."""
    shape = setting.model_shape
    weights = shape.layers * shape.layer + 2 * shape.vocab * shape.hidden
    if name in CONDENSED:
        weights += shape.layers * sum(shape.projections.values())
    kept = 2 * shape.layers * shape.kv_heads * shape.head_dim * text.length
    if name == FULL_STATIC:
        rows += 1  # what is copied into a cache of fixed size was read by a growing one
    entries = kept * rows if name in (FULL, CUDNN, FULL_STATIC) else 0
    return (weights + entries) * setting.dtype.itemsize


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU, where nobody counts."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
