"""Standard tasks in a folder of results: no answer is asked for twice, processes share them, folders are compared."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from beacon.evaluation.harness.keeping import AnsweredElsewhere, KeepingLM, request_names
from beacon.evaluation.harness.reducing import suite_mean
from beacon.evaluation.report.comparing import compare
from beacon.evaluation.report.statistics import Difference, weighted
from beacon.evaluation.report.summary import Summary, summarise
from beacon.evaluation.results import Results
from beacon.evaluation.results.answers import KeptAnswers, shared_out
from beacon.evaluation.running import Totals, run_suite
from tests.evaluation.fake_suite import fake_model
from tests.evaluation.fake_suite import methods as fakes
from tests.evaluation.standard_suite import TASKS, Guesser, methods, run, tiny, write_data

ROOT = Path(__file__).resolve().parents[2]
READINGS = 8 * 4 + 4  # continuations of arc_easy; gsm8k's eight questions are four


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data")
    return tmp_path / "data"


def measured(folder: Path) -> dict[str, Any]:
    """All that must be the same however it was measured."""
    results = Results(folder)
    found = {
        (method, task): {name: entry[name] for name in ("documents", "metrics")}
        for method, of_method in results.harness().items()
        for task, entry in of_method["tasks"].items()
    }
    return {"tasks": found, "documents": {method: results.documents(method) for method in methods()}}


def lines(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text().splitlines())


def test_answers_and_scores_of_documents_are_kept(tmp_path: Path, data: Path) -> None:
    totals = run(tmp_path / "out", data)
    assert (totals.ok, totals.failed) == (6, 0)
    answers = list(lines(tmp_path / "out" / "harness" / "answers" / "guess.jsonl"))
    assert len(answers) == READINGS
    found = Results(tmp_path / "out")
    scored = found.documents("guess")["arc_easy"]["acc"]
    parts = {(line["document"], line["part"]) for line in answers if line["task"] == "arc_easy"}
    assert parts == {(document, part) for document in scored for part in range(4)}
    for method in methods():
        of_arc = found.documents(method)["arc_easy"]["acc"]
        assert len(of_arc) == 8 and set(of_arc.values()) <= {0.0, 1.0}
        value = found.harness()[method]["tasks"]["arc_easy"]["metrics"]["acc"]["value"]
        assert sum(of_arc.values()) / 8 == pytest.approx(value)


def test_a_killed_run_loses_the_context_it_was_at(tmp_path: Path, data: Path) -> None:
    """Continuations of one context are asked together, for what a model reads may depend on the longest."""
    run(tmp_path / "whole", data, {"guess": Guesser()})
    for stops_at, kept in ((1, 0), (3, 2), (20, 4 + 12), (READINGS, 4 + 28)):  # gsm8k comes first
        folder = tmp_path / f"stopped {stops_at}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, data, {"guess": Guesser(stops_at=stops_at)})
        method = Guesser()
        assert run(folder, data, {"guess": method}).ok == 2
        assert method.count == READINGS - kept
        assert measured_by(folder, "guess") == measured_by(tmp_path / "whole", "guess")


def measured_by(folder: Path, method: str) -> Any:
    results = Results(folder)
    return results.documents(method), {n: e["metrics"] for n, e in results.harness()[method]["tasks"].items()}


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, method = tmp_path / "out", Guesser(stops_at=20)
    with pytest.raises(KeyboardInterrupt):
        run(folder, data, {"guess": method})
    file = folder / "harness" / "answers" / "guess.jsonl"
    kept = file.read_text().splitlines()
    damaged = ["not an answer", '{"request": 3, "answer": ""}']
    file.write_text("\n".join([*kept[:4], *damaged, *kept[6:-1], kept[-1][:20]]))  # four are of gsm8k, which is done
    again = Guesser()
    assert run(folder, data, {"guess": again}).ok == 2
    assert again.count == READINGS - 4 - 8 and "line 5 is damaged" in caplog.text  # two whole contexts are left


def test_two_processes_give_what_one_gives(tmp_path: Path, data: Path) -> None:
    """With torchrun; what one process began goes on in two."""
    run(tmp_path / "one", data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", data, {"guess": Guesser(stops_at=12)})
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.evaluation.standard_suite", str(tmp_path / "two"), str(data)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert measured(tmp_path / "two") == measured(tmp_path / "one")
    folder = tmp_path / "two" / "harness" / "answers"
    for method in map(quote, methods()):
        parts = [list(lines(folder / f"{name}.jsonl")) for name in (method, f"{method}.rank1")]
        both = [line["request"] for part in parts for line in part]
        again = 3 if method == "guess" else 0  # of the context at which the first run was stopped
        assert all(parts) and len(both) == len(set(both)) + again  # nothing else was answered twice


def test_contexts_are_shared_out_by_length_and_what_begins_alike_stays_together(tmp_path: Path) -> None:
    books = [letter * 900 for letter in "abcdef"]
    contexts = [f"{book} question {number}" for number in range(3) for book in books] + ["a short one"] * 2
    stores = [KeptAnswers(tmp_path / f"{rank}.jsonl", rank=rank, count=3) for rank in range(3)]
    rows = list(zip(*(store.share(contexts) for store in stores), strict=True))
    assert all(sum(row) == 1 for row in rows)
    owners = {context: row.index(True) for context, row in zip(contexts, rows, strict=True)}
    for book in books:
        assert len({owner for context, owner in owners.items() if context.startswith(book)}) == 1
    assert [sum(owner == rank for owner in owners.values()) for rank in range(3)] in ([7, 6, 6], [6, 7, 6], [6, 6, 7])
    assert shared_out(reversed(contexts), 3) == owners
    one_beginning = [f"{'x' * 900} {number}" for number in range(12)]  # solved examples, say
    shares = list(shared_out(one_beginning, 3).values())
    assert [shares.count(rank) for rank in range(3)] == [4, 4, 4]


class Request:
    """As the harness has them, as far as an answer depends on it."""

    def __init__(self, *args: Any) -> None:
        self.args, self.task_name, self.doc, self.idx = args, "some", {"question": args[0]}, 0


class Told:
    """A model that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.ratios = 8

    def set_cache_hook(self, hook: Any) -> None:
        self.hook = hook

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += [request.args[0] for request in requests]
        return [f"{request.args[0]} {len(self.asked)}" for request in requests]


