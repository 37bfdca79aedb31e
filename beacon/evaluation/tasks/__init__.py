"""Tasks of our own, for what lm-evaluation-harness does not measure.

One task, step by step::

    from beacon.evaluation.tasks import make_task

    task = make_task("needle", lengths=[4096, 32768], depths=[0.1, 0.5, 0.9])
    for item in task.items(model, tokenizer):
        result = task.run(Beacon(8), model, tokenizer, item)

What they measure, their options and data: docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from beacon.evaluation.suite import Task
from beacon.evaluation.tasks.ask_many import AskManyTask
from beacon.evaluation.tasks.cost import CostTask
from beacon.evaluation.tasks.multi_needle import MultiNeedleTask
from beacon.evaluation.tasks.multi_turn import MultiTurnTask
from beacon.evaluation.tasks.needle import NeedleTask
from beacon.evaluation.tasks.passkey import PasskeyTask
from beacon.evaluation.tasks.perplexity import PerplexityTask
from beacon.evaluation.tasks.topics import TopicsTask

__all__ = ["TASKS", "make_task", "task_options"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        PerplexityTask,
        PasskeyTask,
        NeedleTask,
        MultiNeedleTask,
        TopicsTask,
        AskManyTask,
        CostTask,
        MultiTurnTask,
    )
}


def make_task(name: str, **options: Any) -> Task:
    """A task by its name.

    Args:
        name: One of :data:`TASKS`.
        **options: Fields of the task's class, all of which may be left out.

    Returns:
        The task.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: No such task, an option that it does not take, or a value that is not allowed.
    """
    allowed = task_options(name)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"options of the task {name} must be among {', '.join(allowed)}, got {', '.join(unknown)}; leave them out."
        )
    try:
        return TASKS[name](**options)
    except (TypeError, ValueError) as err:
        raise type(err)(f"{name}: {err}") from err


def task_options(name: str) -> tuple[str, ...]:
    """The options that a task takes, in the order of its class.

    Raises:
        ValueError: No such task.
    """
    if name not in TASKS:
        raise ValueError(f"a task must be one of {', '.join(TASKS)}, got {name!r}; choose one of these.")
    return tuple(field.name for field in fields(TASKS[name]))  # type: ignore[arg-type]
