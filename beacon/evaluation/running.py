"""Run a suite: every method reads every item of every task, and what comes of it goes into a folder at once."""

from __future__ import annotations

import json
import logging
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from beacon.evaluation.failures import CannotRun, free_memory, may_pass, one_line, out_of_memory, where
from beacon.evaluation.methods import Method
from beacon.evaluation.processes import processes
from beacon.evaluation.results import (
    Record,
    Results,
    TaskHead,
    files_fingerprint,
    model_fingerprint,
    stamp,
    tokenizer_fingerprint,
)
from beacon.evaluation.standard import check_arguments, check_standard, run_standard, standard_files
from beacon.evaluation.suite import Item, Result, Task
from beacon.identity import base_fingerprint

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, float, int], None]

RESERVED = ("harness", "figures")  # folders beside those of tasks


@dataclass(frozen=True)
class Totals:
    """How many pieces (a method with an item or a standard task) there are of each status, earlier runs' included.

    Args:
        ok: Measured.
        cannot_run: Methods that cannot read an item, with the reason; some may at another time.
        failed: Mistakes; running once more tries them again.
        first: Whether this process is the one that tells of them.
        alone: Whether there is no other.
    """

    ok: int
    cannot_run: int
    failed: int
    first: bool = True
    alone: bool = True


def run_suite(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    methods: Mapping[str, Method],
    folder: str | Path,
    progress: Progress | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    standard: Sequence[str] = (),
) -> Totals:
    """Measure methods by tasks, as far as a folder does not hold it already.

    Under ``accelerate launch`` items are shared out among the processes, series of items as a whole; the folder must
    be one that all see.

    Args:
        model: A wrapped model.
        tokenizer: Its tokenizer.
        tasks: What is measured.
        methods: By the names that results go by.
        folder: Where results are, or go to.
        progress: Called with (name of the method, its items done by this process, items in all).
        options: Of tasks and methods, by their names: what they were made with, as JSON values, for a folder keeps
            results of the same options only. ``harness``: arguments of
            :func:`beacon.evaluation.harness.evaluate_tasks`, with which standard tasks are run.
        seed: Of the random numbers that a task or method may draw; every piece begins with its own.
        overwrite: Remove what the folder holds.
        standard: Suites and tasks of lm-evaluation-harness.

    Returns:
        How many pieces there are of each status.

    Raises:
        FileNotFoundError: A task's data are missing.
        ImportError: Standard tasks are asked for, and lm-evaluation-harness is not installed.
        ValueError: No task or method, an unknown standard task, two tasks of one name, or a folder of other results.
    """
    given = {**{name: {} for name in methods}, **({"harness": {}} if standard else {}), **(options or {})}
    arguments = given.get("harness", {})
    _check(tasks, standard, methods, tokenizer, arguments)
    together = processes()
    results = Results(folder)
    for name, paths in _paths(tasks, methods).items():
        given[name] = {**given.get(name, {}), "files": files_fingerprint(paths)}
    settings = {**model_settings(model), "tokenizer": tokenizer_fingerprint(tokenizer), "seed": seed}
    overwritten = overwrite and results.begun
    if not overwritten:
        results.check(settings, given)  # before texts are prepared, which takes a while
    before = {} if overwritten else results.harness()
    files = standard_files(standard, list(methods), before, arguments) if standard else {}
    items = {task.name: list(task.items(model, tokenizer)) for task in tasks}
    heads = [TaskHead.of(task, items[task.name]) for task in tasks]
    if not overwritten:
        results.check(settings, given, heads)
    here = {**stamp(), "model": model_name(model)}
    together.wait()  # all have seen what was there
    if together.first:
        if overwritten:
            results.clear()
        results.begin(settings, given, {**here, "processes": together.count}, heads, list(methods))
    together.wait()
    start = results.starts
    found = {(head.name, name): _finished(results, head, name) for head in heads for name in methods}
    together.wait()  # nobody adds a line while another one reads
    share = [(task, some) for task in tasks for some in _series(items[task.name])[together.rank :: together.count]]
    for name, method in methods.items():  # one after the other, for some hold models or processes of their own
        pieces = [(task, [i for i in some if i.name not in found[task.name, name]]) for task, some in share]
        done, count = 0, sum(len(some) for _, some in pieces)
        if progress is not None:
            progress(name, done, count)
        for task, some in pieces:
            for record in run_series(task, method, model, tokenizer, some, seed):
                results.append(task.name, name, replace(record, start=start), together.rank)
                done += 1
                if progress is not None:
                    progress(name, done, count)
        method.close(model)
    together.wait()
    statuses: list[str] = [
        record.status for head in heads for name in methods for record in results.records(head, name)
    ]
    if standard:
        made = {"start": start, "stamp": here}
        statuses += run_standard(
            model, tokenizer, standard, methods, results, together, arguments, progress, made, files
        )
    counts = Counter(statuses)
    return Totals(counts["ok"], counts["cannot-run"], counts["failed"], together.first, together.count == 1)


def model_name(model: Any) -> str:
    """What a model was loaded from: a hub id, or the name of a folder; empty where nobody knows."""
    given = str(getattr(model.config, "name_or_path", "") or "")
    return Path(given).name if Path(given).is_dir() else given


