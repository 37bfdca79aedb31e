"""Recipes: sections, options over them, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from beacon.config import PAPER_RATIOS
from beacon.training import Recipe

BASE: dict[str, Any] = {"model": {"name": "default"}, "data": {"sources": ["python-library"]}}


def parse(**sections: Any) -> Recipe:
    return Recipe.parse({**BASE, **sections})


def test_sections_become_what_reads_them() -> None:
    recipe = parse(
        beacon={"preset": "paper", "window": 512},
        ratios={"choices": [2, 4], "curriculum": [{"until": 1, "choices": [8]}]},
        training={"max_steps": 3},
    )
    assert recipe.beacon.window == 512 and recipe.beacon.ratios == PAPER_RATIOS
    assert recipe.ratios.curriculum[0].choices == (8,) and recipe.validation is None and recipe.evaluation is None
    arguments = recipe.arguments()
    assert arguments["output_dir"] == "runs/run" and arguments["max_steps"] == 3
    assert arguments["report_to"] == "tensorboard"


def test_options_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**BASE, "training": {"learning_rate": 1.0, "fsdp_config": {"version": 2}}}))
    options = ["--training.learning_rate", "5e-5", "--beacon.window=64", "--beacon.ratios", "[2, 4]"]
    options += ["--training.fsdp_config.reshard_after_forward", "false", "--model.lora", "{r: 4}"]
    recipe = Recipe.load(path, options)
    assert recipe.name == "mine" and recipe.training["learning_rate"] == 5e-5
    assert recipe.beacon.window == 64 and recipe.beacon.ratios == (2, 4) and recipe.model.lora == {"r": 4}
    assert recipe.training["fsdp_config"] == {"version": 2, "reshard_after_forward": False}
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert Recipe.load(again).values == recipe.values
    assert yaml.safe_load(path.read_text())["training"]["learning_rate"] == 1.0
    words = Recipe.load(path, ["--training.eval_strategy", "no", "--training.bf16", "true"]).training
    assert words["eval_strategy"] == "no" and words["bf16"] is True


def test_fingerprints_tell_which_section_changes_what_a_step_computes() -> None:
    one = parse().fingerprints
    data = BASE["data"]
    for same in (parse(training={"learning_rate": 1}), parse(data={**data, "num_proc": 2}), parse(validation=data)):
        assert same.fingerprints == one
    for section, changed in {
        "ratios": parse(ratios={"seed": 1}),
        "data": parse(data={**data, "seed": 1}),
        "beacon": parse(beacon={"window": 64, "ratios": [2]}),
        "model": parse(model={"name": "default", "quantization": "4bit"}),
    }.items():
        assert {name for name, value in changed.fingerprints.items() if one[name] != value} == {f"section {section}"}


@pytest.mark.parametrize(
    "sections, error, message",
    [
        ({"modell": {}}, ValueError, "a recipe has no field 'modell'; did you mean model"),
        ({"model": None}, ValueError, "must have a section model"),
        ({"model": {"dtype": "float32"}}, ValueError, "model: .*name"),
        ({"model": {"name": "x", "dtype": "float8"}}, ValueError, "dtype must be one of float32"),
        ({"model": {"name": "x", "quantization": "2bit"}}, ValueError, "quantization must be one of 4bit"),
        ({"model": {"name": 3}}, TypeError, "name must be a folder"),
        ({"beacon": {"preset": "iclr"}}, ValueError, "preset must be one of paper, iclr2025"),
        ({"beacon": {"windows": 3}}, ValueError, "beacon has no field 'windows'; did you mean window"),
        ({"beacon": {"window": 64, "ratios": [3]}}, ValueError, "stride must divide by ratio"),
        ({"ratios": {"choices": [3]}}, ValueError, "stride must divide by ratio"),
        ({"ratios": [2]}, TypeError, "section ratios must hold fields"),
        ({"data": {"sources": []}}, ValueError, "sources"),
        (
            {"data": {"sources": ["a"], "max_len": 3}},
            ValueError,
            "data has no field 'max_len'; did you mean max_length",
        ),
        (
            {"objective": {"distillation": 1}, "data": {"sources": ["a"], "packing": True}},
            NotImplementedError,
            "packing",
        ),
    ],
)
def test_mistakes_in_a_recipe(sections: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(**sections)


def test_unknown_training_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="training has no field 'learning_rte'; did you mean learning_rate"):
        parse(training={"learning_rte": 1}).arguments()


@pytest.mark.parametrize(
    "options, message",
    [
        (["training.max_steps", "3"], "must read --section.field value"),
        (["--max_steps", "3"], "must read --section.field value"),
        (["--train.max_steps", "3"], "a section of model, beacon"),
        (["--training.max_steps"], "must be followed by a value"),
        (["--beacon.ratios", "[2"], "must be YAML"),
    ],
)
def test_mistakes_in_options(options: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ValueError, match=message):
        Recipe.load(path, options)


@pytest.mark.parametrize("text, message", [("a: [", "must be YAML"), ("- a", "must hold sections"), ("", "must hold")])
def test_files_that_are_no_recipes(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.load(path)
    with pytest.raises(FileNotFoundError, match=r"no such recipe: .*; examples/recipes/"):
        Recipe.load(tmp_path / "nowhere.yaml")
