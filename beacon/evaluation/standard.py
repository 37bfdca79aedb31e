"""Tasks of lm-evaluation-harness in a folder of results: what is finished is kept, processes share the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from beacon.evaluation.failures import one_line, out_of_memory
from beacon.evaluation.harness import SUITES, evaluate_tasks
from beacon.evaluation.harness.running import _mean
from beacon.evaluation.harness.tasks import choose, task_manager
from beacon.evaluation.methods import Method
from beacon.evaluation.processes import Processes
from beacon.evaluation.results import Results
from beacon.evaluation.suite import CannotRun

logger = logging.getLogger(__name__)

STOCK = "stock"


def check_standard(names: Sequence[str]) -> dict[str, list[str]]:
    """The harness's tasks that names stand for, by suite (``""`` for single ones).

    Raises:
        ImportError: The harness is not installed.
        ValueError: An unknown name.
    """
    return choose(names, task_manager())


def run_standard(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    methods: Mapping[str, Method],
    results: Results,
    together: Processes,
    options: Mapping[str, Any],
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Measure standard tasks, one by one, as far as a folder does not hold them.

    Args:
        model: A wrapped model.
        tokenizer: Its tokenizer.
        names: Suites and tasks.
        methods: By the names that results go by. ``stock`` is what the harness takes it for: texts are cut to the end
            that the native context holds.
        results: Where results are, or go to.
        together: The processes that share the work.
        options: Keyword arguments of :func:`beacon.evaluation.harness.evaluate_tasks`.
        progress: Called with (what, tasks done by this process, tasks in all).

    Returns:
        ``ok``, ``cannot-run`` or ``failed`` for each task and method.

    Raises:
        FileNotFoundError: Data are missing; says what to put where.
    """
    chosen = check_standard(names)
    tasks = list(dict.fromkeys(task for some in chosen.values() for task in some))
    found = results.harness()
    pieces = [(method, task) for method in methods for task in tasks if not _finished(found, method, task)]
    together.wait()  # nobody writes while another one reads
    mine = pieces[together.rank :: together.count]
    for number, (name, task) in enumerate(mine):
        if progress is not None:
            progress("standard tasks", number, len(mine))
        way = {"stock": True} if name == STOCK else {"method": methods[name]}
        measured = _measure(model, tokenizer, task, {**options, **way})
        results.add_harness(name, {**measured, "method": name}, together.rank)
        if name not in (following for following, _ in mine[number + 1 :]):
            methods[name].close(model)
    if progress is not None:
        progress("standard tasks", len(mine), len(mine))
    together.wait()
    found = results.harness()
    if together.first:
        for method in methods:
            results.add_harness(method, {"tasks": {}, "suites": _suites(found[method]["tasks"], chosen)})
    together.wait()
    return [found[method]["tasks"][task].get("status", "ok") for method in methods for task in tasks]


def _finished(found: Mapping[str, Any], method: str, task: str) -> bool:
    entry = found.get(method, {}).get("tasks", {}).get(task)
    return entry is not None and entry.get("status") != "failed"


def _measure(model: Any, tokenizer: Any, task: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ``evaluate_tasks`` returns for one task, or why there is nothing."""
    try:
        return evaluate_tasks(model, tokenizer, [task], **settings)
    except (ImportError, FileNotFoundError):  # for the user to mend
        raise
    except (CannotRun, NotImplementedError, ValueError) as err:  # ValueError: a tokenizer that prompts do not fit, say
        status, reason = "cannot-run", one_line(err)
    except Exception as err:
        status, reason = "cannot-run" if out_of_memory(err) else "failed", f"{type(err).__name__}: {one_line(err)}"
        logger.warning("%s failed: %r", task, err, exc_info=logger.isEnabledFor(logging.DEBUG))
    return {"tasks": {task: {"status": status, "reason": reason, "documents": 0, "metrics": {}}}, "suites": {}}


def _suites(tasks: Mapping[str, Any], chosen: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Means over the suites of which every task was measured."""
    whole = {suite: names for suite, names in chosen.items() if suite and all(tasks[n]["metrics"] for n in names)}
    return {
        suite: {**_mean([tasks[name] for name in names], SUITES[suite].weighted), "members": list(names)}
        for suite, names in whole.items()
    }
