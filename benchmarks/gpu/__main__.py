"""Measure and tune the kernels on this machine's GPU.

python -m benchmarks.gpu bench     # correctness, ceilings, headline cells; minutes
python -m benchmarks.gpu full      # the whole grid; goes on where it was interrupted
python -m benchmarks.gpu tune      # tiles; writes the winners into the table
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BUDGETS = {"bench": 420.0, "full": float("inf"), "tune": float("inf")}
REHEARSAL_BUDGET = 600.0
DTYPES = ("bfloat16", "float16", "float32")  # the table tells them apart by size only


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 when all went well, 1 when a kernel of ours was wrong or broke, 2 without a GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.dry_run and options.out is not None and Path(options.out).resolve().is_relative_to(RESULTS):
        parser.error(f"a dry run's figures must not stand among results, got --out {options.out}; name another folder.")
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a bare machine has nothing installed
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        sys.stderr.write("This needs a CUDA GPU and there is none; --dry-run rehearses on the CPU.\n")
        return 2
    if options.dry_run:
        torch.set_num_threads(1)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.command == "tune":
        return _tune(options, device)
    return _bench(options, device)


def _bench(options: argparse.Namespace, device: torch.device) -> int:
    from benchmarks.gpu.bench import Budget, check_kernels, measure_ceilings, measure_cells, say, show
    from benchmarks.gpu.cases import GRID, HEADLINE, KERNELS, REHEARSAL, REHEARSAL_GRID
    from benchmarks.machine import slug, stamp
    from benchmarks.results import Results

    full, rehearsal = options.command == "full", options.dry_run
    budget = Budget(_budget(options))
    mark = stamp(device, options.commit)
    folder = _folder(options, slug(mark.machine))
    say(f"{mark.machine}, driver {mark.driver}, torch {mark.torch}, triton {mark.triton}, commit {mark.commit}")
    checked = Results(folder / "correctness.csv", mark)
    checks_done = checked.finished() if full else frozenset()
    broken = check_kernels(device, checked, budget, thorough=full and not rehearsal, done=checks_done)
    results = Results(folder / ("grid.csv" if full else "kernels.csv"), mark)
    if set(KERNELS) > broken:
        measure_ceilings(device, results, rehearsal=rehearsal)
    large, small = (GRID, REHEARSAL_GRID) if full else (HEADLINE, REHEARSAL)
    cells = small if rehearsal else large
    done = results.finished() if full else set()
    left = [cell for cell in cells if cell.name not in done]
    if done:
        say(f"{len(cells) - len(left)} of {len(cells)} cells were finished before")
    well = measure_cells(left, device, results, budget, broken)
    show(results.path, [cell.name for cell in cells])
    return 0 if well and not broken else 1


def _tune(options: argparse.Namespace, device: torch.device) -> int:
    from benchmarks.gpu.bench import Budget, say
    from benchmarks.gpu.tune import tune
    from benchmarks.machine import slug, stamp
    from benchmarks.results import Results

    mark = stamp(device, options.commit)
    results = Results(_folder(options, slug(mark.machine)) / "tiles.csv", mark)
    say(f"{mark.machine}, driver {mark.driver}, torch {mark.torch}, triton {mark.triton}, commit {mark.commit}")
    return tune(
        device,
        results,
        Budget(_budget(options)),
        kernels=options.kernels,
        head_dims=[64] if options.dry_run else options.head_dims,
        dtypes=["float16"] if options.dry_run else options.dtypes,
        write=not (options.dry_run or options.print_only),
    )


def _budget(options: argparse.Namespace) -> float:
    if options.budget_seconds is not None:
        return float(options.budget_seconds)
    return REHEARSAL_BUDGET if options.dry_run else BUDGETS[options.command]


def _folder(options: argparse.Namespace, machine: str) -> Path:
    """Where results go: never a rehearsal's among the measurements."""
    if options.out is not None:
        return Path(options.out).resolve()
    return Path(tempfile.mkdtemp(prefix="benchmarks-")) if options.dry_run else RESULTS / machine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "bench": "correctness, ceilings and the headline cells",
        "full": "the whole grid; finished cells in the result file are not measured again",
        "tune": "time candidate tiles, write the winners into kernels/beacon_kernels/tiles.py",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--dry-run", action="store_true", help="tiny sizes in Triton's CPU interpreter; no figures"
        )
        command.add_argument("--budget-seconds", type=float, help="begin no cell that is unlikely to end in this time")
        command.add_argument("--out", help="folder of the results (default: benchmarks/results/<machine>)")
        command.add_argument("--commit", help="what to stamp rows with where the tree has no git history")
        if name == "tune":
            command.add_argument("--print-only", action="store_true", help="leave the table as it is")
            command.add_argument("--kernels", nargs="+", help="tables to tune (default: all)")
            command.add_argument("--head-dims", nargs="+", type=int, default=[128, 64, 96, 256])
            command.add_argument(
                "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
            )
    parser.set_defaults(print_only=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
