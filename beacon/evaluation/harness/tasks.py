"""The suites that stand for published benchmarks, and the harness's tasks that make them up."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beacon.evaluation.harness.language_model import require_harness


@dataclass(frozen=True)
class Suite:
    """Tasks of the harness that are reported together.

    Args:
        folder: Where the harness has them, below its ``tasks``.
        pattern: Regular expression that the whole name of each matches.
        weighted: The suite's mean weighs tasks by their documents; else each counts alike.
        by_length: Every task is measured at every length asked for.
        part: Names the part of a suite that a document belongs to, if any; metrics are told for each as well.
    """

    folder: str
    pattern: str = ".*"
    weighted: bool = False
    by_length: bool = False
    part: Callable[[Mapping[str, Any]], str | None] | None = None


def words_of_longbench(document: Mapping[str, Any]) -> str | None:
    """The part of LongBench-E that a document belongs to, by its length in words.

    Source: LongBench, arXiv 2308.14508, section 3.2.
    """
    words = document.get("length")
    if not isinstance(words, int):
        return None
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"


def length_of_longbench2(document: Mapping[str, Any]) -> str | None:
    """``short``, ``medium`` or ``long``, as the data set says it: to 32k, to 128k, or more words.

    Source: LongBench v2, arXiv 2412.15204, section 3.
    """
    length = document.get("length")
    return length if isinstance(length, str) else None


SUITES: dict[str, Suite] = {
    "ruler": Suite("ruler", by_length=True),
    "longbench": Suite("longbench", r".*(?<!_e)"),
    "longbench_e": Suite("longbench", r".*_e", part=words_of_longbench),
    "longbench2": Suite("longbench2", weighted=True, part=length_of_longbench2),
    "infinitebench": Suite("infinitebench"),
    "babilong": Suite("babilong", r"babilong_qa[1-5]", by_length=True),  # the others are published as short texts only
    "mmlu": Suite("mmlu/default", weighted=True),
    "hellaswag": Suite("hellaswag"),
    "arc": Suite("arc", r"arc_(easy|challenge)"),
    "gsm8k": Suite("gsm8k", "gsm8k"),
}


@functools.cache  # listing them takes seconds
def task_manager() -> Any:
    """The harness's ``TaskManager`` over the suites' folders (all its tasks take many seconds to list)."""
    require_harness()
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = dict.fromkeys(root / suite.folder for suite in SUITES.values())
    return lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=False)


def choose(names: Sequence[str], manager: Any) -> dict[str, list[str]]:
    """Find the tasks that names stand for.

    Args:
        names: Suites, and single tasks of their folders.
        manager: From :func:`task_manager`.

    Returns:
        The tasks of every suite that was named, by suite; single tasks under ``""``.

    Raises:
        ValueError: An unknown name, or none at all.
    """
    known = manager.all_subtasks
    unknown = [name for name in names if name not in SUITES and name not in known]
    if unknown or not names:
        hint = close_names(unknown[0], [*SUITES, *known]) if unknown else ""
        raise ValueError(
            f"tasks must be suites or tasks of theirs, got {', '.join(unknown) or 'none'}{hint}; choose from "
            f"{', '.join(SUITES)}, or single ones such as niah_single_2, longbench_qasper, mmlu_anatomy. Other "
            "tasks of the harness are run by its own simple_evaluate(model=BeaconLM(...))."
        )
    chosen = {name: suite_tasks(name, manager) for name in names if name in SUITES}
    covered = {task for tasks in chosen.values() for task in tasks}
    single = [name for name in dict.fromkeys(names) if name not in SUITES and name not in covered]
    return {**chosen, "": single} if single else chosen


def close_names(name: str, names: Sequence[str]) -> str:
    """`` (did you mean ...?)``, or nothing where no name is like it."""
    close = difflib.get_close_matches(name, names)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def suite_tasks(name: str, manager: Any) -> list[str]:
    """Names of a suite's tasks, in order."""
    suite = SUITES[name]
    return [
        task
        for task in manager.all_subtasks
        if in_folder(task, suite.folder, manager) and re.fullmatch(suite.pattern, task)
    ]


def suite_of(task: str, manager: Any) -> str:
    """The suite whose folder a task is in (the first that its name fits)."""
    homes = [name for name, suite in SUITES.items() if in_folder(task, suite.folder, manager)]
    return next((name for name in homes if re.fullmatch(SUITES[name].pattern, task)), homes[0])


def in_folder(task: str, folder: str, manager: Any) -> bool:
    """Whether the harness has a task in that folder of its tasks."""
    return Path(manager.task_index[task].yaml_path).parent.as_posix().endswith(f"/tasks/{folder}")
