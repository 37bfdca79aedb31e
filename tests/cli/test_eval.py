"""`beacon eval` and `beacon bench`: the shipped model on real tasks, small; exit codes and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import beacon
from beacon.cli import main
from beacon.evaluation.failures import CannotRun
from beacon.evaluation.report import summarise
from beacon.evaluation.results import Results
from beacon.evaluation.suite import Result
from beacon.evaluation.tasks.passkey import PasskeyTask

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--tasks", "passkey", "--lengths", "300", "600", "--limit", "2", "--methods", "truncate-left", "beacon"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    more = ["--ratios", "8", "--set", "passkey.depths=[0.1]", "perplexity.targets=64"]
    command = [*SMALL, "--tasks", "perplexity", "passkey", *more]
    assert main(["eval", *command, "--out", str(folder)]) == 0
    return folder


def test_eval_measures_and_reports(measured):
    summary = summarise(Results(measured))
    assert [task.name for task in summary.tasks] == ["perplexity", "passkey"]
    assert summary.methods == ["truncate-left", "beacon", "beacon:8"]
    assert summary.tasks[1].keys == ("length", "depth") and summary.tasks[1].values("depth") == [0.1]
    assert summary.run["options"]["perplexity"] == {"lengths": [300, 600], "limit": 2, "targets": 64}
    assert summary.run["options"]["beacon:8"] == {}
    assert set(summary.run["settings"]["tokenizer"]) == {"tokens", "chat_template"}
    found = summary.tasks[1].group("beacon", length=600).metrics["digits"]
    assert found.n == 2 and found.value > 0.5
    assert (measured / "report.html").read_text().startswith("<!doctype html>")
    assert {file.name for file in (measured / "figures").iterdir()} == {"perplexity.png", "passkey.png"}


def test_eval_goes_on_and_tells_what_it_found(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PasskeyTask, "run", lambda *_: pytest.fail("it ran again"))
    more = ["--set", "passkey.depths=[0.1]"]
    assert main(["eval", *SMALL, *more, "--out", str(measured)]) == 0
    printed = capsys.readouterr().out
    assert "found (%) by tokens of text, depth 10% (higher is better)" in printed and "0 failed" in printed
    assert f"wrote {measured / 'report.html'}" in printed


def test_what_fails_or_cannot_run_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    def run(self: Any, method: Any, *_: Any) -> Result:
        if method.name.startswith("truncate"):
            raise CannotRun("this is too long for it")
        raise KeyError("oops") if broken else CannotRun("nor for this")

    monkeypatch.setattr(PasskeyTask, "run", run)
    broken = True
    assert main(["eval", *SMALL, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "0 measured, 4 cannot run, 4 failed" in printed and "this is too long for it" in printed
    assert "KeyError: 'oops'" in printed
    broken = False
    assert main(["eval", *SMALL, "--out", str(tmp_path)]) == 0
    assert "0 measured, 8 cannot run, 0 failed" in capsys.readouterr().out


def test_another_run_is_refused_or_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PasskeyTask, "run", lambda *_: Result({"found": 1.0, "digits": 1.0}))
    assert main(["eval", *SMALL, "--out", str(tmp_path)]) == 0
    for change, words in (("--seed=1", "seed 0 (now 1)"), ("--limit=3", "passkey.limit 2 (now 3)")):
        assert main(["eval", *SMALL, change, "--out", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    assert main(["eval", *SMALL, "--seed", "1", "--overwrite", "--out", str(tmp_path)]) == 0
    assert Results(tmp_path).run["settings"]["seed"] == 1


@pytest.mark.parametrize(
    "command, words",
    [
        (["--tasks", "needel"], "--tasks must be among perplexity, passkey, needle, "),
        (["--tasks", "needel"], "longbench2, infinitebench, babilong, mmlu"),
        (["--tasks", "needel"], "got needel (did you mean needle"),
        (["--methods", "beakon"], "got 'beakon' (did you mean beacon?)"),
        (["--methods", "beacon:7"], "must divide by ratio"),
        (["--tasks", "ask-many"], "ask-many needs data, a Parquet file"),
        (["--tasks", "passkey", "--data", "nothere"], "no such file or folder of text: nothere"),
        (["--tasks", "passkey", "--lengths", "0"], "lengths must be at least 2, got 0"),
        (["--tasks", "passkey", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--set", "passkey"], "--set must be NAME.OPTION=VALUE, got 'passkey'"),
        (["--set", "topics.topics=3"], "--set must name a task or method of this run"),
        (["--set", "passkey.wording=prose"], "options of the task passkey must be among"),
        (["--set", "stock.ratio=8"], "stock takes no option, got ratio"),
        (["--methods", "beacon:8", "--set", "beacon:8.ratio=4"], "must not give what a method's name says"),
        (["--methods", "beacon:8", "--set", "beacon.ratio=4"], "must not give what a method's name says"),
        (["--methods", "beacon:adaptive", "--set", "beacon.policy=random"], "beacon takes one policy, got adaptive"),
        (["--methods", "pi:abc"], "pi takes a number, got 'abc'; as in pi:8."),
        (["--methods", "fine-tuned:/no/such"], "must name a model's folder or hub id, got '/no/such'"),
        (["--device", "nowhere"], "device must be one that PyTorch finds"),
        (["--model", "/no/such/model"], "no such folder: /no/such/model"),
        (["--out", __file__], "results need a folder, got the file"),
        (["--out", str(Path(__file__).parent)], "must be empty or hold results, got other files"),
    ],
)
def test_mistakes_are_one_line(command, words, tmp_path, capsys):
    out = [] if "--out" in command else ["--out", str(tmp_path / "out")]
    assert main(["eval", "--tasks", "passkey", *out, *command]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def write_arc(data: Path) -> None:
    """Questions of a known form in place of ARC's."""
    for name in ("ARC-Easy", "ARC-Challenge"):
        folder = data / "ai2_arc" / name
        folder.mkdir(parents=True)
        choices = {"text": ["one", "two", "three", "four"], "label": list("ABCD")}
        rows = [{"id": str(n), "question": f"What is {n}?", "choices": choices, "answerKey": "B"} for n in range(3)]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_standard_tasks_go_into_the_same_report(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    write_arc(tmp_path / "data")
    command = ["eval", "--tasks", "arc", "--data", str(tmp_path / "data"), "--methods", "stock", "beacon:8"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "4 measured, 0 cannot run, 0 failed" in capsys.readouterr().out
    found = Results(tmp_path / "out").harness()
    assert set(found) == {"stock", "beacon:8"} and found["beacon:8"]["ratios"] == 8
    assert found["stock"]["suites"]["arc"]["members"] == ["arc_challenge", "arc_easy"]
    assert "arc_easy" in (tmp_path / "out" / "report.html").read_text()
    before = {file: file.read_bytes() for file in (tmp_path / "out" / "harness").glob("*.json")}
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert {file: json.loads(text) for file, text in before.items()} == {
        file: json.loads(file.read_text()) for file in before
    }
    assert (tmp_path / "out" / "harness" / "answers" / "stock.jsonl").is_file()
    assert main(["bench", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    command[command.index("arc")] = "gsm8k"
    assert main([*command, "--out", str(tmp_path / "more")]) == 2
    assert "hf download openai/gsm8k" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, words",
    [
        (["--tasks", "niah_singel_2"], "got niah_singel_2 (did you mean niah_single_2"),
        (["--tasks", "arc", "--set", "harness.chat_template=true"], "the chat template needs a tokenizer that has one"),
        (["--tasks", "arc", "--set", "harness.chat_templat=true"], "got chat_templat (did you mean chat_template?)"),
        (["--tasks", "arc", "--set", "harness.stock=true"], "options of the harness must be among data, limit"),
        (["--tasks", "arc", "--limit", "0"], "limit must be a number of documents, got 0"),
        (["--tasks", "babilong", "--lengths", "1500"], "BABILong has lengths of whole thousands of tokens, got 1500"),
        (["--tasks", "passkey", "gsm8k", "--set", "harness.data=DATA"], "hf download openai/gsm8k"),
    ],
)
def test_mistakes_with_standard_tasks_are_told_before_anything_runs(command, words, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(PasskeyTask, "run", lambda *_: pytest.fail("it began"))
    write_arc(tmp_path / "data")
    command = [word.replace("DATA", str(tmp_path / "data")) for word in command]
    if "harness.data" not in "".join(command):
        command += ["--data", str(tmp_path / "data")]
    assert main(["eval", *command, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_of_a_method_cannot_change_on_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PasskeyTask, "run", lambda *_: Result({"found": 1.0, "digits": 1.0}))
    command = ["eval", *SMALL, "--methods", "sliding-window", "sliding-window:128", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--set", "sliding-window.window=64"]) == 2
    assert "sliding-window.window absent (now 64)" in capsys.readouterr().err
    more = ["--set", "sliding-window.window=64", "sliding-window.sinks=2"]
    assert main([*command, *more, "--overwrite"]) == 0
    options = Results(tmp_path).run["options"]
    assert options["sliding-window"] == {"window": 64, "sinks": 2} and options["sliding-window:128"] == {"sinks": 2}


def test_bench_compares(measured, tmp_path, monkeypatch, capsys):
    assert main(["bench", str(measured), str(measured)]) == 0
    printed = capsys.readouterr().out
    assert "0 better, 0 worse, 0 items lost" in printed and "truncate-left" in printed
    right = 1.0
    monkeypatch.setattr(PasskeyTask, "run", lambda *_: Result({"found": right, "digits": right}))
    command = ["eval", "--tasks", "passkey", "--lengths", "300", "600", "--methods", "beacon", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0
    right = 0.0
    assert main([*command, str(tmp_path / "b")]) == 0
    assert main([*command, str(tmp_path / "c"), "--seed", "1"]) == 0
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    printed = capsys.readouterr().out
    assert "WORSE" in printed and "(worse)" in printed and "of which 1 decide: 0 better, 1 worse" in printed
    assert " 10 " in printed and "texts" in printed and "length 300" in printed  # places that moved
    assert main(["bench", str(tmp_path / "b"), str(tmp_path / "a")]) == 0
    assert "1 better" in capsys.readouterr().out
    assert main(["bench", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "settings differ: seed 0 (now 1)" in printed and "do not decide): passkey.seed 0 (now 1)" in printed
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    (tmp_path / "d" / "passkey" / "beacon.jsonl").unlink()
    assert main(["bench", str(tmp_path / "a"), str(tmp_path / "d")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "items not measured in both" in printed and "0 worse, 20 items lost" in printed


@pytest.mark.parametrize(
    "command, words",
    [
        (["nothere"], "nothere must be a folder of results"),
        (["MEASURED", "--threshold", "-1"], "must be a share of at least 0, got -1"),
    ],
)
def test_bench_mistakes(measured, command, words, capsys):
    command = [str(measured) if word == "MEASURED" else word for word in command]
    assert main(["bench", str(measured), *command]) == 2
    assert words in capsys.readouterr().err


def test_a_saved_model_has_its_own_beacons(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = beacon.default_model()
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(PasskeyTask, "run", lambda *_: Result({"found": 1.0, "digits": 1.0}))
    assert main(["eval", *SMALL, "--out", str(tmp_path / "default")]) == 0
    assert main(["eval", *SMALL, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "default")]) == 0


@pytest.mark.slow
def test_processes_share_the_command(measured, tmp_path):
    pytest.importorskip("lm_eval")
    write_arc(tmp_path / "data")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = ["-m", "beacon", "eval", *SMALL, "--tasks", "passkey", "arc"]
    command += ["--set", "passkey.depths=[0.1]", f"harness.data={tmp_path / 'data'}", "--out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outputs = []
    for folder, start in (("two", launch), ("one", [])):
        whole = [sys.executable, *start, *command, str(tmp_path / folder)]
        done = subprocess.run(whole, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        outputs.append(done.stdout.replace(str(tmp_path / folder), "FOLDER"))
    assert outputs[0] == outputs[1] and outputs[0].count("wrote FOLDER") == 3
    found, wanted = (Results(tmp_path / folder) for folder in ("two", "one"))
    (head,) = found.tasks()
    for method in ("truncate-left", "beacon"):
        pairs = zip(found.records(head, method), wanted.records(head, method), strict=True)
        assert all((a.item, a.scores, a.output) == (b.item, b.scores, b.output) for a, b in pairs)
        assert found.harness()[method]["suites"] == wanted.harness()[method]["suites"]
    assert (tmp_path / "two" / "harness" / "beacon.rank1.json").exists()
