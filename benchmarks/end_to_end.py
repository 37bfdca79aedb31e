"""Time reading and decoding of long texts against full attention and others' schedules, in one run.

python benchmarks/end_to_end.py                          # Llama-2-7B, then Llama-3-8B shapes: needs a GPU of 80 GB
python benchmarks/end_to_end.py --budget-seconds 500     # the most important cells first; the rest is skipped
python benchmarks/end_to_end.py --scale small            # on a CPU; rows go to a temporary folder
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.inference.setting import Setting

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCALES = ("7b", "8b", "small", "tiny")
CONTENDERS = (
    *("beacon", "beacon-static", "loop", "published"),
    *("full-dynamic", "full-cudnn", "full-static", "sliding-window", "kvpress"),
)
FUSED = ("none", "compile", "liger")
KINDS = ("prefill", "decode", "prefill-parts", "decode-parts")
FILE = "end_to_end.csv"
BUDGET = 900.0


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 when all went well, 1 when ours broke or contenders disagree, 2 without a GPU that the scale needs."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for folder in (str(ROOT), str(ROOT / "kernels")):  # a bare machine has nothing installed
        if folder not in sys.path:
            sys.path.insert(0, folder)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes on standard error
    import torch

    from benchmarks.inference.setting import NEW_TOKENS, TEXTS, Setting
    from benchmarks.models import ON_CPU, SCALES

    scales = ["tiny"] if options.dry_run else options.scale
    device = torch.device("cpu" if options.cpu or options.dry_run or not torch.cuda.is_available() else "cuda")
    large = [name for name in scales if name not in ON_CPU]
    if device.type == "cpu" and large:
        sys.stderr.write(f"--scale {' '.join(large)} needs a CUDA GPU and there is none; try --scale small.\n")
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    settings = []
    for name in scales:
        new = options.new_tokens or NEW_TOKENS[name]
        cells = (TEXTS[name], new, options.attention_path, options.fuse)
        settings.append(Setting(name, SCALES[name], device, dtype, *cells))
    return _run(settings, options)


def _run(settings: list[Setting], options: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.bench import say
    from benchmarks.inference.report import report, verdicts
    from benchmarks.inference.run import LOST, Run
    from benchmarks.inference.tasks import tasks
    from benchmarks.machine import named_stamp, slug
    from benchmarks.measure import release
    from benchmarks.models import fuse, random_llama
    from benchmarks.results import Results, read

    deadline = time.monotonic() + options.budget_seconds
    device = settings[0].device
    mark = named_stamp(device, options.commit)
    if options.out is not None:
        folder = Path(options.out).resolve()
    else:  # never a rehearsal's rows among the measurements
        counts = device.type == "cuda" and "tiny" not in [setting.name for setting in settings]
        folder = RESULTS / slug(mark.machine) if counts else Path(tempfile.mkdtemp(prefix="benchmarks-"))
    results = Results(folder / FILE, mark)
    begun = len(read(results.path))
    say(f"{mark.machine}, driver {mark.driver}, torch {mark.torch}, triton {mark.triton}, commit {mark.commit}")
    problems = []
    for setting in settings:
        say(f"{setting.name}: {setting.scale}, window {setting.scale.window}, {setting.precision}")
        try:
            base = random_llama(setting.scale, setting.positions, device, setting.dtype).eval()
            fuse(base, setting.fused)
        except torch.OutOfMemoryError:
            problems.append(f"the weights of {setting.name} do not fit into the device's memory")
            continue
        run = Run(base, setting, results, deadline, say, options.kvpress_python)
        run.run(
            task
            for task in tasks(setting.name)
            if task.impl in (options.only or [task.impl])
            and task.kind in options.kinds
            and task.text.length in (options.lengths or [task.text.length])
        )
        problems += run.problems
        if LOST in run.problems:
            break
        del run, base
        release(device)
    rows = read(results.path)[begun:]
    say("\n" + report(rows))
    for setting in settings:
        say("")
        for line in verdicts(rows, setting.name, mark.machine):
            say(f"{setting.name} {line}")
    for line in problems:
        say(f"PROBLEM {line}")
    say(f"{mark.machine}; rows in {results.path}")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/end_to_end.py", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", nargs="+", choices=SCALES, default=["7b", "8b"], help="models, in order")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="IMPL", help="contenders alone: %(choices)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is measured")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="texts of these lengths alone, in tokens")
    parser.add_argument("--new-tokens", type=int, help="decoded in a timed call")
    parser.add_argument("--kvpress-python", metavar="PATH", help="interpreter of an environment that has kvpress")
    parser.add_argument("--attention-path", default="auto", help="of ours and loop: auto, triton, flex, sdpa")
    parser.add_argument("--fuse", choices=FUSED, default="none", help="norms and SwiGLU in fused kernels, for all")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="rehearse with tiny sizes on the CPU; no figures")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=BUDGET,
        help=f"begin no cell that is unlikely to end in this time (default: {BUDGET:.0f})",
    )
    parser.add_argument("--out", help="folder of the results (default: benchmarks/results/<machine>; a CPU: temporary)")
    parser.add_argument("--commit", help="what to stamp rows with where the tree has no git history")
    return parser


if __name__ == "__main__":
    sys.exit(main())