def test_drawn_answers_are_not_kept(tmp_path: Path) -> None:
    inner = Told()
    lm = KeepingLM(inner, KeptAnswers(tmp_path / "x.jsonl"))
    greedy, drawn = Request("a", {"until": []}), Request("b", {"temperature": 0.7})
    assert lm.generate_until([drawn, greedy, greedy, drawn]) == ["b 3", "a 1", "a 1", "b 3"]
    assert inner.asked == ["a", "b", "b"] and lm.ratios == 8
    assert lm.generate_until([greedy, drawn]) == ["a 1", "b 4"]
    assert inner.asked == ["a", "b", "b", "b"] and len(list(lines(tmp_path / "x.jsonl"))) == 1


def test_one_of_several_processes_draws_nothing_before_scoring(tmp_path: Path) -> None:
    inner = Told()
    lm = KeepingLM(inner, KeptAnswers(tmp_path / "x.jsonl", rank=0, count=2))
    with pytest.raises(AnsweredElsewhere):
        lm.generate_until([Request(f"context {number}", {"do_sample": True}) for number in range(9)])
    assert not inner.asked


def test_continuations_of_a_context_are_told_apart_by_their_company() -> None:
    """What a model reads may depend on the longest of them, so another task's may not be taken."""
    first, second = request_names("loglikelihood", [("a", "x"), ("a", "yy")])
    assert first != second and request_names("loglikelihood", [("a", "yy"), ("b", "z"), ("a", "x")])[2] == first
    assert first not in request_names("loglikelihood", [("a", "x"), ("a", "yyy")])
    kinds = {request_names(kind, [("a", {})])[0] for kind in ("generate_until", "loglikelihood_rolling")}
    assert len(kinds) == 2


