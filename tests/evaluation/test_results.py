"""The folder of results: lines that survive whatever happens, and settings that must not be mixed."""

from __future__ import annotations

import copy
import json
import logging
import math
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, strategies

import beacon
from beacon.evaluation.results import (
    Record,
    Results,
    TaskHead,
    append_record,
    best_records,
    files_fingerprint,
    model_fingerprint,
    read_records,
    stamp,
    tokenizer_fingerprint,
)
from beacon.evaluation.results.entries import added, better, finished, of_parts, parts
from beacon.evaluation.suite import Item
from tests.evaluation.fake_suite import FakeNeedle, fake_model

HEAD = TaskHead("needle", {"accuracy": True}, (("a", {"length": 1}), ("b", {"length": 2})))
SETTINGS = {"model": {"weights": "abc"}, "config": {"window": 16}, "seed": 0}
STAMP = {"utc": "now", "commit": None, "dirty": None}


def record(item: str = "a", **values) -> Record:
    return Record(**{"item": item, "place": {"length": 1}, "status": "ok", "scores": {"accuracy": 1.0}, **values})


def begun(folder: Path, settings=SETTINGS, head: TaskHead = HEAD, options=None) -> Results:
    results = Results(folder)
    results.begin(settings, options or {}, STAMP, [head], ["beacon:8"])
    return results


floats = strategies.floats() | strategies.sampled_from([math.inf, -math.inf])


@given(
    strategies.text(min_size=1),
    strategies.dictionaries(strategies.text(), floats),
    strategies.none() | strategies.text(),
    strategies.sampled_from(["ok", "cannot-run", "failed"]),
)
def test_a_record_is_one_line_of_strict_json(item, scores, output, status):
    made = Record(item=item, place={"depth": 0.5}, status=status, scores=scores, output=output, reason=output)
    line = made.to_line()
    assert "\n" not in line and "\r" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = Record.from_line(line)
    assert json.dumps(again.scores) == json.dumps(scores)  # NaN is not NaN
    assert (again.item, again.status, again.output, again.reason) == (item, status, output, output)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", '{"item": "a"}', "\x00\x00", '{"item": "a", "place": {}, "status": "fine", "scores": {}}', "null"],
)
def test_damaged_lines_are_left_out_and_told(line, tmp_path, caplog):
    file = tmp_path / "x.jsonl"
    append_record(file, record("a"))
    file.write_bytes(file.read_bytes() + line.encode() + b"\n")
    append_record(file, record("b"))
    with caplog.at_level(logging.WARNING):
        assert [found.item for found in read_records(file)] == ["a", "b"]
    assert "line 2 is damaged" in caplog.text


@pytest.mark.parametrize("values", [{"seconds": "long"}, {"scores": {"accuracy": None}}, {"more": 1}, {"place": 3}])
def test_lines_of_wrong_types_are_damaged(values):
    line = json.dumps({**json.loads(record().to_line()), **values})
    with pytest.raises(ValueError, match=r".+"):
        Record.from_line(line)


def test_a_cut_line_is_removed_before_the_next(tmp_path):
    file = tmp_path / "x.jsonl"
    append_record(file, record("a"))
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut] if cut < len(whole) else whole)
        append_record(file, record("b"))
        assert [found.item for found in read_records(file)] == ["a", "b"]


def test_the_best_status_counts_and_of_equals_the_last():
    lines = [record(status="failed"), record(scores={"accuracy": 0.0}), record(status="failed"), record("b")]
    assert best_records(lines)["a"].status == "ok"
    assert best_records([record(scores={"accuracy": 0.0}), record()])["a"].scores == {"accuracy": 1.0}


def test_files_of_several_processes_are_one(tmp_path):
    results = begun(tmp_path)
    results.append("needle", "beacon:8", record("b", place={"length": 2}), rank=0)
    results.append("needle", "beacon:8", record("a"), rank=1)
    assert {file.name for file in (tmp_path / "needle").glob("*.jsonl")} == {
        "beacon%3A8.jsonl",
        "beacon%3A8.rank1.jsonl",
    }
    assert results.methods("needle") == ["beacon:8"]
    assert [found.item for found in results.records(HEAD, "beacon:8")] == ["a", "b"]  # the order of the items


