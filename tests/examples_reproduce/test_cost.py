"""Cost of reading against length: one true measurement of a tiny model, all else with made-up figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "reproduce_100x"))

import beacon
import cost
import plots_cost as plots
from tests.evaluation.tiny import tiny_llama


@pytest.fixture
def folder(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "model")
    config = beacon.BeaconConfig(window=16, ratios=(2, 8))
    beacon.save_adapter(beacon.wrap(base, config), tmp_path / "model" / "adapter")
    return tmp_path / "model"


def made_up(full, tokens, **_):
    """Full attention takes 1 ms a token and 1 us a pair."""
    seconds = tokens / 1000 + (tokens**2 / 1e6 if full else 0)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": 2**20 * (tokens if full else 3),
        "kv_entries": tokens if full else tokens // 8,
        "kv_bytes": 0,
    }


def test_a_point_in_a_process_of_its_own(folder, tmp_path, monkeypatch):
    file = cost.measure_cost(folder, tmp_path, lengths=(100,), full_up_to=100, threads=1)
    found = json.loads(file.read_text())
    assert list(found) == ["what", "command", "machine", "settings", "stopped", "rows"]
    assert (found["settings"]["ratio"], found["settings"]["dtype"], found["stopped"]) == (8, "float32", None)
    ours, full = found["rows"]
    assert (ours["method"], ours["tokens"], ours["kv_entries"]) == ("beacon, ratio 8", 100, 6 * 2 + 4)
    assert (full["method"], full["tokens"], full["kv_entries"]) == ("full attention", 100, 100)
    config = tiny_llama().config
    entry = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # float32 keys and values
    assert (ours["kv_bytes"], full["kv_bytes"]) == (16 * entry, 100 * entry)
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 for row in found["rows"])

    def measure_again(**point):
        pytest.fail(f"{point} is in the results already")

    monkeypatch.setattr(cost, "measure_apart", measure_again)
    cost.measure_cost(folder, tmp_path, lengths=(100,), threads=1)
    assert json.loads(file.read_text())["rows"] == found["rows"]
    monkeypatch.setattr(cost, "measure_apart", made_up)
    cost.measure_cost(folder, tmp_path, lengths=(100,), threads=2)  # other settings
    assert json.loads(file.read_text())["rows"] != found["rows"]


@pytest.mark.parametrize(
    "full_up_to,lengths,reason",
    [
        (None, [1000, 4000], "16,000 tokens would take full attention about 272 s, the limit is 120 s"),
        (1000, [1000], "full attention was asked for up to 1,000 tokens"),
        (99_999, [1000, 4000, 16_000], "full attention ran out of memory at 64,000 tokens"),
    ],
)
def test_full_attention_stops(folder, tmp_path, monkeypatch, full_up_to, lengths, reason):
    def measure(full, tokens, **point):
        if full and tokens > 20_000:
            raise MemoryError
        return made_up(full, tokens, **point)

    monkeypatch.setattr(cost, "measure_apart", measure)
    wanted = (1000, 4000, 16_000, 64_000)
    for _ in range(2):  # the second time there is nothing to do
        file = cost.measure_cost(folder, tmp_path, lengths=wanted, full_up_to=full_up_to, threads=1)
        found = json.loads(file.read_text())
        assert found["stopped"] == reason
        assert [row["tokens"] for row in found["rows"] if row["method"] == cost.FULL] == lengths
        assert sorted(row["tokens"] for row in found["rows"] if row["method"] != cost.FULL) == list(wanted)


def test_foresees_times():
    assert cost.foresee({}, 100) == 0.0
    assert cost.foresee({100: 2.0}, 300) == pytest.approx(18.0)  # quadratic where nothing else is known
    assert cost.foresee({100: 2.0, 200: 4.0}, 300) == pytest.approx(6.0)
    assert cost.foresee({100: 2.0, 200: 3.0}, 400) == pytest.approx(6.0)
    assert cost.foresee({50: 9.0, 100: 1.0, 200: 4.0}, 400) == pytest.approx(16.0)
    assert cost.foresee({100: 1.0, 200: 8.0}, 400) == pytest.approx(32.0)


@pytest.mark.parametrize(
    "code,stderr,error",
    [
        (1, "OSError: nowhere", RuntimeError),
        (-9, "", MemoryError),
        (1, "DefaultCPUAllocator: can't allocate memory", MemoryError),
    ],
)
def test_failures_say_why(monkeypatch, code, stderr, error):
    ended = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(cost.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(error, match=rf'"tokens": 9, .*failed: {stderr}'):
        cost.measure_apart(tokens=9, threads=1)


def test_peak_counts_what_a_call_takes():
    result, seconds, peak = cost._watch(lambda: torch.ones(2**23).sum().item(), "cpu")
    assert result == 2**23 and seconds > 0
    if sys.platform == "linux":
        assert peak == pytest.approx(4 * 2**23, rel=0.1)
        assert cost._watch(lambda: None, "cpu")[2] < 2**20  # an earlier peak is forgotten


def test_figure_and_table(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "measure_apart", made_up)
    cost.measure_cost(folder, tmp_path, lengths=(512, 2048, 2**20), threads=1)
    picture = plots.plot_cost(tmp_path)
    assert picture == tmp_path / "cost.png" and picture.read_bytes()[:4] == b"\x89PNG"
    lines = plots.table_cost(tmp_path).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[-3].count("|") == 10
    assert lines[2] == "| 512 | 0.51 | 1,000 | 3 | 64 | 0.77 | 661 | 512 | 512 |"
    assert lines[4] == "| 1,048,576 | 1,048.58 | 1,000 | 3 | 131,072 | – | – | – | – |"
    assert "threads: 1, float32" in lines[-1] and lines[-1].endswith("the limit is 120 s.")
    assert [plots.short(n) for n in (512, 2048, 2**20, 50_000)] == ["512", "2K", "1M", "50,000"]
