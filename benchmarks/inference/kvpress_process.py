"""kvpress, run by an interpreter of its own, as rows like everybody's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.attempts import Unavailable
from benchmarks.inference.contenders import KVPRESS
from benchmarks.inference.prefill import WARM_TOKENS, prefill_rows, rates, whole
from benchmarks.inference.setting import Setting, Text
from benchmarks.inference.tasks import DECODE, repeats
from benchmarks.measure import Spread, spread
from benchmarks.results import Row

EAGER = "eager"  # the way it decodes: a greedy loop over forward calls, as in its pipeline
PEER = Path(__file__).with_name("kvpress_peer.py")
MISSING = "no interpreter with kvpress was named; it needs transformers < 5.3, so one of its own: --kvpress-python PATH"


def kvpress_rows(setting: Setting, text: Text, python: str | None, seconds: float) -> list[Row]:
    """Read a text under a press at a compression equal to the ratio, then decode one row after it.

    Args:
        setting: The model's sizes and where it runs.
        text: What is read.
        python: The interpreter; None: there is none.
        seconds: After which the process is ended.

    Raises:
        Unavailable: There is no such interpreter, or kvpress does not work in it.
        torch.OutOfMemoryError: The text does not fit.
        TimeoutError: It took longer.
    """
    if python is None:
        raise Unavailable(MISSING)
    found = _ask(setting, text, python, seconds)
    if "failed" in found:
        raise torch.OutOfMemoryError(found["failed"])
    taken = spread(found["seconds"])
    metrics: dict[str, Spread | float] = {
        **rates(KVPRESS, setting, text, taken),
        **{name: float(found[name]) for name in ("cache_mb", "first_s", "peak_mb") if found[name] is not None},
    }
    rows = prefill_rows(KVPRESS, setting, text, metrics)
    decoded = whole(float(found["tokens_per_s"]))
    case, shape = setting.case(DECODE, text, 1), setting.shape(text)
    rows.append(Row(case, KVPRESS, shape, setting.precision, f"{EAGER}_tokens_per_s", decoded))
    used = " ".join(f"{name}={found[name]}" for name in ("press", "kvpress", "transformers", "torch"))
    return [dataclasses.replace(row, shape=f"{row.shape} {used}") for row in rows]


def _ask(setting: Setting, text: Text, python: str, seconds: float) -> dict[str, Any]:
    spec = {
        "scale": dataclasses.asdict(setting.scale),
        "length": text.length,
        "ratio": text.ratio,
        "device": str(setting.device),
        "dtype": setting.precision,
        "repeats": repeats(setting, text),
        "new_tokens": setting.new_tokens,
        "warm_tokens": WARM_TOKENS,
        "threads": None if setting.on_gpu else torch.get_num_threads(),
    }
    command = [python, str(PEER), json.dumps(spec)]
    limit = None if seconds == float("inf") else max(seconds, 1.0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except OSError as err:
        raise Unavailable(f"{python} cannot be run: {err}") from err
    except subprocess.TimeoutExpired as err:
        raise TimeoutError(f"the process took longer than the {seconds:.0f} s that were left") from err
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{PEER.name} ended with {done.returncode}: {last[:300]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
