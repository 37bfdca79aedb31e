"""Running a suite: what is finished stays, what cannot run is a result, processes share the work."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from beacon.evaluation.failures import CannotRun, NotAvailable
from beacon.evaluation.results import Record, Results, append_record
from beacon.evaluation.running import Totals, run_item, run_series, run_suite
from beacon.evaluation.suite import Result
from tests.evaluation.fake_suite import FakeCost, FakeMethod, FakeNeedle, FakeTurns, fake_model, methods, tasks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wrapped() -> Any:
    return fake_model()


def everything(folder: Path) -> dict[tuple[str, str], list[Record]]:
    results = Results(folder)
    return {(h.name, m): results.records(h, m) for h in results.tasks() for m in results.methods(h.name)}


def scores(folder: Path) -> dict[tuple[str, str, str], Any]:
    """All that must be the same however items were run."""
    return {
        (*key, record.item): (record.status, dict(record.scores), record.output, record.reason)
        for key, records in everything(folder).items()
        for record in records
    }


def test_every_method_reads_every_item(wrapped, tmp_path):
    told = []
    mine = methods()
    totals = run_suite(wrapped, None, tasks(), mine, tmp_path, lambda *said: told.append(said))
    assert totals == Totals(ok=24 * 4 - 8 + 18 * 4 - 6 + 3 * 4 - 1, cannot_run=15, failed=0)
    found = everything(tmp_path)
    assert list(found) == [(task, method) for task in ("perplexity", "needle", "cost") for method in methods()]
    assert told[0] == ("stock", 0, 45) and told[-1] == ("beacon:8", 45, 45)
    assert [method.closed for method in mine.values()] == [1] * 4
    reasons = {record.reason for record in found["needle", "stock"] if record.status == "cannot-run"}
    assert reasons == {"16384 tokens exceed the 4096 that stock can read"}


def test_finished_items_are_not_run_again(wrapped, tmp_path, monkeypatch):
    run_suite(wrapped, None, tasks(), methods(), tmp_path)
    before = scores(tmp_path)
    monkeypatch.setattr(FakeNeedle, "run", lambda *_: pytest.fail("it ran again"))
    totals = run_suite(wrapped, None, tasks(), methods(), tmp_path)
    assert totals.ok + totals.cannot_run == len(before)
    assert scores(tmp_path) == before
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 2


def test_tasks_and_methods_are_added_to_a_folder(wrapped, tmp_path):
    some = methods()
    run_suite(wrapped, None, tasks()[:1], {"beacon": some["beacon"]}, tmp_path)
    run_suite(wrapped, None, tasks()[1:], some, tmp_path)
    run_suite(wrapped, None, tasks(), some, tmp_path)
    run_suite(wrapped, None, tasks(), methods(), tmp_path / "at once")
    assert scores(tmp_path) == scores(tmp_path / "at once")


@pytest.mark.parametrize("stop", [0, 1, 7, 29])
def test_a_run_that_is_killed_loses_one_item_and_goes_on(wrapped, tmp_path, stop, monkeypatch):
    run_suite(wrapped, None, tasks(), methods(), tmp_path / "whole")
    count = 0
    original = FakeNeedle.run

    def killed(self: Any, *args: Any) -> Result:
        nonlocal count
        if count == stop:
            raise KeyboardInterrupt
        count += 1
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FakeNeedle, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path / "killed")
    assert sum(map(len, everything(tmp_path / "killed").values())) == stop
    run_suite(wrapped, None, tasks()[1:2], methods(), tmp_path / "killed")
    wanted = {key: value for key, value in scores(tmp_path / "whole").items() if key[0] == "needle"}
    assert scores(tmp_path / "killed") == wanted


KILLED = """
import os, signal, sys
from tests.evaluation import fake_suite
from beacon.evaluation.running import run_suite

count, run = 0, fake_suite.FakeNeedle.run

def killed(*args):
    global count
    count += 1
    if count > 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(*args)

