"""Short texts: the same perplexity with and without the adapter."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import beacon
from corpus import Corpus
from perplexity import long_texts
from records import Record
from scales import NATIVE_CONTEXT

# The adaptive policy keeps room for one more window and 64 tokens: all of 447 tokens stay, with ratio 0 of any text.
CASES = {None: (32, 191, 192, 193, 320, 447), 0: (448, 511, 512)}


@torch.no_grad()
def measure(model: Any, held_out: Corpus, results: Path, texts: int) -> Path:
    """Losses of short texts through the wrapped and the stock model, and the largest difference of their logits."""
    drawn = long_texts(held_out, NATIVE_CONTEXT, texts)
    record = Record(results / "short.json", "loss of short texts, with adapter and without", {"texts": len(drawn)})
    for ratio, length in ((ratio, length) for ratio, lengths in CASES.items() for length in lengths):
        if record.has(length=length):
            continue
        ids = torch.stack([text[:length] for _, text in drawn]).to(model.device)
        ours = model(ids, ratios=ratio).logits
        with beacon.disabled(model):
            stock = model(ids).logits
        losses = [functional.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for x in (ours, stock)]
        difference = (ours - stock).abs().max().item()
        policy = "adaptive" if ratio is None else f"ratio {ratio}"
        record.add(length=length, policy=policy, ours=losses[0], stock=losses[1], difference=difference)
    return record.file
