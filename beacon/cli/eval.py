"""``beacon eval``: methods and tasks by name, a folder of results, and its report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console

from beacon.cli.common import check_device, load_model, no_inner_bars, progress_bars, quiet, show_table
from beacon.evaluation.harness import SUITES
from beacon.evaluation.harness.tasks import close_names
from beacon.evaluation.methods import Method, check_method, make_method, named_option
from beacon.evaluation.report import Summary, summarise, write_report
from beacon.evaluation.report.tables import Table, matrix, problems, standard
from beacon.evaluation.results import Results
from beacon.evaluation.running import Totals, run_suite
from beacon.evaluation.standard import standard_names
from beacon.evaluation.suite import Task
from beacon.evaluation.tasks import TASKS, make_task, task_options

HARNESS = "harness"
SHARED = ("data", "limit", "lengths")  # options of the command that the harness takes, too

Options = dict[str, dict[str, Any]]  # by task or method, or for the harness


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and report; 1 where something failed that should have run."""
    quiet(args)
    if not args.debug:
        logging.getLogger("beacon.evaluation").setLevel(logging.WARNING)
    _settle_device(args)
    names = list(dict.fromkeys([*args.methods, *(f"beacon:{ratio}" for ratio in args.ratios)]))
    own, others = _split_tasks(list(dict.fromkeys(args.tasks)))
    options = _options(args, own, others, names)
    for name in names:
        check_method(name, **options[name])
    tasks = [make_task(name, **options[name]) for name in own]
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a report needs matplotlib for its figures; pip install 'activation-beacon[eval]'.")
    with console.status(f"loading {args.model}"):
        model, tokenizer = load_model(args)
    if Results(args.out).begun and not args.overwrite and _first():
        console.print(f"going on with what {args.out} holds", soft_wrap=True)
    methods = {name: make_method(name, model, tokenizer=tokenizer, **options[name]) for name in names}
    totals = _measure(args, console, model, tokenizer, tasks, methods, options, others)
    if totals.first:
        files = write_report(args.out)
        for table in _tables(summarise(Results(args.out))):
            show_table(console, table.head, [[cell.text for cell in row] for row in table.rows], table.title)
        console.print(f"{totals.ok} measured, {totals.cannot_run} cannot run, {totals.failed} failed")
        for file in files[:3]:
            console.print(f"wrote {file}", soft_wrap=True)
    if not totals.alone:
        from beacon.training.run import leave_group

        leave_group()
    return 1 if totals.failed else 0


def _measure(
    args: argparse.Namespace,
    console: Console,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    methods: Mapping[str, Method],
    options: Options,
    others: Sequence[str],
) -> Totals:
    with progress_bars(console if _first() else Console(quiet=True)) as bars:
        shown: dict[str, Any] = {}

        def advance(what: str, done: float, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
            bars.update(shown[what], completed=done, total=total)

        settings = {"options": options, "seed": args.seed, "overwrite": args.overwrite, "standard": others}
        with nullcontext() if args.debug else no_inner_bars():
            return run_suite(model, tokenizer, tasks, methods, args.out, advance, **settings)


def _first() -> bool:
    """Whether this is the one of several processes that tells."""
    return os.environ.get("RANK", "0") == "0"


def _settle_device(args: argparse.Namespace) -> None:
    """Each of several processes takes a GPU of its own."""
    if args.device == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    check_device(args.device)
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)


def _split_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own tasks, and those of the harness.

    Raises:
        ValueError: Neither.
    """
    own = [name for name in names if name in TASKS]
    others = [name for name in names if name not in TASKS]
    has_harness = importlib.util.find_spec("lm_eval") is not None
    known = standard_names() if others and has_harness else list(SUITES)
    wrong = next((name for name in others if name not in known), None)
    if wrong is not None:
        raise ValueError(
            f"--tasks must be among {', '.join(TASKS)}, or of lm-evaluation-harness: {', '.join(SUITES)} or single "
            f"tasks of these; got {wrong}{close_names(wrong, [*TASKS, *known])}."
        )
    return own, others


def _options(args: argparse.Namespace, own: Sequence[str], others: Sequence[str], methods: Sequence[str]) -> Options:
    """What tasks, methods and the harness are made with."""
    given = {"data": None if args.data is None else str(args.data), "limit": args.limit, "seed": args.seed}
    given |= {"lengths": list(args.lengths)}
    options: Options = {
        name: {key: given[key] for key in task_options(name) if given.get(key) is not None} for name in own
    }
    if others:
        options[HARNESS] = {key: given[key] for key in SHARED if given[key] is not None}
    parts = list(options)
    options |= {name: {} for name in methods}
    for text in args.set:
        name, value = _setting(text)
        what, _, field = name.rpartition(".")
        named = [method for method in methods if what in (method, method.partition(":")[0])]
        whose = [what] if what in parts else named
        if not whose:
            known = ", ".join([*parts, *methods])
            raise ValueError(f"--set must name a task or method of this run ({known}), got {text!r}; correct it.")
        free = [one for one in whose if what in parts or field != named_option(one)]
        if not free:
            raise ValueError(
                f"--set must not give what a method's name says, got {text!r} for {', '.join(whose)}; name the method "
                "with another value."
            )
        for one in free:
            options[one][field] = value
    return options


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or "." not in name:
        raise ValueError(f"--set must be NAME.OPTION=VALUE, got {text!r}; as in --set needle.samples=4.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _tables(summary: Summary) -> list[Table]:
    found = []
    for task in summary.parts:
        for metric in [metric for metric in task.head.metrics if task.scores(metric)][:1]:
            table = matrix(task, metric)
            found.append(Table(f"{task.name}: {table.title}", table.head, table.rows))
        lost = problems(task)
        if lost is not None:
            found.append(Table(f"{task.name}: {lost.title}", lost.head, lost.rows))
    return [*found, *standard(summary)]