def test_a_model_that_keeps_can_be_copied(tmp_path: Path) -> None:
    lm = KeepingLM(Told(), KeptAnswers(tmp_path / "x.jsonl"))
    assert copy.copy(lm).lm is lm.lm


def test_what_others_answer_is_told_once_the_own_share_is_kept(tmp_path: Path) -> None:
    inner, requests = Told(), [Request(f"context {number}", {}) for number in range(20)]
    lm = KeepingLM(inner, KeptAnswers(tmp_path / "x.jsonl", rank=0, count=2))
    with pytest.raises(AnsweredElsewhere, match="of 20 requests"):
        lm.generate_until(requests)
    kept = {line["request"] for line in lines(tmp_path / "x.jsonl")}
    assert 0 < len(inner.asked) < 20 and kept == set(
        request_names("generate_until", [(text, {}) for text in inner.asked])
    )


def test_documents_are_compared_in_pairs(tmp_path: Path, data: Path) -> None:
    """Every document a little better is sure; by means and their errors it could not be told."""
    run(tmp_path / "before", data, methods(["guess"]))
    run(tmp_path / "after", data, methods(["guess"]))
    first, second = (summarise(Results(tmp_path / name)) for name in ("before", "after"))
    same = compare(first, second)
    assert not same.losses and {change.difference.p for change in same.overall} == {1.0}
    names = list(first.documents["guess"]["arc_easy"]["acc"])
    results = Results(tmp_path / "before")
    for at, folder in enumerate((results, Results(tmp_path / "after"))):
        scores = {name: number / 10 + at * (0.05 + number / 1000) for number, name in enumerate(names)}
        folder.add_documents("guess", "arc_easy", "acc", scores)
    moved = compare(*(summarise(Results(tmp_path / name)) for name in ("before", "after")))
    change = next(c for c in moved.overall if (c.task, c.method, c.metric) == ("arc_easy", "guess", "acc"))
    assert change.moved == 1 and change.difference.clusters == 8 and moved.better == [change]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_suite_is_compared_by_its_documents(weighted: bool) -> None:
    """Two tasks of 10 and 30 documents, each of which gains about 0.1 of a score that varies far more."""
    random = np.random.default_rng(0)
    scores, later = {}, {}
    for task, count in (("one", 10), ("two", 30)):
        values = random.uniform(0, 1, count)
        scores[task] = {"acc": {f"{task} {at}": float(value) for at, value in enumerate(values)}}
        later[task] = {
            "acc": {name: value + 0.1 + random.normal(0, 0.02) for name, value in scores[task]["acc"].items()}
        }
    sides = [of_suite(some, weighted) for some in (scores, later)]
    change = compare(*sides).overall[0]
    assert (change.task, change.metric, change.moved) == ("both", "acc", 1)
    weights = (0.25, 0.75) if weighted else (0.5, 0.5)
    for found, some in ((change.difference.before, scores), (change.difference.after, later)):
        means = [np.mean(list(some[task]["acc"].values())) for task in ("one", "two")]
        assert found == pytest.approx(np.dot(weights, means))
    assert change.difference.low > 0.05 and change.difference.high < 0.15
    unpaired = compare(*(replace(side, documents={}) for side in sides)).overall[0]
    assert unpaired.moved == 0 and unpaired.difference.low < 0


def of_suite(scores: Mapping[str, Mapping[str, Mapping[str, float]]], weighted: bool) -> Summary:
    tasks = {
        task: {"documents": len(some["acc"]), "metrics": {"acc": mean_of(list(some["acc"].values()))}}
        for task, some in scores.items()
    }
    mean = suite_mean(list(tasks.values()), weighted)
    measured = {"tasks": tasks, "suites": {"both": {**mean, "members": list(tasks), "weighted": weighted}}}
    run = {"settings": {}, "methods": ["guess"], "starts": []}
    return Summary(run, [], {"guess": measured}, {"guess": scores})


