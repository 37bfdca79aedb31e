"""Put the trained base and adapter into the package: bfloat16 safetensors, tokenizer, model card."""

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon
from run import replace_folder

logger = logging.getLogger("export")
CARD = Path(__file__).with_name("MODEL_CARD.md")
LIMIT = 16 << 20  # bytes, all files together


def last_record(path: Path) -> dict:
    """The final evaluation in a training log."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record.get("final")][-1]


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--out", type=Path, default=Path("beacon/assets/default_model"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fresh = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(args.work / "base", dtype=torch.bfloat16)
    model.save_pretrained(fresh)
    AutoTokenizer.from_pretrained(args.work / "base").save_pretrained(fresh)
    beacon.save_adapter(beacon.load_adapter(model, args.work / "adapter"), fresh / "adapter")
    card = CARD.read_text()
    for name in ("base", "adapter"):
        shutil.copy(args.work / f"{name}_log.jsonl", fresh / f"{name}_training_log.jsonl")
        card = card.replace(f"@{name}@", json.dumps(last_record(args.work / f"{name}_log.jsonl"), indent=1))
    (fresh / "README.md").write_text(card)
    size = sum(file.stat().st_size for file in fresh.rglob("*") if file.is_file())
    if size > LIMIT:
        raise ValueError(f"the shipped model must stay below {LIMIT} bytes, got {size}; train a smaller one.")
    replace_folder(fresh, args.out)
    logger.info("%s: %.1f MB", args.out, size / 1e6)


if __name__ == "__main__":
    main()
