import math

import pytest
import torch

import beacon
from beacon.evaluation import (
    Beacon,
    SlidingWindow,
    Stock,
    Truncated,
    full_cache_bytes,
    held_entries,
    measure_perplexity,
    native_context,
    negative_log_likelihoods,
)
from tests.evaluation.tiny import NATIVE


def test_stock_losses_are_the_models_own(model, ids):
    text = ids[:NATIVE]
    losses = negative_log_likelihoods(model, text, NATIVE - 1, Stock())
    with beacon.disabled(model), torch.no_grad():
        expected = model(text[None], labels=text[None]).loss
    assert losses.shape == (NATIVE - 1,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), expected)


@pytest.mark.parametrize("ratio", [2, 8])
def test_beacon_losses_are_the_models_own(model, ids, ratio):
    losses = negative_log_likelihoods(model, ids, len(ids) - 1, Beacon(ratio))
    with torch.no_grad():
        expected = model(ids[None], labels=ids[None], ratios=ratio).loss
    torch.testing.assert_close(losses.mean(), expected)


@pytest.mark.parametrize("method", [Beacon(4), Beacon((4, 2) + (8,) * 8), Stock(), SlidingWindow(16)])
def test_last_losses_do_not_depend_on_how_many_are_asked(model, ids, method):
    many, few = (negative_log_likelihoods(model, ids, count, method) for count in (60, 9))
    torch.testing.assert_close(few, many[-9:], atol=2e-5, rtol=1e-4)


def test_truncated_reads_the_last_tokens_only(model, ids):
    losses = negative_log_likelihoods(model, ids, 20, Truncated())
    same = negative_log_likelihoods(model, ids[-NATIVE - 1 :], 20, Stock())
    torch.testing.assert_close(losses, same)
    assert Truncated().read(model, ids, 20).entries == NATIVE


def test_more_targets_are_truncated_in_blocks(model, ids):
    kept, targets = 10, 2 * (NATIVE - 10) + 7
    losses = negative_log_likelihoods(model, ids, targets, Truncated(kept))
    # Logits of a block foresee the tokens after it: its inputs begin one token before its first target.
    first = len(ids) - 1 - targets
    blocks = [(first - kept, first + NATIVE - kept), (first + NATIVE - 2 * kept, first + 2 * (NATIVE - kept))]
    blocks.append((first + 2 * (NATIVE - kept) - kept, len(ids) - 1))
    counts = [NATIVE - kept] * 2 + [7]
    same = [
        negative_log_likelihoods(model, ids[start : end + 1], count, Stock())
        for (start, end), count in zip(blocks, counts, strict=True)
    ]
    torch.testing.assert_close(losses, torch.cat(same))


def test_results_say_what_was_read(model, ids):
    result = measure_perplexity(model, [ids, ids.flip(0)], 128, 30, Beacon(4))
    losses = [negative_log_likelihoods(model, text[-128:], 30, Beacon(4)) for text in (ids, ids.flip(0))]
    assert (result.method, result.context, result.targets) == ("beacon, ratio 4", 128, 60)
    assert result.loss == pytest.approx(torch.cat(losses).mean().item())
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.entries == 127 // 16 * 4 + 127 % 16


def test_adaptive_policy_knows_the_whole_length(model, ids):
    outcome = Beacon().read(model, ids, 10)
    cache = model.compress(ids[None])
    assert outcome.entries == held_entries(cache)


def test_memory_of_full_attention(model, ids):
    with beacon.disabled(model), torch.no_grad():
        cache = model(ids[None, :10]).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert full_cache_bytes(model.config, 10, 4) == size


def test_bad_input(model, ids):
    with pytest.raises(ValueError, match="targets must lie between 1 and 149"):
        negative_log_likelihoods(model, ids, 150, Stock())
    with pytest.raises(ValueError, match="every text must have at least 200"):
        measure_perplexity(model, [ids], 200, 10, Stock())
    with pytest.raises(ValueError, match="fit the native context"):
        negative_log_likelihoods(model, ids, 100, Truncated())
    with pytest.raises(ValueError, match="kept must be in 0"):
        negative_log_likelihoods(model, ids, 100, Truncated(NATIVE))
    assert native_context(model) == NATIVE
