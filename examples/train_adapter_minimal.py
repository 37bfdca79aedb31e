"""Fine-tune beacons on your own text in one screen: a plain loop, the base frozen, a random ratio per window.

python examples/train_adapter_minimal.py MODEL TEXT_FILE OUT_FOLDER --steps 100
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a supported causal LM")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4, help="full windows per sequence")
    parser.add_argument("--lr", type=float, default=5e-5)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(), return_tensors="pt").input_ids
    config = beacon.BeaconConfig(window=args.window, ratios=(2, 4, 8, 16, 32))
    model = beacon.wrap(AutoModelForCausalLM.from_pretrained(args.model), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    length = min(args.window * args.windows + args.window // 2, ids.shape[1])
    for step in range(args.steps):
        start = random.randrange(ids.shape[1] - length + 1)
        sequence = ids[:, start : start + length]
        ratios = [random.choice(config.ratios) for _ in range(args.windows)]
        loss = model(input_ids=sequence, labels=sequence, ratios=ratios).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item():.4f} ratios {ratios}")
    beacon.save_adapter(model, args.out)


if __name__ == "__main__":
    main()
