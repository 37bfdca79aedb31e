"""`beacon train` as a user types it, on the shipped model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import beacon
from beacon.cli import main
from beacon.evaluation import read_documents

TRAINING = {"use_cpu": True, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with data of its own: one broken line, one text shorter than a window."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [text[:1500] for text in list(read_documents().values())[:12]]
    lines = [json.dumps({"text": text}) for text in [*texts, "short: 1"]]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:5], '{"text": "broken', *lines[5:]]))
    values = {
        "model": {"name": "default", "adapter": "default", "dtype": "float32"},
        "beacon": {"window": 128, "stride": 32, "ratios": [2, 4, 8], "sink": 4},
        "data": {"sources": [str(tmp_path / "data.jsonl")], "max_length": 400},
        "training": {**TRAINING, "output_dir": str(tmp_path / "run"), "gradient_checkpointing": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_its_files_and_going_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    assert main(["train", str(recipe)]) == 0
    out, err = capsys.readouterr()
    assert "4 steps, mean loss" in out and f"Adapter: {run}" in out and "beacon ask default --adapter" in out
    assert "step 4/4: loss" in err + out and "tokens/s" in err + out
    assert {"beacon_config.json", "beacon_model.safetensors", "recipe.yaml", "checkpoint-4"} <= {
        path.name for path in run.iterdir()
    }
    assert list(run.rglob("events.out.tfevents*"))
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(beacon.default_model()), run)
    assert model.beacon_config.ratio_policy == "adaptive"

    assert main(["train", str(recipe)]) == 2
    assert "holds checkpoints of an earlier run (up to checkpoint-4)" in " ".join(capsys.readouterr().err.split())
    assert main(["train", str(recipe), "--resume", "--training.max_steps", "6"]) == 0
    assert "6 steps" in capsys.readouterr().out
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["max_steps"] == 6
    assert main(["train", str(recipe), "--resume", "--ratios.seed", "5"]) == 2
    assert "was written with section ratios" in " ".join(capsys.readouterr().err.split())


def test_check_prints_the_recipe_and_does_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--check", "--training.learning_rate", "1e-3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["training"]["learning_rate"] == 1e-3
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.sources", "[nowhere.jsonl]"], "nowhere.jsonl"),
        (["--model.name", "/nowhere"], "/nowhere"),
        (["--training.learning_rate_typo", "1"], "training has no field 'learning_rate_typo'"),
        (["--data.min_length", "90000", "--data.max_length", "100000"], "must leave at least one example, got none"),
        (["--data.too_long", "error"], "400"),
        (["--data.broken_lines", "error"], "data.jsonl:6"),
        (["--data.sources", "[{path: DATA, text_column: body}]"], "body"),
        (["--resume", "/nowhere/checkpoint-3"], "is no complete checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option.replace("DATA", str(recipe.parent / "data.jsonl")) for option in options]
    assert main(["train", str(recipe), *options]) == 2
    err = capsys.readouterr().err
    error = err[err.rindex("error:") :]
    assert message in error and "Traceback" not in err


def test_reports_that_need_a_package_say_so(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    assert main(["train", str(recipe), "--wandb"]) == 2
    assert "training.report_to names wandb, which is not installed" in " ".join(capsys.readouterr().err.split())


def test_other_commands_take_no_such_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "default", "--training.max_steps", "3"])
    with pytest.raises(SystemExit):
        main(["train", "recipe.yaml", "--nothing"])
    assert "unrecognized arguments: --training.max_steps" in capsys.readouterr().err


def test_as_a_module_it_is_the_same_command(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    import runpy

    calls: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["beacon.training", str(recipe), "--check"])
    monkeypatch.setattr("beacon.cli.main", lambda argv: calls.append(argv) or 7)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("beacon.training", run_name="__main__")
    assert stopped.value.code == 7 and calls == [["train", str(recipe), "--check"]]
