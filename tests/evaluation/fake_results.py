"""Folders of results that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beacon.evaluation.results import Record, Results, TaskHead
from beacon.evaluation.running import run_suite
from tests.evaluation.fake_suite import fake_model, methods, tasks

MEASURED = {"metrics": {"acc": {"value": 0.5, "stderr": 0.01}, "gone|": {"value": 1.0, "stderr": None}}, "documents": 9}
REFUSED = {"metrics": {}, "documents": 0, "status": "cannot-run", "reason": "the tokenizer <knows> few words"}
SUITE = {**MEASURED, "tasks": 1, "members": ["arc_easy"]}


def fake_results(path: Path) -> Path:
    """Results of fakes, with what the harness measured beside them."""
    run_suite(fake_model(), None, tasks(), methods(), path, options={"needle": {"depths": [0.0, 0.5, 1.0]}})
    entries = {"tasks": {"arc_easy": MEASURED, "niah": REFUSED}, "suites": {"arc": SUITE}}
    Results(path).add_harness("beacon", {"harness": "0.4", **entries})
    Results(path).add_harness("stock", {"harness": "0.4", "tasks": {"arc_easy": MEASURED}, "suites": {}})
    return path


def made(folder: Path, rows: dict[str, list[tuple[str, dict[str, Any], float | None]]], metrics=None) -> Results:
    """Results with these scores: by method, items with place and score (None: cannot run)."""
    results = Results(folder)
    items = {name: place for records in rows.values() for name, place, _ in records}
    head = TaskHead("needle", metrics or {"accuracy": True}, tuple(items.items()), {name: name for name in items})
    settings = {"model": {"weights": "a"}, "config": {"window": 16}, "seed": 0, "dtype": "float32", "device": "cpu"}
    machine = {"cpu": "some", "cores": 2, "threads": 1, "gpu": None, "gpus": 0}
    start = {"utc": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2", "triton": None}, "commit": "0" * 40}
    start |= {"dirty": True, "machine": machine, "processes": 1}
    results.begin(settings, {}, start, [head], list(rows))
    for method, records in rows.items():
        for name, place, score in records:
            scores = {} if score is None else {next(iter(head.metrics)): score}
            status, reason = ("cannot-run", "too long") if score is None else ("ok", None)
            line = Record(item=name, place=place, status=status, scores=scores, reason=reason, seconds=1.0)
            results.append("needle", method, line)
    return results
