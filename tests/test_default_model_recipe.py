"""The scripts that make the default model, from data to export, for a second each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon
from beacon.evaluation import library_texts

pytestmark = pytest.mark.slow  # about to go: examples/reproduce_100x takes its place
ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "default_model"


def run(script: str, *args: object, work: Path) -> str:
    """Run a script of the recipe in a fresh process; returns what it logged."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, RECIPE / script, "--work", work, *args]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def records(file: Path) -> list[dict]:
    """A training log."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Encoded data of a few files with the shipped tokenizer."""
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(beacon.default_model())
    tokenizer.save_pretrained(work / "tokenizer")
    for split in ("train", "held_out"):
        texts = [text.ids.numpy().astype(np.uint16) for text in library_texts(tokenizer, 4200, 2)]
        np.save(work / "data" / f"{split}_tokens.npy", np.concatenate(texts))
        np.save(work / "data" / f"{split}_starts.npy", np.cumsum([0, *map(len, texts)]))
    return work


def test_base_is_trained_and_resumed(work: Path) -> None:
    options = ["--cpu", "--threads", 1, "--windows", 8, "--keys", 8]
    run("train_base.py", "--minutes", 0.01, *options, work=work)
    first = records(work / "base_log.jsonl")[-1]
    assert first["final"] and first["step"] >= 1
    assert "resumed at step" in run("train_base.py", "--minutes", first["minutes"] + 0.03, *options, work=work)
    assert records(work / "base_log.jsonl")[-1]["step"] > first["step"]
    AutoModelForCausalLM.from_pretrained(work / "base")


def test_adapter_is_trained_resumed_and_exported(work: Path) -> None:
    shutil.copytree(beacon.default_model(), work / "base", ignore=shutil.ignore_patterns("adapter", "*.md"))
    shutil.copy(work / "base" / "base_training_log.jsonl", work / "base_log.jsonl")
    options = ["--cpu", "--threads", 1, "--tokens", 600, "--rows", 1]
    run("train_adapter.py", "--minutes", 0.01, *options, work=work)
    first = records(work / "adapter_log.jsonl")[-1]
    assert first["final"] and first["step"] >= 1
    assert "resumed at step" in run("train_adapter.py", "--minutes", first["minutes"] + 0.03, *options, work=work)
    assert records(work / "adapter_log.jsonl")[-1]["step"] > first["step"]

    out = work / "exported"
    run("export.py", "--out", out, work=work)
    card = (out / "README.md").read_text()
    assert '"final": true' in card and "@" not in card
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(out), out / "adapter")
    assert model.beacon_config.window == 128