fake_suite.FakeNeedle.run = killed
run_suite(fake_suite.fake_model(), None, [fake_suite.FakeNeedle()], fake_suite.methods(), sys.argv[1])
"""


def test_a_run_that_is_killed_outright_keeps_all_but_the_item_it_was_at(wrapped, tmp_path):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    assert sum(map(len, everything(tmp_path / "killed").values())) == 20
    run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path / "killed")
    run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path / "whole")
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")


def test_damaged_items_are_done_again(wrapped, tmp_path):
    run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path)
    before = scores(tmp_path)
    file = tmp_path / "needle" / "beacon.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][: len(lines[3]) // 2] + b"\n"
    lines[5] = b"\xff\x00\n"
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path)
    assert scores(tmp_path) == before


def test_a_mistake_is_recorded_told_and_tried_again(wrapped, tmp_path, caplog):
    broken = "length 4096, depth 0.5, sample 1"
    totals = run_suite(wrapped, None, [FakeNeedle(broken=broken)], methods(), tmp_path)
    assert (totals.failed, totals.cannot_run) == (4, 6)
    assert f"needle, {broken} failed" in caplog.text
    failed = [r for records in everything(tmp_path).values() for r in records if r.status == "failed"]
    (reason,) = {record.reason for record in failed}
    assert re.fullmatch(rf"KeyError: '{broken}' \(fake_suite\.py:\d+\)", reason)
    totals = run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path)
    assert totals.failed == 0
    run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path / "without")
    assert scores(tmp_path / "without") == scores(tmp_path)


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (CannotRun("too\n long"), "cannot-run", "too long"),
        (NotImplementedError("the rope type must be 'default'"), "cannot-run", "the rope type must be 'default'"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "cannot-run", "out of memory: CUDA out of memory. Tried"),
        (MemoryError(), "cannot-run", "out of memory: "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "cannot-run", "out of memory: "),
        (RuntimeError("shapes"), "failed", "RuntimeError: shapes"),
        (ValueError("x" * 900), "failed", "ValueError: xxx"),
    ],
)
def test_what_comes_of_an_exception(error, status, reason):
    task = FakeCost()

    def fail(*_: Any) -> Result:
        raise error

    task.run = fail
    record = run_item(task, FakeMethod("beacon"), None, None, next(iter(task.items(None, None))))
    assert record.status == status and record.reason is not None
    assert record.reason.startswith(reason) and len(record.reason) < 600


@pytest.mark.parametrize(
    "error, again",
    [
        (CannotRun("too long"), False),
        (NotAvailable("no network"), True),
        (CannotRun("kvpress: out of memory: Tried"), True),
        (MemoryError(), True),
        (NotImplementedError("never"), False),
    ],
)
def test_what_may_pass_is_tried_again(wrapped, tmp_path, error, again):
    task = FakeCost()

    def fail(*_: Any) -> Result:
        raise error

    task.run = fail
    some = {"beacon": methods()["beacon"]}
    assert run_suite(wrapped, None, [task], some, tmp_path) == Totals(ok=0, cannot_run=3, failed=0)
    totals = run_suite(wrapped, None, [FakeCost()], some, tmp_path)
    assert (totals.ok, totals.cannot_run) == ((3, 0) if again else (0, 3))


def test_a_record_tells_its_start(wrapped, tmp_path):
    some = methods()
    run_suite(wrapped, None, [FakeCost()], {"stock": some["stock"]}, tmp_path)
    run_suite(wrapped, None, [FakeCost()], some, tmp_path)
    starts = {method: {r.start for r in records} for (_, method), records in everything(tmp_path).items()}
    assert starts == {"stock": {1}, "sliding-window": {2}, "beacon": {2}, "beacon:8": {2}}


def test_a_method_with_other_options_is_refused(wrapped, tmp_path):
    run_suite(wrapped, None, [FakeCost()], methods(), tmp_path)
    with pytest.raises(ValueError, match=r"got sliding-window\.window absent \(now 64\)"):
        run_suite(wrapped, None, [FakeCost()], methods(), tmp_path, options={"sliding-window": {"window": 64}})


def test_other_data_tokenizer_or_model_of_a_method_are_refused(wrapped, tmp_path, tokenizer):
    task, method = FakeCost(), methods()["beacon"]
    task.data, method.path = tmp_path / "text.txt", tmp_path / "model"
    task.data.write_text("one")
    method.path.mkdir()

    def again() -> Totals:
        return run_suite(wrapped, tokenizer, [task], {"fine-tuned": method}, tmp_path / "out")

    again()
    again()
    for file, words in ((task.data, r"cost\.files"), (method.path / "weights", r"fine-tuned\.files")):
        before = file.read_text() if file.exists() else None
        file.write_text("another")
        with pytest.raises(ValueError, match=f"same options, got {words}"):
            again()
        file.unlink() if before is None else file.write_text(before)
    again()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"same settings, got tokenizer\.chat_template"):
        again()


def test_scores_do_not_depend_on_what_ran_before(wrapped, tmp_path):
    random.seed(7)
    torch.manual_seed(7)
    before = (random.getstate(), torch.get_rng_state())
    run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path / "all")
    assert (random.getstate(), torch.get_rng_state())[0] == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    run_suite(wrapped, None, [FakeNeedle()], {"beacon": methods()["beacon"]}, tmp_path / "one")
    wanted = {key: value for key, value in scores(tmp_path / "all").items() if key[1] == "beacon"}
    assert scores(tmp_path / "one") == wanted
    run_suite(wrapped, None, [FakeNeedle()], {"beacon": methods()["beacon"]}, tmp_path / "seed", seed=1)
    assert scores(tmp_path / "seed") != wanted


def test_another_model_is_refused_unless_overwritten(wrapped, tmp_path):
    run_suite(wrapped, None, [FakeNeedle()], methods(), tmp_path)
    other = fake_model()
    next(other.parameters()).data += 1
    with pytest.raises(ValueError, match=r"same settings, got model\.weights"):
        run_suite(other, None, [FakeNeedle()], methods(), tmp_path)
    with pytest.raises(ValueError, match="same items of needle"):
        run_suite(wrapped, None, [FakeNeedle(samples=3)], methods(), tmp_path)
    totals = run_suite(other, None, [FakeCost()], methods(), tmp_path, overwrite=True)
    assert totals.ok == 11 and [head.name for head in Results(tmp_path).tasks()] == ["cost"]


def test_overwriting_does_not_take_other_folders(wrapped, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold results"):
        run_suite(wrapped, None, [FakeCost()], methods(), tmp_path, overwrite=True)


@pytest.mark.parametrize(
    "chosen, some, words",
    [
        ([], methods(), "needs tasks and methods, got 0 and 4"),
        ([FakeCost()], {}, "needs tasks and methods, got 1 and 0"),
        ([FakeCost(), FakeCost()], methods(), "'cost' twice"),
        ([FakeCost(name="harness")], methods(), "must not be named harness or figures"),
    ],
)
def test_nothing_to_run_is_refused(wrapped, tmp_path, chosen, some, words):
    with pytest.raises(ValueError, match=words):
        run_suite(wrapped, None, chosen, some, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_data_stop_the_run_before_it_begins(wrapped, tmp_path):
    task = FakeCost()

    def missing(*_: Any) -> Any:
        raise FileNotFoundError("get the data with ... and put them there")

    task.items = missing
    with pytest.raises(FileNotFoundError, match="get the data"):
        run_suite(wrapped, None, [FakeNeedle(), task], methods(), tmp_path)
    assert not list(tmp_path.iterdir())


def launch(folder: Path, command: list[str]) -> None:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *command, "-m", "tests.evaluation.fake_suite", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_processes_give_what_one_gives(wrapped, tmp_path):
    """With torchrun; a run by one process goes on in two."""
    run_suite(wrapped, None, [*tasks(), FakeTurns()], methods(), tmp_path / "one")
    begun = {**methods()}
    run_suite(wrapped, None, tasks()[:1], {"sliding-window": begun["sliding-window"]}, tmp_path / "two")
    launch(tmp_path / "two", ["torch.distributed.run", "--standalone", "--nproc-per-node=2"])
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    parts = {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "two" / "needle").glob("*.jsonl")}
    assert parts["beacon.jsonl"] == parts["beacon.rank1.jsonl"] == 9
    assert not (tmp_path / "two" / "perplexity" / "sliding-window.rank1.jsonl").exists()
    files = [tmp_path / "two" / "turns" / name for name in ("stock.jsonl", "stock.rank1.jsonl")]
    items = [[json.loads(line)["item"] for line in file.read_text().splitlines()] for file in files]
    turns = [[f"turn {turn}, sample {sample}" for sample in some for turn in (1, 2, 3)] for some in ((0, 2), (1,))]
    assert items == turns  # no series is split
    starts = json.loads((tmp_path / "two" / "run.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [1, 2]
    again = run_suite(wrapped, None, [*tasks(), FakeTurns()], methods(), tmp_path / "two")  # and goes on in one
    assert again.failed == 0 and scores(tmp_path / "two") == scores(tmp_path / "one")


@pytest.mark.slow
def test_accelerate_launch(wrapped, tmp_path):
    """`--multi_gpu` is what makes accelerate start several processes on one machine, also where there is no GPU."""
    run_suite(wrapped, None, [*tasks(), FakeTurns()], methods(), tmp_path / "one")
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch(tmp_path / "two", ["accelerate.commands.launch", *options, "--dynamo_backend", "no"])
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    assert (tmp_path / "two" / "needle" / "beacon.rank1.jsonl").exists()


def test_only_one_file_is_added_to(tmp_path):
    """What a process of rank 1 left behind is never written to by rank 0."""
    append_record(tmp_path / "x.rank1.jsonl", Record(item="a", place={}, status="ok"))
    before = (tmp_path / "x.rank1.jsonl").read_bytes()
    append_record(tmp_path / "x.jsonl", Record(item="b", place={}, status="ok"))
    assert (tmp_path / "x.rank1.jsonl").read_bytes() == before


# -- series ------------------------------------------------------------------------------------------------------------


def turns(*numbers: int, sample: int) -> list[str]:
    return [f"turn {number}, sample {sample}" for number in numbers]


def test_a_series_is_run_at_once_and_in_its_order(wrapped, tmp_path):
    task, said = FakeTurns(), []
    one = {"beacon": methods()["beacon"]}
    assert run_suite(wrapped, None, [task], one, tmp_path, lambda *told: said.append(told)) == Totals(9, 0, 0)
    assert task.asked == [turns(1, 2, 3, sample=sample) for sample in range(3)]
    lines = (tmp_path / "turns" / "beacon.jsonl").read_text().splitlines()
    assert [json.loads(line)["item"] for line in lines] == [name for some in task.asked for name in some]
    assert said == [("beacon", done, 9) for done in range(10)]
    records = everything(tmp_path)["turns", "beacon"]
    assert [record.item for record in records] == [item.name for item in task.items(None, None)]
    for record, item in zip(records, task.items(None, None), strict=True):  # chance is that of the item
        alone = next(run_series(task, one["beacon"], wrapped, None, [item]))
        assert (record.scores, record.output) == (alone.scores, alone.output)


@pytest.mark.parametrize(
    "error, totals",
    [
        (CannotRun("too long"), Totals(8, 1, 0)),
        (torch.OutOfMemoryError("CUDA out of memory"), Totals(8, 1, 0)),
        (KeyError("a mistake"), Totals(8, 0, 1)),
    ],
)
def test_a_series_goes_on_after_an_item_that_cannot_be_read(wrapped, tmp_path, error, totals):
    broken, one = "turn 2, sample 1", {"beacon": methods()["beacon"]}
    task = FakeTurns(errors={broken: error})
    assert run_suite(wrapped, None, [task], one, tmp_path) == totals
    assert task.asked[1:3] == [turns(1, 2, 3, sample=1), turns(3, sample=1)]
    again = FakeTurns()
    run_suite(wrapped, None, [again], one, tmp_path)
    assert again.asked == ([] if isinstance(error, CannotRun) else [[broken]])  # what is done is not passed on
    if again.asked:
        run_suite(wrapped, None, [FakeTurns()], one, tmp_path / "without")
        assert scores(tmp_path) == scores(tmp_path / "without")


def test_every_item_of_a_series_fails_by_itself(wrapped, tmp_path):
    errors = {name: KeyError(name) for name in turns(1, 2, 3, sample=0)}
    task, one = FakeTurns(samples=1, errors=errors), {"beacon": methods()["beacon"]}
    assert run_suite(wrapped, None, [task], one, tmp_path) == Totals(0, 0, 3)
    assert [len(some) for some in task.asked] == [3, 2, 1]


@pytest.mark.parametrize("stop", range(4))
def test_a_series_that_is_killed_keeps_what_was_done(wrapped, tmp_path, stop, monkeypatch):
    count, one, run = 0, {"beacon": methods()["beacon"]}, FakeTurns.run

    def killed(*args: Any) -> Result:
        nonlocal count
        if count == stop:
            raise KeyboardInterrupt
        count += 1
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(FakeTurns, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run_suite(wrapped, None, [FakeTurns()], one, tmp_path)
    assert len(everything(tmp_path).get(("turns", "beacon"), [])) == stop
    task = FakeTurns()
    run_suite(wrapped, None, [task], one, tmp_path)
    assert sum(map(len, task.asked)) == 9 - stop
    run_suite(wrapped, None, [FakeTurns()], one, tmp_path / "whole")
    assert scores(tmp_path) == scores(tmp_path / "whole")


def test_what_a_series_holds_is_let_go_before_the_next(wrapped, tmp_path):
    held: list[str] = []

    class Holding(FakeTurns):
        def run_series(self, method: Any, model: Any, tokenizer: Any, items: Any) -> Any:
            assert not held
            held.append(items[0].name)
            try:
                yield from super().run_series(method, model, tokenizer, items)
                pytest.fail("no more is asked for than there is")
            finally:
                held.clear()

    assert run_suite(wrapped, None, [Holding()], {"beacon": methods()["beacon"]}, tmp_path).failed == 0
    assert not held


def test_a_series_that_gives_too_few_results_is_a_mistake(wrapped):
    class Short(FakeTurns):
        def run_series(self, method: Any, model: Any, tokenizer: Any, items: Any) -> Any:
            yield from list(super().run_series(method, model, tokenizer, items))[:1]

    task = Short(samples=1)
    records = list(run_series(task, methods()["beacon"], wrapped, None, list(task.items(None, None))))
    assert [record.status for record in records] == ["ok", "failed", "ok"]  # the third was asked for anew
    assert "must give a result for every item" in records[1].reason


def test_an_error_of_a_series_before_its_first_item(wrapped):
    class Refusing(FakeTurns):
        def run_series(self, *_: Any) -> Any:
            raise CannotRun("no dialogues")

    task = Refusing(samples=1)
    records = list(run_series(task, methods()["beacon"], wrapped, None, list(task.items(None, None))))
    assert [(record.status, record.reason) for record in records] == [("cannot-run", "no dialogues")] * 3
