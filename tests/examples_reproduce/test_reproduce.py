"""The reproduction, from encoded data to figures, on a model of two layers, as its commands run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon
from beacon.evaluation import library_texts

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "reproduce_100x"


def run(*command: object, fails: bool = False) -> str:
    """Run Python in a fresh process, with the reproduction's folder on its path; returns what it logged."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded text of a few files with the shipped tokenizer, as ``corpus.py`` lays it out."""
    work = tmp_path_factory.mktemp("work")
    tokenizer = AutoTokenizer.from_pretrained(beacon.default_model())
    tokenizer.save_pretrained(work / "tokenizer")
    texts = [text.ids.numpy().astype(np.uint16) for text in library_texts(tokenizer, 6000, 4)]
    for split, chosen in (("train", texts[:2]), ("held_out", texts[2:])):
        (work / "data" / split).mkdir(parents=True)
        np.save(work / "data" / split / "tokens.npy", np.concatenate(chosen))
        np.save(work / "data" / split / "starts.npy", np.cumsum([0, *map(len, chosen)]))
    rows = ("a\t3\tPSF-2.0\ttrain", "b\t1\tMIT\ttrain", "c\t3\tPSF-2.0\theld-out", "d\t1\tMIT\theld-out")
    (work / "data" / "packages.tsv").write_text("\n".join(rows) + "\n")
    return work


@pytest.fixture
def work(data: Path, tmp_path: Path) -> Path:
    """A folder of build products of its own."""
    for name in ("data", "tokenizer"):
        (tmp_path / name).symlink_to(data / name)
    return tmp_path


def test_one_command_makes_model_and_figures(work: Path) -> None:
    command = [FOLDER / "reproduce.py", "--work", work, "--scale", "trial", "--threads", 1, "--cpu"]
    run(*command)
    results = work / "results"
    rows = {
        name: json.loads((results / f"{name}.json").read_text())["rows"] for name in ("short", "passkey", "needles")
    }
    assert all(row["ours"] == row["stock"] and row["difference"] == 0 for row in rows["short"])
    assert {row["depth"] for row in rows["passkey"]} == {(n + 0.5) / 10 for n in range(10)}
    assert {row["kind"] for row in rows["needles"]} == {"number", "topic"}
    perplexity = json.loads((results / "perplexity.json").read_text())
    assert {"beacon", "YaRN", "sliding window 192", "stock"} <= {row["method"] for row in perplexity["rows"]}
    assert all(np.isfinite(row["loss"]) for row in perplexity["rows"])
    for name in ("perplexity", "passkey", "needles", "cost"):
        assert (results / f"{name}.png").stat().st_size > 5000
    assert "| beacon |" in (results / "README.md").read_text()
    card = (work / "model" / "README.md").read_text()
    assert '"final": true' in card and "@" not in card and "| d | 1 | MIT | held-out |" in card
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(work / "model"), work / "model" / "adapter")
    assert model.beacon_config.ratios[-1] == 128

    before = {file: file.stat().st_mtime_ns for file in results.glob("*.json")}
    run(*command, "--stages", "evaluate")  # all rows are there
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_stopped_training_ends_as_an_unbroken_one(work: Path, which: str) -> None:
    train = f"""
import dataclasses, logging, pathlib, sys, torch
import train_{which} as stage
from scales import SCALES
torch.use_deterministic_algorithms(True)
logging.basicConfig(level=logging.INFO)
def due(run, minutes):
    if run.step == int(sys.argv[2]):
        raise SystemExit(3)
    return True
stage.Run.due = due
scale = dataclasses.replace(SCALES["trial"], base_steps=4, rows=0)
stage.train_{which}(pathlib.Path(sys.argv[1]), scale, cpu=True)
"""
    broken, whole, base = work, work / "whole", work / "untrained"
    whole.mkdir()
    for name in ("data", "tokenizer"):
        (whole / name).symlink_to(work / name)
    if which == "adapter":
        run(
            "-c",
            "import scales, sys; scales.make_base(scales.SCALES['trial'], 5120).save_pretrained(sys.argv[1])",
            base,
        )
        for folder in (broken, whole):
            (folder / "base").symlink_to(base)
    run("-c", train, broken, 3, fails=True)
    assert "resumed at step 2" in run("-c", train, broken, 99)
    run("-c", train, whole, 99)
    weights = [torch.load(folder / f"{which}_checkpoint.pt") for folder in (broken, whole)]
    part = "model" if which == "base" else "beacons"
    for name, value in weights[0][part].items():
        assert torch.equal(value, weights[1][part][name]), name


def test_every_variant_of_the_ablations_is_a_configuration() -> None:
    replace = "dataclasses.replace(a.CONFIG, window=a.STRIDE, **changes)"
    run("-c", f"import ablations as a, dataclasses; [{replace} for changes in a.VARIANTS.values()]")
