"""The command line: its options, its tables, and one clear line for every mistake."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM

import beacon
from beacon.cli import commands, main
from beacon.cli.main import build_parser

OPTIONS = {
    "demo": ["--device", "--file", "--length", "--model", "--output", "--quick", "--ratio"],
    "info": ["--lengths", "MODEL"],
    "ask": [
        "--adapter",
        "--cache",
        "--context",
        "--device",
        "--dtype",
        "--max-new-tokens",
        "--question",
        "--ratio",
        "MODEL",
    ],
    "train": ["--check", "--resume", "--wandb", "RECIPE"],
    "eval": [
        "--adapter",
        "--data",
        "--device",
        "--dtype",
        "--lengths",
        "--limit",
        "--methods",
        "--model",
        "--out",
        "--overwrite",
        "--ratios",
        "--seed",
        "--set",
        "--tasks",
    ],
    "bench": ["--threshold", "AFTER", "BEFORE"],
}


def test_options_are_these() -> None:
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert sorted(commands) == sorted(OPTIONS)
    for name, wanted in OPTIONS.items():
        own = [a for a in commands[name]._actions if a.dest not in ("help", "debug")]
        found = [(a.option_strings or [a.metavar])[0] for a in own]
        assert sorted(found) == sorted(wanted), name


def test_info_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "llama (supported: llama, mistral" in printed
    assert "full attention" in printed and "ratio 128" in printed


def test_ask_streams_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = tmp_path / "text.py"
    context.write_text("import os\n\n\ndef f():\n    return 1\n" * 60)
    question = ["--question", "def ", "--max-new-tokens", "3", "--ratio", "8"]
    assert main(["ask", "default", "--context", str(context), *question]) == 0
    printed = capsys.readouterr().out
    assert "tokens read" in printed and "sdpa" in printed


def test_ask_goes_on_from_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context, kept = tmp_path / "text.py", tmp_path / "caches" / "text.safetensors"
    context.write_text("import os\n\n\ndef f():\n    return 1\n" * 60)
    question = ["--question", "def ", "--max-new-tokens", "3", "--cache", str(kept)]
    assert main(["ask", "default", "--context", str(context), "--ratio", "8", *question]) == 0
    first = capsys.readouterr().out
    assert kept.exists()
    assert main(["ask", "default", *question]) == 0
    again = capsys.readouterr().out
    assert first.split("┏")[0].strip() == again.split("┏")[0].strip() != ""  # the answer
    assert "per second" in first and "kept in" in again
    assert main(["ask", "default", "--context", str(context), *question]) == 2
    assert "is there already: leave --context and --ratio out" in capsys.readouterr().err
    assert main(["ask", "default", *question, "--ratio", "8"]) == 2
    assert main(["ask", "default", "--question", "def ", "--cache", str(tmp_path)]) == 2
    assert "--cache must name a file" in capsys.readouterr().err
    assert main(["ask", "default", "--question", "def "]) == 2
    assert "--context must name a file to read, or --cache one that was read before" in capsys.readouterr().err


def test_demo_writes_numbers_figure_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.py"
    text.write_text(Path(argparse.__file__).read_text())
    out = tmp_path / "out"
    assert main(["demo", "--quick", "--file", str(text), "--length", "600", "--output", str(out)]) == 0
    assert "perplexity after" in capsys.readouterr().out
    numbers = json.loads((out / "demo.json").read_text())
    assert {entry["method"] for entry in numbers["perplexity"]} >= {"stock", "truncated", "beacon", "beacon, ratio 8"}
    assert numbers["machine"]["torch"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "demo.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.split("</style>")[1]


@pytest.mark.parametrize(
    "command, words",
    [
        (["ask", "default", "--context", "missing.txt", "--question", "?"], "no such file"),
        (["ask", "somewhere", "--context", __file__, "--question", "?"], "--adapter"),
        (["ask", "default", "--context", __file__, "--question", "?", "--ratio", "7"], "must divide by ratio"),
        (["demo", "--quick", "--file", "missing.txt"], "no such file"),
        (["demo", "--quick", "--device", "nowhere"], "device must be one that PyTorch finds"),
        (["demo", "--length", "-5"], "length must be at least 512 tokens"),
        (["demo", "--quick", "--output", __file__], "--output must be a folder"),
        (["demo", "--quick", "--device", "meta"], "device must be one that computes"),
        (["info", "/no/such/model"], "no such folder: /no/such/model"),
        (["info", "default", "--lengths", "0"], "--lengths must be numbers of tokens, got 0"),
        (["ask", "default", "--context", __file__, "--question", "?", "--max-new-tokens", "0"], "at least 1, got 0"),
        (
            ["ask", "default", "--context", __file__, "--question", "?", "--adapter", "nothere"],
            "no folder 'nothere' here",
        ),
    ],
)
def test_mistakes_are_one_line(command: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_demo_without_matplotlib_says_so_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(commands, "run_demo", lambda *_: pytest.fail("it measured"))
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "pip install 'activation-beacon[demo]'" in capsys.readouterr().err


def test_damaged_base_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(beacon.default_model(), folder)
    (folder / "model.safetensors").write_bytes(b"\x08" + b"\0" * 20)
    command = ["ask", str(folder), "--adapter", str(folder / "adapter"), "--context", __file__, "--question", "?"]
    assert main(command) == 2
    assert f"{folder} has a damaged file" in capsys.readouterr().err


def test_remote_code_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('remote code ran')")
    assert main(["info", str(tmp_path)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err


def test_narrow_terminals_keep_the_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["beacon.cli.main"], "WIDTH", 60)
    assert main(["info", "default", "--lengths", "4096", "1000000"]) == 0
    printed = capsys.readouterr().out
    assert "1,000,000" in printed and "6.1 GB" in printed and "…" not in printed


def test_unsupported_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config().save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 2
    assert "gpt2" in capsys.readouterr().err


def test_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    adapter = str(beacon.default_model() / "adapter")
    assert main(["ask", str(tmp_path), "--adapter", adapter, "--context", __file__, "--question", "?"]) == 2
    assert "was made for another base: hidden_size 256 (this model has 64)" in capsys.readouterr().err


def test_chat_template_is_used() -> None:
    tokenizer = AutoTokenizer.from_pretrained(beacon.default_model())
    tokenizer.chat_template = "<u>{{ messages[0].content }}</u><a>"
    head, tail = commands._prompt(tokenizer, "x = 1\n" * 9, "what is x?")
    assert tokenizer.decode(head[0]) == "<u>" + "x = 1\n" * 9
    assert tokenizer.decode(tail[0]) == "\n\nwhat is x?</u><a>"


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "info", stop)
    assert main(["info", "default"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert beacon.__version__ in capsys.readouterr().out


def test_other_libraries_show_no_bars_beside_ours() -> None:
    from tqdm import tqdm

    from beacon.cli.common import no_inner_bars

    with no_inner_bars():
        assert tqdm(total=3).disable and tqdm(total=3, disable=False).disable
    assert not tqdm(total=3).disable