def test_names_with_paths_stay_in_the_folder(tmp_path):
    results = begun(tmp_path / "run")
    name = "fine-tuned:../../elsewhere"
    results.append("needle", name, record())
    assert results.methods("needle") == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_record_of_another_place_is_not_the_item(tmp_path):
    results = begun(tmp_path)
    results.append("needle", "beacon:8", record("a", place={"length": 3}))
    assert results.records(HEAD, "beacon:8") == []


def test_texts_that_items_share_are_kept(tmp_path):
    task = FakeNeedle(lengths=(8, 16), depths=(0.5,))
    items = list(task.items(None, None))
    head = TaskHead.of(task, [*items, Item("alone", {"length": 8}), Item("text 0", {"length": 8})])
    begun(tmp_path, head=head)
    (again,) = Results(tmp_path).tasks()
    assert again == head and list(again.clusters) == [*(item.name for item in items), "alone", "text 0"]
    named = [again.cluster(name) for name, _ in again.items]
    assert named[:4] == ["text 0", "text 1"] * 2 and len(set(named)) == 4  # a name is no text, though it is called so
    Results(tmp_path).check(SETTINGS, {}, [head])
    other = TaskHead(head.name, head.metrics, head.items, {**head.clusters, items[1].name: "text 2"})
    with pytest.raises(ValueError, match=r"same items of needle, got .*sample 1\.cluster text 1 \(now text 2\)"):
        Results(tmp_path).check(SETTINGS, {}, [other])
    old = TaskHead(head.name, head.metrics, head.items)
    with pytest.raises(ValueError, match=r"cluster text 0 \(now absent\)"):
        Results(tmp_path).check(SETTINGS, {}, [old])
    assert TaskHead.from_json(old.to_json()) == old and {*map(old.cluster, dict(old.items))} == {None}


def test_where_data_are_does_not_count(tmp_path):
    """What is in them does, where both sides know it."""
    results = begun(tmp_path, options={"needle": {"data": "books", "files": "a"}})
    results.check(SETTINGS, {"needle": {"data": "/elsewhere/books", "files": "a"}}, [HEAD])
    with pytest.raises(ValueError, match=r"got needle\.files a \(now b\)\. .*--overwrite"):
        results.check(SETTINGS, {"needle": {"data": "/elsewhere/books", "files": "b"}}, [HEAD])
    with pytest.raises(ValueError, match=r"needle\.data books \(now other\)"):
        results.check(SETTINGS, {"needle": {"data": "other"}}, [HEAD])


def test_other_settings_are_refused_with_what_differs(tmp_path):
    results = begun(tmp_path, options={"needle": {"samples": 2}})
    results.check(SETTINGS, {"needle": {"samples": 2}}, [HEAD])
    results.check(SETTINGS, {"passkey": {"samples": 3}}, [])  # another task may come to it
    changed = {**SETTINGS, "config": {"window": 32}, "seed": 1}
    with pytest.raises(ValueError, match=r"same settings, got config\.window 16 \(now 32\); seed 0 \(now 1\)"):
        results.check(changed)
    with pytest.raises(ValueError, match=r"same options, got needle\.samples 2 \(now 4\)"):
        results.check(SETTINGS, {"needle": {"samples": 4}})
    other = TaskHead("needle", {"accuracy": True}, (("a", {"length": 1}), ("c", {"length": 2})))
    with pytest.raises(ValueError, match=r"same items of needle.*b.*absent"):
        results.check(SETTINGS, {}, [other])


def test_options_of_methods_are_compared_where_only_one_side_names_them(tmp_path):
    results = begun(tmp_path)  # beacon:8, without options
    with pytest.raises(ValueError, match=r"same options, got beacon:8\.window absent \(now 64\)"):
        results.check(SETTINGS, {"beacon:8": {"window": 64}})
    results.check(SETTINGS, {"beacon:8": {}, "yarn": {"factor": 4}})
    begun(tmp_path, options={"yarn": {"factor": 4}})
    with pytest.raises(ValueError, match=r"same options, got yarn\.factor 4 \(now absent\)"):
        results.check(SETTINGS, {"yarn": {}})


