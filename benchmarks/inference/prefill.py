"""Time and memory of reading a text up to its first new token."""

from __future__ import annotations

import time

import torch

from beacon.training.flops import peak_flops
from benchmarks.inference.contenders import flops_of
from benchmarks.inference.readers import Contender, Reading
from benchmarks.inference.setting import Setting, Text
from benchmarks.inference.tasks import PREFILL, repeats
from benchmarks.measure import Spread, first_call, spread
from benchmarks.results import Row

WARM_TOKENS = 16 * 1024  # read before anything is timed


def prefill(
    ready: Contender, name: str, setting: Setting, text: Text, deadline: float
) -> tuple[list[Row], Reading, Spread]:
    """Measure one contender on one text.

    Args:
        ready: The contender.
        name: Its name.
        setting: Where it runs.
        text: What it reads.
        deadline: After which nothing is repeated.

    Returns:
        Its rows, what it read in the last run, and the seconds to the first token.
    """
    device = setting.device
    warm = setting.ids(min(text.length, WARM_TOKENS))
    first = first_call(lambda: _first_token(ready.read(warm, text.ratio)), device)
    ids = setting.ids(text.length)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    kept: list[Reading] = []

    def run() -> None:
        kept.append(ready.read(ids, text.ratio))
        _first_token(kept[0])

    while len(seconds) < repeats(setting, text) and (not seconds or time.monotonic() < deadline):
        kept.clear()  # the run before must not count in this one's memory
        seconds.append(first_call(run, device))
    taken = spread(seconds)
    found = rates(name, setting, text, taken)
    if setting.on_gpu:
        found["peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    found |= {"cache_mb": ready.cache_bytes(kept[0].cache) / 2**20, "first_s": first}
    return prefill_rows(name, setting, text, found), kept[0], taken


def rates(name: str, setting: Setting, text: Text, seconds: Spread) -> dict[str, Spread | float]:
    """What follows from the time to the first token."""
    work = flops_of(name, setting, text).model
    found: dict[str, Spread | float] = {
        "ttft_s": seconds,
        "prefill_tokens_per_s": seconds.rate(text.length),
        "tflops": seconds.rate(work / 1e12),
    }
    half = setting.dtype == torch.bfloat16
    peak = peak_flops(torch.cuda.get_device_name(setting.device)) if setting.on_gpu and half else None
    if peak is not None:
        found["mfu"] = seconds.rate(work / peak)
    return found


def prefill_rows(name: str, setting: Setting, text: Text, found: dict[str, Spread | float]) -> list[Row]:
    """A row per metric."""
    case, shape = setting.case(PREFILL, text), setting.shape(text)
    return [Row(case, name, shape, setting.precision, metric, whole(value)) for metric, value in found.items()]


def whole(value: Spread | float) -> Spread:
    """A single number as its own quantiles."""
    return Spread(value, value, value) if isinstance(value, float) else value


def _first_token(reading: Reading) -> int:
    return int(reading.ids[0, -1])  # waits for the device
