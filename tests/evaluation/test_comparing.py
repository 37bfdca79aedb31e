"""Two folders of results compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from beacon.evaluation.report import compare, summarise
from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.results import Record, Results, TaskHead
from beacon.evaluation.running import run_suite
from tests.evaluation.fake_results import fake_results, made
from tests.evaluation.fake_suite import FakeMethod, FakeNeedle, fake_model, methods


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fake_results(tmp_path_factory.mktemp("results"))


def series(values: list[float | None], length: int = 4) -> list[tuple[str, dict[str, Any], float | None]]:
    return [(f"length {length}, {at}", {"length": length}, value) for at, value in enumerate(values)]


def compared(tmp_path: Path, before: Any, after: Any, metrics=None, **options: Any) -> Any:
    for name, values in (("before", before), ("after", after)):
        made(tmp_path / name, {"beacon": values}, metrics)
    return compare(summarise(Results(tmp_path / "before")), summarise(Results(tmp_path / "after")), **options)


def test_the_same_is_no_change(folder):
    summary = summarise(Results(folder))
    found = compare(summary, summary)
    assert not found.regressed and not found.losses and not found.only and not found.settings
    assert (
        len(found.overall) == 4 * (3 + 2 + 3) + 2 + 2
    )  # the suite, whose task is not told again, and the task of stock
    assert all(change.moved == 0 and change.p == 1 for change in [*found.overall, *found.places])


@pytest.mark.parametrize("higher", [True, False])
def test_direction_is_the_metrics(tmp_path, higher):
    found = compared(tmp_path, series([0.2] * 20), series([0.8] * 20), {"score": higher})
    assert found.overall[0].moved == (1 if higher else -1)
    assert found.regressed is not higher


def test_few_items_or_small_changes_are_no_regression(tmp_path):
    assert not compared(tmp_path / "few", series([1.0] * 4), series([0.0] * 4)).regressed
    assert not compared(tmp_path / "small", series([1.0] * 40), series([0.995] * 40)).regressed
    assert compared(tmp_path / "low", series([1.0] * 40), series([0.995] * 40), threshold=0.001).regressed
    assert compared(tmp_path / "zero", series([0.0] * 40), series([0.1] * 40)).overall[0].moved == 1


def test_perplexities_are_compared_by_their_factor(tmp_path):
    found = compared(tmp_path, series([10.0, 20.0] * 10), series([11.0, 22.0] * 10), {"perplexity": False})
    change = found.overall[0]
    assert change.geometric and change.difference.low == pytest.approx(1.1) and found.regressed
    assert change.difference.before == pytest.approx(math.sqrt(200))


def test_items_that_are_lost_are_a_regression(tmp_path):
    found = compared(tmp_path / "lost", series([1.0] * 9), series([1.0] * 8 + [None]))
    assert found.regressed and (found.losses[0].lost, found.losses[0].reason) == (1, "too long")
    found = compared(tmp_path / "gained", series([1.0] * 8 + [None]), series([1.0] * 9))
    assert not found.regressed and found.losses[0].gained == 1
    everything = compared(tmp_path / "all", series([1.0] * 3), series([None] * 3))
    assert everything.regressed and not everything.overall


def test_places_are_told_but_do_not_count(tmp_path):
    before = [*series([1.0] * 40, 4), *series([0.0] * 40, 8)]
    after = [*series([0.0] * 40, 4), *series([1.0] * 40, 8)]
    found = compared(tmp_path, before, after)
    assert not found.regressed and [change.moved for change in found.places] == [-1, 1]
    assert [change.place for change in found.places] == [{"length": 4}, {"length": 8}]


def test_only_common_items_are_compared(tmp_path):
    found = compared(tmp_path, series([1.0] * 3), series([1.0] * 5))
    assert found.overall[0].difference.n == 3
    with pytest.raises(ValueError, match="items in common"):
        compared(tmp_path / "none", series([1.0] * 3, 4), series([1.0] * 3, 8))
    with pytest.raises(ValueError, match="share of at least 0"):
        compared(tmp_path / "bad", series([1.0]), series([1.0]), threshold=-1)


def test_a_real_change_is_found_among_fakes(folder, tmp_path):
    worse = {**methods(), "beacon": FakeMethod("beacon", 0.3)}
    del worse["beacon:8"]
    model = fake_model()
    for name, chosen in (("before", methods()), ("after", worse)):
        run_suite(model, None, [FakeNeedle(samples=10)], chosen, tmp_path / name)
    found = compare(summarise(Results(tmp_path / "before")), summarise(Results(tmp_path / "after")))
    moved = {(change.method, change.metric): change.moved for change in found.overall}
    assert moved == {
        (m, s): -(m == "beacon") for m in ("stock", "sliding-window", "beacon") for s in ("accuracy", "f1")
    }
    assert found.only == ["needle, beacon:8: in the first only"]
    assert [(loss.method, loss.lost) for loss in found.losses] == [("beacon:8", 90)]
    assert [change.metric for change in found.overall if change.decides] == ["accuracy"] * 3


def test_standard_tasks_are_compared_by_their_errors(folder, tmp_path):
    before = summarise(Results(folder))
    changed = json.loads(json.dumps(before.harness))
    changed["beacon"]["suites"]["arc"]["metrics"]["acc"]["value"] = 0.3
    after = type(before)(before.run, before.tasks, changed)
    found = compare(before, after)
    assert [(change.task, change.metric, change.moved) for change in found.overall if change.moved] == [
        ("arc", "acc", -1)
    ]
    assert found.regressed


def test_standard_tasks_that_were_all_right_and_are_all_wrong(folder):
    before = summarise(Results(folder))
    sides = []
    for value in (1.0, 0.0):
        harness = json.loads(json.dumps(before.harness))
        harness["stock"]["tasks"]["arc_easy"]["metrics"]["acc"] = {"value": value, "stderr": 0.0}
        sides.append(Summary(before.run, before.tasks, harness))
    found = compare(*sides)
    assert [(change.task, change.method) for change in found.worse] == [("arc_easy", "stock")] and found.regressed
    assert compare(*reversed(sides)).better and not compare(*reversed(sides)).regressed


def test_standard_tasks_that_vanish_are_a_regression(folder):
    before = summarise(Results(folder))

    def after(change: Any) -> Any:
        harness = json.loads(json.dumps(before.harness))
        change(harness)
        found = compare(before, Summary(before.run, before.tasks, harness))
        assert found.regressed
        return [(loss.task, loss.method, loss.lost, loss.reason) for loss in found.losses]

    failed = {"metrics": {}, "documents": 0, "status": "failed", "reason": "KeyError: oops"}
    told = after(lambda harness: harness["beacon"]["tasks"].update(arc_easy=failed))
    assert told == [("arc_easy", "beacon", 9, "KeyError: oops")]
    assert after(lambda harness: harness["stock"]["tasks"].clear()) == [
        ("arc_easy", "stock", 9, "the second folder has no such task")
    ]
    assert after(lambda harness: harness.pop("stock")) == [
        ("arc_easy", "stock", 9, "the second folder has no such method")
    ]
    told = after(lambda harness: harness["stock"]["tasks"]["arc_easy"].update(documents=4))
    assert told == [("arc_easy", "stock", 5, "the second folder has fewer documents")]


def test_what_vanishes_is_a_regression(tmp_path):
    both = {"beacon": series([1.0] * 3), "stock": series([1.0] * 3)}
    before = summarise(made(tmp_path / "before", both))
    only = compare(before, summarise(made(tmp_path / "method", {"beacon": both["beacon"]})))
    assert only.regressed and [(loss.method, loss.lost) for loss in only.losses] == [("stock", 3)]
    fewer = compare(before, summarise(made(tmp_path / "items", {name: rows[:2] for name, rows in both.items()})))
    assert fewer.regressed and [(loss.method, loss.lost) for loss in fewer.losses] == [("beacon", 1), ("stock", 1)]
    assert fewer.losses[0].reason == "not among the items of the second folder"
    (task,) = before.tasks
    other = TaskSummary(TaskHead("passkey", task.head.metrics, task.head.items), task.records)
    gone = compare(Summary(before.run, [task, other], {}), before)
    assert gone.regressed and [(loss.task, loss.lost) for loss in gone.losses] == [("passkey", 3)] * 2
    assert not compare(before, Summary(before.run, [task, other], {})).regressed
    infinite = compared(tmp_path / "inf", series([9.0] * 3), series([9.0, 9.0, math.inf]), {"perplexity": False})
    assert infinite.regressed and infinite.losses[0].reason == "perplexity inf"


COSTS = ("read_seconds", "read_tokens_per_second", "first_token_seconds", "decode_tokens_per_second", "cache_bytes")
METHODS = ("stock", "truncate-left", "sliding-window", "beacon", "beacon:8")  # those of `beacon eval`
GRID = [
    (length, sample, depth) for length in (1024, 4096) for sample in (0, 1) for depth in (0.05, 0.25, 0.5, 0.75, 0.95)
]


def usual(run: Any, needle: Any = lambda at: 1.0, perplexity: Any = lambda document: 1.0) -> Summary:
    """What `beacon eval` makes: its tasks, methods and items. Those given are of the method beacon."""
    import random

    found = []
    hidden = [
        (f"length {n}, depth {d}, sample {s}", {"length": n, "depth": d}, f"stretch, {s}, {d}") for n, s, d in GRID
    ]
    texts = [
        (f"python-library, document {at}, length {n}", {"length": n, "source": "python-library"}, f"document {at}")
        for at in range(8)
        for n in (1024, 4096)
    ]
    lengths = [(f"length {n}, sample 0", {"length": n}, "stretch 0") for n in (1024, 4096)]
    for name, metrics, items in (
        ("perplexity", {"perplexity": False, "nll": False}, texts),
        ("passkey", {"found": True, "digits": True}, hidden),
        ("needle", {"found": True}, hidden),
        ("cost", {metric: "per" in metric for metric in (*COSTS, "peak_bytes")}, lengths),
    ):
        records = {}
        for method in METHODS:
            drawn = random.Random(f"{name}, {method}")
            records[method] = []
            for at, (item, place, _) in enumerate(items):
                value = needle(at) if (name, method) == ("needle", "beacon") else 1.0
                if name == "perplexity":
                    value = 9 * (perplexity(at // 2) if method == "beacon" else 1.0) * drawn.uniform(0.8, 1.2)
                scores = {metric: math.log(value) if metric == "nll" else value for metric in metrics}
                records[method].append(Record(item=item, place=place, status="ok", scores=scores))
        clusters = {item: text for item, _, text in items}
        head = TaskHead(name, metrics, tuple((item, place) for item, place, _ in items), clusters)
        found.append(TaskSummary(head, records))
    return Summary(run, found, {})


RUN = {"settings": {}, "methods": list(METHODS), "starts": []}


@pytest.mark.parametrize("falls", [lambda at: at >= 10, lambda at: (at + at // 10) % 2 == 0])
def test_a_large_fall_is_found_in_a_table_of_the_usual_size(falls):
    """At one length, or on every text at one length of two."""
    before, after = usual(RUN), usual(RUN, needle=lambda at: float(not falls(at)))
    found = compare(before, after)
    assert len(found.overall) == 55
    decides = {(change.task, change.metric) for change in found.overall if change.decides}
    assert decides == {("perplexity", "perplexity"), ("passkey", "found"), ("needle", "found")}
    (worse,) = found.worse
    assert (worse.task, worse.method) == ("needle", "beacon") and found.regressed
    assert worse.difference.after == 0.5 and worse.difference.clusters == 10
    assert not compare(after, before).regressed and compare(after, before).better


@pytest.mark.parametrize("falls", [lambda at: at % 10 == 3, lambda at: GRID[at][2] == 0.5, lambda at: GRID[at][1] == 0])
def test_a_fall_on_some_texts_is_not_sure(falls):
    found = compare(usual(RUN), usual(RUN, needle=lambda at: float(not falls(at))))
    assert [change.difference.after < 1 for change in found.overall if change.task == "needle"].count(True) == 1
    assert not found.regressed


def few(summary: Summary, count: int, told: bool = True) -> Summary:
    """Needles on so many texts."""
    (task,) = (task for task in summary.tasks if task.name == "needle")
    head = task.head
    texts = {name: f"text {at % count}" for at, (name, _) in enumerate(head.items)} if told else {}
    return Summary(summary.run, [TaskSummary(TaskHead(head.name, head.metrics, head.items, texts), task.records)], {})


@pytest.mark.parametrize("count, decides", [(2, False), (5, False), (6, True)])
def test_fewer_than_six_texts_never_decide(count, decides):
    before, after = (few(usual(RUN, needle=lambda at, here=here: here), count) for here in (1.0, 0.0))
    found = compare(before, after)
    assert {change.decides for change in found.overall} == {decides} and not found.worse
    (fallen,) = (change for change in found.overall if change.difference.after < change.difference.before)
    assert fallen.difference.clusters == count and fallen.difference.p == 2 * 0.5**count
    (group,) = (group for group in before.tasks[0].groups() if group.method == "beacon")
    assert (group.metrics["found"].low is not None) == decides


def test_folders_that_tell_no_texts():
    """All items may then be of one text, so nothing is sure; nor where one folder alone tells."""
    before, after = (usual(RUN, needle=lambda at, here=here: here) for here in (1.0, 0.0))
    for first, second in ((False, False), (True, False), (False, True)):
        found = compare(few(before, 20, first), few(after, 20, second))
        assert {change.difference.clusters for change in found.overall} == {1}
        assert not any(change.decides for change in found.overall)
    assert {c.difference.clusters for c in compare(few(before, 20), few(after, 20)).overall} == {20}
    (group,) = (group for group in few(before, 20, False).tasks[0].groups() if group.method == "beacon")
    assert group.metrics["found"].low is None


def test_a_perplexity_that_rises_is_found_in_a_table_of_the_usual_size():
    before = usual(RUN)
    found = compare(before, usual(RUN, perplexity=lambda document: 1.3 + 0.05 * document))
    assert [(change.task, change.metric, change.method) for change in found.worse] == [
        ("perplexity", "perplexity", "beacon")
    ]
    assert [change.moved for change in found.overall if change.metric == "nll"] == [0, 0, 0, -1, 0]  # told, uncounted
    assert not compare(before, usual(RUN, perplexity=lambda document: 1.3 if document == 4 else 1.0)).regressed


def test_tasks_of_other_options_do_not_decide():
    before, after = usual(RUN), usual(RUN, needle=lambda at: 0.0)
    sides = []
    for summary, samples, ratio in ((before, 2, 4), (after, 3, 4)):
        options = {
            "needle": {"samples": samples},
            "passkey": {},
            "beacon:8": {"ratio": ratio},
            "topics": {"n": samples},
        }
        sides.append(Summary({**RUN, "options": options}, summary.tasks, {}))
    found = compare(*sides)
    assert found.options == ["needle.samples 2 (now 3)"] and not found.regressed  # no topics were measured
    assert [change.moved for change in found.overall if change.task == "needle"] == [0, 0, 0, -1, 0]
    assert {change.task for change in found.overall if change.decides} == {"perplexity", "passkey"}
    more = compare(sides[0], Summary({**RUN, "options": {"beacon:8": {"ratio": 8}}}, after.tasks, {}))
    assert more.options == ["beacon:8.ratio 4 (now 8)", "needle.samples 2 (now absent)"]


def test_standard_tasks_of_other_options_do_not_decide(folder):
    before = summarise(Results(folder))
    harness = json.loads(json.dumps(before.harness))
    harness["beacon"]["suites"]["arc"]["metrics"]["acc"]["value"] = 0.3
    found = compare(before, Summary({**before.run, "options": {"harness": {"num_fewshot": 5}}}, before.tasks, harness))
    assert "harness.num_fewshot absent (now 5)" in found.options and not found.worse
