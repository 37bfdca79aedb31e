"""Who computes a kernel's cells, ours first, then peers by importance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import decoding, ours, peers, plans, rotation
from benchmarks.gpu.attempts import Implementation
from benchmarks.gpu.cases import Cell
from benchmarks.gpu.flex_peer import flex
from benchmarks.results import OURS

DENSE = ("cudnn", "flash", "flash-attn", "flash-attn-3")  # dense causal attention of as many visible pairs
GRAPH = "-graph"

_ATTENTION = (
    Implementation(OURS, ours.attention),
    Implementation("flex", flex),
    Implementation("cudnn", peers.dense(SDPBackend.CUDNN_ATTENTION)),
    Implementation("flash", peers.dense(SDPBackend.FLASH_ATTENTION)),
    Implementation("flash-attn", peers.package("flash_attn")),
    Implementation("flash-attn-3", peers.package("flash_attn_interface")),
    Implementation("sdpa", peers.project_path),
    Implementation("sdpa-mask", peers.masked),
)
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "forward": _ATTENTION,
    "backward": _ATTENTION,
    "decode": (
        Implementation(OURS, decoding.ours),
        Implementation(OURS + GRAPH, decoding.ours, graph=True),
        Implementation("sdpa", decoding.sdpa),
        Implementation("sdpa" + GRAPH, decoding.sdpa, graph=True),
        Implementation("flash-attn", decoding.flash_attn),
    ),
    "rotate_commit": (Implementation(OURS, rotation.ours), Implementation("eager", rotation.eager)),
}
DRAW: dict[str, Callable[[Cell, torch.device], Any]] = {
    "forward": plans.draw,
    "backward": plans.draw,
    "decode": decoding.draw,
    "rotate_commit": rotation.draw,
}
