"""Log-likelihoods of continuations, in pieces: the logits of a whole text are never held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from beacon.evaluation.harness.contexts import Tokens
from beacon.evaluation.harness.reading import Reading

MAX_LOGITS = 2**27  # logits held at once: half a gigabyte in float32
MAX_ROWS = 8  # continuations scored in one call, or as many as there are contexts


@torch.no_grad()
def score(model: Any, reading: Reading, requests: Sequence[tuple[int, Tokens]]) -> list[tuple[float, bool]]:
    """Score continuations of contexts that have been read.

    Requests that read the same, as single letters after one question do, take one row together.

    Args:
        model: A wrapped model.
        reading: The contexts.
        requests: Number of the context and token ids of the continuation, at least one.

    Returns:
        For each the sum of its tokens' log-probabilities, in nats, and whether greedy decoding would give it.
    """
    places: dict[tuple[int, Tokens], list[int]] = {}
    for number, (row, continuation) in enumerate(requests):
        places.setdefault((row, continuation[:-1]), []).append(number)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    inputs = list(places)
    step = max(MAX_ROWS, len(reading.questions))
    for start in range(0, len(inputs), step):
        part = inputs[start : start + step]
        numbers = [(at, number) for at, key in enumerate(part) for number in places[key]]
        continuations = [requests[number][1] for _, number in numbers]
        scores = _score_rows(model, reading, part, [at for at, _ in numbers], continuations)
        for (_, number), result in zip(numbers, scores, strict=True):
            results[number] = result
    return results


def _score_rows(
    model: Any, reading: Reading, inputs: list[tuple[int, Tokens]], owners: list[int], continuations: list[Tokens]
) -> list[tuple[float, bool]]:
    """Read ``inputs``, a row each, and score every continuation on its owner's row."""
    device = model.device
    ids, mask = _right_padded([(reading.last(row), *rest) for row, rest in inputs])
    targets, counted = _right_padded(continuations)
    ids, targets, counted = ids.to(device), targets.to(device), counted.to(device)
    rows = [row for row, _ in inputs]
    cache = None if reading.cache is None else reading.cache.select(rows)
    known = reading.mask[rows]
    seen = torch.cat([known, mask], dim=1).long().to(device)
    owner = torch.tensor(owners, device=device)
    total = torch.zeros(len(owners), dtype=torch.float64, device=device)
    greedy = torch.ones(len(owners), dtype=torch.bool, device=device)
    width = ids.shape[1]
    step = max(1, MAX_LOGITS // (len(rows) * model.config.vocab_size))
    for start in range(0, width, step):
        stop = min(start + step, width)
        out = model(
            ids[:, start:stop],
            attention_mask=seen[:, : known.shape[1] + stop],
            past_key_values=cache,
            use_cache=stop < width,
            **reading.settings,
        )
        cache = out.past_key_values
        logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))  # [rows, piece, vocab]
        at = torch.arange(stop - start, device=device)
        wanted, counts = targets[:, start:stop], counted[:, start:stop]
        picked = logits[owner[:, None], at, wanted] - logits.logsumexp(dim=-1)[owner]  # [continuations, piece]
        total += picked.double().masked_fill(~counts, 0.0).sum(dim=1)
        greedy &= ((logits.argmax(dim=-1)[owner] == wanted) | ~counts).all(dim=1)
    return list(zip(total.tolist(), greedy.tolist(), strict=True))


def _right_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that begin together (every piece then has text in the first), and which entries are text; CPU."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[number, : len(row)] = True
    return ids, mask
