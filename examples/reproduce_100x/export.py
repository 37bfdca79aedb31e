"""Put base and adapter into the package: bfloat16 safetensors, tokenizer, model card, training logs."""

import csv
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon
from progress import replace_folder

CARD = Path(__file__).with_name("MODEL_CARD.md")
LIMIT = 25 << 20  # bytes, all files together


def export(work: Path, out: Path) -> Path:
    """Write the model folder beside its place, then rename it.

    Args:
        work: Folder of build products, with base, adapter and their logs.
        out: Where the folder goes; an older one is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: It would be larger than 25 MB.
    """
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
    model.save_pretrained(fresh)
    AutoTokenizer.from_pretrained(work / "base").save_pretrained(fresh)
    beacon.save_adapter(beacon.load_adapter(model, work / "adapter"), fresh / "adapter")
    card = CARD.read_text().replace("@packages@", _packages(work / "data" / "packages.tsv"))
    for name in ("base", "adapter"):
        log = work / f"{name}_log.jsonl"
        shutil.copy(log, fresh / f"{name}_training_log.jsonl")
        card = card.replace(f"@{name}@", json.dumps(_last_record(log), indent=1))
    (fresh / "README.md").write_text(card)
    size = sum(file.stat().st_size for file in fresh.rglob("*") if file.is_file())
    if size > LIMIT:
        raise ValueError(f"the shipped model must stay below {LIMIT} bytes, got {size}; train a smaller one.")
    replace_folder(fresh, out)
    return out


def _last_record(log: Path) -> dict:
    """The final evaluation in a training log."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record for record in records if record.get("final")][-1]


def _packages(table: Path) -> str:
    """Packages as Markdown: name, version, licence, split; the standard library's folders in one row per split."""
    with table.open() as file:
        rows = list(csv.reader(file, delimiter="\t"))
    lines = ["| package | version | licence | split |", "|---|---|---|---|"]
    for split in ("train", "held-out"):
        for version in sorted({row[1] for row in rows if row[2] == "PSF-2.0" and row[3] == split}):
            names = ", ".join(row[0] for row in rows if row[1:] == [version, "PSF-2.0", split] and row[0] != "stdlib")
            what = f"all but the held-out ones ({names} and single modules)" if split == "train" else names
            lines.append(f"| Python's standard library: {what} | {version} | PSF-2.0 | {split} |")
    lines += [f"| {' | '.join(row)} |" for row in rows if row[2] != "PSF-2.0"]
    return "\n".join(lines)