def mean_of(values: list[float]) -> dict[str, float]:
    return {"value": float(np.mean(values)), "stderr": float(np.std(values, ddof=1) / len(values) ** 0.5)}


def changed(counts: list[int], changes: list[float], **options: Any) -> Difference:
    """Tasks of so many documents that count alike, of which all scores were 0."""
    tasks = [task for task, count in enumerate(counts) for _ in range(count)]
    weights = [1 / len(counts) / counts[task] for task in tasks]
    return weighted([0.0] * len(tasks), changes, weights, tasks, options.get("clusters", list(range(len(tasks)))))


def test_few_documents_of_a_suite_are_sure_of_little() -> None:
    assert changed([2] * 13, [1.0] * 7 + [0.0] * 19).p == pytest.approx(2 * 0.5**7, rel=0.3)  # the sign test
    one_task = changed([3, 100], [-1.0] * 3 + [0.01, -0.01] * 50)
    assert one_task.p > 0.1 and changed([4], [-1.0] * 4).least == 0.125
    assert changed([1, 20], [1.0] * 21).low is None and changed([6, 6], [0.5] * 12).low == 0.5
    shared = changed([10, 10], [1.0] * 20, clusters=[0, 1] * 10)
    assert (shared.clusters, shared.p) == (2, 0.5)
    assert changed([3, 3], [0.0] * 6).p == 1.0


@pytest.mark.parametrize("counts", [[2] * 13, [5] * 13, [4, 4], [1, 30]])
def test_a_suite_in_which_nothing_changed_raises_few_alarms(counts: list[int]) -> None:
    random = np.random.default_rng(1)
    found = [changed(counts, list(random.integers(-1, 2, sum(counts)).astype(float))).p for _ in range(300)]
    assert np.mean([p < 0.05 for p in found]) < 0.08


def test_a_change_of_all_documents_is_told() -> None:
    random = np.random.default_rng(2)
    found = changed([20] * 5, list(random.normal(0.2, 0.5, 100)))
    assert found.p < 0.01 and 0 < found.low < 0.2 < found.high
    error = 0.5 / 100**0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.2)


def test_documents_of_other_prompts_are_not_lost(tmp_path: Path, data: Path) -> None:
    """As those of RULER are with another tokenizer: none is in common, so means are compared."""
    run(tmp_path / "before", data, {"guess": Guesser()})
    for file in data.rglob("*.jsonl"):
        file.write_text(file.read_text().replace("function", "method").replace("return", "yield"))
    run(tmp_path / "after", data, {"guess": Guesser()})
    comparison = compare(*(summarise(Results(tmp_path / name)) for name in ("before", "after")))
    assert not comparison.losses and {change.task for change in comparison.overall} == set(TASKS)


def test_options_of_the_harness_stay_the_same(tmp_path: Path, data: Path) -> None:
    run_suite(
        *tiny(),
        [],
        {"guess": Guesser()},
        tmp_path / "out",
        standard=["arc_easy"],
        options={"harness": {"data": str(data)}},
    )
    with pytest.raises(ValueError, match=r"same options, got .*harness\.data"):
        run_suite(*tiny(), [], {"guess": Guesser()}, tmp_path / "out", standard=["arc_easy"])


def test_documents_that_are_gone_are_lost(tmp_path: Path, data: Path) -> None:
    run(tmp_path / "before", data, {"guess": Guesser()}, limit=4)
    write_data(data, 3)
    run(tmp_path / "after", data, {"guess": Guesser()}, limit=4)
    comparison = compare(*(summarise(Results(tmp_path / name)) for name in ("before", "after")))
    assert {(loss.task, loss.lost, loss.gained) for loss in comparison.losses} == {(task, 1, 0) for task in TASKS}
    assert comparison.regressed


