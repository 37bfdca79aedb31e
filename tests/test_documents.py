"""Packed documents: each reads as if it were alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.readers import close, fixed, wrapped
from tests.tiny_models import random_ids

LENGTHS = (21, 5, 8, 1, 30)


def packed() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    ids = random_ids(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return list(ids.split(LENGTHS, dim=1)), ids, positions


@pytest.mark.parametrize("training", [False, True])
def test_documents_are_read_one_by_one(training: bool) -> None:
    model = wrapped(fixed(8, 2)).train(training)
    alone, ids, positions = packed()
    ratios = [2, 4, 8]
    logits = torch.cat([model(part, ratios=ratios, use_cache=False).logits for part in alone], dim=1)
    out = model(ids, position_ids=positions, ratios=ratios)
    assert out.past_key_values is None
    close(out.logits, logits, 1e-5)
    close(model(ids, position_ids=positions, ratios=ratios, logits_to_keep=3).logits, logits[:, -3:], 1e-5)
    some = torch.tensor([40, 2])
    close(model(ids, position_ids=positions, ratios=ratios, logits_to_keep=some).logits, logits[:, some], 1e-5)


def test_loss_and_gradients_are_those_of_a_padded_batch() -> None:
    model = wrapped(fixed(8, 2)).train()
    alone, ids, positions = packed()
    results = []
    rows = torch.nn.utils.rnn.pad_sequence([part[0] for part in alone], batch_first=True)
    mask = (torch.arange(rows.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    weights = torch.rand(1, ids.shape[1])
    padded_weights = torch.zeros(rows.shape).masked_scatter(mask.bool(), weights)
    labels = ids.clone()
    labels[0, torch.tensor(LENGTHS).cumsum(0)[:-1]] = -100
    for call in (
        {"input_ids": ids, "position_ids": positions, "labels": labels, "weights": weights},
        {
            "input_ids": rows,
            "attention_mask": mask,
            "labels": rows.masked_fill(mask == 0, -100),
            "weights": padded_weights,
        },
    ):
        model.zero_grad()
        loss = model(**call, num_items_in_batch=60).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    close(*(loss for loss, _ in results), 1e-6)
    for name, gradient in results[0][1].items():
        close(gradient, results[1][1][name], 1e-5, name)


def test_the_flattening_collator_of_transformers_is_understood() -> None:
    model, ids = wrapped(fixed(8, 2)).train(), random_ids(1, 40)[0].tolist()
    batch = DataCollatorWithFlattening()([{"input_ids": ids[:25]}, {"input_ids": ids[25:]}])
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[:25]), torch.tensor(ids[25:])], batch_first=True)
    mask = torch.ones_like(rows)
    mask[1, 15:] = 0
    expected = model(rows, mask, labels=rows.masked_fill(mask == 0, -100)).loss
    close(model(**batch).loss, expected, 1e-6)


def test_packed_documents_that_cannot_be_read() -> None:
    model = wrapped(fixed(8, 2))
    _, ids, positions = packed()
    with pytest.raises(ValueError, match="count 0, 1, 2"):
        model(ids, position_ids=positions * 2)
    with pytest.raises(ValueError, match="no common cache"):
        model(ids, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(ids, position_ids=positions, labels=ids[:, 1:])


def test_other_position_ids_mark_no_documents() -> None:
    model, ids = wrapped(fixed(8, 2)), random_ids(1, 40)
    plain = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(40)[None]).logits, plain)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), torch.arange(37)[None]], dim=1)  # generate's, left padding
    mask = torch.ones(1, 40)
    mask[0, :3] = 0
    assert model(ids, mask, position_ids=padded).logits.shape == plain.shape
