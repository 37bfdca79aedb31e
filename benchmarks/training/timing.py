"""Time and memory of whole steps, and whether contenders of the same function agree."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from beacon.training.flops import peak_flops
from benchmarks.measure import Spread, first_call, release, settle, spread
from benchmarks.results import OURS, Row
from benchmarks.training.contenders import FULL, Contender, contender
from benchmarks.training.setting import Setting

LEAST = 2  # steps that are timed, whatever the budget
WARM_UPS, SETTLED = 5, 0.9  # at most; until one takes more than this share of the one before
ALIKE = {"float32": 1e-3, "bfloat16": 0.15}  # largest difference of gradients from ours
PROBES = ("model.beacon_embed_tokens.weight", "model.layers.0.self_attn.beacon_v_proj.weight")


@dataclass(frozen=True)
class Outcome:
    """What a contender gave.

    Args:
        rows: Its measurements.
        probes: Gradients of `PROBES` in its first step, on the CPU; None for full attention.
    """

    rows: list[Row]
    probes: list[torch.Tensor] | None = None


def attempt(name: str, base: Any, setting: Setting, steps: int, deadline: float) -> Outcome:
    """Measure a contender; what goes wrong becomes a row."""
    if time.monotonic() >= deadline:
        return Outcome([_none(name, setting, "skipped", "time budget")])
    release(setting.device)  # of the contender before, whose frames are gone by now
    try:
        with contender(name, base, setting) as ready:
            return _measured(ready, steps, deadline)
    except torch.OutOfMemoryError as err:
        return Outcome([_none(name, setting, "failed", f"out of memory: {_short(err)}")])
    except Exception as err:  # one contender must not end the others
        return Outcome([_none(name, setting, "failed", f"{type(err).__name__}: {_short(err)}")])


def compare(outcomes: dict[str, Outcome], setting: Setting) -> list[Row]:
    """Rows of metric ``difference``: gradients of the first step from ours, relative."""
    ours = outcomes[OURS].probes if OURS in outcomes else None
    rows = []
    for name, outcome in outcomes.items():
        if name == OURS or ours is None or outcome.probes is None:
            continue
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(outcome.probes, ours, strict=True))
        rows.append(_row(name, setting, "difference", apart))
    return rows


def disagreements(rows: Iterable[Row]) -> list[str]:
    """Contenders whose gradients are too far from ours."""
    return [
        f"{row.impl} differs from {OURS} by {row.value.p50:.2g} in its gradients"
        for row in rows
        if row.metric == "difference" and row.value is not None and not row.value.p50 <= ALIKE[row.dtype]
    ]


def _measured(ready: Contender, steps: int, deadline: float) -> Outcome:
    setting = ready.setting
    device, on_gpu = setting.device, setting.device.type == "cuda"
    begin = time.perf_counter()
    loss = float(ready.gradients())
    probes = None if ready.name == FULL else [_gradient(ready, name) for name in PROBES]
    ready.optimizer.step()
    ready.optimizer.zero_grad(set_to_none=True)
    settle(device)
    first = time.perf_counter() - begin
    _warm_up(ready)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    while len(seconds) < steps and (len(seconds) < LEAST or time.monotonic() < deadline):
        seconds.append(first_call(ready.step, device))
    taken = spread(seconds)
    found: dict[str, Spread | float] = {
        "ms": Spread(*(1e3 * seconds for seconds in dataclasses.astuple(taken))),
        "tokens_per_s": taken.rate(setting.tokens),
        "tflops": taken.rate(ready.flops.hardware / 1e12),
    }
    peak = peak_flops(torch.cuda.get_device_name(device)) if on_gpu and setting.dtype == torch.bfloat16 else None
    if peak is not None:
        found |= {
            "hfu": taken.rate(ready.flops.hardware / peak),
            "mfu": taken.rate(ready.flops.model / peak),
        }
    if on_gpu:
        found["peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    found |= {"first_s": first, "loss": loss}
    rows = [_row(ready.name, setting, metric, value) for metric, value in found.items()]
    return Outcome(rows, probes)


def _warm_up(ready: Contender) -> None:
    """Steps until they get no faster."""
    before = float("inf")
    for _ in range(WARM_UPS):
        taken = first_call(ready.step, ready.setting.device)
        if taken > SETTLED * before:
            return
        before = taken


def _gradient(ready: Contender, name: str) -> torch.Tensor:
    gradient = ready.parameters[name].grad
    assert gradient is not None
    return gradient.float().cpu().clone()


def _row(name: str, setting: Setting, metric: str, value: Spread | float) -> Row:
    value = Spread(value, value, value) if isinstance(value, float) else value
    return Row(setting.case, name, setting.shape, setting.precision, metric, value)


def _none(name: str, setting: Setting, status: str, reason: str) -> Row:
    return Row(setting.case, name, setting.shape, setting.precision, status=status, reason=reason)


def _short(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
