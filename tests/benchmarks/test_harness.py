"""What the GPU benchmarks do when something breaks, runs out of time or is to be written."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from beacon_kernels import tiles
from beacon_kernels.tiles import TABLES, Tile
from benchmarks.gpu import bench, correctness
from benchmarks.gpu.aims import AIMS, figures, reached, sizes_of
from benchmarks.gpu.attempts import Attempt, Implementation, Unavailable, attempt, difference
from benchmarks.gpu.candidates import CANDIDATES, candidates
from benchmarks.gpu.cases import GRID, HEADLINE, KERNELS, Cell
from benchmarks.gpu.comparisons import Sizes, _calls, _schedule, quotient
from benchmarks.gpu.flex_peer import _packed, _unpacked
from benchmarks.gpu.peers import square_length
from benchmarks.gpu.plans import read_text, sights
from benchmarks.gpu.retile import SOURCE, Entry, retiled, written
from benchmarks.machine import Stamp
from benchmarks.measure import Spread
from benchmarks.results import Results, Row, latest, read

CPU = torch.device("cpu")
CELL = Cell("decode", 4, 64, 2, 1, 64, "float32", window=16)
STAMP = Stamp("NVIDIA H200", "1", "2", "3", "c0ffee", "no", "f00d")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "folder" / "kernels.csv", STAMP)


def ok(case: str, impl: str, metric: str, value: float, shape: str = "") -> Row:
    return Row(case, impl, shape, "bfloat16", metric, Spread(value, value, value))


def check(kernel: str, worst: float) -> correctness.Check:
    def run() -> float:
        if worst < 0:
            raise RuntimeError("out of shared memory\nand more")
        return worst

    return correctness.Check(kernel, "made up", torch.float32, "heads=2/1", run)


def test_a_wrong_kernel_is_reported_and_not_timed(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [check("forward", 0.5), check("backward", math.nan), check("decode", 3.0), check("rotate_commit", -1.0)]
    monkeypatch.setattr(bench, "checks", lambda device, thorough: found)
    budget = bench.Budget(100)
    broken = bench.check_kernels(CPU, results, budget)
    assert broken == {"backward", "decode", "rotate_commit"}
    reasons = [row["reason"] for row in read(results.path)]
    assert reasons[0] == "" and "nan times" in reasons[1] and "3 times what is allowed" in reasons[2]
    assert reasons[3] == "RuntimeError: out of shared memory"
    assert not bench.measure_cells([CELL], CPU, results, budget, broken)
    assert read(results.path)[-1]["reason"] == "found wrong by the check before"


def test_nothing_is_measured_on_a_gpu_that_is_lost(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [check("decode", -1.0), check("forward", 0.5)]
    monkeypatch.setattr(bench, "alive", lambda device: False)
    monkeypatch.setattr(bench, "checks", lambda device, thorough: found)
    assert bench.check_kernels(CPU, results, bench.Budget(100)) == set(KERNELS)
    assert len(read(results.path)) == 1


def test_what_does_not_fit_into_the_time_is_listed(results: Results) -> None:
    assert bench.measure_cells(HEADLINE, CPU, results, bench.Budget(0), set())
    assert [(row["case"], row["status"]) for row in read(results.path)] == [(c.name, "skipped") for c in HEADLINE]


def test_what_an_implementation_raises_becomes_a_row() -> None:
    def absent(problem: object) -> Attempt:
        raise Unavailable("not installed")

    def breaks(problem: object) -> Attempt:
        raise RuntimeError("\nillegal instruction\n")

    for build, status, reason in ((absent, "unavailable", "not"), (breaks, "failed", "RuntimeError: illegal")):
        outcome = attempt(Implementation("peer", build), CELL, None, CPU)
        assert outcome.status == status and outcome.rows[0].reason.startswith(reason)


def test_kernels_that_disagree_with_a_peer_fail(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def gives(value: float) -> Implementation:
        build = Attempt(lambda: [torch.full((3,), value)], 1.0, "gbps", ours=list)
        return Implementation("beacon" if value == 1 else "peer", lambda problem: build)

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "decode", (gives(1.0), gives(1.1)))
    assert not bench.measure_cells([CELL], CPU, results, bench.Budget(100), set())
    own = [row for row in read(results.path) if row["impl"] == "beacon"]
    assert [row["status"] for row in own] == ["failed"] and own[0]["reason"] == "differs from peer by 0.0909"
    assert results.finished() == set()


def test_difference_sees_nan() -> None:
    one = torch.ones(2)
    assert difference([one], [one]) == 0
    assert not difference([torch.tensor([1.0, math.nan])], [one]) <= 1


def test_an_error_is_held_against_the_reference_in_the_same_dtype() -> None:
    truth = torch.tensor([1.0, 2.0, -math.inf], dtype=torch.float64)
    near = truth.half()
    assert quotient(near, near, truth, torch.float16) == 0
    far = near.clone()
    far[0] += 0.1
    assert quotient(far, near, truth, torch.float16) > 1
    unwritten = near.clone()
    unwritten[1] = math.nan
    assert quotient(unwritten, near, truth, torch.float16) == math.inf
    assert quotient(near[:2], near, truth, torch.float16) == math.inf


def test_results_grow_and_are_taken_up(results: Results) -> None:
    results.append([ok("a", "beacon", "ms", 2.0), Row("a", "peer", "", "", status="unavailable", reason="none")])
    results.append([Row("b", "beacon", "", "", status="failed", reason="wrong")])
    assert results.finished() == {"a"}
    assert Results(results.path, Stamp("NVIDIA H100", *"123", "c0ffee", "no", "f00d")).finished() == set()
    assert Results(results.path, Stamp("NVIDIA H200", *"123", "another", "yes", "f00d")).finished() == {"a"}
    for row in read(results.path):
        assert row["machine"] == "NVIDIA H200" and row["commit"] == "c0ffee" and row["utc"].endswith("+00:00")
    results.path.write_text("case,impl\n")
    with pytest.raises(ValueError, match="must have the columns case, impl, shape"):
        Results(results.path, STAMP)


def test_the_last_run_of_a_cell_counts() -> None:
    old, new = ({"case": "a", "impl": "beacon", "metric": m, "utc": t} for m, t in (("ms", "1"), ("gbps", "2")))
    other = {"case": "b", "impl": "beacon", "metric": "ms", "utc": "1"}
    assert latest([old, other, new]) == [new, other]


def test_rates_are_fast_where_times_are_short() -> None:
    assert Spread(1.0, 2.0, 4.0).rate(8) == Spread(2.0, 4.0, 8.0)


def test_aims_are_judged_by_ratios_of_one_run(results: Results) -> None:
    forward, decode = HEADLINE[0], HEADLINE[1]
    results.append(
        [
            *(ok(forward.name, impl, "tflops", v, forward.shape) for impl, v in (("beacon", 480), ("flex", 320))),
            *(ok(forward.name, impl, "tflops", v, forward.shape) for impl, v in (("cudnn", 600), ("flash", 500))),
            *(ok(decode.name, impl, "gbps", v, decode.shape) for impl, v in (("beacon", 1), ("beacon-graph", 3600))),
            *(ok(decode.name, impl, "gbps", v, decode.shape) for impl, v in (("sdpa", 4000), ("sdpa-graph", 1800))),
            Row("ceiling copy", "torch", "", "", "gbps", Spread(4000, 4000, 4000)),
        ]
    )
    found = figures(read(results.path))
    values = {
        (aim.kernel, aim.value): reached(aim, cell.name, found)
        for cell in (forward, decode)
        for aim in AIMS
        if aim.holds_for(cell.name, sizes_of(cell.shape), "NVIDIA H200")
    }
    assert values == {
        ("forward", "flex"): 1.5,
        ("forward", "dense"): 0.8,
        ("forward", "tflops"): 480,
        ("decode", "copy"): 0.9,
    }
    absolute = next(aim for aim in AIMS if aim.value == "tflops")
    assert not absolute.holds_for(forward.name, sizes_of(forward.shape), "NVIDIA A100-SXM4-80GB")
    below = next(aim for aim in AIMS if aim.value == "sdpa")
    assert reached(below, decode.name, found) == 2  # graph against graph


def test_pairs_are_those_of_the_definition() -> None:
    """Window 16 at ratio 4: raw tokens see memory and themselves, beacons memory, 4 j raw tokens and themselves."""
    plan = read_text(Cell("forward", 4, 48, window=16))
    pairs = sum(sight.pairs for sight in sights(plan, [0], [12]))
    assert pairs == sum(16 * m + 16 * 17 // 2 + 4 * m + 4 * (1 + 2 + 3 + 4) + 4 for m in (0, 4, 8))


def test_dense_peers_get_as_many_pairs() -> None:
    assert square_length(10 * 11 // 2) == 10
    for pairs in (9 * 10**6, 415 * 10**6):
        length = square_length(pairs)
        assert length % 128 == 0 and abs(length * (length + 1) / 2 / pairs - 1) < 0.04


def test_stores_come_back_from_whole_blocks() -> None:
    stores = [torch.randn(count, 2, 4) for count in (5, 128, 130)]
    packed = _packed(stores, False)
    assert packed.shape == (1, 2, 128 + 128 + 256, 4)
    assert all(map(torch.equal, _unpacked(packed[0].transpose(0, 1), [5, 128, 130]), stores))


def test_cells_are_told_apart_and_the_headline_is_part_of_the_grid() -> None:
    assert len({cell.name for cell in GRID}) == len(GRID)
    assert GRID[: len(HEADLINE)] == HEADLINE
    assert {cell.ratio for cell in HEADLINE} == {2, 8, 32, 128}
    assert {cell.length for cell in HEADLINE} == {8192, 32768, 131072}


@pytest.mark.parametrize("architecture", [80, 90])
def test_one_tile_changes_in_the_table_and_nothing_else(architecture: int) -> None:
    source, new = SOURCE.read_text(), Tile(256, 16, 2, 7, 3)
    for kernel in CANDIDATES:
        changed = retiled(source, Entry(kernel, 128, "bfloat16", architecture), new)
        lines = [(a, b) for a, b in zip(source.splitlines(), changed.splitlines(), strict=True) if a != b]
        assert len(lines) == 1 and written(new) in lines[0][1]
        fresh: dict[str, object] = {"__name__": tiles.__name__}
        exec(compile(changed, "tiles.py", "exec"), fresh)
        table = fresh["TABLES"]
        assert isinstance(table, dict)
        expected = list(TABLES[kernel][128, 2])
        expected[architecture == 90] = new
        assert list(map(repr, table[kernel][128, 2])) == list(map(repr, expected))
    with pytest.raises(ValueError, match="must have an entry"):
        retiled(source, Entry("forward", 80, "bfloat16", architecture), new)
    with pytest.raises(ValueError, match="must name a dictionary for 'sideways'"):
        retiled(source, Entry("sideways", 128, "bfloat16", architecture), new)


def test_a_tile_is_written_for_its_own_architecture_only(tmp_path: Path) -> None:
    path, entry = tmp_path / "tiles.py", Entry("forward", 64, "float16", 90)
    path.write_text(SOURCE.read_text())
    before, new = TABLES["forward"][64, 2], Tile(16, 16, 1, 1)
    with entry.holding(new):
        assert TABLES["forward"][64, 2] == (before[0], new)
    assert TABLES["forward"][64, 2] == before
    try:
        entry.write(new, path)
        assert TABLES["forward"][64, 2] == (before[0], new) and written(new) in path.read_text()
    finally:
        TABLES["forward"][64, 2] = before


def test_a_candidate_is_checked_where_its_table_is_used() -> None:
    """The first calls of the first two plans that a GPU checks take the wide and the narrow tile of every kernel."""
    sizes, used = Sizes(torch.bfloat16), set()
    for case in correctness._plans(torch.device("cuda"))[:2]:
        for sight in _calls(replace(case, cuts=case.cuts[:1])):
            schedule = _schedule(sight, sizes, CPU, gradients=True)
            assert schedule.dq is not None and schedule.dkv is not None
            used |= {schedule.forward.tile, schedule.dq.tile, schedule.dkv.tile}
    assert {TABLES[kernel][128, 2][0] for kernel in CANDIDATES if kernel != "decode"} <= used


def test_candidates_fit_and_leave_out_the_tables_own() -> None:
    for kernel in CANDIDATES:
        entry = Entry(kernel, 128, "bfloat16", 90)
        found = list(candidates(entry, 227 * 1024))
        assert len(found) == len(set(found)) > 5 and entry.current not in found


def test_csv_is_one_table(results: Results) -> None:
    results.append([ok("a, with a comma", "beacon", "ms", 1.5)])
    results.append([ok("b", "beacon", "ms", 0.25)])
    with results.path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 3 and {len(line) for line in lines} == {len(lines[0])}
    assert lines[1][0] == "a, with a comma" and lines[2][5:8] == ["0.25"] * 3
