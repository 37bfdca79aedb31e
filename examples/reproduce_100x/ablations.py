"""The paper's ablations on a smaller model: coverage, training ratios, own projections, placement.

    python examples/reproduce_100x/ablations.py

A base and one adapter per variant, trained alike on the same sequences, then measured alike. As in the paper windows
do not overlap, in all variants. Goes on where it was stopped.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import beacon
from beacon.evaluation import Beacon, SlidingWindow, measure_perplexity
from corpus import load_corpus
from course import RATIOS as SPACINGS
from perplexity import SINKS, TARGETS, long_texts
from recall import find_passkeys
from records import Record
from scales import CONFIG, SCALES, STRIDE
from train_adapter import train_adapter
from train_base import train_base

logger = logging.getLogger("ablations")
COMMAND = "python examples/reproduce_100x/ablations.py"
FIXED = 8  # the one ratio of the variant that trains at one
VARIANTS = {
    "step-expansion": {},
    "segmentation": {"attention": "segmentation"},
    "full-coverage": {"attention": "full-coverage"},
    "q k v": {"projections": ("q", "k", "v")},
    "interleave": {"placement": "interleave", "attention": "full-coverage", "attend_beacons": True},
    "one ratio": {},
}
CONTEXTS = (512, 2048, 8192, 16384)
RATIOS = (2, 8, 32, 128)


def measure(work: Path, results: Path, texts: int, keys: int) -> Path:
    """Perplexity by context and ratio, and passkeys, of every variant's adapter.

    Args:
        work: Folder of build products, with the base and all adapters.
        results: Folder for ``ablations.json``.
        texts: Texts for perplexity.
        keys: Passkeys per depth.

    Returns:
        The result file.
    """
    tokenizer, _, held_out = load_corpus(work)
    drawn = long_texts(held_out, max(CONTEXTS) + TARGETS, texts)
    settings = {"targets": TARGETS, "texts": [name for name, _ in drawn], "keys": keys}
    command = f"{COMMAND} --texts {texts} --keys {keys}"
    record = Record(results / "ablations.json", "perplexity and passkeys by variant", settings, command)
    for variant in VARIANTS:
        base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).eval()
        model = beacon.load_adapter(base, work / variant.replace(" ", "-"))
        methods = [Beacon(ratio) for ratio in RATIOS]
        if variant == "step-expansion":
            methods.append(SlidingWindow(STRIDE, SINKS))
        for context in CONTEXTS:
            for method in methods:
                if not record.has(variant=variant, method=method.name, context=context):
                    ids = [text.to(model.device) for _, text in drawn]
                    found = measure_perplexity(model, ids, context + TARGETS, TARGETS, method)
                    record.add(variant=variant, method=method.name, context=context, loss=round(found.loss, 5))
        for ratio in RATIOS:
            if not record.has(variant=variant, length=4096, ratio=ratio):
                right, asked = find_passkeys(model, tokenizer, held_out, 4096, Beacon(ratio), keys)
                record.add(variant=variant, length=4096, ratio=ratio, found=right, asked=asked)
    return record.file


def main() -> None:
    """Read the command line, train what is missing, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/ablations"), help="folder of build products")
    parser.add_argument(
        "--data", type=Path, default=Path("build/reproduce_100x"), help="whose corpus is taken if there"
    )
    parser.add_argument("--results", type=Path, default=Path("examples/reproduce_100x/results"))
    parser.add_argument("--scale", choices=SCALES, default="ablation")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--keys", type=int, default=4, help="passkeys at each of ten depths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for part in ("data", "tokenizer"):
        if (args.data / part).exists() and not (args.work / part).exists():
            (args.work / part).symlink_to((args.data / part).resolve())
    scale = SCALES[args.scale]
    train_base(args.work, scale, seed=args.seed, cpu=args.cpu)
    for variant, changes in VARIANTS.items():
        config = dataclasses.replace(CONFIG, window=STRIDE, **changes)
        # What a beacon sees depends on its ratio in some variants, so all are trained as their ratios place them.
        only, spacings = (FIXED, (FIXED,)) if variant == "one ratio" else (None, SPACINGS)
        options = {"only_ratio": only, "spacings": spacings, "seed": args.seed, "cpu": args.cpu, "rows": 0}
        train_adapter(args.work, scale, config=config, name=variant.replace(" ", "-"), **options)
    logger.info("%s", measure(args.work, args.results, args.texts, args.keys))


if __name__ == "__main__":
    main()