def model_settings(model: Any) -> dict[str, Any]:
    """What results depend on of a wrapped model; JSON values."""
    parameter = next(model.parameters())
    return {
        "model": {**base_fingerprint(model), "weights": model_fingerprint(model)},
        "config": json.loads(model.beacon_config.to_json()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }


def run_series(
    task: Task, method: Method, model: Any, tokenizer: Any, items: Sequence[Item], seed: int = 0
) -> Iterator[Record]:
    """Let a method read items of one series, whatever comes of each; after one that went wrong the rest begins anew.

    Each item begins with random numbers of its own, that depend on ``seed`` and its name only.

    Args:
        task: Whose items they are.
        method: What reads.
        model: A wrapped model.
        tokenizer: Its tokenizer.
        items: In their order.
        seed: Of the random numbers.

    Returns:
        A record for each item, made when it is asked for.
    """
    rest = list(items)
    while rest:
        with closing(_results(task, method, model, tokenizer, tuple(rest))) as results:
            went_well = True
            while rest and went_well:
                with _seeded(f"{seed}/{task.name}/{rest[0].name}", model):
                    record = run_item(task, method, model, tokenizer, rest.pop(0), results)
                went_well = record.status == "ok"
                yield record


def run_item(
    task: Task, method: Method, model: Any, tokenizer: Any, item: Item, results: Iterator[Result] | None = None
) -> Record:
    """Let a method read an item, whatever comes of it.

    Args:
        task: Whose item it is.
        method: What reads.
        model: A wrapped model.
        tokenizer: Its tokenizer.
        item: The item.
        results: Makes the results of a series, of which this item's is the next; None: it is run by itself.
    """
    start = time.perf_counter()

    def record(**values: Any) -> Record:
        seconds = round(time.perf_counter() - start, 6)
        return Record(item=item.name, place=dict(item.place), seconds=seconds, **values)

    try:
        result = task.run(method, model, tokenizer, item) if results is None else next(results, None)
        if result is None:
            raise RuntimeError(f"run_series of {task.name} must give a result for every item, got none for this one.")
        scores = {name: float(value) for name, value in result.scores.items()}
        return record(status="ok", scores=scores, output=result.output)
    except (CannotRun, NotImplementedError) as err:
        return record(status="cannot-run", reason=one_line(err) or "no reason was given", again=may_pass(err))
    except Exception as err:
        if not out_of_memory(err):
            logger.warning("%s, %s failed: %r", task.name, item.name, err, exc_info=logger.isEnabledFor(logging.DEBUG))
            return record(status="failed", reason=f"{type(err).__name__}: {one_line(err)} ({where(err)})")
        reason = f"out of memory: {one_line(err)}"
    free_memory()
    return record(status="cannot-run", reason=reason, again=True)


def _series(items: Sequence[Item]) -> list[list[Item]]:
    """Items that are run together, in the order in which the first of each comes."""
    found: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        key = ("item", item.name) if item.series is None else ("series", item.series)
        found.setdefault(key, []).append(item)
    return list(found.values())


def _results(
    task: Task, method: Method, model: Any, tokenizer: Any, items: Sequence[Item]
) -> Generator[Result, None, None]:
    """Of a series, begun when the first is asked for."""
    yield from task.run_series(method, model, tokenizer, items)


def _paths(tasks: Sequence[Task], methods: Mapping[str, Method]) -> dict[str, list[Path]]:
    """Files and folders that items are made of, and models of a method's own, by the names of tasks and methods."""
    found: dict[str, list[Path]] = {}
    for task in tasks:
        data, sources = getattr(task, "data", None), getattr(task, "sources", None)
        names = [sources] if isinstance(sources, (str, Path)) else list(sources or ())
        inner = [] if data is None else [Path(data) / name for name in names if (Path(data) / name).exists()]
        own = [Path(name) for name in names if Path(name).exists()]
        found[task.name] = [*(inner or ([] if data is None else [Path(data)])), *own]
    for name, method in methods.items():
        path = getattr(method, "path", None)
        found[name] = [Path(path)] if path is not None and Path(path).is_dir() else []
    return {name: paths for name, paths in found.items() if paths and all(path.exists() for path in paths)}


def _check(
    tasks: Sequence[Task],
    standard: Sequence[str],
    methods: Mapping[str, Method],
    tokenizer: Any,
    arguments: Mapping[str, Any],
) -> None:
    names = [task.name for task in tasks]
    count = len(tasks) + len(standard)
    if not count or not methods:
        raise ValueError(f"a suite needs tasks and methods, got {count} and {len(methods)}; name some.")
    if standard:
        check_standard(standard)
        check_arguments(tokenizer, arguments)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"tasks must have names of their own, got {twice!r} twice; name it once.")
    taken = next((name for name in names if name in RESERVED), None)
    if taken is not None:
        raise ValueError(f"tasks must not be named {' or '.join(RESERVED)}, got {taken!r}; rename it.")


def _finished(results: Results, head: TaskHead, method: str) -> set[str]:
    """Items that are not run again."""
    return {record.item for record in results.records(head, method) if record.finished}


@contextmanager
def _seeded(name: str, model: Any) -> Iterator[None]:
    """Random numbers that depend on a name only; the caller's go on afterwards where they were."""
    device = next(model.parameters()).device
    before = random.getstate()
    seed = zlib.crc32(name.encode())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
