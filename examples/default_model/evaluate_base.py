"""Does the base use its context? Held-out loss by offset, and passkey recall by depth."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from data import Corpus, load_corpus
from tasks import NUM_DIGITS, TaskSampler

BUCKETS = ((0, 64), (64, 128), (128, 256), (256, 384), (384, 511))
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Corpus,
    windows: int = 64,
    keys: int = 16,
    seqlen: int = 512,
) -> dict:
    """Measure a model on held-out code.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        held_out: documents that were not trained on.
        windows: windows of code, the same for the same number.
        keys: passkey sequences for each depth.
        seqlen: tokens of a window.

    Returns:
        `loss` (nats for a token, by offset of the predicting position), `loss_mean`, `passkey`
        (share of right digits by depth) and `repeat` (loss of a random chunk seen again).
    """
    training = model.training
    model.eval()
    sampler = TaskSampler(held_out, tokenizer, np.random.default_rng(1234))

    def losses(sequences: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for at in range(0, len(sequences), 8):
            ids = torch.from_numpy(np.stack(sequences[at : at + 8])).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            parts.append((loss.view(len(ids), -1).cpu(), (logits.argmax(-1) == ids[:, 1:]).cpu()))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    loss, _ = losses([sampler.code(seqlen) for _ in range(windows)])
    result = {"loss_mean": round(loss.mean().item(), 4)}
    result["loss"] = {f"{low}-{high}": round(loss[:, low:high].mean().item(), 4) for low, high in BUCKETS}
    result["passkey"] = {}
    for depth in DEPTHS:
        _, right = losses([sampler.passkey(seqlen, depth)[0] for _ in range(keys)])
        result["passkey"][str(depth)] = round(right[:, -NUM_DIGITS:].float().mean().item(), 4)
    chunks = [np.tile(sampler.rng.integers(1, sampler.vocab_size, seqlen // 2), 2) for _ in range(8)]
    repeated, _ = losses(chunks)
    result["repeat"] = round(repeated[:, seqlen // 2 :].mean().item(), 4)
    model.train(training)
    return result


def main() -> None:
    """Evaluate a saved base and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--keys", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer, _, held_out = load_corpus(args.work)
    model = AutoModelForCausalLM.from_pretrained(args.work / "base", dtype=torch.float32)
    print(json.dumps(evaluate(model, tokenizer, held_out, args.windows, args.keys), indent=2))


if __name__ == "__main__":
    main()
