"""Tasks of lm-evaluation-harness in a folder of results: what is finished is kept, processes share the rest."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from beacon.evaluation.failures import CannotRun, free_memory, may_pass, one_line, out_of_memory, where
from beacon.evaluation.harness import SUITES, evaluate_tasks
from beacon.evaluation.harness.keeping import AnsweredElsewhere
from beacon.evaluation.harness.reducing import suite_mean
from beacon.evaluation.harness.running import check_data, check_settings, length_metric
from beacon.evaluation.harness.tasks import choose, close_names, task_manager
from beacon.evaluation.methods import Method
from beacon.evaluation.processes import Processes
from beacon.evaluation.results import Results, files_fingerprint
from beacon.evaluation.results.answers import KeptAnswers
from beacon.evaluation.results.entries import finished, of_parts, parts

logger = logging.getLogger(__name__)

SET_HERE = ("stock", "method", "ratios", "answers")  # arguments of `evaluate_tasks` that are none of a user's
Progress: TypeAlias = Callable[[str, float, int], None]

LENGTHS: Sequence[int] = inspect.signature(evaluate_tasks).parameters["lengths"].default


@dataclass(frozen=True)
class Piece:
    """What is measured at once: a task, or one length of a task that has lengths.

    Args:
        task: Its name.
        length: In tokens; None for a task without lengths.
        metric: What the length is called.
    """

    task: str
    length: int | None = None
    metric: str | None = None

    def entry(self, found: Mapping[str, Any], method: str) -> Mapping[str, Any] | None:
        """What is known of it."""
        entry: Mapping[str, Any] | None = found.get(method, {}).get("tasks", {}).get(self.task)
        return entry if entry is None or self.metric is None else parts(entry).get(self.metric)


def standard_names() -> list[str]:
    """Every suite and task.

    Raises:
        ImportError: The harness is not installed.
    """
    return [*SUITES, *task_manager().all_subtasks]


def check_standard(names: Sequence[str]) -> dict[str, list[str]]:
    """The harness's tasks that names stand for, by suite (``""`` for single ones).

    Raises:
        ImportError: The harness is not installed.
        ValueError: An unknown name.
    """
    return choose(names, task_manager())


def check_arguments(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Find out whether options are what :func:`beacon.evaluation.harness.evaluate_tasks` takes.

    Raises:
        FileNotFoundError: ``data`` is no folder.
        ValueError: One that it does not take, or a value that it cannot have.
    """
    known = [
        name
        for name, parameter in inspect.signature(evaluate_tasks).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in SET_HERE
    ]
    for name in options:
        if name not in known:
            raise ValueError(
                f"options of the harness must be among {', '.join(known)}, got {name}{close_names(name, known)}; "
                "correct it."
            )
    check_settings(tokenizer, **options)


def standard_files(
    names: Sequence[str], methods: Sequence[str], found: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, str]:
    """Find out whether the data of all that is left to do are at hand, and are those of what is done.

    Args:
        names: Suites and tasks.
        methods: Names of the methods.
        found: What was measured before.
        options: Keyword arguments of :func:`beacon.evaluation.harness.evaluate_tasks`.

    Returns:
        Fingerprints of local files by task.

    Raises:
        FileNotFoundError: Data are missing; says what to put where.
        ValueError: They are others than before, or cannot be read.
    """
    pieces = _pieces(check_standard(names), options)
    left = dict.fromkeys(
        piece.task for piece in pieces for method in methods if not finished(piece.entry(found, method))
    )
    files = check_data(
        list(left), **{name: options[name] for name in ("data", "lengths", "num_fewshot") if name in options}
    )
    prints = {task: files_fingerprint(some) for task, some in files.items() if some}
    for piece in pieces:
        for method in methods:
            entry = piece.entry(found, method) or {}
            before = entry.get("files")
            if finished(entry) and before is not None and prints.get(piece.task, before) != before:
                raise ValueError(
                    f"the data of {piece.task} must be those that {method} was measured with, got other files; bring "
                    "these back, name another folder of results, or overwrite it."
                )
    return prints


