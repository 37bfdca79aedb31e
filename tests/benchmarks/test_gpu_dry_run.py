"""The GPU benchmarks, rehearsed as commands: every code path in the interpreter, tiny sizes, no figures that count."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TILES = ROOT / "kernels" / "beacon_kernels" / "tiles.py"
CELLS = {
    "forward r4 48 2/1 d64 float16",
    "backward r4 32 2/1 d64 float32",
    "decode r4 64 2/1 d64 float16",
    "rotate_commit r4 32 2/1 d64 float32",
}


def command(*arguments: str, code: int = 0) -> str:
    """What `python -m benchmarks.gpu` prints where nothing but PyTorch, Triton and NumPy is installed."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    line = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder, before = tmp_path_factory.mktemp("bench"), files(RESULTS)
    printed = command("bench", "--dry-run", "--out", str(folder))
    assert files(RESULTS) == before
    return folder, printed


def test_every_kernel_is_checked_first(bench: tuple[Path, str]) -> None:
    checked = rows(bench[0] / "correctness.csv")
    assert {row["case"].split()[1].rstrip(",") for row in checked} == {"forward", "backward", "decode", "rotate_commit"}
    assert {row["status"] for row in checked} == {"ok"}
    assert all(0 < float(row["p50"]) <= 1 for row in checked)


def test_every_cell_has_a_row_of_ours_and_of_each_peer(bench: tuple[Path, str]) -> None:
    found = rows(bench[0] / "kernels.csv")
    statuses = {(row["case"], row["impl"]): row["status"] for row in found}
    assert {case for case, _ in statuses} == CELLS | {"ceiling copy", "ceiling product", "host plan"}
    forward = {impl: status for (case, impl), status in statuses.items() if case.startswith("forward")}
    assert forward == {
        **dict.fromkeys(("beacon", "flex", "flash", "sdpa", "sdpa-mask"), "ok"),
        **dict.fromkeys(("cudnn", "flash-attn", "flash-attn-3"), "unavailable"),
    }
    assert statuses["backward r4 32 2/1 d64 float32", "sdpa"] == "ok"
    assert statuses["decode r4 64 2/1 d64 float16", "beacon-graph"] == "unavailable"
    assert all(statuses[case, "beacon"] == "ok" for case in CELLS)
    assert all(row["reason"] for row in found if row["status"] != "ok")
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in found if row["status"] == "ok")


def test_same_function_same_results(bench: tuple[Path, str]) -> None:
    """Ours, FlexAttention on the same plan, the project's own path and eager rotation agree at every cell."""
    compared = [row for row in rows(bench[0] / "kernels.csv") if row["metric"] == "difference"]
    assert {(row["case"].split()[0], row["impl"]) for row in compared} == {
        ("forward", "flex"),
        ("forward", "sdpa"),
        ("backward", "sdpa"),
        ("decode", "sdpa"),
        ("rotate_commit", "eager"),
    }
    assert all(0 <= float(row["p50"]) < 2e-3 for row in compared)


def test_the_last_lines_tell_the_story(bench: tuple[Path, str]) -> None:
    folder, printed = bench
    table = printed[printed.index("cell | ours") :].splitlines()
    assert {line.split(" | ")[0] for line in table} >= CELLS
    assert "aims: 5 rehearsed" in table[-1] and "met" not in table[-1]
    assert {row["machine"] for name in ("kernels", "correctness") for row in rows(folder / f"{name}.csv")} == {
        "cpu-interpreter"
    }


def test_figures_are_drawn_from_the_file(bench: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib")
    for kernel in ("forward", "backward", "decode", "rotate_commit"):
        assert (bench[0] / f"kernels-{kernel}.png").stat().st_size > 5000


def test_full_goes_on_where_it_was_interrupted(bench: tuple[Path, str], tmp_path: Path) -> None:
    """Cells in the file are not measured again; one that other kernels were measured on is."""
    shutil.copy(bench[0] / "correctness.csv", tmp_path)
    before = rows(bench[0] / "kernels.csv")
    for row in before:
        if row["case"].startswith("decode"):
            row["kernels"] = "another"
    with (tmp_path / "grid.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, before[0])
        writer.writeheader()
        writer.writerows(before)
    printed = command("full", "--dry-run", "--out", str(tmp_path))
    assert "3 of 5 cells were finished before" in printed
    after = rows(tmp_path / "grid.csv")
    assert after[: len(before)] == before
    measured = {row["case"] for row in after[len(before) :] if row["impl"] == "beacon"} - {"host plan"}
    assert measured == {"decode r4 64 2/1 d64 float16", "forward r8 32 2/2 d64 float32"}


def test_tune_checks_times_and_leaves_the_table(tmp_path: Path) -> None:
    before = TILES.read_bytes()
    printed = command("tune", "--dry-run", "--out", str(tmp_path))
    assert TILES.read_bytes() == before
    assert "forward_narrow, head_dim 64, float16, sm_80: best of" in printed
    tried = {(row["case"].split(":")[0], row["impl"]) for row in rows(tmp_path / "tiles.csv") if row["metric"] == "ms"}
    assert {case for case, _ in tried} == {"tune forward_narrow", "tune decode"} and len(tried) == 4


def test_a_rehearsal_never_lands_among_results() -> None:
    printed = command("bench", "--dry-run", "--out", "benchmarks/results/rehearsal", code=2)
    assert "must not stand among results" in printed
    assert not (RESULTS / "rehearsal").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    assert "needs a CUDA GPU" in command("bench", code=2)
