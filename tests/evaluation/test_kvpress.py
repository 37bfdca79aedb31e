"""kvpress in a process of its own: its environment, the talk with it, and (where there is one) kvpress itself."""

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import beacon
from beacon.evaluation import KVPress, Stock, measure_perplexity
from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.kvpress import PRESSES, environment, process, weights, worker
from beacon.evaluation.methods.kvpress.weights import stock_folder
from tests.evaluation.tiny import tiny_llama, word_tokenizer
from tests.tiny_models import tiny_model

VARIABLE = "KVPRESS_PYTHON"  # an interpreter that has kvpress; else the one built by an earlier use is taken

# Stands for the worker: it notes what it gets and follows orders.
FAKE = """
import json, sys
spec = json.loads(sys.argv[1])
print("loading", file=sys.stderr)
if spec["dtype"] == "float64":
    sys.exit("no such precision")
print(json.dumps({"ready": {"torch": "0"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["context"] == [13]:
        print("the reason\\nin two lines", file=sys.stderr)
        sys.exit(3)
    if request["context"] == [14]:
        print(json.dumps({"cannot": "too short"}), flush=True)
        continue
    print(json.dumps({"answers": [q[:2] for q in request["questions"]], "got": request, "spec": spec}), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE)
    return script


@pytest.fixture
def model():
    return beacon.wrap(tiny_llama(320), beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8))


@pytest.fixture(autouse=True)
def _no_process_stays():
    yield
    for workers in list(process._running.values()):
        for known in workers.values():
            if isinstance(known, process.Worker):
                known.close()
    process._running.clear()


# -- the environment -------------------------------------------------------------------------------------------------


class Pip:
    """Stands for ``subprocess.run``: makes files instead of installing."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.commands = fails, []

    def __call__(self, command, **settings):
        assert settings["check"] and "PYTHONPATH" not in settings["env"]
        self.commands.append(command)
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
            (Path(command[-1]) / "lib" / f"python3.{sys.version_info[1]}" / "site-packages").mkdir(parents=True)
        if self.fails and self.fails in command:
            said = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution\n"
            raise subprocess.CalledProcessError(1, command, "", said)


@pytest.fixture
def pip(monkeypatch):
    def use(fails: str = "") -> Pip:
        fake = Pip(fails)
        monkeypatch.setattr(environment.subprocess, "run", fake)
        monkeypatch.setattr(environment, "_failures", {})
        return fake

    return use


