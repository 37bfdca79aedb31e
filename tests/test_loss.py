"""The next-token loss: chunked, over window and call borders, counted as Hugging Face counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beacon import loss as loss_module
from tests.readers import close, fixed, wrapped
from tests.tiny_models import random_ids, tiny_model

CONFIGS = {
    "append": fixed(8, 2, projections=("q", "k", "v", "o")),
    "biases": fixed(8, 2, projections=("k", "v")),
    "window by window": fixed(8, 2, segment=1),
    "interleave": fixed(8, 2, placement="interleave", attention="full-coverage", attend_beacons=True),
}


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("name", ["llama3", "granite"])
def test_short_texts_have_the_stock_models_loss(name: str) -> None:
    model, stock, ids = wrapped(fixed(32, 4), name), tiny_model(name), random_ids(2, 30)
    labels = ids.clone()
    labels[0, :10], labels[1, 25:] = -100, -100
    ours, theirs = model(ids, labels=labels), stock(ids, labels=labels)
    close(ours.loss, theirs.loss, 1e-6)
    for count in (7, torch.tensor(7)):
        theirs = stock(ids, labels=labels, num_items_in_batch=count)
        close(model(ids, labels=labels, num_items_in_batch=count).loss, theirs.loss, 1e-6)


def test_long_texts_have_the_loss_of_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 16)  # several chunks, the last one short
    model, ids = wrapped(fixed(8, 2)), random_ids(2, 45)
    labels = ids.clone()
    labels[:, 11:30] = -100
    close(model(ids, labels=labels).loss, by_hand(model(ids).logits, labels), 1e-5)


def test_the_first_label_of_a_call_belongs_to_the_last_token_before() -> None:
    model, ids = wrapped(fixed(8, 2)), random_ids(2, 40)
    whole = model(ids, labels=ids, use_cache=True).loss * 2 * 39
    cache, parts = None, []
    for low, high in ((0, 7), (7, 8), (8, 24), (24, 40)):
        out = model(
            ids[:, low:high], torch.ones(2, high), past_key_values=cache, labels=ids[:, low:high], use_cache=True
        )
        cache = out.past_key_values
        parts.append(out.loss * 2 * (high - low - (low == 0)))
    close(sum(parts), whole, 1e-5)
    end = model(ids, past_key_values=model.compress(ids[:, :30]), labels=ids).loss  # the whole text with its labels
    last = model(ids, labels=torch.cat([torch.full((2, 30), -100), ids[:, 30:]], dim=1), use_cache=True).loss
    close(end, last, 1e-5)


def test_labels_without_any_that_counts_and_short_training_texts() -> None:
    """Neither NaN nor an error in backward: a batch may hold a text too short for beacons."""
    model, ids = wrapped(fixed(8, 2)).train(), random_ids(2, 20)
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing.item() == 0
    nothing.backward()
    for length in (1, 5, 8):
        short = model(ids[:, :length], labels=ids[:, :length]).loss
        assert torch.isfinite(short)
        short.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_window_that_ends_the_text_gets_no_beacons_under_labels() -> None:
    model, ids = wrapped(fixed(8, 4, placement="interleave")), random_ids(1, 14)
    out = model(ids, labels=ids, logits_to_keep=14)
    assert out.past_key_values is None
    close(out.loss, by_hand(out.logits, ids), 1e-5)
    kept = model(ids, labels=ids, logits_to_keep=14, use_cache=True)
    assert kept.past_key_values.stats()[0]["beacons"] == 3
    step = wrapped(fixed(8, 4, placement="interleave", attention="full-coverage", attend_beacons=True))
    assert (step(ids, labels=ids, logits_to_keep=14).logits - step(ids).logits)[:, 12:].abs().max() > 1e-3


def test_no_logits_of_the_whole_text_are_held() -> None:
    """The head sees at most a chunk of rows at a time, in both directions."""
    model, rows = wrapped(fixed(8, 2)), []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    ids = random_ids(1, 3000)
    model(ids, labels=ids).loss.backward()
    assert max(rows) <= loss_module.CHUNK and sum(rows) == 2 * 3000


def test_a_prompt_without_labels_costs_no_head() -> None:
    model, rows = wrapped(fixed(8, 2)), []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    ids = random_ids(1, 3000)
    labels = ids.clone()
    labels[:, :2900] = -100
    with torch.no_grad():
        model(ids, labels=labels)
    assert sum(rows) == 3000 - 2 * loss_module.CHUNK


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 5, 8, 45])
def test_every_beacon_parameter_gets_a_gradient_in_training(name: str, length: int) -> None:
    """DDP and FSDP2 wait for all of them, also where a text is too short for beacons and in the last layer."""
    model, ids = wrapped(CONFIGS[name]).train(), random_ids(2, length)
    model(ids, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_weights_are_factors_of_the_labels_losses() -> None:
    model, ids = wrapped(fixed(8, 2)), random_ids(2, 45)
    labels = ids.clone()
    labels[:, 20:25] = -100
    weights = torch.rand(2, 45)
    logits = model(ids).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    own = (weights[:, 1:] * (labels[:, 1:] != -100)).flatten()
    close(model(ids, labels=labels, weights=weights).loss, (each * own).sum() / own.sum(), 1e-5)
    close(model(ids, labels=labels, weights=weights, num_items_in_batch=7).loss, (each * own).sum() / 7, 1e-5)
    close(model(ids, labels=labels, weights=torch.full((2, 45), 3.0)).loss, model(ids, labels=labels).loss, 1e-6)
    assert model(ids, labels=labels, weights=torch.zeros(2, 45)).loss == 0
    cache = model(ids[:, :20], labels=labels[:, :20], weights=weights[:, :20], use_cache=True).past_key_values
    rest = {"labels": labels[:, 20:], "weights": weights[:, 20:], "num_items_in_batch": 1}
    split = model(ids[:, 20:], torch.ones(2, 45), past_key_values=cache, use_cache=True, **rest).loss
    close(split, (each * own).view(2, 44)[:, 19:].sum(), 1e-5)
    for wrong, kind in (
        (torch.ones(2, 44), ValueError),
        (-weights, ValueError),
        (weights * torch.nan, ValueError),
        (labels, TypeError),
    ):
        with pytest.raises(kind, match="weights must"):
            model(ids, labels=labels, weights=wrong)
