"""The training-step benchmark: its baselines compute what ours computes, and a tiny run goes through as a command."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import beacon

pytest.importorskip("triton")  # the stamp names its version

from beacon.weights import beacon_parameters
from benchmarks import train_step
from benchmarks.machine import Stamp
from benchmarks.results import OURS, Results, read
from benchmarks.training import account, report, timing
from benchmarks.training.contenders import FULL, LOOP, NAMES, PUBLISHED, contender
from benchmarks.training.published import published_loss
from benchmarks.training.setting import SCALES, Scale, Setting, build_base, draw_ratios
from tests.tiny_models import randomize

RESULTS = Path(train_step.RESULTS)
SMALL = Scale(32, 48, 2, 4, 2, 96, 16, 128)
CPU = torch.device("cpu")


def setting(tokens: int = 75, dtype: torch.dtype = torch.float32, ratios: tuple[int, ...] = (2, 16, 4, 8)) -> Setting:
    return Setting("tiny", SMALL, tokens, ratios, CPU, dtype)


def base_of(cell: Setting) -> Any:
    """Weights large enough for attention to be uneven."""
    return randomize(build_base(cell)).requires_grad_(False)


def gradients(name: str, cell: Setting) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    base = base_of(cell)
    with contender(name, base, cell) as ready:
        loss = ready.gradients()
        return loss, {key: parameter.grad.clone() for key, parameter in ready.parameters.items()}


@pytest.mark.parametrize("name", [LOOP, PUBLISHED])
@pytest.mark.parametrize("tokens", [75, 80])
def test_the_schedules_compute_one_function(name: str, tokens: int) -> None:
    """That is what makes them baselines: equal loss and equal gradients of every beacon parameter."""
    loss, ours = gradients(OURS, setting(tokens))
    other, theirs = gradients(name, setting(tokens))
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert theirs.keys() == ours.keys()
    for key, gradient in ours.items():
        stops = (
            "layers.1.self_attn.beacon_q",
            "layers.1.self_attn.beacon_o",
        )  # beacons end at the last layer's k and v
        assert bool(gradient.any()) != any(part in key for part in stops), key
        torch.testing.assert_close(theirs[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=key)


def test_the_published_schedule_under_autocast() -> None:
    cell = setting(dtype=torch.bfloat16)
    (loss, ours), (other, theirs) = gradients(OURS, cell), gradients(PUBLISHED, cell)
    torch.testing.assert_close(other, loss, rtol=1e-2, atol=0)
    for key in timing.PROBES:
        assert ours[key].dtype == torch.float32  # master weights
        assert float((theirs[key] - ours[key]).norm() / ours[key].norm()) < timing.ALIKE["bfloat16"]


def test_the_published_schedule_refuses_what_it_does_not_compute() -> None:
    base = beacon.wrap(base_of(setting()), setting().config.replace(sink=1))
    with pytest.raises(NotImplementedError, match="first version alone"):
        published_loss(base, setting().ids, (2, 2, 2, 2))


def test_full_attention_trains_copies_and_gives_the_base_back() -> None:
    cell = setting()
    base = base_of(cell)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with torch.no_grad():
        stock = base(cell.ids, labels=cell.ids, use_cache=False).loss
    for name in NAMES:
        with contender(name, base, cell) as ready:
            loss = ready.step()
            assert all(parameter.requires_grad for parameter in ready.parameters.values())
            assert sum(p.requires_grad for p in base.parameters()) == len(ready.parameters)
            if name == FULL:
                torch.testing.assert_close(loss, stock)
                assert len(ready.parameters) == 4 * SMALL.layers
            else:
                assert ready.parameters.keys() == beacon_parameters(base).keys()
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        assert {key: parameter.requires_grad for key, parameter in base.named_parameters()} == flags


def test_what_breaks_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    cell = setting()
    monkeypatch.setattr(timing, "_measured", lambda *_: full())
    base = base_of(cell)
    row = timing.attempt(PUBLISHED, base, cell, 2, float("inf")).rows[0]
    assert (row.impl, row.status) == (PUBLISHED, "failed") and "2 GiB" in row.reason
    assert not hasattr(base, "beacon_wrapping")
    assert timing.attempt(LOOP, base, cell, 2, time.monotonic()).rows[0].status == "skipped"


def files() -> set[Path]:
    return {path for path in RESULTS.rglob("*") if path.is_file()}


def test_tiny_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    arguments = ["--scale", "tiny", "--tokens", "256", "--steps", "2", "--ratios", "2 8", "--cpu", "--commit", "here"]
    assert train_step.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / train_step.FILE)
    assert files() == before
    assert {row["status"] for row in rows} == {"ok"}
    metrics = {(row["impl"], row["metric"]) for row in rows}
    assert metrics >= {(name, metric) for name in NAMES for metric in ("ms", "tokens_per_s", "tflops", "loss")}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    apart = {row["impl"]: float(row["p50"]) for row in rows if row["metric"] == "difference"}
    assert apart.keys() == {LOOP, PUBLISHED} and max(apart.values()) < timing.ALIKE["float32"]
    assert "ratios=2,8,2 " in rows[0]["shape"]
    printed = capsys.readouterr().out
    assert "x ours" in printed and printed.count("not judged here") == 3


def test_without_a_folder_a_cpu_run_writes_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    assert train_step.main(["--scale", "tiny", "--tokens", "128", "--steps", "2", "--cpu", "--only", "ours"]) == 0
    assert files() == before
    assert "benchmarks-" in capsys.readouterr().out.splitlines()[-1]


def test_large_scales_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--cpu"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_the_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--account", "--cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("raw tokens/s") == 2 and "bfloat16" in printed
    ratios = draw_ratios(SCALES["7b"], 8192, None, 5)
    cell = Setting("7b", SCALES["7b"], 8192, ratios, CPU, torch.bfloat16)
    machine = account.MACHINES[0]
    ours = account.components(cell, machine, OURS)
    # No component is faster than its FLOPs at the peak.
    parts = ("raw tokens: forward", "raw tokens: recomputed", "raw tokens: gradients of inputs", "beacons: all three")
    done = cell.flops
    least = (3 * done.matrices - done.skipped) / account.PEAK
    assert sum(ours[f"matrices, {part}"] for part in parts) > least
    assert account.expected(ours) < account.expected(account.components(cell, machine, PUBLISHED))


def test_draws() -> None:
    assert draw_ratios(SCALES["7b"], 8192, None, 5) == (4, 8, 64, 2, 32, 4, 2)
    assert draw_ratios(SCALES["7b"], 8193, [2, 4], 0) == (2, 4) * 4
    assert max(draw_ratios(SCALES["tiny"], 64 * 40, None, 0)) <= 64


@pytest.mark.parametrize("machine, judged", [("NVIDIA H100 80GB HBM3", True), ("AMD EPYC", False)])
def test_aims(tmp_path: Path, machine: str, judged: bool) -> None:
    mark = Stamp(machine, "1", "2", "3", "4", "no", "5")
    results = Results(tmp_path / "x.csv", mark)
    cell = dataclasses.replace(setting(), name="7b")
    for name, milliseconds, rate in ((OURS, 1000.0, 8192.0), (LOOP, 1200.0, 6826.0), (PUBLISHED, 3500.0, 2340.0)):
        results.append([timing._row(name, cell, "ms", milliseconds), timing._row(name, cell, "tokens_per_s", rate)])
    results.append([timing._none(FULL, cell, "failed", "out of memory")])
    rows = read(results.path)
    lines = report.verdicts(rows, "7b")
    expected = ["met", "below", "met"] if judged else ["not judged"] * 3
    assert all(f": {verdict}" in line for verdict, line in zip(expected, lines, strict=True)), lines
    assert all("not judged" in line for line in report.verdicts(rows, "1b"))
    assert "failed: out of memory" in report.table(rows)
