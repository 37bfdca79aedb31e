"""The recipes of examples/recipes: what they say is allowed, adds up, and is what their comments and the paper say."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments

from beacon.cli import main
from beacon.cli.main import build_parser
from beacon.config import PAPER_RATIOS
from beacon.training import Recipe
from tests.training.tiny_data import words, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "recipes"
LAUNCH = FOLDER / "launch"
DOCUMENTS = (FOLDER / "README.md", ROOT / "docs" / "training.md")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WINDOWS_AND_SINKS = {"llama2": (1024, 0), "llama3": (1024, 1), "mistral": (2048, 0), "qwen2": (2048, 0)}


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe(name: str, *options: str) -> Recipe:
    return Recipe.load(FOLDER / f"{name}.yaml", options)


def head(name: str) -> str:
    """The comment that a recipe begins with, on one line."""
    lines = (FOLDER / f"{name}.yaml").read_text().split("\n\n", 1)[0].splitlines()
    return " ".join(" ".join(line.lstrip("# ") for line in lines).split())


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


# -- what recipes say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_training_arguments_take_every_field(name, tmp_path):
    here = {"output_dir": str(tmp_path), "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
    arguments = recipe(name).arguments()
    allowed = {field.name for field in fields(TrainingArguments)}
    assert set(arguments) <= allowed
    TrainingArguments(**{**arguments, **here})


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_what_it_is(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    assert f"examples/recipes/{name}.yaml" in head(name)
    for part in ("Source ", "Batch ", "Time ", "redicted, not measured" if name != "tiny-cpu" else "Measured "):
        assert part in head(name), part


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_is_the_product_that_the_comment_says(name):
    found = re.search(
        r"Batch (\d+) \w+[\w ,.-]* a step = (\d+) process\w* x (\d+) \w+ x (\d+) accumulated batch", head(name)
    )
    whole, processes, documents, accumulated = map(int, found.groups())
    training = recipe(name).training
    assert whole == processes * documents * accumulated
    assert documents == training["per_device_train_batch_size"]
    assert accumulated == training["gradient_accumulation_steps"]
    assert whole == 8 or name == "tiny-cpu"
    assert ("torchrun" in head(name)) == (processes > 1)
    assert recipe(name).ratios.same_on_all_ranks == (processes > 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_document_fills_a_window_and_goes_on(name):
    """Shorter ones have no beacons and teach nothing."""
    found = recipe(name)
    assert found.data.min_length > found.beacon.window and not found.data.packing


@pytest.mark.parametrize("name", NAMES)
def test_check_prints_a_recipe_that_says_the_same(name, capsys, tmp_path):
    assert main(["train", str(FOLDER / f"{name}.yaml"), "--check", "--training.max_steps", "7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = Recipe.load(printed)
    assert again.values == recipe(name, "--training.max_steps", "7").values
    assert again.training["max_steps"] == 7


def test_the_first_version_of_the_paper():
    for name in ("paper-llama2", "single-gpu"):
        found = recipe(name)
        beacon, training = found.beacon, found.training
        assert (beacon.placement, beacon.attention, beacon.window, beacon.stride) == (
            "append",
            "step-expansion",
            1024,
            1024,
        )
        assert beacon.projections == ("q", "k", "v", "o") and beacon.sink == 0
        assert found.ratios.choices == PAPER_RATIOS and found.ratios.policy == "step-random"
        assert (found.data.min_length, found.data.max_length) == (1200, 8192)
        assert (training["max_steps"], training["learning_rate"], training["warmup_steps"]) == (10_000, 5e-5, 0)
        assert (found.model.dtype, found.model.beacon_dtype) == ("bfloat16", "float32")
    small = recipe("single-gpu-24gb")
    assert small.ratios.choices == PAPER_RATIOS and small.beacon.projections == ("q", "k", "v")
    assert (small.model.quantization, small.model.beacon_dtype) == ("4bit", "bfloat16")


@pytest.mark.parametrize("family", WINDOWS_AND_SINKS)
def test_both_phases_of_the_iclr_version(family):
    first, second = recipe(f"iclr-{family}-pretrain"), recipe(f"iclr-{family}-finetune")
    assert first.beacon == second.beacon and first.model.name == second.model.name
    assert second.model.adapter == first.arguments()["output_dir"]
    assert (first.beacon.window, first.beacon.sink) == WINDOWS_AND_SINKS[family]
    assert (first.beacon.placement, first.beacon.projections) == ("interleave", ("q", "k", "v"))
    assert (first.ratios.choices, second.ratios.choices) == ((2, 4, 8, 16, 32), (2, 4, 8))
    assert (first.training["learning_rate"], second.training["learning_rate"]) == (5e-5, 1e-5)
    assert (first.data.min_length, first.data.max_length, first.data.too_long) == (2400, 20480, "skip")
    thousands = sum(source.weight for source in second.data.sources)
    assert thousands == 28 and second.training["max_steps"] * 8 == thousands * 1000


# -- launchers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know, but for those inside
    options = {action.dest for action in launch_command_parser()._actions}
    inside = {**config.fsdp_config, **config.deepspeed_config}
    assert set(inside) <= options
    assert config.num_processes == 8 and (config.distributed_type.value in ("MULTI_GPU",) or inside)
    if "deepspeed_config_file" in inside:
        stage = json.loads((ROOT / inside["deepspeed_config_file"]).read_text())["zero_optimization"]["stage"]
        assert path.stem == f"deepspeed-zero{stage}"


def test_several_nodes_start_torchrun_and_resume():
    script = LAUNCH / "multi-node.sh"
    assert os.access(script, os.X_OK)
    slurm = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env = {**slurm, "NNODES": "4", "MASTER": "node0", "GPUS": "8", "RUN_ID": "one", "PYTHON": "echo"}
    command = [str(script), "recipe.yaml", "--training.fsdp", "true"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == shlex.split(
        "-m torch.distributed.run --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 "
        "--rdzv-id one --max-restarts 3 -m beacon.training recipe.yaml --resume --training.fsdp true"
    )
    del env["MASTER"]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=False).returncode == 2


# -- documents ---------------------------------------------------------------------------------------------------------


def test_the_table_names_every_recipe():
    text = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"\(([\w-]+)\.yaml\)", text))
    assert named == set(NAMES)
    assert all(f"`{path.name}`" in text for path in LAUNCH.glob("*.yaml"))


def test_commands_of_the_documents_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [
        line
        for path in DOCUMENTS
        for block in blocks(path, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if "beacon train" in line or "beacon.training" in line
    ]
    assert len(commands) >= 8
    for command in commands:
        told = shlex.split(command.partition(" #")[0])
        start = told.index("train") if "train" in told else told.index("beacon.training")
        args, options = build_parser().parse_known_args(["train", *told[start + 1 :]])
        Recipe.load(args.recipe, options).arguments()


def test_sections_in_the_documents_are_accepted():
    shown = [yaml.safe_load(block) for path in DOCUMENTS for block in blocks(path, "yaml")]
    assert len(shown) >= 3
    for values in shown:
        Recipe.parse({"model": {"name": "default"}, "data": {"sources": ["a.jsonl"]}, **values})


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # where there is no GPU
@pytest.mark.parametrize("number", [0, 1], ids=["ratios of a function", "TRL"])
def test_code_of_the_documents_runs(number, tmp_path, monkeypatch, capsys):
    code = blocks(ROOT / "docs" / "training.md", "python")[number]
    if "trl" in code:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": words(300 + 50 * row)} for row in range(6)])
    exec(compile(code, "docs/training.md", "exec"), {"__name__": "documentation"})
    assert list((tmp_path / "runs").glob("*/checkpoint-2/beacon_model.safetensors"))


# -- a run -------------------------------------------------------------------------------------------------------------


def test_tiny_cpu_runs_and_resumes(tmp_path, capsys):
    """Two steps and a third one, on small files in place of the library's."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": words(520 + 10 * row)} for row in range(12)])
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [{"text": words(1100)}])
    output = tmp_path / "run"
    options = {
        "data.sources": f"[{corpus}]",
        "validation.sources": f"[{held_out}]",
        "evaluation.source": held_out,
        "evaluation.lengths": "[512]",
        "evaluation.texts": "1",
        "evaluation.passkey_lengths": "[512]",
        "training.output_dir": str(output),
        "training.gradient_accumulation_steps": "2",
        "training.train_sampling_strategy": "group_by_length",
        "training.eval_steps": "2",
        "training.save_steps": "2",
        "training.disable_tqdm": "true",
    }
    command = [
        "train",
        str(FOLDER / "tiny-cpu.yaml"),
        *(word for key, v in options.items() for word in (f"--{key}", v)),
    ]
    assert main([*command, "--training.max_steps", "2"]) == 0, capsys.readouterr().err
    assert "2 steps, mean loss" in capsys.readouterr().out
    assert (output / "beacon_model.safetensors").is_file() and (output / "checkpoint-2").is_dir()
    records = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2]
    assert {"perplexity_512_ratio_8", "passkey_512_ratio_8"} <= set(records[0])
    again = Recipe.load(output / "recipe.yaml")
    assert (
        again.training["max_steps"] == 2
        and again.fingerprints == Recipe.load(FOLDER / "tiny-cpu.yaml", ["--data.sources", f"[{corpus}]"]).fingerprints
    )
    assert main([*command, "--training.max_steps", "3"]) == 2
    assert "go on from them with --resume" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--training.max_steps", "3", "--resume"]) == 0, capsys.readouterr().err
    assert "3 steps, mean loss" in capsys.readouterr().out
