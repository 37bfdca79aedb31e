"""Time and memory of decoding after a text, for batches of several rows and in every way a contender has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu.attempts import Unavailable, said
from benchmarks.inference.contenders import device_bytes, least_bytes
from benchmarks.inference.prefill import whole
from benchmarks.inference.readers import Contender, Reading
from benchmarks.inference.setting import Setting, Text
from benchmarks.inference.tasks import DECODE
from benchmarks.measure import Spread, first_call, release, spread
from benchmarks.results import Row

WARM_TOKENS, REPEATS = 4, 2
OUT_OF_MEMORY = "out of memory"
CERTAIN = 1.15  # this much of a GPU's memory does not fit, whatever is left out of the estimate


def decode(
    ready: Contender, name: str, setting: Setting, text: Text, batches: Sequence[int], deadline: float
) -> Iterator[list[Row]]:
    """Measure one contender after one text and half a window more, so that the open window is as full as on average.

    Every row of a batch has the same text. A batch that does not fit gets a row and the next one is tried.

    Args:
        ready: The contender.
        name: Its name.
        setting: Where it runs.
        text: What it reads first.
        batches: Rows.
        deadline: After which no batch begins.

    Yields:
        The rows of each batch.
    """
    reading = ready.read(setting.ids(text.length + setting.scale.window // 2), text.ratio)
    for batch in batches:
        yield [row for way in ready.ways for row in _attempt(ready, name, way, setting, text, reading, batch, deadline)]


def too_large(name: str, setting: Setting, text: Text, rows: int = 1) -> str:
    """Why a cell certainly does not fit; empty if it may."""
    held, needed = device_bytes(setting.device), least_bytes(name, setting, text, rows)
    if held is None or needed < CERTAIN * held:
        return ""
    return f"{OUT_OF_MEMORY}: needs {needed / 1e9:.0f} GB at least, the device has {held / 1e9:.0f} GB; not tried"


def _attempt(
    ready: Contender, name: str, way: str, setting: Setting, text: Text, reading: Reading, batch: int, deadline: float
) -> list[Row]:
    """Rows of one way; what goes wrong becomes a row."""
    case, shape = setting.case(DECODE, text, batch), setting.shape(text, batch)

    def none(status: str, reason: str) -> list[Row]:
        return [Row(case, name, shape, setting.precision, f"{way}_tokens_per_s", None, status, reason)]

    why = too_large(name, setting, text, batch)
    if why:
        return none("failed", why)
    if time.monotonic() >= deadline:
        return none("skipped", "time budget")
    if setting.on_gpu:
        release(setting.device)
    try:
        found = _measured(ready, way, setting, ready.repeated(reading, batch), batch)
    except torch.OutOfMemoryError as err:
        return none("failed", f"{OUT_OF_MEMORY}: {' '.join(str(err).split())[:200]}")
    except Unavailable as err:
        return none("unavailable", str(err))
    except Exception as err:  # one way must not end the others
        return none("failed", said(err))
    return [Row(case, name, shape, setting.precision, metric, whole(value)) for metric, value in found.items()]


def _measured(ready: Contender, way: str, setting: Setting, reading: Reading, batch: int) -> dict[str, Spread | float]:
    device, count = setting.device, setting.new_tokens
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    more = ready.decoder(way, reading)
    first = first_call(lambda: more(WARM_TOKENS), device)
    seconds = spread([first_call(lambda: more(count), device) for _ in range(REPEATS)])
    found: dict[str, Spread | float] = {
        f"{way}_tokens_per_s": seconds.rate(batch * count),
        f"{way}_first_s": first,
        f"{way}_cache_mb": ready.cache_bytes(reading.cache) / 2**20,
    }
    if setting.on_gpu:
        found[f"{way}_peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found
