"""What a cache remembers, and what can be done with it between calls."""

from __future__ import annotations

import copy
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.readers import close, fixed, pad, wrapped
from tests.tiny_models import random_ids

CONFIGS = {
    "append": fixed(8, 2, sink=1),
    "stride < window": fixed(8, 2, stride=4),
    "interleave": fixed(8, 2, placement="interleave", attention="full-coverage", attend_beacons=True),
    "stock": fixed(64, 2),
}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return wrapped(CONFIGS[request.param])


def logits_after(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of new tokens after a cache, which is left as it is."""
    mask = torch.ones(ids.shape[0], cache.get_seq_length() + ids.shape[1])
    with torch.no_grad():
        return model(ids, mask, past_key_values=cache.fork()).logits


def test_stats() -> None:
    model = wrapped(fixed(8, 2, sink=1))
    (row,) = model.compress(random_ids(1, 28)).stats()
    assert row == {
        "text_tokens": 28,
        "sinks": 1,
        "beacons": 12,
        "raw": 4,
        "windows": 3,
        "bytes": (1 + 12 + 4) * 2 * 2 * 2 * 8 * 4,  # entries, k and v, layers, kv heads, head_dim, fp32
        "effective_ratio": 28 / 17,
        "attention_path": "sdpa",
    }
    (row,) = wrapped(fixed(8, 0)).compress(random_ids(1, 28)).stats()
    assert (row["raw"], row["beacons"], row["bytes"], row["effective_ratio"]) == (28, 0, 28 * 256, 1.0)
    rows = model.compress(random_ids(2, 28), torch.tensor([[1] * 28, [0] * 8 + [1] * 20])).stats()
    assert [row["text_tokens"] for row in rows] == [28, 20] and rows[1]["bytes"] == (1 + 8 + 4) * 256


def test_ids_are_kept_as_int32_on_the_cpu(model: Any) -> None:
    ids = random_ids(2, 20)
    given = ids.to(torch.int32)
    cache = model.compress(given)
    given.zero_()  # the caller's tensor is the caller's
    kept, mask = cache.columns.read()
    assert kept.dtype == torch.int32 and kept.device.type == "cpu" and torch.equal(kept.long(), ids) and mask.all()
    assert cache.get_seq_length() == 20 and cache.batch_size == 2 and cache.is_initialized


def test_forks_are_independent(model: Any) -> None:
    ids, new = random_ids(2, 30), random_ids(2, 9, seed=1)
    cache = model.compress(ids)
    before = logits_after(model, cache, new)
    fork = cache.fork()
    returned = model(new, torch.ones(2, 39), past_key_values=fork).past_key_values
    assert returned is fork and fork.get_seq_length() == 39 and cache.get_seq_length() == 30
    assert torch.equal(logits_after(model, cache, new), before)
    assert torch.equal(logits_after(model, copy.deepcopy(cache), new), before)


def test_rows_can_be_selected_repeated_and_reordered(model: Any) -> None:
    ids, new = random_ids(3, 30), random_ids(3, 9, seed=1)
    cache = model.compress(ids)
    whole = logits_after(model, cache, new)
    close(logits_after(model, cache.select([2, 0]), new[[2, 0]]), whole[[2, 0]], 2e-5)
    again = cache.fork()
    again.reorder_cache(torch.tensor([1, 1, 0]))
    close(logits_after(model, again, new[[1, 1, 0]]), whole[[1, 1, 0]], 2e-5)
    again = cache.fork()
    again.batch_repeat_interleave(2)
    close(logits_after(model, again, new.repeat_interleave(2, dim=0)), whole.repeat_interleave(2, dim=0), 2e-5)
    close(logits_after(model, cache, new), whole, 1e-9)


def test_one_row_serves_a_batch(model: Any) -> None:
    ids, new = random_ids(1, 30), random_ids(3, 9, seed=1)
    cache = model.compress(ids)
    out = logits_after(model, cache, new)
    assert cache.batch_size == 1
    for row in range(3):
        close(out[row], logits_after(model, cache, new[row : row + 1])[0], 2e-5)
    whole = model(torch.cat([ids.expand(3, -1), new], dim=1), past_key_values=cache.fork()).logits
    close(whole, out, 1e-6)


def test_to_moves_every_tensor(model: Any) -> None:
    """To another device and back; the CPU stands in for both, float64 copies for what must not be shared."""
    ids, new = random_ids(2, 30), random_ids(2, 9, seed=1)
    cache = model.compress(ids)
    moved = cache.to("cpu")
    assert torch.equal(logits_after(model, moved, new), logits_after(model, cache, new))
    far = cache.to("meta")
    tensors = [t for store in far.stores for name in store.__slots__ for t in getattr(store, name)]
    if far.stock is not None:
        tensors += [t for layer in far.stock.layers for t in (layer.keys, layer.values)] + far.stock_positions
    assert tensors and all(t.device.type == "meta" for t in tensors + [h for h in far.last_hidden if h is not None])
    assert far.columns.read()[0].device.type == "cpu"


def test_crop_inside_the_raw_tail(model: Any) -> None:
    ids, new = random_ids(2, 31), random_ids(2, 9, seed=1)  # 31 = 3 windows (6 strides of 4) and 7 (3) tokens
    cache = model.compress(ids)
    shorter = model.compress(ids[:, :28])
    cache.crop(-1)
    cache.crop(0)
    cache.crop(-2)
    close(logits_after(model, cache, new), logits_after(model, shorter, new), 1e-5)
    ours, theirs = cache.stats()[0], shorter.stats()[0]
    assert ours == theirs and cache.get_seq_length() == 28


def test_crop_past_the_tail_is_refused() -> None:
    model = wrapped(fixed(8, 2))
    cache = model.compress(random_ids(1, 30))
    with pytest.raises(ValueError, match=r"since the last condensation, 6 in row 0, got 7; fork\(\)"):
        cache.crop(-7)
    with pytest.raises(ValueError, match="negative number of tokens to remove, got 3; pass -3"):
        cache.crop(3)
    assert cache.stats()[0]["text_tokens"] == 30
    mask = torch.tensor([[1] * 28 + [0] * 2])
    with pytest.raises(ValueError, match="got padding in row 0"):
        model.compress(random_ids(1, 30), mask).crop(-2)


def test_whole_text_or_only_what_is_new(model: Any) -> None:
    ids = random_ids(2, 40)
    cache = model.compress(ids[:, :30])
    with torch.no_grad():
        whole = model(ids, past_key_values=cache.fork()).logits
        new = model(ids[:, 30:], past_key_values=cache.fork()).logits
    assert torch.equal(whole, new) and new.shape[1] == 10
    assert model.compress(ids, past_key_values=cache) is cache and cache.get_seq_length() == 40
    assert [row["text_tokens"] for row in cache.stats()] == [40, 40]


def test_a_text_that_departs_is_named(model: Any) -> None:
    ids = random_ids(1, 40)
    cache = model.compress(ids[:, :30])
    other = ids.clone()
    other[0, 17] = 95 if ids[0, 17] != 95 else 94
    message = rf"departs from it at token 17 \({int(other[0, 17])} instead of {int(ids[0, 17])}\)"
    with pytest.raises(ValueError, match=message):
        model(other, past_key_values=cache)
    with pytest.raises(ValueError, match=r"must bring something new.*fork"):
        model(ids[:, :30], past_key_values=cache)
    with pytest.raises(ValueError, match="must bring something new"):
        model.compress(ids[:, :12], past_key_values=cache)
    assert cache.get_seq_length() == 30
    again = torch.ones(1, 60)  # over all columns: the same words once more
    assert model.compress(ids[:, :30], again, cache).get_seq_length() == 60


def test_a_turn_that_begins_as_the_text_did_is_new(model: Any) -> None:
    """The header of a chat turn recurs; a common history is longer."""
    cache = model.compress(random_ids(1, 30))
    known = random_ids(1, 30)
    for shared, new in ((3, 9), (5, 6), (6, 60), (14, 20)):
        turn = torch.cat([known[:, :shared], (known[:, shared : shared + 1] + 1 - 4) % 90 + 4], dim=1)
        turn = torch.cat([turn, random_ids(1, new, seed=shared)], dim=1)
        read = model.compress(turn, past_key_values=cache.fork())
        assert read.get_seq_length() == 30 + turn.shape[1]
    stripped = torch.cat([known[:, :20], (known[:, 20:21] + 1 - 4) % 90 + 4], dim=1)
    with pytest.raises(ValueError, match="departs from it at token 20"):
        model.compress(stripped, past_key_values=cache)


def test_a_text_padded_in_another_way_is_refused(model: Any) -> None:
    texts = [random_ids(1, n, seed=n)[0] for n in (20, 13)]
    ids, mask = pad(texts)
    cache = model.compress(ids, mask)
    longer = [torch.cat([text, random_ids(1, n, seed=50 + n)[0]]) for text, n in zip(texts, (3, 14), strict=True)]
    ids, mask = pad(longer)
    with pytest.raises(ValueError, match="padded in another way"):
        model.compress(ids, mask, cache)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("length", [6, 40])
def test_masks_agree_with_what_was_read(model: Any, length: int) -> None:
    """Before anything is condensed and after."""
    texts = [random_ids(1, n, seed=n)[0] for n in (length, length - 3)]
    ids, mask = pad(texts)
    new, ones = random_ids(2, 5, seed=9), torch.ones(2, 5, dtype=torch.long)
    cache = model.compress(ids, mask)
    expected = model(new, past_key_values=cache.fork(), attention_mask=torch.cat([mask, ones], dim=1)).logits
    everything = torch.ones(2, length + 5, dtype=torch.long)  # padding read before stays padding
    assert torch.equal(model(new, past_key_values=cache.fork(), attention_mask=everything).logits, expected)
    everything[1, 4] = 0
    with pytest.raises(ValueError, match="got 0 in row 1 at column 4"):
        model(new, past_key_values=cache, attention_mask=everything)


def test_ids_under_the_padding_do_not_matter(model: Any) -> None:
    ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (7, 4)])
    odd = ids.masked_fill(mask == 0, 96)  # a pad token beyond the embedding
    assert torch.equal(model(odd, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert torch.equal(model(ids.to(torch.int16), attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_rows_that_are_not_there_are_named(model: Any) -> None:
    cache = model.compress(random_ids(2, 20))
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 2\), got \[5\]"):
        cache.select([5])
    with pytest.raises(TypeError, match="rows must be ints"):
        cache.select([False, True])
    with pytest.raises(TypeError, match="crop takes an int"):
        cache.crop(None)
    assert [state.tokens for state in cache.select(torch.tensor([1, -1])).states] == [20, 20]


def test_what_was_said_once_is_remembered() -> None:
    model, ids = wrapped(fixed(8, 2)), random_ids(1, 60)
    ratios = [4, 0, 2, 8, 1, 2, 4]
    whole = model.compress(ids, ratios=ratios)
    cache = model.compress(ids[:, :21], ratios=ratios)
    cache = model.compress(ids[:, 21:], past_key_values=cache)
    assert [state.ratios for state in cache.states] == [state.ratios for state in whole.states] == [tuple(ratios)]
    cache = model.compress(ids[:, :21], keep_first=3, keep_from=27)
    cache = model.compress(ids[:, 21:], past_key_values=cache)
    assert model(ids[:, :1], torch.ones(1, 61), past_key_values=cache.fork(), keep_from=27).logits.shape[1] == 1
    (row,) = cache.stats()
    assert (row["windows"], row["beacons"], row["raw"]) == (3, 12, 3 + 33)
    for wrong in ({"keep_first": 4}, {"keep_from": 35}):
        with pytest.raises(ValueError, match="must be the same in every call on one cache"):
            model(ids[:, :1], past_key_values=cache, **wrong)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("length", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_memory_grows_with_the_entries_kept(length: int) -> None:
    """What is held: the entries, 5 bytes per token (an int32 id, a mask bool), and nothing larger behind a view."""
    model, ids, cache = wrapped(fixed(256, 128)), random_ids(1, length), None
    before = peak = _resident()
    for low in range(0, length, 20_000):
        new = ids[:, low : low + 20_000]
        cache = model.compress(new, torch.ones(1, low + new.shape[1], dtype=torch.bool), cache)
        peak = max(peak, _resident())
    assert cache is not None
    (row,) = cache.stats()
    windows = length // 256
    assert row["windows"] == windows and row["beacons"] == 2 * windows and row["raw"] == length - 256 * windows
    assert row["bytes"] == (row["beacons"] + row["raw"]) * 256
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)}
    assert sum(held.values()) <= row["bytes"] + length * 5 + 1024
    print(f"{length} tokens: {row['bytes']} bytes held, {peak - before} more resident at the peak")
    assert peak - before < 200e6 + 20 * length  # activations of one pass, masks over columns so far, the allocator


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _tensors(cache: Any) -> list[torch.Tensor]:
    tensors = [t for store in cache.stores for name in store.__slots__ for t in getattr(store, name)]
    return [*tensors, *cache.columns.read(), *(h for h in cache.last_hidden if h is not None)]
