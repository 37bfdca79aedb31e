"""Time and memory of reading and decoding."""

import math
import time

import pytest
import torch

import beacon
from beacon.evaluation.methods import Beacon, Method, Outcome, Stock
from beacon.evaluation.methods.kvpress import KVPress
from beacon.evaluation.tasks import make_task, measuring
from beacon.evaluation.tasks.measuring import PeakMemory, now, seconds
from tests.evaluation.tiny import CODE, tiny_llama, word_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model(tokenizer):
    return beacon.wrap(tiny_llama(vocab=len(tokenizer)), beacon.BeaconConfig(window=16, ratios=(2, 4), reserve=8))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "code.py").write_text(CODE * 4)
    return tmp_path


class Slow(Method):
    """Takes a tenth of a millisecond and 20 KB for a token read, and a millisecond for one decoded."""

    name = "slow"

    def __init__(self, known=True):
        self.known, self.read_lengths = known, []

    def read(self, model, ids, keep, progress=None):
        self.read_lengths.append(len(ids))
        held = torch.ones(len(ids), 5000)
        time.sleep(len(ids) * 1e-4)
        return Outcome(held[:keep], len(ids))

    def continue_text(self, model, ids, count):
        self.read(model, ids, 1)
        time.sleep(count * 1e-3)
        return [0] * count

    def held_bytes(self, model, length):
        return 100 * length if self.known else None


def test_figures_and_how_they_grow(text, tokenizer, model):
    task = make_task("cost", lengths=[100, 1000], data=text, new_tokens=60, repeats=2)
    small, large = (task.run(Slow(), model, tokenizer, item).scores for item in task.items(model, tokenizer))
    for scores, length in ((small, 100), (large, 1000)):
        assert set(scores) <= set(task.metrics) and all(map(math.isfinite, scores.values()))
        assert scores["read_seconds"] >= length * 1e-4
        assert scores["read_tokens_per_second"] == pytest.approx(length / scores["read_seconds"])
        assert scores["first_token_seconds"] >= length * 1e-4 + 1e-3
        assert scores["cache_bytes"] == 100 * length
    assert large["read_seconds"] > small["read_seconds"]
    assert 10 < large["decode_tokens_per_second"] <= 1500
    assert large["peak_bytes"] >= 15e6 and large["peak_bytes"] > small["peak_bytes"]


def test_every_method_reads_the_same_and_all_of_it(text, tokenizer, model):
    task = make_task("cost", lengths=[300], data=text, repeats=2)
    method = Slow(known=False)
    scores = task.run(method, model, tokenizer, next(iter(task.items(model, tokenizer)))).scores
    assert method.read_lengths == [300] * 7  # once to warm up, then reading, one token, more tokens, twice
    assert "cache_bytes" not in scores


class Loading(Slow):
    """Loads 120 MB of weights when it is first asked."""

    weights = None

    def read(self, model, ids, keep, progress=None):
        if self.weights is None:
            self.weights = torch.ones(30_000_000)
        return super().read(model, ids, keep)


def test_loading_weights_is_no_cost_of_reading(text, tokenizer, model):
    task, method = make_task("cost", lengths=[100], data=text, repeats=1), Loading()
    for _ in range(2):
        scores = task.run(method, model, tokenizer, next(iter(task.items(model, tokenizer)))).scores
        assert scores["peak_bytes"] < 60e6


def test_memory_of_another_process_is_left_out(text, tokenizer, model):
    method = Slow()
    method.own_process = True
    task = make_task("cost", lengths=[100], data=text, repeats=1)
    scores = task.run(method, model, tokenizer, next(iter(task.items(model, tokenizer)))).scores
    assert "read_seconds" in scores and not {"peak_bytes", "peak_allocated_bytes"} & set(scores)
    assert KVPress("snapkv").own_process and not any(other.own_process for other in (Slow(), Stock(), Beacon()))


def test_real_methods(text, tokenizer, model):
    task = make_task("cost", lengths=[64, 256], data=text, repeats=1, new_tokens=4)
    for method in (Beacon(4), Stock()):
        small, large = (task.run(method, model, tokenizer, item).scores for item in task.items(model, tokenizer))
        assert large["cache_bytes"] > small["cache_bytes"] and all(map(math.isfinite, large.values()))
        assert min(large["read_seconds"], large["first_token_seconds"]) > 0 and large["peak_bytes"] >= 0


def test_clock(model):
    assert 0.01 <= seconds(model, lambda: time.sleep(0.01)) < 10
    assert now(model) <= now(model)


def test_where_the_system_tells_little(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "STATUS", tmp_path / "absent")
    monkeypatch.setattr(measuring, "CLEAR", tmp_path / "absent" / "either")
    peak = PeakMemory(CPU)
    assert peak.read()["peak_bytes"] >= 0
    monkeypatch.setitem(__import__("sys").modules, "resource", None)
    assert PeakMemory(CPU).read() == {}


@pytest.mark.gpu
def test_on_a_gpu(text, tokenizer, model):
    model = model.to("cuda")
    task = make_task("cost", lengths=[256, 1024], data=text, repeats=1, new_tokens=4)
    small, large = (task.run(Stock(), model, tokenizer, item).scores for item in task.items(model, tokenizer))
    assert large["peak_bytes"] > small["peak_bytes"] > 0
    assert large["peak_allocated_bytes"] > large["peak_bytes"]