@pytest.fixture(scope="module")
def wrapped() -> Any:
    return fake_model()


def make_standard(monkeypatch: pytest.MonkeyPatch, evaluate: Any) -> list[dict[str, Any]]:
    """Tasks of the harness without the harness's work; what it is asked comes back."""
    from beacon.evaluation import standard

    asked: list[dict[str, Any]] = []

    def run(model: Any, tokenizer: Any, names: list[str], **settings: Any) -> dict[str, Any]:
        asked.append({"task": names[0], **settings})
        evaluate(**asked[-1])
        metrics = [str(n) for n in settings["lengths"]] if names[0].startswith("ruler") else ["acc"]
        found = {name: {"value": 0.5, "stderr": 0.1} for name in metrics}
        return {"tasks": {names[0]: {"documents": 2, "metrics": found}}, "suites": {}, "scores": {}, "limit": None}

    monkeypatch.setattr(standard, "evaluate_tasks", run)
    monkeypatch.setattr(standard, "check_data", lambda tasks, **_: {})
    monkeypatch.setattr("beacon.evaluation.running.check_arguments", lambda *_: None)
    return asked


def test_a_length_that_cannot_be_read_leaves_the_others(wrapped, tmp_path, monkeypatch):
    freed, most = [], 4096

    def evaluate(lengths: list[int], **_: Any) -> None:
        if lengths[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    asked = make_standard(monkeypatch, evaluate)
    monkeypatch.setattr("beacon.evaluation.standard.free_memory", lambda: freed.append(1))
    some, given = {"stock": fakes()["stock"]}, {"harness": {"lengths": [1024, 4096, 8192]}}

    def run() -> Totals:
        return run_suite(wrapped, None, [], some, tmp_path, options=given, standard=["ruler_vt", "arc_easy"])

    totals = run()
    assert (totals.ok, totals.cannot_run, len(freed)) == (3, 1, 1)
    assert [(one["task"], one["lengths"]) for one in asked[:3]] == [("ruler_vt", [n]) for n in (1024, 4096, 8192)]
    assert all(one["method"] is some["stock"] and "stock" not in one for one in asked)
    entry = Results(tmp_path).harness()["stock"]["tasks"]["ruler_vt"]
    assert list(entry["metrics"]) == ["1024", "4096"] and entry["reason"].startswith("8192: out of memory")
    assert entry["lengths"]["1024"]["start"] == 1 and entry["lengths"]["1024"]["stamp"]["versions"]["torch"]
    most = 8192
    asked.clear()
    totals = run()
    assert (totals.ok, totals.cannot_run) == (4, 0) and [one["lengths"] for one in asked] == [[8192]]
    entry = Results(tmp_path).harness()["stock"]["tasks"]["ruler_vt"]
    assert "status" not in entry and entry["lengths"]["8192"]["start"] == 2


def test_only_what_a_method_cannot_read_cannot_run(wrapped, tmp_path, monkeypatch):
    from beacon.evaluation.harness.ruler import PromptsDoNotFit

    error: Exception = ValueError("a mistake")

    def evaluate(**_: Any) -> None:
        raise error

    make_standard(monkeypatch, evaluate)
    some = {"beacon": fakes()["beacon"]}
    totals = run_suite(wrapped, None, [], some, tmp_path, standard=["arc_easy"])
    assert (totals.cannot_run, totals.failed) == (0, 1)
    error = PromptsDoNotFit("too long")
    totals = run_suite(wrapped, None, [], some, tmp_path, standard=["arc_easy"])
    assert (totals.cannot_run, totals.failed) == (1, 0)
    run_suite(wrapped, None, [], some, tmp_path, standard=["arc_easy"])
    assert Results(tmp_path).harness()["beacon"]["tasks"]["arc_easy"]["start"] == 2
