"""Parse the command line, run a subcommand, turn users' mistakes into one clear line."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from beacon import __version__

USER_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    OSError,
    ImportError,
    FloatingPointError,  # a loss that is no number
    MemoryError,
)
WIDTH = 120
LENGTHS = (4096, 32768, 131072, 1_000_000)
EXAMPLES = """examples:
  beacon demo --quick
  beacon info default --lengths 8192 65536
  beacon ask default --context book.txt --question "# the pass key is "
  beacon ask MODEL --adapter ADAPTER --context report.txt --question "What was decided?" --ratio 8
  beacon train examples/recipes/tiny-cpu.yaml --training.max_steps 20
  beacon eval --tasks passkey cost --methods stock beacon beacon:8 --lengths 1024 4096
  beacon bench build/eval build/eval-new
"""
# Of `beacon eval`: what is read offline in a few minutes.
DEFAULT_TASKS = ("perplexity", "passkey", "needle", "cost")
DEFAULT_METHODS = ("stock", "truncate-left", "sliding-window", "beacon", "beacon:8")
TEXTS = (1024, 4096)


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and options."""
    parser = argparse.ArgumentParser(
        prog="beacon",
        description="Read far beyond a language model's context window, with its weights untouched.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"beacon {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and log messages")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="measure the shipped model on a long real text")
    demo.add_argument("--file", type=Path, help="read this text in place of the standard library's sources")
    demo.add_argument("--length", type=int, default=8192, help="tokens of the longest text (default 8192)")
    demo.add_argument("--ratio", type=int, default=8, help="raw tokens per beacon (default 8)")
    demo.add_argument("--output", type=Path, default=Path("build/demo"), help="folder of the results")
    demo.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    demo.add_argument("--quick", action="store_true", help="fewer texts and shorter ones, for a first look")
    demo.add_argument("--model", type=Path, help="another folder laid out as the shipped model's")

    info = commands.add_parser("info", help="what wrapping a model would add, without loading it")
    info.add_argument("model", metavar="MODEL", help="folder, hub id, or default")
    info.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="texts whose memory is told, in tokens")

    ask = commands.add_parser("ask", help="read a file and answer a question about it")
    ask.add_argument("model", metavar="MODEL", help="folder, hub id, or default for the shipped model")
    ask.add_argument("--adapter", help="folder or hub id of the beacons (the shipped model has its own)")
    ask.add_argument("--context", type=Path, help="UTF-8 file to read")
    ask.add_argument("--cache", type=Path, help="file that keeps what was read: taken from there, or written there")
    ask.add_argument("--question", required=True, help="what is asked after the file")
    ask.add_argument("--ratio", type=int, help="raw tokens per beacon (default: the configured policy)")
    ask.add_argument("--max-new-tokens", type=int, default=64, help="length of the answer (default 64)")
    ask.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    ask.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the model")

    train = commands.add_parser(
        "train",
        help="train beacons for a model, as a recipe says",
        usage="beacon train RECIPE [--resume [CHECKPOINT]] [--check] [--wandb] [--SECTION.FIELD VALUE ...]",
        description="Train beacons; under torchrun or accelerate launch as `-m beacon.training RECIPE ...`.",
    )
    train.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file; examples/recipes/ has some")
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or from the last one of the output folder",
    )
    train.add_argument("--check", action="store_true", help="print the recipe with its options and stop")
    train.add_argument("--wandb", action="store_true", help="report to Weights & Biases too")

    evaluate = commands.add_parser(
        "eval",
        help="measure a model beside its rivals, and write a report",
        description="Measure; under accelerate launch as `-m beacon eval ...`, whose processes share the work. A run "
        "that was ended goes on where it was. Names of tasks and methods: docs/evaluation.md.",
    )
    evaluate.add_argument("--model", default="default", help="folder, hub id, or default for the shipped model")
    evaluate.add_argument("--adapter", help="folder or hub id of the beacons (the shipped model has its own)")
    evaluate.add_argument(
        "--tasks", nargs="+", default=DEFAULT_TASKS, metavar="TASK", help=f"default {' '.join(DEFAULT_TASKS)}"
    )
    evaluate.add_argument(
        "--methods", nargs="+", default=DEFAULT_METHODS, metavar="METHOD", help=f"default {' '.join(DEFAULT_METHODS)}"
    )
    evaluate.add_argument("--lengths", type=int, nargs="+", default=TEXTS, help="tokens of texts (default 1024 4096)")
    evaluate.add_argument("--ratios", type=int, nargs="+", default=(), help="measure beacon:RATIO as well, for each")
    evaluate.add_argument("--data", type=Path, help="text for our tasks; for standard ones a folder of data sets")
    evaluate.add_argument("--limit", type=int, help="items of each length, or documents, at most")
    evaluate.add_argument("--out", type=Path, default=Path("build/eval"), help="folder of results (default build/eval)")
    evaluate.add_argument("--overwrite", action="store_true", help="remove what the folder holds")
    evaluate.add_argument("--seed", type=int, default=0, help="draws what is hidden in texts (default 0)")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    evaluate.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model (default auto: float32 on the CPU, else the checkpoint's)",
    )
    evaluate.add_argument(
        "--set", nargs="+", default=(), metavar="NAME.OPTION=VALUE", help="options of a task, a method or the harness"
    )

    bench = commands.add_parser("bench", help="what moved between two folders of results; exit code 1 if for the worse")
    bench.add_argument("before", type=Path, metavar="BEFORE", help="folder that beacon eval wrote")
    bench.add_argument("after", type=Path, metavar="AFTER", help="another one, of the same tasks")
    bench.add_argument(
        "--threshold", type=float, default=0.01, help="smallest change that counts, as a share (default 0.01)"
    )
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _command(name: str) -> Callable[[argparse.Namespace, Console], int | None]:
    """What a subcommand does; imported here, for transformers loads slowly and its settings come first."""
    if name in ("train", "eval", "bench"):
        run: Callable[[argparse.Namespace, Console], int | None] = importlib.import_module(f"beacon.cli.{name}").run
        return run
    from beacon.cli import commands

    return {"demo": commands.demo, "info": commands.info, "ask": commands.ask}[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        Exit code: 0, 1 where an evaluation found a failure or something worse, 2 for a mistake in what was asked, 130
        for Ctrl-C.
    """
    parser = build_parser()
    args, options = parser.parse_known_args(argv)
    if options and (args.command != "train" or "." not in options[0].partition("=")[0]):
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    args.options = options
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.ERROR, format="%(levelname)s %(name)s: %(message)s"
    )
    if not args.debug:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)  # a file has no width to fit

    try:
        return _command(args.command)(args, console) or 0
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
    except USER_ERRORS as err:
        if args.debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(' '.join(str(err).split()))}")
        return 2
