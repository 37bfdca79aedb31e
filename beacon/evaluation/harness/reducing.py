"""What is kept of the harness's results: metrics of tasks and suites, and the scores of documents behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypeAlias

from beacon.evaluation.harness.keeping import document_name
from beacon.evaluation.harness.tasks import SUITES, suite_of
from beacon.evaluation.results.entries import suite_weights

Part: TypeAlias = Callable[[Mapping[str, Any]], "str | None"]
Scores: TypeAlias = dict[str, dict[str, float]]  # by metric and document
Metrics: TypeAlias = "dict[str, dict[str, Any]]"  # "value" and "stderr" by metric


def reduced(results: Mapping[str, Any], chosen: Mapping[str, Sequence[str]], manager: Any) -> dict[str, Any]:
    """The harness's results, without what no report reads.

    Args:
        results: What ``lm_eval.evaluate`` returned, samples included.
        chosen: Tasks by suite; single ones under ``""``.
        manager: From :func:`beacon.evaluation.harness.tasks.task_manager`.

    Returns:
        ``harness``, ``tasks``, ``suites`` and ``scores`` as of :func:`beacon.evaluation.harness.evaluate_tasks`.
    """
    import lm_eval

    tasks, scores = {}, {}
    for name, measured in results["results"].items():
        metrics, samples = _metrics(measured), results["samples"][name]
        part = SUITES[suite_of(name, manager)].part
        whole = document_scores(samples, metrics)
        parts = {} if part is None else _by_part(samples, whole, part)
        scores[name] = {**whole, **parts}
        tasks[name] = {
            "documents": results["n-samples"][name]["effective"],
            "shots": results["n-shot"].get(name, 0),
            "version": results["versions"].get(name),
            "metrics": {**metrics, **{metric: _mean(list(some.values())) for metric, some in parts.items()}},
        }
    suites = {
        suite: suite_mean([tasks[name] for name in names], SUITES[suite].weighted)
        for suite, names in chosen.items()
        if suite
    }
    return {"harness": lm_eval.__version__, "tasks": tasks, "suites": suites, "scores": scores}


def document_scores(samples: Sequence[Mapping[str, Any]], metrics: Metrics) -> Scores:
    """Scores of documents by metric, of those metrics that are their mean.

    Args:
        samples: The harness's, of one task: one for each document and filter.
        metrics: The task's.

    Returns:
        By the names of documents, as :func:`beacon.evaluation.harness.keeping.document_name` gives them; equal ones are
        numbered.
    """
    found: Scores = {}
    for document, sample in _named(samples):
        for metric in sample["metrics"]:
            value, name = sample[metric], _metric_name(metric, sample["filter"])
            if name in metrics and isinstance(value, (bool, int, float)):
                found.setdefault(name, {})[document] = float(value)
    return {name: some for name, some in found.items() if _is_mean(metrics[name]["value"], some.values())}


def _is_mean(value: float | None, scores: Iterable[float]) -> bool:
    return value is not None and math.isclose(value, fmean(scores), rel_tol=1e-6, abs_tol=1e-9)


def _named(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Samples with the names of their documents; equal documents are numbered."""
    seen: dict[tuple[str, str], int] = {}
    named = []
    for sample in samples:
        digest = document_name(sample["doc"])
        times = seen[digest, sample["filter"]] = seen.get((digest, sample["filter"]), 0) + 1
        named.append((digest if times == 1 else f"{digest}-{times}", sample))
    return named


def _by_part(samples: Sequence[Mapping[str, Any]], scores: Scores, part: Part) -> Scores:
    """Scores of the documents of each part, as metrics of their own."""
    parts = {document: part(sample["doc"]) for document, sample in _named(samples)}
    found: Scores = {}
    for metric, some in scores.items():
        for name in sorted({name for name in parts.values() if name is not None}):
            mine = {document: value for document, value in some.items() if parts[document] == name}
            if mine:
                found[f"{metric}, {name}"] = mine
    return found


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """A metric over some of a task's documents: it says of how many."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": fmean(values), "stderr": error, "documents": len(values)}


def _metrics(measured: Mapping[str, Any]) -> Metrics:
    """Values and standard errors by metric."""
    found: Metrics = {}
    for key, value in measured.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = measured.get(f"{metric}_stderr,{kind}")
        error = float(stderr) if isinstance(stderr, (int, float)) else None
        found[_metric_name(metric, kind)] = {"value": float(value), "stderr": error}
    return found


def _metric_name(metric: str, kind: str) -> str:
    """Filters but ``none`` are part of the name."""
    return metric if kind == "none" else f"{metric},{kind}"


def suite_mean(tasks: Sequence[Mapping[str, Any]], weighted: bool) -> dict[str, Any]:
    """Means of the metrics that all tasks of a suite have; tasks are independent, so their errors add in squares.

    Metrics of parts are means over the tasks that have the part, by its documents where these weigh.

    Args:
        tasks: Their entries.
        weighted: Whether tasks weigh as much as they have documents, or alike.
    """
    names = dict.fromkeys(name for task in tasks for name in task["metrics"])
    metrics = {}
    for name in names:
        having = [task for task in tasks if name in task["metrics"]]
        found = [task["metrics"][name] for task in having]
        of_parts = all("documents" in metric for metric in found)
        if len(having) < len(tasks) and not of_parts:
            continue
        counts = [metric.get("documents", task["documents"]) for task, metric in zip(having, found, strict=True)]
        weights = suite_weights(counts, weighted)
        errors = [metric["stderr"] for metric in found]
        metrics[name] = {
            "value": sum(weight * metric["value"] for weight, metric in zip(weights, found, strict=True)),
            "stderr": None if None in errors else math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))),
            **({"documents": sum(counts)} if of_parts else {}),
        }
    return {"documents": sum(task["documents"] for task in tasks), "tasks": len(tasks), "metrics": metrics}