@pytest.mark.skipif(os.name == "nt", reason="paths of a venv on POSIX")
def test_the_environment_is_built_once_and_whole(tmp_path, pip, monkeypatch, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    fake = pip()
    with caplog.at_level(logging.WARNING):
        python = environment.interpreter()
    folder = tmp_path / "activation-beacon" / f"kvpress-{environment.VERSION}"
    assert python == folder / "bin" / "python" and python.is_file() and "building an environment" in caplog.text
    (shared,) = folder.rglob("shared.pth")
    assert Path(shared.read_text().strip(), "torch", "__init__.py").is_file()
    install = fake.commands[1]
    assert install[1:4] == ["-m", "pip", "install"] and {*environment.REQUIREMENTS} < {*install}
    assert f"torch=={torch.__version__}" in install  # there already: pip must not change it
    assert environment.interpreter() == python and len(fake.commands) == 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.skipif(os.name == "nt", reason="paths of a venv on POSIX")
def test_an_environment_of_another_pytorch_is_built_anew(tmp_path, pip, monkeypatch) -> None:
    fake = pip()
    environment.interpreter(tmp_path / "own")
    (tmp_path / "own" / "old").touch()
    monkeypatch.setattr(torch, "__version__", "1.0")
    environment.interpreter(tmp_path / "own")
    assert len(fake.commands) == 6 and not (tmp_path / "own" / "old").exists()


@pytest.mark.parametrize("fails", ["venv", "pip", "-c"])
def test_no_environment_is_a_reason_and_not_tried_again(tmp_path, pip, fails, model) -> None:
    fake = pip(fails)
    for _ in range(2):
        with pytest.raises(
            CannotRun, match=r"cannot be built in .*: ERROR: Could not .* ERROR: No matching"
        ) as failure:
            environment.interpreter(tmp_path / "own")
    assert "Retrying" not in str(failure.value) and list(tmp_path.iterdir()) == []
    assert sum("venv" in command for command in fake.commands) == 1


def test_a_folder_that_cannot_be_made(tmp_path, pip) -> None:
    pip()
    (tmp_path / "file").touch()
    with pytest.raises(CannotRun, match="cannot be built"):
        environment.interpreter(tmp_path / "file" / "own")


# -- the process -----------------------------------------------------------------------------------------------------


def test_a_process_serves_many_requests(model, fake) -> None:
    running = process.Worker(model, Path(sys.executable), fake)
    for context in ([1], [2, 3]):
        found = running.ask({"context": context, "questions": [[4, 5, 6], [7]]})
        assert found["answers"] == [[4, 5], [7]] and found["got"]["context"] == context
    assert found["spec"]["dtype"] == "float32" and found["spec"]["device"] == "cpu" and found["spec"]["threads"] >= 1
    assert running.versions == {"torch": "0"} and not (running.folder / "weights").exists()
    with pytest.raises(CannotRun, match=r"^kvpress: too short$"):
        running.ask({"context": [14], "questions": []})
    assert running.runs and running.ask({"context": [1], "questions": []})["answers"] == []
    ended, folder = running._process, running.folder
    running.close()
    running.close()
    assert ended.returncode == 0 and not folder.exists() and not running.runs


def test_a_crash_is_told_with_what_was_said_last(model, fake) -> None:
    running = process.Worker(model, Path(sys.executable), fake)
    with pytest.raises(CannotRun, match=r"ended with 3: loading \| the reason \| in two lines"):
        running.ask({"context": [13], "questions": []})
    assert not running.runs and not running.folder.exists()


def test_a_process_that_was_killed(model, fake) -> None:
    running = process.Worker(model, Path(sys.executable), fake)
    running._process.kill()
    running._process.wait()
    with pytest.raises(CannotRun, match="process ended with -9"):
        running.ask({"context": [1], "questions": []})


def test_an_interrupt_ends_it(model, fake, monkeypatch) -> None:
    running = process.Worker(model, Path(sys.executable), fake)
    monkeypatch.setattr(running, "_answer", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        running.ask({"context": [1], "questions": []})
    assert not running.runs


def test_one_process_for_all_presses_of_a_model(model, fake, monkeypatch) -> None:
    monkeypatch.setattr(process.Worker.__init__, "__defaults__", (fake,))
    methods = [KVPress("snapkv", 4, python=sys.executable), KVPress("streaming-llm", 2, python=sys.executable)]
    for method in methods:
        assert method.answers(model, [1, 2], [[3, 4, 5], []], 5) == [[2, 3], [2]]  # the last token asks
    (running,) = process._running[model].values()
    found = running.ask({**methods[0]._request(model, running), "context": [1], "questions": []})
    assert found["got"]["press"] == "SnapKVPress" and found["got"]["fraction"] == 0.75
    with pytest.raises(CannotRun, match="ended with 3"):
        methods[0].answers(model, [13], [[1]], 5)
    assert methods[0].answers(model, [1], [[3]], 5) == [[3]]  # a new one
    (running,) = process._running[model].values()
    methods[1].close(model)
    assert not running.runs and model not in process._running
    assert methods[1].continue_text(model, torch.tensor([1, 2]), 5) == [2]


def test_a_process_ends_with_its_model(fake, monkeypatch) -> None:
    monkeypatch.setattr(process.Worker.__init__, "__defaults__", (fake,))
    model = beacon.wrap(tiny_llama(), beacon.BeaconConfig(window=16, ratios=(2,)))
    KVPress("snapkv", 4, python=sys.executable).answers(model, [1], [[3]], 5)
    (running,) = process._running[model].values()
    popen = running._process
    del model, running
    gc.collect()
    assert popen.returncode == 0 and not len(process._running)


def test_what_does_not_come_up_is_not_tried_again(fake, monkeypatch) -> None:
    monkeypatch.setattr(process.Worker.__init__, "__defaults__", (fake,))
    model = beacon.wrap(tiny_llama().double(), beacon.BeaconConfig(window=16, ratios=(2,), attention_path="sdpa"))
    method = KVPress("snapkv", 4, python=sys.executable)
    with pytest.raises(CannotRun, match=r"ended with 1: loading \| no such precision"):
        method.answers(model, [1], [[3]], 5)
    monkeypatch.setattr(process, "Worker", None)
    with pytest.raises(CannotRun, match="no such precision"):
        method.answers(model, [1], [[3]], 5)
    monkeypatch.undo()
    with pytest.raises(CannotRun, match="nowhere/python cannot be run"):
        KVPress("snapkv", 4, python="nowhere/python").answers(model, [1], [[3]], 5)


def test_models_that_kvpress_does_not_know() -> None:
    model = beacon.wrap(tiny_model("olmo2"), beacon.BeaconConfig(window=16, ratios=(2,)))
    with pytest.raises(CannotRun, match="reads models of type llama, mistral, phi3, qwen2, qwen3, got olmo2"):
        KVPress("snapkv", 4, python=sys.executable).answers(model, [1], [[3]], 5)


def test_bad_presses_and_ratios() -> None:
    with pytest.raises(ValueError, match=r"press must be one of snapkv, .* got 'knorm'"):
        KVPress("knorm")
    with pytest.raises(ValueError, match="ratio must be at least 1 and finite, got 0"):
        KVPress("snapkv", 0)
    assert KVPress("snapkv", 4).name == "snapkv, ratio 4" and KVPress("kvzip", 2.5).name == "kvzip, ratio 2.5"


# -- the weights -----------------------------------------------------------------------------------------------------


def test_weights_are_saved_without_beacons(model, tmp_path) -> None:
    folder = stock_folder(model, tmp_path / "weights")
    assert folder == tmp_path / "weights" and not (folder / "beacon_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = tiny_llama(320).state_dict()
    assert type(loaded).__name__ == "LlamaForCausalLM" and set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_weights_that_are_on_the_disk_are_taken_from_there(tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = beacon.wrap(model, beacon.BeaconConfig(window=16, ratios=(2,)))
    assert stock_folder(model, tmp_path / "weights") == tmp_path / "base"
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    assert stock_folder(model, tmp_path / "weights") == tmp_path / "weights"
    shorter = {name: tensor[:-1] for name, tensor in tiny_llama().state_dict().items()}
    assert weights._same(tiny_llama().state_dict(), tmp_path / "base")
    assert not weights._same(shorter, tmp_path / "base") and not weights._same({}, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"damaged")
    assert stock_folder(model, tmp_path / "other") == tmp_path / "other"


def test_weights_that_cannot_be_had(model, tmp_path) -> None:
    model.is_quantized = True
    with pytest.raises(CannotRun, match="kvpress reads with plain weights"):
        stock_folder(model, tmp_path / "weights")


# -- what the process does, with a press in kvpress's place ----------------------------------------------------------


class EveryOther:
    """Keeps every other key and value, as hooks of a press would; fraction 0 keeps all."""

    def __init__(self, compression_ratio: float) -> None:
        self.step = 2 if compression_ratio else 1

    @contextlib.contextmanager
    def __call__(self, model):
        seen = []
        hook = model.model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
        yield
        hook.remove()
        for layer in seen[0]["past_key_values"].layers:
            layer.keys, layer.values = layer.keys[:, :, :: self.step], layer.values[:, :, :: self.step]


@pytest.fixture
def served(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kvpress", types.SimpleNamespace(EveryOther=EveryOther))
    stock = AutoModelForCausalLM.from_pretrained(stock_folder(model, tmp_path / "weights"))

    def serve(**request):
        given = {"press": "EveryOther", "fraction": 0.0, "tokenizer": None, "count": 6, "ends": [], **request}
        with torch.inference_mode():
            return worker.serve(stock, json.loads(json.dumps(given)))

    return serve


def test_the_worker_reads_as_the_stock_model_where_nothing_is_dropped(model, served, tmp_path) -> None:
    ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(3))
    context, questions = ids[:120].tolist(), [ids[120:].tolist(), ids[3:7].tolist()]
    expected = Stock().answers(model, context, questions, 6)
    found = served(context=context, questions=questions)
    assert found["answers"] == expected and found["entries"] == 120
    assert found["bytes"] == Stock().held_bytes(model, 120)
    end = expected[0][2]
    assert served(context=context, questions=questions[:1], ends=[end])["answers"] == [
        expected[0][: expected[0].index(end)]
    ]
    assert served(context=[], questions=[context + questions[0]])["answers"] == expected[:1]
    half = served(context=context, questions=questions, fraction=0.5)
    assert half["entries"] == 60 and half["answers"] != expected
    alone = [served(context=context, questions=[question], fraction=0.5)["answers"][0] for question in questions]
    assert half["answers"] == alone


def test_the_worker_writes_logits(model, served, tmp_path) -> None:
    from safetensors.torch import load_file

    ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(3))
    file = tmp_path / "logits.safetensors"
    served(context=ids[:120].tolist(), questions=[ids[120:].tolist()], logits=str(file))
    expected = Stock().read(model, ids, 30).logits
    torch.testing.assert_close(load_file(file)["logits"], expected, atol=2e-5, rtol=1e-4)


# -- kvpress itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def python():
    named = os.environ.get(VARIABLE)
    built = environment.cache_folder() / f"kvpress-{environment.VERSION}"
    if named:
        return named
    if environment._record(built) != environment._wanted():
        pytest.skip(f"needs an interpreter with kvpress: set {VARIABLE}, or let a method build its environment")
    return str(environment.interpreter())


def test_kvpress_reads_the_same_items(python) -> None:
    base = tiny_llama(320, head_dim=32)  # kvzip looks for a key that no query points at, which takes room
    model, tokenizer = beacon.wrap(base, beacon.BeaconConfig(window=16, ratios=(2, 4, 8))), word_tokenizer()
    ids = torch.randint(1, 320, (300,), generator=torch.Generator().manual_seed(3))
    questions = [ids[100:107], ids[9:12]]
    expected = Stock().answers(model, ids, questions, 5)
    for press, what in PRESSES.items():
        assert KVPress(press, 1, tokenizer, python).answers(model, ids, questions, 5) == expected
        method = KVPress(press, 4, tokenizer, python)
        together = method.answers(model, ids, questions, 5)
        assert together == [method.answers(model, ids, [question], 5)[0] for question in questions]
        outcome = method.read(model, ids, 20)
        assert outcome.logits.shape == (20, 320) and outcome.entries == (70 if what.frees else 280) + 20
        (running,) = process._running[model].values()
        asked = {"context": ids.tolist(), "questions": [], "count": 1, "ends": []}
        assert method.held_bytes(model, 300) == running.ask({**method._request(model, running), **asked})["bytes"]
    assert len(process._running[model]) == 1
    full = KVPress("snapkv", 1, python=python).read(model, ids, 20)
    torch.testing.assert_close(full.logits, Stock().read(model, ids, 20).logits, atol=1e-4, rtol=1e-3)
    loss = measure_perplexity(model, [ids], 300, 20, KVPress("snapkv", 4, python=python))
    assert loss.method == "snapkv, ratio 4" and loss.loss > 0
    with pytest.raises(CannotRun, match=r"AssertionError: Query length 30 should be greater than the window size 64"):
        KVPress("snapkv", 4, python=python).answers(model, ids[:30], questions, 5)
    with pytest.raises(CannotRun, match="asks the model in words and needs its tokenizer"):
        KVPress("kvzip", 4, python=python).answers(model, ids, questions, 5)
