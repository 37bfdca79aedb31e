"""Run standard tasks on a model and keep what a report needs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from beacon.evaluation.harness.babilong import babilong_files, babilong_overrides, length_name
from beacon.evaluation.harness.keeping import AnswerStore, KeepingLM
from beacon.evaluation.harness.language_model import beacon_lm, check_chat_template
from beacon.evaluation.harness.local_data import hub_name, local_overrides
from beacon.evaluation.harness.reducing import reduced
from beacon.evaluation.harness.ruler import punkt_found, ruler_overrides, source_files
from beacon.evaluation.harness.tasks import SUITES, choose, suite_of, task_manager
from beacon.evaluation.methods import Method, make_method

logger = logging.getLogger(__name__)

FEWSHOT_SEED = 1234  # the harness's own


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    ratios: int | list[int] | None = None,
    stock: bool = False,
    lengths: Sequence[int] = (4096,),
    chat_template: bool = False,
    max_length: int | None = None,
    method: str | Method | None = None,
    answers: AnswerStore | None = None,
) -> dict[str, Any]:
    """Measure a model on standard tasks.

    Args:
        model: A wrapped model (with ``stock`` any causal LM).
        tokenizer: Its tokenizer.
        tasks: Suites (see ``SUITES``) or single tasks of theirs.
        data: Folder that holds a folder per data set with Parquet or JSONL files; None lets the harness load from the
            hub.
        limit: Documents of each task at most, and of each length.
        batch_size: Contexts read together.
        num_fewshot: Solved examples in each prompt; None takes each task's own. Tasks that are defined without stay so.
        ratios: As in the model's forward; None for the configured policy.
        stock: Measure the stock model, texts cut to the end that its native context holds.
        lengths: Tokens, for RULER and BABILong: each length is a metric.
        chat_template: Ask in the format of the tokenizer's chat template.
        max_length: Longest text, of which the end is read; None sets no limit.
        method: Measure a baseline in place of the beacons, by name (``yarn``, ``truncate-middle``; see
            :func:`beacon.evaluation.make_method`) or a method itself.
        answers: Keeps answers as they are given; those that it has are not asked for again.

    Returns:
        What can be written as JSON: ``method``, ``ratios``, ``limit``, ``harness`` (its version); ``tasks``, each by
        its name with ``documents`` (of one length, where there are several), ``shots``, ``version``, and ``metrics``
        by name with ``value`` and ``stderr`` (None after a single document); ``suites``, each by its name with
        ``documents``, ``tasks`` (how many) and ``metrics`` in the same way: means over the suite's tasks; ``scores``,
        each task's by metric and document (a fingerprint), where the metric is their mean. LongBench's tasks tell
        metrics by length as well, in words (``score, 0-4k``; those of LongBench v2 ``acc, short``).

    Raises:
        AnsweredElsewhere: ``answers`` leaves some to other processes; this one's share is kept.
        CannotRun: The method cannot read a text of these tasks, and why.
        FileNotFoundError: Data is missing; says what to put where.
        ImportError: The harness is not installed.
        NotImplementedError: A task whose answers are not greedy, which a method cannot give.
        TypeError: A model that is not wrapped.
        ValueError: An unknown task or method, a bad limit or length, or a tokenizer without a chat template.
    """
    manager = task_manager()
    chosen = choose([tasks] if isinstance(tasks, str) else list(tasks), manager)
    check_settings(
        tokenizer,
        data=data,
        limit=limit,
        num_fewshot=num_fewshot,
        lengths=lengths,
        chat_template=chat_template,
        max_length=max_length,
    )
    names = list(dict.fromkeys(name for group in chosen.values() for name in group))
    folder = None if data is None else Path(data)
    specs = [_spec(name, manager, folder, tokenizer, lengths, limit, num_fewshot) for name in names]
    made = make_method(method, model, tokenizer=tokenizer) if isinstance(method, str) else None
    was_training = model.training
    try:
        own = copy.deepcopy(tokenizer)  # the harness gives one without a pad token some other token for it
        way = {"ratios": ratios, "stock": stock, "method": made or method}
        with _without_warnings():
            lm = beacon_lm()(model, tokenizer=own, batch_size=batch_size, max_length=max_length, **way)
        asked = lm if answers is None else KeepingLM(lm, answers)
        results = _run(asked, manager, specs, limit, chat_template, folder)
    finally:
        model.train(was_training)
        if made is not None:
            made.close(model)
    name = method if isinstance(method, str) else method.name if method is not None else "stock" if stock else "beacon"
    return {**reduced(results, chosen, manager), "method": name, "ratios": lm.ratios, "limit": limit}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Where the harness does not warn of a model that is given as such."""
    told = logging.getLogger("lm_eval.models.huggingface")
    before = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(before)