def run_standard(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    methods: Mapping[str, Method],
    results: Results,
    together: Processes,
    options: Mapping[str, Any],
    progress: Progress | None = None,
    made: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> list[str]:
    """Measure standard tasks, one by one and length by length, as far as a folder does not hold them.

    Args:
        model: A wrapped model.
        tokenizer: Its tokenizer.
        names: Suites and tasks.
        methods: By the names that results go by.
        results: Where results are, or go to.
        together: The processes that share the work.
        options: Keyword arguments of :func:`beacon.evaluation.harness.evaluate_tasks`.
        progress: Called with (what, pieces done by this process and the share of the next, pieces in all).
        made: What is written down beside each result: of which start it is.
        files: Fingerprints by task, from :func:`standard_files`.

    Returns:
        ``ok``, ``cannot-run`` or ``failed`` for each piece and method.

    Raises:
        FileNotFoundError: Data are missing; says what to put where.
    """
    chosen = check_standard(names)
    pieces, found = _pieces(chosen, options), results.harness()
    left = [(name, piece) for name in methods for piece in pieces if not finished(piece.entry(found, name))]
    if together.count > 1:  # answers are shared out by contexts, then scoring by pieces
        stores = _stores(results, left, together, together.count)
        for number, (name, piece) in enumerate(left):
            stores[name].progress = partial(_tell, progress, number, len(left))
            _answer_share(model, tokenizer, piece, {**options, "method": methods[name], "answers": stores[name]})
            _close(methods, name, left[number + 1 :], model)
    together.wait()
    stores = _stores(results, left, together, 1)
    mine = left[together.rank :: together.count]
    for number, (name, piece) in enumerate(mine):
        if together.count == 1:
            stores[name].progress = partial(_tell, progress, number, len(mine))
        measured = _measure(model, tokenizer, piece, {**options, "method": methods[name], "answers": stores[name]})
        print_of_files = {"files": files[piece.task]} if files and piece.task in files else {}
        entry = {**measured["tasks"][piece.task], **print_of_files, **(made or {})}
        if piece.metric is not None:
            entry = of_parts({piece.metric: {**entry, "length": piece.length}})
        for metric, scores in measured.pop("scores").get(piece.task, {}).items():
            results.add_documents(name, piece.task, metric, scores, together.rank)
        results.add_harness(name, {**measured, "tasks": {piece.task: entry}, "method": name}, together.rank)
        _close(methods, name, mine[number + 1 :], model)
    if left:
        _tell(progress, len(left), len(left), 0.0)
    together.wait()
    found = results.harness()
    if together.first:
        for method in methods:
            results.add_harness(method, {"tasks": {}, "suites": _suites(found[method]["tasks"], chosen)})
    together.wait()
    entries = [piece.entry(found, method) for method in methods for piece in pieces]
    return [entry.get("status", "ok") for entry in entries if entry is not None]


def _stores(
    results: Results, left: Sequence[tuple[str, Piece]], together: Processes, count: int
) -> dict[str, KeptAnswers]:
    """What is answered by now, by method; nobody writes while another one reads."""
    together.wait()
    stores = {name: results.answers(name, together.rank, count) for name, _ in left}
    together.wait()
    return stores


def _tell(progress: Progress | None, done: int, count: int, share: float) -> None:
    """Tell how many of the pieces are done, with the share of the one that is being measured."""
    if progress is not None:
        progress("standard tasks", done + share, count)


def _close(methods: Mapping[str, Method], name: str, following: Sequence[tuple[str, Piece]], model: Any) -> None:
    """Let a method go whose last piece it was."""
    if name not in (other for other, _ in following):
        methods[name].close(model)


def _pieces(chosen: Mapping[str, Sequence[str]], options: Mapping[str, Any]) -> list[Piece]:
    manager, pieces = task_manager(), []
    for task in dict.fromkeys(task for some in chosen.values() for task in some):
        for length in options.get("lengths", LENGTHS):
            metric = length_metric(task, length, manager)
            pieces.append(Piece(task) if metric is None else Piece(task, length, metric))
    return list(dict.fromkeys(pieces))


def _answer_share(model: Any, tokenizer: Any, piece: Piece, settings: Mapping[str, Any]) -> None:
    """Answer what this process has to of a piece. What goes wrong does so again where the piece is scored."""
    try:
        evaluate_tasks(model, tokenizer, [piece.task], **_settings(piece, settings))
    except (ImportError, FileNotFoundError):  # for the user to mend
        raise
    except AnsweredElsewhere:
        pass
    except Exception as err:
        logger.debug("%s cannot be answered by one of several processes: %r", piece.task, err)
    free_memory()


def _measure(model: Any, tokenizer: Any, piece: Piece, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``evaluate_tasks`` returns for one piece (but for suites), or why there is nothing."""
    again: dict[str, Any] = {}
    try:
        return {**evaluate_tasks(model, tokenizer, [piece.task], **_settings(piece, settings)), "suites": {}}
    except (ImportError, FileNotFoundError):  # for the user to mend
        raise
    except (CannotRun, NotImplementedError) as err:
        status, reason = "cannot-run", one_line(err) or "no reason was given"
        again = {"again": True} if may_pass(err) else {}
    except Exception as err:
        status, reason = "failed", f"{type(err).__name__}: {one_line(err)} ({where(err)})"
        if out_of_memory(err):
            status, reason, again = "cannot-run", f"out of memory: {one_line(err)}", {"again": True}
        else:
            logger.warning("%s failed: %r", piece.task, err, exc_info=logger.isEnabledFor(logging.DEBUG))
    free_memory()
    entry = {"status": status, "reason": reason, **again, "documents": 0, "metrics": {}}
    return {"tasks": {piece.task: entry}, "suites": {}, "scores": {}}


def _settings(piece: Piece, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return settings if piece.length is None else {**settings, "lengths": [piece.length]}


def _suites(tasks: Mapping[str, Any], chosen: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Means over the suites of which every task was measured."""
    found = {}
    for suite, names in chosen.items():
        if suite and all(tasks[name]["metrics"] for name in names):
            weighted = SUITES[suite].weighted
            mean = suite_mean([tasks[name] for name in names], weighted)
            found[suite] = {**mean, "members": list(names), "weighted": weighted}
    return found
