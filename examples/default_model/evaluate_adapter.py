"""Passkeys by depth and perplexity beside sliding windows, of a shipped or freshly exported model, on held-out code."""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import beacon
from beacon.evaluation import Beacon, SlidingWindow, measure_perplexity
from data import load_corpus
from tasks import NUM_DIGITS, TaskSampler

logger = logging.getLogger("evaluate_adapter")
LENGTH, TARGETS = 4096, 1024


@torch.no_grad()
def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"), help="data; made if missing")
    parser.add_argument("--model", type=Path, default=None, help="folder of base and adapter/; default the shipped one")
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--texts", type=int, default=24)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = args.model or beacon.default_model()
    tokenizer, _, held_out = load_corpus(args.work)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = beacon.load_adapter(base, folder / "adapter")
    sampler = TaskSampler(held_out, tokenizer, np.random.default_rng(2024))
    for seqlen, ratio in ((LENGTH, 8), (1024, 8), (LENGTH, 16)):
        depths = (np.arange(args.keys) + 0.5) / args.keys * (1 - 150 / seqlen)
        right = []
        for ids in torch.from_numpy(np.stack([sampler.passkey(seqlen, depth)[0] for depth in depths])).split(4):
            logits = model(ids[:, :-1], ratios=ratio, logits_to_keep=NUM_DIGITS, use_cache=False).logits
            right.append(logits.argmax(-1) == ids[:, -NUM_DIGITS:])
        found = torch.cat(right).float()
        fifths = [round(part.mean().item(), 2) for part in found.tensor_split(5)]
        exact = found.amin(dim=1).mean().item()
        what = f"passkeys, {seqlen} tokens, ratio {ratio}"
        logger.info("%s: %.3f per digit (by depth %s), %.2f exact", what, found.mean().item(), fifths, exact)
    texts = [torch.from_numpy(sampler.code(LENGTH + 1)) for _ in range(args.texts)]
    for method in (Beacon(8), Beacon(), Beacon(32), SlidingWindow(128), SlidingWindow(508)):
        result = measure_perplexity(model, texts, LENGTH + 1, TARGETS, method)
        what = f"{LENGTH} tokens, {method.name}"
        logger.info(
            "%s: perplexity %.3f (loss %.4f), %.0f entries", what, result.perplexity, result.loss, result.entries
        )


if __name__ == "__main__":
    main()