def check_settings(
    tokenizer: Any,
    *,
    data: Any = None,
    limit: Any = None,
    batch_size: Any = 1,
    num_fewshot: Any = None,
    lengths: Any = (4096,),
    chat_template: Any = False,
    max_length: Any = None,
) -> None:
    """Find out whether these can be settings of :func:`evaluate_tasks`, before anything is read.

    Raises:
        FileNotFoundError: ``data`` is no folder.
        ValueError: One of the others is none, or the tokenizer has no chat template that is asked for.
    """
    if data is not None and not Path(data).is_dir():
        raise FileNotFoundError(
            f"data must be a folder with a folder per data set, got {data}; see docs/evaluation.md."
        )
    if limit is not None and not _whole(limit, 1):
        raise ValueError(f"limit must be a number of documents, got {limit!r}; pass for example 100, or None for all.")
    if not isinstance(lengths, Sequence) or not lengths or not all(_whole(length, 0) for length in lengths):
        shown = list(lengths) if isinstance(lengths, tuple) else lengths
        raise ValueError(f"lengths must be numbers of tokens, got {shown!r}; pass for example [4096, 32768].")
    numbers = {"batch_size": (batch_size, 1), "num_fewshot": (num_fewshot, 0), "max_length": (max_length, 1)}
    for name, (value, least) in numbers.items():
        if value is not None and not _whole(value, least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}; correct it.")
    if not isinstance(chat_template, bool):
        raise ValueError(f"chat_template must be true or false, got {chat_template!r}; choose one.")
    if chat_template:
        check_chat_template(tokenizer)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_data(
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    lengths: Sequence[int] = (4096,),
    num_fewshot: int | None = None,
) -> dict[str, list[Path]]:
    """Find out whether the data of tasks are at hand, before anything is read.

    Without a folder the hub (or its cache) is asked for every data set; RULER's own sources are not.

    Args:
        tasks: Names of the harness.
        data: As of :func:`evaluate_tasks`, like the others.
        lengths: See there.
        num_fewshot: See there.

    Returns:
        Local files by task; none where there are none.

    Raises:
        FileNotFoundError: Some are not; says what to put where.
        ValueError: Files of a form that is not read, or a length that a data set cannot have.
    """
    manager = task_manager()
    folder = None if data is None else Path(data)
    if folder is None:
        _check_hub([name for name in tasks if suite_of(name, manager) != "ruler"], manager)
    found: dict[str, list[Path]] = {}
    for name in tasks:
        spec = _spec(name, manager, folder, None, lengths, None, num_fewshot)
        config, suite = manager.task_index[name].cfg, suite_of(name, manager)
        if folder is None:
            found[name] = []
        elif suite == "ruler":
            found[name] = source_files(name, folder)
        elif suite == "babilong":
            found[name] = [file for files in babilong_files(name, config, lengths, folder).values() for file in files]
        else:
            splits = spec["dataset_kwargs"]["data_files"].values()
            found[name] = sorted({Path(file) for files in splits for file in files})
    return found


def _check_hub(names: Sequence[str], manager: Any) -> None:
    import datasets

    sets: dict[str, tuple[str, str | None]] = {}
    for name in names:
        config = manager.task_index[name].cfg
        if config.get("dataset_path"):
            sets.setdefault(config["dataset_path"], (name, config.get("dataset_name")))
    for path, (name, part) in sets.items():
        try:
            datasets.load_dataset_builder(path, name=part)
        except OSError as err:
            raise FileNotFoundError(_not_at_hand([name], manager, err)) from err
        except Exception as err:  # it may need what the task passes beside; the run will tell
            logger.debug("%s cannot be looked at beforehand: %r", path, err)


def length_metric(task: str, length: int, manager: Any) -> str | None:
    """The metric that stands for a length of a task; None for tasks that have no lengths."""
    suite = suite_of(task, manager)
    if not SUITES[suite].by_length:
        return None
    return length_name(length) if suite == "babilong" else str(length)


def _spec(
    name: str,
    manager: Any,
    data: Path | None,
    tokenizer: Any,
    lengths: Sequence[int],
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, Any]:
    """A task, and what is changed in the harness's configuration of it."""
    config: Mapping[str, Any] = manager.task_index[name].cfg
    shots = config.get("num_fewshot")
    if num_fewshot is not None and shots != 0:
        shots = num_fewshot
    changes: dict[str, Any] = {"num_fewshot": shots or 0}
    suite = suite_of(name, manager)
    if suite == "ruler":
        changes |= ruler_overrides(name, tokenizer, lengths, limit, data)
    elif suite == "babilong":
        changes |= babilong_overrides(name, config, lengths, data)
    elif data is not None:
        changes |= local_overrides(name, config, data, shots or 0)
    return {"task": name, **changes}


def _run(
    lm: Any, manager: Any, specs: list[dict[str, Any]], limit: int | None, chat_template: bool, data: Path | None
) -> Mapping[str, Any]:
    import lm_eval

    names = [spec["task"] for spec in specs]
    makes_ruler = any(suite_of(name, manager) == "ruler" for name in names)
    try:
        with punkt_found(names, data) if makes_ruler else nullcontext():
            loaded = manager.load([{"group": "beacon", "task": specs}])
    except OSError as err:  # what `datasets` raises where it reaches no hub
        raise FileNotFoundError(_not_at_hand(names, manager, err)) from err
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    samples = None if limit is None else {name: _first(task, limit) for name, task in loaded["tasks"].items()}
    results: Mapping[str, Any] = lm_eval.evaluate(
        lm,
        {"tasks": loaded["tasks"], "groups": {}},
        samples=samples,
        log_samples=True,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
    )
    return results


def _not_at_hand(names: Sequence[str], manager: Any, err: Exception) -> str:
    return (
        f"the data of {', '.join(names)} must be at hand, got: {err} Pass data=FOLDER with a folder per data set "
        f"in it, {', '.join(_folders(names, manager))}; docs/evaluation.md says what belongs there."
    )


def _folders(names: Sequence[str], manager: Any) -> list[str]:
    """Names of the local folders that tasks read."""
    configs = [manager.task_index[name].cfg for name in names]
    return sorted({hub_name(config) for config in configs if config.get("dataset_path")})


def _first(task: Any, limit: int) -> list[int]:
    """The first documents of a task, of every length that it has."""
    documents = task.eval_docs
    lengths = documents["max_length"] if "max_length" in documents.column_names else [None] * len(documents)
    seen: dict[Any, int] = {}
    chosen = []
    for number, length in enumerate(lengths):
        seen[length] = seen.get(length, 0) + 1
        if seen[length] <= limit:
            chosen.append(number)
    return chosen
