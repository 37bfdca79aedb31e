"""The floor of a prefill: its matrix products alone, the same layers on as many tokens, nothing between them."""

from __future__ import annotations

from typing import Any

import torch

from beacon.segments import windows_per_pass
from benchmarks.inference.setting import Setting, Text
from benchmarks.measure import first_call

MOST_TOKENS = 128 * 1024  # run; beyond that the time of these is scaled, for every pass is alike


def products_seconds(model: Any, setting: Setting, text: Text) -> float:
    """Seconds of all matrix products of reading a text, pass by pass as the library would read it.

    The last layer gives keys and values alone, but in the last pass; beacons get there no further than that.

    Args:
        model: A wrapped model: beacons have projections of their own.
        setting: Its sizes.
        text: What is read.
    """
    window = setting.scale.window
    with torch.no_grad():
        per_pass = window * windows_per_pass(model, setting.device, window, text.length)
        sizes = [min(per_pass, text.length - start) for start in range(0, text.length, per_pass)]
        run = sizes[-max(1, MOST_TOKENS // per_pass) :]
        _pass(model, setting, text.ratio, run[0], last=True)
        seconds = first_call(lambda: _passes(model, setting, text.ratio, run), setting.device)
    return seconds * text.length / sum(run)


def _passes(model: Any, setting: Setting, ratio: int, sizes: list[int]) -> None:
    for number, tokens in enumerate(sizes, 1):
        _pass(model, setting, ratio, tokens, last=number == len(sizes))


def _pass(model: Any, setting: Setting, ratio: int, tokens: int, *, last: bool) -> None:
    """The products of one pass; what each gives is dropped, its inputs are random."""
    window, hidden = setting.scale.window, setting.scale.hidden
    beacons = tokens // window * (window // ratio)
    x = torch.randn(tokens + beacons, hidden, device=setting.device, dtype=setting.dtype)
    *inner, end = model.model.layers
    for layer in inner:
        _projections(layer.self_attn, x, tokens, "qkvo")
        _mlp(layer.mlp, x)
    _projections(end.self_attn, x, tokens, "kv")
    if last:
        for name in "qo":
            getattr(end.self_attn, f"{name}_proj")(x[:tokens])
        _mlp(end.mlp, x[:tokens])
        model.lm_head(x[:1])


def _projections(attention: Any, x: torch.Tensor, tokens: int, names: str) -> None:
    for name in names:
        getattr(attention, f"{name}_proj")(x[:tokens])
        if len(x) > tokens:
            getattr(attention, f"beacon_{name}_proj")(x[tokens:])


def _mlp(mlp: Any, x: torch.Tensor) -> None:
    mlp.up_proj(x)
    mlp.down_proj(mlp.gate_proj(x))
