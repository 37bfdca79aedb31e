"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import beacon

ROOT = Path(__file__).resolve().parents[1]


def run(*args: object) -> str:
    """Run an example in a fresh process; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_reads_once_and_answers_twice() -> None:
    printed = run("examples/quickstart.py").splitlines()
    assert "'beacons': 432" in printed[0]
    assert printed[1] == "'\\n# the pass key is 48213'"
    assert printed[2].startswith("'\\n\\nclass ArgumentParser(")


def test_minimal_training_writes_an_adapter(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "beacon" / "config.py").read_text())
    folder = beacon.default_model()
    out = tmp_path / "adapter"
    options = ["--steps", 2, "--window", 64, "--windows", 3]
    printed = run("examples/train_adapter_minimal.py", folder, text, out, *options)
    assert "step 2 loss" in printed
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(folder), out)
    assert model.beacon_config.window == 64


@pytest.mark.parametrize("name", ["plan", "schedule"])
def test_figures(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(f"examples/draw_{name}.py", tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
