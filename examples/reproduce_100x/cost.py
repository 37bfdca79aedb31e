"""Time and memory of reading against length: beacons beside full attention with the same weights.

    python examples/reproduce_100x/cost.py

Every point is taken in a process of its own. Points that are in the results already are not taken again.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import beacon
from beacon.evaluation import held_entries
from records import Record, machine

logger = logging.getLogger("cost")
COMMAND = "python examples/reproduce_100x/cost.py"
RESULTS = Path("build/reproduce_100x/results")
LENGTHS = tuple(512 * 4**n for n in range(6)) + (2**20,)
FULL = "full attention"
RATIO = 128  # or the largest that the model is configured with
WARM_UP = 512  # tokens read before the clock starts
REPEATS, REPEATED = 3, 8192  # the median of so many readings, for texts of up to so many tokens
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PATIENCE = 120.0  # seconds that full attention may take for one text


def measure_cost(
    folder: Path,
    results: Path,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    full_up_to: int | None = None,
    threads: int = 2,
) -> Path:
    """Seconds, peak memory and entries held of reading random tokens, by method and length.

    Args:
        folder: A base model with its adapter in ``adapter/``.
        results: Folder for ``cost.json``.
        lengths: Tokens of the texts.
        full_up_to: The longest text for full attention; None: as long as a text takes less than 120 seconds, foreseen
            from the shorter ones.
        threads: Of the CPU.

    Returns:
        The result file; its ``stopped`` says why full attention reads no longer text, or is null.

    Raises:
        RuntimeError: A measurement failed.
    """
    config = json.loads((folder / "adapter" / "beacon_config.json").read_text())
    ratio = RATIO if RATIO in config["ratios"] else max(config["ratios"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "model": config["base"],
        "window": config["window"],
        "stride": config["stride"],
        "ratio": ratio,
        "device": machine()["device"],
        "dtype": str(_dtype(device)).removeprefix("torch."),
        "threads": threads,
        "ids": "random",
        "repeats": f"median of {REPEATS} for up to {REPEATED:,} tokens, else 1; one more for the peak",
    }
    record = Record(results / "cost.json", "cost of reading a text, by method and length", settings, COMMAND)
    record.content["machine"]["threads"] = str(threads)
    record.content["stopped"] = None
    common = {"folder": str(folder), "ratio": ratio, "device": device, "threads": threads}
    for tokens in sorted(lengths):
        method = f"beacon, ratio {ratio}"
        if not record.has(method=method, tokens=tokens):
            _add(record, method, measure_apart(**common, full=False, tokens=tokens))
        if record.content["stopped"] is None and not record.has(method=FULL, tokens=tokens):
            record.content["stopped"] = _why_not(record, tokens, full_up_to)
            if record.content["stopped"] is None:
                try:
                    _add(record, FULL, measure_apart(**common, full=True, tokens=tokens))
                except MemoryError:
                    record.content["stopped"] = f"{FULL} ran out of memory at {tokens:,} tokens"
    record.add(**record.rows.pop())  # writes the file again, with what has been decided since
    return record.file


def _add(record: Record, method: str, found: dict[str, Any]) -> None:
    row = {"method": method, **found}
    record.add(**row)
    logger.info("%s", json.dumps(row))


def _why_not(record: Record, tokens: int, full_up_to: int | None) -> str | None:
    """Why full attention does not read so many tokens; None if it does."""
    if full_up_to is not None:
        return f"{FULL} was asked for up to {full_up_to:,} tokens" if tokens > full_up_to else None
    times = {row["tokens"]: row["seconds"] for row in record.rows if row["method"] == FULL and row["tokens"] < tokens}
    seconds = foresee(times, tokens)
    if seconds <= PATIENCE:
        return None
    return f"{tokens:,} tokens would take {FULL} about {seconds:,.0f} s, the limit is {PATIENCE:.0f} s"


def foresee(times: dict[int, float], tokens: int) -> float:
    """Seconds that a longer text takes: a linear and a quadratic part through the last two points, 0 without any."""
    points = sorted(times.items())[-2:]
    if not points:
        return 0.0
    last, seconds = points[-1]
    quadratic = seconds / last**2
    if len(points) == 2:
        first, before = points[0]
        quadratic = min(max((seconds / last - before / first) / (last - first), 0.0), quadratic)
    return (seconds / last - quadratic * last) * tokens + quadratic * tokens**2


# -- one point ---------------------------------------------------------------------------------------------------------


def measure_apart(**point: Any) -> dict[str, Any]:
    """:func:`measure_point` in a fresh process.

    Raises:
        MemoryError: It ran out of memory.
        RuntimeError: It failed.
    """
    paths = os.pathsep.join(filter(None, sys.path))
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env |= {"OMP_NUM_THREADS": str(point["threads"]), "PYTHONPATH": paths}
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip()[-2000:]
        out_of_memory = done.returncode == -9 or "OutOfMemoryError" in last or "can't allocate memory" in last
        raise (MemoryError if out_of_memory else RuntimeError)(f"{json.dumps(point)} failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def measure_point(folder: str, full: bool, tokens: int, ratio: int, device: str, threads: int) -> dict[str, Any]:
    """Read a text of random tokens.

    Args:
        folder: As in :func:`measure_cost`.
        full: The stock model reads it at once, with a cache, and gives the last token's logits; else beacons do.
        tokens: Length of the text.
        ratio: Of all windows.
        device: ``cpu`` or ``cuda``.
        threads: Of the CPU.

    Returns:
        Columns of a row: ``tokens``, ``seconds``, ``tokens_per_second``, ``peak_bytes`` (at the peak of a reading of
        its own, beside what was held before it), ``kv_entries`` and ``kv_bytes`` of the cache at the end.
    """
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(device)).to(device).eval()
    if not full:
        beacon.load_adapter(model, Path(folder) / "adapter")
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def read(count: int) -> Any:
        if full:
            return model(ids[:, :count], use_cache=True, logits_to_keep=1).past_key_values
        return model.compress(ids[:, :count], ratios=ratio)

    read(min(tokens, WARM_UP))
    _hold_freed_memory(False)
    cache, _, peak = _watch(lambda: read(tokens), device)
    if full:
        entries = cache.get_seq_length()
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        entries, size = held_entries(cache), cache.stats()[0]["bytes"]
    del cache
    _hold_freed_memory(True)
    samples = [_watch(lambda: read(tokens), device)[1] for _ in range(REPEATS if tokens <= REPEATED else 1)]
    seconds = statistics.median(samples)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_bytes": peak,
        "kv_entries": entries,
        "kv_bytes": int(size),
    }


def _watch(call: Callable[[], Any], device: str) -> tuple[Any, float, int]:
    """Result, seconds, and bytes at the peak beside those held before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _forget_peak()
        before, _ = _resident()
    began = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident()[1]
    return result, seconds, peak - before


