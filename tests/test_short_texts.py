"""As long as nothing is condensed the logits are bit for bit the stock model's, on the same calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import beacon
from tests.readers import fixed, pad, wrapped
from tests.tiny_models import random_ids, tiny_model

CONFIGS = {
    "append": fixed(32, 4),
    "append, stride < window, sinks": fixed(32, 4, stride=16, sink=2),
    "append, ratio 0": fixed(8, 0),
    "interleave, ratio 0": fixed(8, 0, placement="interleave", attention="full-coverage", attend_beacons=True),
    "adaptive that fits": beacon.BeaconConfig(window=8, ratios=(0, 2, 4), reserve=100),
    "adaptive that fits, interleave": beacon.BeaconConfig(
        window=8, ratios=(0, 2, 4), reserve=100, placement="interleave", attention="full-coverage", attend_beacons=True
    ),
}


@pytest.fixture(params=CONFIGS, scope="module")
def both(request: pytest.FixtureRequest) -> Any:
    """A wrapped model and the stock model."""
    return wrapped(CONFIGS[request.param], "llama3"), tiny_model("llama3")


@torch.no_grad()
def test_one_call(both: Any) -> None:
    model, stock = both
    ids = random_ids(2, 31)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert torch.equal(model(ids, logits_to_keep=3).logits, stock(ids, logits_to_keep=3).logits)
    index = torch.tensor([5, 30])
    assert torch.equal(model(ids, logits_to_keep=index).logits, stock(ids, logits_to_keep=index).logits)


@torch.no_grad()
def test_continuation(both: Any) -> None:
    model, stock = both
    ids, ours, theirs = random_ids(2, 31), None, None
    for low, high in ((0, 5), (5, 6), (6, 7), (7, 20), (20, 31)):
        out = model(ids[:, low:high], past_key_values=ours)
        ref = stock(ids[:, low:high], past_key_values=theirs, use_cache=True)
        ours, theirs = out.past_key_values, ref.past_key_values
        assert torch.equal(out.logits, ref.logits), (low, high)
    assert "stock" in ours.stats()[0]["attention_path"]


@torch.no_grad()
def test_left_padded_batch(both: Any) -> None:
    model, stock = both
    ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (21, 9)])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for given in (None, positions):
        out = model(ids[:, :20], mask[:, :20], position_ids=None if given is None else given[:, :20])
        ref = stock(ids[:, :20], mask[:, :20], position_ids=None if given is None else given[:, :20], use_cache=True)
        text = mask[:, :20].bool()
        assert torch.equal(out.logits[text], ref.logits[text])
        out = model(ids[:, 20:], mask, past_key_values=out.past_key_values)
        # The stock model counts padding columns unless it is told; relative positions are all that matters to us.
        at = positions[:, 20:] if given is not None else None
        ref = stock(ids[:, 20:], mask, position_ids=at, past_key_values=ref.past_key_values)
        assert torch.equal(out.logits, ref.logits)


@torch.no_grad()
def test_generate(both: Any) -> None:
    model, stock = both
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings.update(output_logits=True, return_dict_in_generate=True)
    ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (21, 9)])
    for more in ({}, {"num_beams": 3}):
        ours = model.generate(ids, attention_mask=mask, **settings, **more)
        theirs = stock.generate(ids, attention_mask=mask, **settings, **more)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_a_long_row_beside_a_short_one_stays_right() -> None:
    """A batch leaves the stock attention as a whole: then a short row is equal to rounding, not bit for bit."""
    model, stock = wrapped(fixed(16, 4), "llama3"), tiny_model("llama3")
    texts = [random_ids(1, n, seed=n)[0] for n in (40, 9)]
    ids, mask = pad(texts)
    with torch.no_grad():
        ours, theirs = model(ids, mask).logits[1, -9:], stock(texts[1][None]).logits[0]
    assert (ours - theirs).abs().max() < 2e-5


def test_interleave_with_a_ratio_differs() -> None:
    """Its beacons stand between the tokens from the start, so this must not be taken for a stock plan."""
    model = wrapped(fixed(16, 4, placement="interleave", attention="full-coverage", attend_beacons=True), "llama3")
    ids = random_ids(1, 12)
    with torch.no_grad():
        ours, theirs = model(ids).logits, tiny_model("llama3")(ids).logits
        assert torch.allclose(ours[:, :4], theirs[:, :4], atol=2e-5)
        assert (ours[:, 5:] - theirs[:, 5:]).abs().max() > 1e-2
