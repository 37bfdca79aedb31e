"""Time one training step against window-by-window schedules and full attention, in one process.

python benchmarks/train_step.py                       # Llama-2-7B shapes, 8,192 tokens: needs a GPU of 80 GB
python benchmarks/train_step.py --scale small         # on a CPU; rows go to a temporary folder
python benchmarks/train_step.py --account             # the prediction, computed, nothing is run
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.training.setting import Setting

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCALES = ("7b", "1b", "small", "tiny")
CONTENDERS = ("ours", "loop", "full", "published")
FILE = "train_step.csv"


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 when all went well, 1 when ours broke or contenders disagree, 2 without a GPU that the scale needs."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for folder in (str(ROOT), str(ROOT / "kernels")):  # a bare machine has nothing installed
        if folder not in sys.path:
            sys.path.insert(0, folder)
    import torch

    from benchmarks.training.setting import ON_CPU, SCALES, Setting, draw_ratios

    device = torch.device("cpu" if options.cpu or not torch.cuda.is_available() else "cuda")
    scale = SCALES[options.scale]
    tokens = options.tokens or scale.tokens
    ratios = draw_ratios(scale, tokens, options.ratios, options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    half = device.type == "cuda" or options.account
    dtype = getattr(torch, options.dtype or ("bfloat16" if half else "float32"))
    setting = Setting(options.scale, scale, tokens, ratios, device, dtype, options.attention_path)
    if options.account:
        from benchmarks.training.account import account

        sys.stdout.write(account(setting) + "\n")
        return 0
    if device.type == "cpu" and options.scale not in ON_CPU:
        sys.stderr.write(f"--scale {options.scale} needs a CUDA GPU and there is none; try --scale small.\n")
        return 2
    out = None if options.out is None else Path(options.out).resolve()
    return _run(setting, options, out)


def _run(setting: Setting, options: argparse.Namespace, out: Path | None) -> int:
    from benchmarks.gpu.bench import say
    from benchmarks.machine import named_stamp, slug
    from benchmarks.models import fuse
    from benchmarks.results import OURS, Results, read
    from benchmarks.training.report import table, verdicts
    from benchmarks.training.setting import build_base
    from benchmarks.training.timing import attempt, compare, disagreements

    deadline = time.monotonic() + options.budget_seconds
    mark = named_stamp(setting.device, options.commit)
    if out is None:  # never a rehearsal's rows among the measurements
        counts = setting.device.type == "cuda" and options.scale != "tiny"
        out = RESULTS / slug(mark.machine) if counts else Path(tempfile.mkdtemp(prefix="benchmarks-"))
    results = Results(out / FILE, mark)
    begun = len(read(results.path))
    say(f"{mark.machine}, driver {mark.driver}, torch {mark.torch}, triton {mark.triton}, commit {mark.commit}")
    say(f"{setting.case}: {setting.shape}")
    base = build_base(setting)
    if options.liger:
        fuse(base, "liger")
    outcomes = {}
    for name in options.only:
        name = OURS if name == "ours" else name
        begin = time.monotonic()
        outcomes[name] = attempt(name, base, setting, options.steps, deadline)
        results.append(outcomes[name].rows)
        last = outcomes[name].rows[-1]
        say(f"{name}: {last.status}, {time.monotonic() - begin:.1f} s {last.reason}")
    apart = compare(outcomes, setting)
    if apart:
        results.append(apart)
    problems = disagreements(apart)
    rows = read(results.path)[begun:]
    say("\n" + table(rows))
    for line in (*verdicts(rows, options.scale), *problems):
        say(line)
    say(f"{mark.machine}, {setting.case}; rows in {results.path}")
    broken = any(row.status == "failed" for row in outcomes[OURS].rows) if OURS in outcomes else False
    return 1 if broken or problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/train_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="7b", help="sizes of the model and of its windows")
    parser.add_argument("--tokens", type=int, help="length of the text (default: 8 windows)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each contender, after warm-up")
    parser.add_argument("--ratios", type=_numbers, help="in turn, in place of a draw from the paper's: '2 4 8'")
    parser.add_argument("--seed", type=int, default=5, help="of the draw")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--attention-path", default="auto", help="of ours and loop: auto, triton, flex, sdpa")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--liger", action="store_true", help="Liger-Kernel's RMSNorm and SwiGLU, for all contenders")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin nothing after this time")
    parser.add_argument("--out", help="folder of the results (default: benchmarks/results/<machine>; a CPU: temporary)")
    parser.add_argument("--commit", help="what to stamp rows with where the tree has no git history")
    parser.add_argument("--account", action="store_true", help="print the predicted account and run nothing")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.replace(",", " ").split()]


if __name__ == "__main__":
    sys.exit(main())
