import pytest
import torch

import beacon
from beacon.evaluation import SlidingWindow, Stock
from beacon.evaluation.methods import sliding_window as module
from beacon.evaluation.methods.sliding_window import SlidingWindowReader, relevant
from beacon.modules import rotate
from tests.evaluation.tiny import NATIVE, tiny_llama

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}


@torch.no_grad()
def by_definition(model, ids: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Every token by itself: its visible tokens in order, at positions 0, 1, 2, ...; final hidden states."""
    body, rotary = model.model, model.beacon_rotary()
    hidden = body.embed_tokens(ids)
    for layer in body.layers:
        attention = layer.self_attn
        q, k, v = attention.project(layer.input_layernorm(hidden), own=False, queries=True)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        outputs = []
        for at in range(len(ids)):
            seen = [i for i in range(at + 1) if i < sinks or i > at - window]
            table = rotary.table(torch.arange(len(seen)), q.dtype)
            here = rotate(q[at : at + 1], tuple(part[-1:] for part in table))
            logits = torch.einsum("qhd,khd->hqk", here, rotate(k[seen], table)) * attention.scaling
            outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[seen]))
        hidden = hidden + attention.o_proj(torch.cat(outputs).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return body.norm(hidden)


@pytest.mark.parametrize("window,sinks", [(1, 4), (7, 4), (16, 0), (16, 4), (33, 1), (200, 4)])
def test_matches_the_definition(model, ids, window, sinks, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 10)
    expected = by_definition(model, ids, window, sinks)
    actual = SlidingWindowReader(model, window, sinks).read(ids)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_matches_the_definition_with_scaled_rotary(ids):
    model = beacon.wrap(
        tiny_llama(rope_parameters=YARN, max_position_embeddings=128), beacon.BeaconConfig(window=16, ratios=(2,))
    )
    actual = SlidingWindowReader(model, 20, 3).read(ids)
    torch.testing.assert_close(actual, by_definition(model, ids, 20, 3), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cuts", [(4, 1, 1, 60, 84), (5, 145), (100, 1, 1, 1, 47)])
def test_cuts_do_not_matter(model, ids, cuts):
    whole = SlidingWindowReader(model, 16).read(ids)
    reader = SlidingWindowReader(model, 16)
    pieces = torch.cat([reader.read(piece) for piece in ids.split(list(cuts))])
    torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=1e-4)


def test_relevant_tokens_are_enough(model, ids):
    text = relevant(ids, keep=10, window=16, sinks=4, num_layers=3)
    assert len(text) == 4 + 10 + 3 * 15 < len(ids)
    whole = SlidingWindowReader(model, 16).read(ids)
    short = SlidingWindowReader(model, 16).read(text)
    torch.testing.assert_close(short[-10:], whole[-10:], atol=2e-5, rtol=1e-4)


def test_is_the_stock_model_on_a_text_that_fits(model, ids):
    text = ids[:NATIVE]
    stock = Stock().read(model, text, 20)
    sliding = SlidingWindow(NATIVE - 4).read(model, text, 20)
    torch.testing.assert_close(sliding.logits, stock.logits, atol=1e-4, rtol=1e-4)
    assert sliding.entries == stock.entries == NATIVE
    assert SlidingWindow(NATIVE - 4).continue_text(model, text[:40], 8) == Stock().continue_text(model, text[:40], 8)


def test_decodes_what_reading_afresh_decodes(model, ids):
    method, text = SlidingWindow(16), ids
    for token in method.continue_text(model, ids, 6):
        assert token == int(method.read(model, text, 1).logits.argmax())
        text = torch.cat([text, torch.tensor([token])])


def test_progress_counts_tokens(model, ids, monkeypatch):
    monkeypatch.setattr(module, "PIECE_TOKENS", 64)
    seen = []
    SlidingWindowReader(model, 16).read(ids, progress=lambda *at: seen.append(at))
    assert seen == [(64, 150), (128, 150), (150, 150)]


@pytest.mark.parametrize("window,sinks", [(0, 4), (8, -1)])
def test_bad_sizes(model, window, sinks):
    with pytest.raises(ValueError, match="window must be at least 1"):
        SlidingWindowReader(model, window, sinks)


def test_too_short_a_first_call(model, ids):
    with pytest.raises(ValueError, match="bring all 4 sinks"):
        SlidingWindowReader(model, 8).read(ids[:3])
