"""Is the adapter learning? Passkeys found whole and the loss of long texts, in a minute, while it trains."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from beacon.evaluation import Beacon, SlidingWindow, measure_perplexity
from corpus import Corpus
from scales import WINDOW
from sequences import Sequences

PASSKEYS = ((1024, 8), (4096, 8), (4096, 32), (4096, 128), (16384, 128))  # tokens, ratio
RATIOS = (2, 8, 32)
LENGTH, SINKS = 4096, 4


@torch.no_grad()
def evaluate_adapter(
    model: Any, held_out: Corpus, tokenizer: PreTrainedTokenizerFast, longest: int, rows: int
) -> dict[str, Any]:
    """Measure a wrapped model on held-out packages.

    Args:
        model: The wrapped model.
        held_out: Packages that were not trained on.
        tokenizer: Their tokenizer.
        longest: Tokens of the longest text to read; longer ones are left out.
        rows: Passkeys of every length and ratio, spread over all depths, and texts for the loss.

    Returns:
        Share of passkeys found whole, and loss of the last quarter of 4,096 tokens at several ratios, beside sliding
        windows of as many raw tokens and of as many entries as the native context.
    """
    result: dict[str, Any] = {}
    for seqlen, ratio in PASSKEYS:
        if seqlen > longest:
            continue
        sequences = Sequences(held_out, tokenizer, np.random.default_rng(99))
        right = 0
        for n in range(rows):
            ids, answer = sequences.passkey(seqlen, (n + 0.5) / rows * (1 - 1.5 * WINDOW / seqlen))
            ids = torch.from_numpy(ids)[None].to(model.device)
            logits = model(ids[:, :-1], ratios=ratio, logits_to_keep=answer, use_cache=False).logits
            right += (logits.argmax(-1) == ids[:, -answer:]).all().item()
        result[f"passkey, {seqlen} tokens, ratio {ratio}"] = round(right / rows, 3)
    length = min(LENGTH, longest)
    sequences = Sequences(held_out, tokenizer, np.random.default_rng(100))
    texts = [torch.from_numpy(sequences.code(length + 1)).to(model.device) for _ in range(rows)]
    for method in (*map(Beacon, RATIOS), SlidingWindow(WINDOW, SINKS), SlidingWindow(512 - SINKS, SINKS)):
        found = measure_perplexity(model, texts, length + 1, length // 4, method)
        result[f"loss, {length} tokens, {method.name}"] = round(found.loss, 4)
    return result
