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

LENGTHS = (32, 127, 128, 129, 256, 447)  # at 448 the third window is full, and no room for a fourth is left


@torch.no_grad()
def measure(model: Any, held_out: Corpus, results: Path, texts: int) -> Path:
    """Losses of short texts through the wrapped and the stock model, and the largest difference of their logits."""
    drawn = long_texts(held_out, NATIVE_CONTEXT, texts)
    record = Record(results / "short.json", "loss of short texts, with adapter and without", {"texts": len(drawn)})
    for length in LENGTHS:
        if record.has(length=length):
            continue
        ids = torch.stack([text[:length] for _, text in drawn]).to(model.device)
        ours = model(ids).logits
        with beacon.disabled(model):
            stock = model(ids).logits
        losses = [functional.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for x in (ours, stock)]
        record.add(length=length, ours=losses[0], stock=losses[1], difference=(ours - stock).abs().max().item())
    return record.file
