"""Does the base use its context? Held-out loss by offset, what far context is worth, needles by depth."""

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from corpus import Corpus
from sequences import Sequences

BUCKETS = ((0, 64), (64, 128), (128, 256), (256, 384), (384, 511))
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
FAR = 384  # the tokens after this offset are read again with less text before them
KEPT = (64, 128, 256)  # tokens before FAR that are kept then


@torch.no_grad()
def evaluate_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: Corpus, windows: int, needles: int
) -> dict:
    """Measure a base on held-out packages within its native context.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        held_out: Packages that were not trained on.
        windows: Stretches of 512 tokens, the same for the same number.
        needles: Sequences for each depth, and for each kind of needle.

    Returns:
        ``loss`` (nats for a token, by offset of the predicting position), ``loss_mean``; ``loss_more`` (how much more
        the tokens from offset 384 on cost with only so many tokens before them: mean and standard error over
        stretches); ``passkey`` (share found whole, by depth), ``needles`` (by kind), ``repeat`` (loss of a random
        chunk seen again).
    """
    training = model.training
    model.eval()
    sequences = Sequences(held_out, tokenizer, np.random.default_rng(1234))
    seqlen = model.config.max_position_embeddings
    texts = np.stack([sequences.code(seqlen) for _ in range(windows)])
    loss, _ = _losses(model, texts)
    result: dict = {"loss_mean": round(loss.mean().item(), 4)}
    result["loss"] = {f"{low}-{high}": round(loss[:, low:high].mean().item(), 4) for low, high in BUCKETS}
    result["loss_more"] = {}
    for kept in KEPT:
        less, _ = _losses(model, texts[:, FAR - kept :])
        more = (less[:, kept:] - loss[:, FAR:]).mean(1)
        error = more.std().item() / len(more) ** 0.5
        result["loss_more"][str(kept)] = [round(more.mean().item(), 4), round(error, 4)]
    result["passkey"] = {str(depth): _found(model, sequences, seqlen, needles, "passkey", depth) for depth in DEPTHS}
    result["needles"] = {kind: _asked(model, sequences, seqlen, needles, kind) for kind in ("number", "topic")}
    chunks = np.stack([np.tile(sequences.rng.integers(1, sequences.vocab_size, seqlen // 2), 2) for _ in range(8)])
    result["repeat"] = round(_losses(model, chunks)[0][:, seqlen // 2 :].mean().item(), 4)
    model.train(training)
    return result


def _losses(model: PreTrainedModel, sequences: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every next token and whether it is foreseen, ``[rows, seqlen - 1]``."""
    losses, right = [], []
    for ids in torch.from_numpy(sequences).split(8):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(ids), -1).cpu())
        right.append((logits.argmax(-1) == ids[:, 1:]).cpu())
    return torch.cat(losses), torch.cat(right)


def _found(model: PreTrainedModel, sequences: Sequences, seqlen: int, count: int, kind: str, depth: float) -> float:
    drawn = [sequences.passkey(seqlen, depth, kind) for _ in range(count)]
    _, right = _losses(model, np.stack([ids for ids, _ in drawn]))
    whole = [row[-answer:].all().item() for row, (_, answer) in zip(right, drawn, strict=True)]
    return round(sum(whole) / count, 4)


def _asked(model: PreTrainedModel, sequences: Sequences, seqlen: int, count: int, kind: str) -> float:
    """Share of right tokens in answers to questions about several needles."""
    drawn = [sequences.needles(seqlen, kind) for _ in range(count)]
    _, right = _losses(model, np.stack([ids for ids, _ in drawn]))
    answers = torch.from_numpy(np.stack([weights for _, weights in drawn]))[:, 1:] > 1.0
    return round(right[answers].float().mean().item(), 4)
