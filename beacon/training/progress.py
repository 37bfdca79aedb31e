"""How fast a training is, and a bar that says so."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_callback import ProgressCallback


@dataclass
class Meter:
    """Counts tokens and FLOPs and the time they take; evaluation and saving are taken out.

    Args:
        tokens: Raw tokens of this process since the last reading.
        model_flops: FLOPs without recomputation (MFU).
        hardware_flops: FLOPs with it (HFU).
    """

    tokens: int = 0
    model_flops: float = 0.0
    hardware_flops: float = 0.0
    _since: float | None = None
    _paused: float = 0.0

    def start(self) -> None:
        """Begin to count time, unless it is being counted."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, tokens: int, model_flops: float, hardware_flops: float) -> None:
        """Count a batch."""
        self.start()
        self.tokens += tokens
        self.model_flops += model_flops
        self.hardware_flops += hardware_flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._since is not None:
                self._paused += time.perf_counter() - begin

    def read(self) -> tuple[float, float, float, float]:
        """Tokens, model FLOPs, hardware FLOPs and seconds since the last reading, which begins anew."""
        now = time.perf_counter()
        seconds = 0.0 if self._since is None else now - self._since - self._paused
        counted = float(self.tokens), self.model_flops, self.hardware_flops, seconds
        self.tokens, self.model_flops, self.hardware_flops, self._since, self._paused = 0, 0.0, 0.0, now, 0.0
        return counted


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has had allocated, in GB (10^9 bytes): of the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


FORMATS = {
    "loss": "loss {:.4f}",
    "eval_loss": "evaluation loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "hfu": "HFU {:.1%}",
    "mfu": "MFU {:.1%}",
    "tflops_per_second": "{:,.2f} TFLOP/s",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "peak_memory_gb": "{:.2f} GB",
}


class ProgressBar(ProgressCallback):
    """Transformers' bar, with one short line per report in place of a dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        line = describe(logs or {})
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(f"step {state.global_step:,}/{state.max_steps:,}: {line}")


def describe(logs: dict[str, Any]) -> str:
    """One line of what a report holds."""
    known = [text.format(logs[name]) for name, text in FORMATS.items() if isinstance(logs.get(name), (int, float))]
    scores = [
        f"{name.removeprefix('eval_').replace('_', ' ')} {value:.1%}"
        if "passkey" in name
        else f"{name.removeprefix('eval_').replace('_', ' ')} {value:.3f}"
        for name, value in logs.items()
        if "perplexity" in name or "passkey" in name
    ]
    return " | ".join([*known, *scores])