def test_what_older_folders_do_not_tell_is_not_compared(tmp_path):
    results = begun(tmp_path, options={"needle": {"samples": 2}})
    settings = {**SETTINGS, "tokenizer": {"tokens": "abc"}}
    options = {"needle": {"samples": 2, "files": "abc"}, "beacon:8": {"files": "abc"}}
    results.check(settings, options, [HEAD])
    begun(tmp_path, settings, options=options)
    with pytest.raises(ValueError, match=r"same settings, got tokenizer\.tokens abc \(now abd\)"):
        results.check({**SETTINGS, "tokenizer": {"tokens": "abd"}}, options)
    with pytest.raises(ValueError, match=r"same options, got needle\.files abc \(now abd\)"):
        results.check(settings, {"needle": {"samples": 2, "files": "abd"}})


def test_lines_of_older_folders_are_read():
    line = (
        '{"item": "a", "place": {}, "status": "cannot-run", "scores": {}, "output": null, "seconds": 1, "reason": "?"}'
    )
    found = Record.from_line(line)
    assert found.start is None and found.finished


def test_what_will_stay_so_counts_before_what_may_pass():
    passing = record(status="cannot-run", again=True)
    assert not passing.finished and not record(status="failed").finished
    assert best_records([record(status="cannot-run"), passing])["a"].finished
    assert best_records([passing, record(status="cannot-run")])["a"].finished


def test_only_folders_of_results_are_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold results"):
        Results(tmp_path).check(SETTINGS)
    with pytest.raises(NotADirectoryError, match="got the file"):
        Results(tmp_path / "notes.txt").check(SETTINGS)
    with pytest.raises(FileNotFoundError, match=r"run\.json; run beacon eval"):
        _ = Results(tmp_path).run
    Results(tmp_path).clear()
    assert (tmp_path / "notes.txt").exists()


def test_clearing_removes_results_only(tmp_path):
    results = begun(tmp_path)
    results.append("needle", "beacon:8", record())
    results.add_harness("beacon:8", {"tasks": {}, "suites": {}})
    (tmp_path / "notes.txt").write_text("mine")
    results.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damaged_files(tmp_path, caplog):
    results = begun(tmp_path)
    results.append("needle", "beacon:8", record())
    (tmp_path / "needle" / "task.json").write_text("{")
    with pytest.raises(ValueError, match=r"task\.json must be JSON, got a damaged file"):
        results.tasks()
    results.check(SETTINGS, {}, [HEAD])  # it is written again
    results.begin(SETTINGS, {}, STAMP, [HEAD], ["beacon:8"])
    assert results.tasks() == [HEAD] and len(results.records(HEAD, "beacon:8")) == 1
    (tmp_path / "run.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"run\.json must have methods, starts"):
        results.check(SETTINGS)
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "beacon.json").write_text("nothing")
    with caplog.at_level(logging.WARNING):
        assert results.harness() == {}
    assert "counts as not there" in caplog.text


