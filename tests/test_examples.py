"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_files_are_compressed_by_two_processes(tmp_path: Path) -> None:
    """Caches are those of one process that reads file by file; what is there stays, what is no text is named."""
    pytest.importorskip("accelerate")
    sources = sorted((ROOT / "beacon").glob("*.py"), key=lambda file: file.stat().st_size)[-5:]
    (tmp_path / "bad.bin").write_bytes(b"\xff\xfe\x00")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = ["examples/compress_files.py", tmp_path / "out", "default", *sources, "--ratio", "8", "--batch", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def compress(*more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, [*launch, *script, "--cpu", *more])]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)

    done = compress()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" tokens, ") == 5
    folder = beacon.default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder / "adapter")
    for source in sources:
        cache = beacon.load_cache(model, tmp_path / "out" / f"{source.name}.safetensors")
        ids = tokenizer(source.read_text(), return_tensors="pt", verbose=False).input_ids
        alone = model.compress(ids, ratios=8)
        kept, whole = ({**c.stats()[0], "bytes": 0} for c in (cache, alone))
        assert kept == whole
        torch.testing.assert_close(cache.stores[-1].memory_v[0], alone.stores[-1].memory_v[0], atol=1e-4, rtol=1e-4)
    again = compress(tmp_path / "bad.bin")
    assert again.returncode != 0 and "bad.bin" in again.stderr
    assert " tokens, " not in again.stdout


@pytest.mark.parametrize("name", ["plan", "schedule"])
def test_figures(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(f"examples/draw_{name}.py", tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