def _resident() -> tuple[int, int]:
    """Bytes of resident memory now and at their peak; the peak twice where only that is known.

    On Linux not by `getrusage`: its peak is handed down by the process that started this one, however large that was.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def _hold_freed_memory(hold: bool) -> None:
    """Whether glibc keeps large blocks that are freed: faster, but how much it keeps differs from process to process.

    Handed back at once, resident memory is what is in use (full attention over 4,096 tokens of the shipped model: peaks
    of 97 to 99 MiB, else of 103 to 172), but reading takes up to 1.8 times as long. So memory and time are measured in
    readings of their own.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, size in (
            (M_MMAP_THRESHOLD, 2**25 if hold else 2**20),
            (M_TRIM_THRESHOLD, 2**30 if hold else 2**17),
        ):
            libc.mallopt(option, size)


def _forget_peak() -> None:
    """Hand freed memory back, and let the peak begin at what is held now (Linux; elsewhere loading counts as well)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="base model with adapter/; the shipped one by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for cost.json")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the texts")
    parser.add_argument("--full-up-to", type=int, help="longest text of full attention; default: while it takes 120 s")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # one measurement, for the process above
    args = parser.parse_args()
    if args.point is not None:
        print(json.dumps(measure_point(**args.point)))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    measure_cost(
        args.folder or beacon.default_model(),
        args.results,
        lengths=tuple(args.lengths),
        full_up_to=args.full_up_to,
        threads=args.threads,
    )


if __name__ == "__main__":
    main()