def test_run_and_task_tell_settings_and_stamp(tmp_path):
    begun(tmp_path, options={"needle": {"samples": 2}})
    begun(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"] == SETTINGS and run["starts"] == [STAMP, STAMP] and run["methods"] == ["beacon:8"]
    task = json.loads((tmp_path / "needle" / "task.json").read_text())
    assert task["settings"] == SETTINGS and task["stamp"] == STAMP and task["metrics"] == {"accuracy": True}
    assert task["options"] == {"samples": 2}


def test_what_the_harness_measured_is_brought_together(tmp_path):
    results = begun(tmp_path)
    wrong = {"status": "failed", "reason": "?", "metrics": {}, "documents": 0}
    right = {"metrics": {"acc": {"value": 1.0, "stderr": None}}, "documents": 3}
    results.add_harness("beacon", {"harness": "0.4", "tasks": {"one": wrong, "two": right}, "suites": {}}, rank=1)
    results.add_harness("beacon", {"harness": "0.4", "tasks": {"one": right}, "suites": {}})
    results.add_harness("beacon", {"tasks": {}, "suites": {"both": right}})
    found = results.harness()
    assert found["beacon"]["tasks"] == {"one": right, "two": right} and found["beacon"]["harness"] == "0.4"
    assert found["beacon"]["suites"] == {"both": right}


def part(length: int, **values) -> dict:
    metrics = {} if "status" in values else {str(length): {"value": 0.5, "stderr": None}}
    return {"length": length, "metrics": metrics, "documents": 3 * bool(metrics), **values}


def test_lengths_of_a_task_are_brought_together(tmp_path):
    results = begun(tmp_path)
    lost = part(4096, status="cannot-run", reason="no memory", again=True)
    for rank, piece in ((1, part(8192)), (0, lost), (0, part(1024))):
        entry = of_parts({str(piece["length"]): piece})
        results.add_harness("beacon", {"tasks": {"ruler_vt": entry}, "suites": {}}, rank)
    entry = results.harness()["beacon"]["tasks"]["ruler_vt"]
    assert list(entry["metrics"]) == ["1024", "8192"] and entry["documents"] == 3
    assert (entry["status"], entry["reason"]) == ("cannot-run", "4096: no memory")
    assert {name: finished(piece) for name, piece in parts(entry).items()} == {
        "1024": True,
        "4096": False,
        "8192": True,
    }
    results.add_harness("beacon", {"tasks": {"ruler_vt": of_parts({"4096": part(4096)})}, "suites": {}}, 1)
    entry = results.harness()["beacon"]["tasks"]["ruler_vt"]
    assert list(entry["metrics"]) == ["1024", "4096", "8192"] and "status" not in entry


def test_entries_of_older_folders_have_a_part_for_each_length():
    old = {"documents": 3, "metrics": {"1024": {"value": 1.0}, "4096": {"value": 0.0}}}
    assert set(parts(old)) == {"1024", "4096"} and all(map(finished, parts(old).values()))
    void = {"documents": 0, "metrics": {}, "status": "cannot-run", "reason": "one length"}
    assert parts(void) == {}  # all lengths are done again
    new = of_parts({"8192": part(8192)})
    assert set(added(old, new)["metrics"]) == set(better(old, new)["metrics"]) == {"1024", "4096", "8192"}
    assert finished(better({**void, "status": "failed"}, void))


def test_items_have_names_of_their_own():
    task = FakeNeedle()
    items = list(task.items(None, None))
    with pytest.raises(ValueError, match="names of their own"):
        TaskHead.of(task, [*items, items[0]])


def test_fingerprint_changes_with_weights():
    model = fake_model()
    before = model_fingerprint(model)
    assert model_fingerprint(fake_model()) == before
    next(model.parameters()).data[:, 0] += 1
    assert model_fingerprint(model) != before


def test_fingerprint_of_a_tokenizer(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    assert before == tokenizer_fingerprint(copy.deepcopy(tokenizer)) and before["chat_template"] is None
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(other)["tokens"] == before["tokens"] and tokenizer_fingerprint(other) != before
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["beacon"])
    assert tokenizer_fingerprint(other)["tokens"] != before["tokens"]
    assert tokenizer_fingerprint(None) is None


def test_fingerprint_of_files(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root / "data" / "inner").mkdir(parents=True)
        (tmp_path / root / "data" / "inner" / "text.txt").write_text("words")
        (tmp_path / root / "data" / "large").write_bytes(bytes(1 << 20))
    folders = [tmp_path / root / "data" for root in ("one", "two")]
    before = files_fingerprint(folders[:1])
    (folders[1] / ".cache").mkdir()
    (folders[1] / ".cache" / "note").write_text("of a download")
    assert files_fingerprint(folders[1:]) == before
    with (folders[1] / "large").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert files_fingerprint(folders[1:]) != before
    (folders[0] / "inner" / "text.txt").write_text("wards")
    assert files_fingerprint(folders[:1]) != before


def test_files_that_git_does_not_know_are_dirt(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").write_text("")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(beacon, "__file__", str(tmp_path / "__init__.py"))
    assert stamp()["dirty"] is False
    (tmp_path / "new.py").write_text("")
    assert stamp()["dirty"] is True


def test_stamp_says_where_and_with_what():
    made = json.loads(json.dumps(stamp()))
    assert set(made["versions"]) == {"python", "activation-beacon", "torch", "transformers", "triton", "lm_eval"}
    assert made["machine"]["cpu"] and made["machine"]["threads"] >= 1
    assert made["commit"] is None or len(made["commit"]) == 40
    assert (made["commit"] is None) == (made["dirty"] is None)


def test_no_commit_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(beacon, "__file__", str(tmp_path / "__init__.py"))
    made = stamp()
    assert made["commit"] is None and made["dirty"] is None
