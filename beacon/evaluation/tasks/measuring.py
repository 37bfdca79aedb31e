"""Time and memory that something takes."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


def now(model: Any) -> float:
    """Seconds on a clock, when the model's device has done all that it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def seconds(model: Any, run: Callable[[], Any]) -> float:
    """How long something takes, to its end on the model's device."""
    start = now(model)
    run()
    return now(model) - start


class PeakMemory:
    """Watches memory from now on.

    On a GPU what torch has allocated there, exactly. On a CPU resident memory of the process: on Linux the peak is
    reset first, elsewhere (and where that is not allowed) only a peak above all earlier ones is seen.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            begin_anew()
            self.before = peak_resident()

    def read(self) -> dict[str, float]:
        """``peak_bytes`` beyond what was in use at the beginning, and on a GPU ``peak_allocated_bytes``, the whole.

        Empty where the system tells nothing.
        """
        if self.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = peak_resident()
        if peak is None or self.before is None:
            return {}
        scores = {"peak_bytes": float(max(peak - self.before, 0))}
        return scores | ({"peak_allocated_bytes": float(peak)} if self.device.type == "cuda" else {})


def begin_anew() -> None:
    """Give freed memory back to the system and let the peak begin at what is resident now, where that can be done."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc, which keeps what was freed
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_resident() -> int | None:
    """Bytes of the process that were resident at once at most; None where the system does not tell."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
