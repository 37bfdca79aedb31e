"""Ordinary ``generate`` on a wrapped model, with and without a cache."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import QuantizedCache
from transformers.generation.streamers import BaseStreamer

import beacon
from tests.readers import close, fixed, pad, wrapped
from tests.tiny_models import random_ids, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
INTERLEAVE = {"placement": "interleave", "attention": "full-coverage", "attend_beacons": True}
CONFIGS = {
    "append": fixed(8, 2, sink=1),
    "stride < window": fixed(8, 2, stride=4),
    "interleave": fixed(8, 2, **INTERLEAVE),
    "stock first": fixed(32, 2),
}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return wrapped(CONFIGS[request.param])


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, steps: int, **call: Any) -> list[int]:
    """What generate must give: read everything anew for every token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False, **call).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0].tolist()


def test_greedy_equals_reading_anew_for_every_token(model: Any) -> None:
    ids = random_ids(1, 27)
    out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert out.sequences[0].tolist() == greedy(model, ids, 12)
    assert isinstance(out.past_key_values, beacon.BeaconCache)
    assert out.past_key_values.stats()[0]["text_tokens"] == 27 + 11
    assert model.generate(ids, **GREEDY, use_cache=False)[0].tolist() == out.sequences[0].tolist()


def test_from_a_cache_with_the_whole_text_or_only_what_is_new(model: Any) -> None:
    ids = random_ids(1, 40)
    expected = model.generate(ids, **GREEDY)[0].tolist()
    cache = model.compress(ids[:, :33])
    assert model.generate(ids, past_key_values=cache.fork(), **GREEDY)[0].tolist() == expected
    assert model.generate(ids[:, 33:], past_key_values=cache.fork(), **GREEDY)[0].tolist() == expected[33:]
    assert model.generate(ids[:, 33:34], past_key_values=cache.fork(), max_new_tokens=1).shape == (1, 2)
    with pytest.raises(ValueError, match="must bring something new"):
        model.generate(ids[:, :33], past_key_values=cache.fork(), **GREEDY)
    assert cache.get_seq_length() == 33


def test_turns_of_a_conversation(model: Any) -> None:
    """generate, then go on with the whole text, or with only what is new (the last token generated included)."""
    ids, question = random_ids(1, 27), random_ids(1, 6, seed=1)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    text = torch.cat([first.sequences, question], dim=1)
    expected = model.generate(text, **GREEDY)[0].tolist()
    cache = first.past_key_values
    assert model.generate(text, past_key_values=cache.fork(), **GREEDY)[0].tolist() == expected
    new = text[:, cache.get_seq_length() :]
    assert new.shape[1] == 7
    assert model.generate(new, past_key_values=cache, **GREEDY)[0].tolist() == expected[-19:]
    assert cache.get_seq_length() == len(expected) - 1


def test_left_padded_rows_equal_each_row_alone(model: Any) -> None:
    texts = [random_ids(1, n, seed=n)[0] for n in (37, 9, 20)]
    ids, mask = pad(texts)
    out = model.generate(ids, attention_mask=mask, **GREEDY, return_dict_in_generate=True, output_logits=True)
    more = random_ids(3, 5, seed=8)
    text = torch.cat([out.sequences, more], dim=1)
    mask = torch.cat([mask, torch.ones(3, 17, dtype=torch.long)], dim=1)
    again = model.generate(text, attention_mask=mask, past_key_values=out.past_key_values, **GREEDY)
    for row, own in enumerate(texts):
        alone = model.generate(own[None], **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert alone.sequences[0, len(own) :].tolist() == out.sequences[row, 37:].tolist()
        for ours, theirs in zip(out.logits, alone.logits, strict=True):
            close(ours[row], theirs[0], 2e-5)
        whole = torch.cat([alone.sequences, more[row : row + 1]], dim=1)
        assert model.generate(whole, **GREEDY)[0, -12:].tolist() == again[row, -12:].tolist()


def test_beams_sampling_and_several_sequences_start_from_one_cached_row(model: Any) -> None:
    ids = random_ids(1, 33)
    cache = model.compress(ids[:, :30])
    for more in (
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7},
        {"generation_config": GenerationConfig(**GREEDY, num_beams=2)},
    ):
        results = []
        for given in (None, cache.fork()):
            torch.manual_seed(5)
            results.append(model.generate(ids, past_key_values=given, **{**GREEDY, **more}))
        assert torch.equal(*results), more
    assert cache.batch_size == 1 and cache.get_seq_length() == 30
    three = random_ids(3, 4, seed=2)
    out = model.generate(three, past_key_values=cache.fork(), **GREEDY, num_beams=2)
    for row in range(3):
        alone = model.generate(three[row : row + 1], past_key_values=cache.fork(), **GREEDY, num_beams=2)
        assert out[row].tolist() == alone[0].tolist()


def test_beam_search_equals_the_stock_models_as_long_as_nothing_is_condensed() -> None:
    ids = random_ids(2, 20)
    stock = tiny_model("qwen2").generate(ids, **GREEDY, num_beams=4)
    assert torch.equal(wrapped(fixed(64, 2)).generate(ids, **GREEDY, num_beams=4), stock)


def test_streamer_and_chunked_prefill(model: Any) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    ids, streamer = random_ids(1, 40), Collect()
    expected = model.generate(ids, streamer=streamer, **GREEDY)[0].tolist()
    assert streamer.tokens == [*expected, -1]
    for size in (1, 7, 64):
        assert model.generate(ids, prefill_chunk_size=size, **GREEDY)[0].tolist() == expected
    cache = model.compress(ids[:, :20])
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):  # 5.17 feeds what the cache holds again
        assert model.generate(ids, past_key_values=cache, prefill_chunk_size=7, **GREEDY)[0].tolist() == expected
    else:
        with pytest.raises(ValueError, match="must bring something new"):
            model.generate(ids, past_key_values=cache, prefill_chunk_size=7, **GREEDY)


def test_ratios_and_spans_go_through() -> None:
    model, ids = wrapped(fixed(8, 2)), random_ids(1, 30)
    ratios = [4, 0, 2, 8, 1, 2]
    expected = greedy(model, ids, 12, ratios=ratios)
    assert model.generate(ids, ratios=ratios, **GREEDY)[0].tolist() == expected
    assert model.generate(ids, ratios=torch.tensor(ratios), num_beams=1, **GREEDY)[0].tolist() == expected
    beams = model.generate(ids, ratios=ratios, num_beams=3, **GREEDY)
    assert torch.equal(model.generate(ids, ratios=torch.tensor(ratios), num_beams=3, **GREEDY), beams)
    cache = model.compress(ids[:, :20], ratios=ratios)
    assert model.generate(ids, past_key_values=cache, **GREEDY)[0].tolist() == expected
    span = {"keep_first": 3, "keep_from": 19}
    out = model.generate(ids, **span, **GREEDY, return_dict_in_generate=True)
    assert out.sequences[0].tolist() == greedy(model, ids, 12, **span)
    (row,) = out.past_key_values.stats()
    assert (row["windows"], row["beacons"], row["raw"]) == (2, 8, 3 + 41 - 19)


def test_expected_length_decides_before_the_text_is_there() -> None:
    config = beacon.BeaconConfig(window=8, ratios=(2, 4, 8), reserve=0, native_context=24)
    model, ids = wrapped(config), random_ids(1, 20)
    for expected, ratio in ((None, 2), (50, 4), (100, 8)):
        out = model.generate(ids, expected_length=expected, **GREEDY, return_dict_in_generate=True)
        assert set(out.past_key_values.states[0].ratios) == {ratio}


def test_what_generate_refuses(model: Any) -> None:
    ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (12, 9)], "right")
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(ids, attention_mask=mask, **GREEDY)
    one = ids[:1]
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(one, prompt_lookup_num_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(one, assistant_model=tiny_model("qwen2"), **GREEDY)
    with pytest.raises(TypeError, match="must be a BeaconCache or an empty DynamicCache, got a StaticCache"):
        model.generate(one, cache_implementation="static", disable_compile=True, **GREEDY)


def test_rows_without_new_text_at_their_end_are_refused(model: Any) -> None:
    """Hugging Face infers a mask from pad tokens only after our check, and none beside a cache."""
    ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (12, 9)], "right")
    settings = {**GREEDY, "eos_token_id": 2}
    with pytest.raises(ValueError, match="needs left padding and new text in every row"):
        model.generate(ids.masked_fill(mask == 0, 0), **settings)
    cache = model.compress(random_ids(2, 20, seed=5))
    with pytest.raises(ValueError, match="needs left padding and new text in every row"):
        model.generate(ids[:, :3], attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]), past_key_values=cache, **GREEDY)
    turns, mask = pad([random_ids(1, n, seed=n)[0] for n in (6, 3)])
    given = model.generate(turns, attention_mask=mask, past_key_values=cache.fork(), **settings)
    inferred = model.generate(turns.masked_fill(mask == 0, 0), past_key_values=cache.fork(), **settings)
    assert torch.equal(given[:, 6:], inferred[:, 6:])


def test_an_interrupt_or_no_cache_leaves_the_cache_as_it_was(model: Any) -> None:
    class Stop(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

    ids = random_ids(1, 36)
    for read in (30, 0):
        cache = model.compress(ids[:, :30]) if read else beacon.BeaconCache(*_identity(model), 1)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, past_key_values=cache, streamer=Stop(), **GREEDY)
        assert (cache.batch_size, cache.get_seq_length()) == (1, read)
    cache = model.compress(ids[:, :30])
    model.generate(ids, past_key_values=cache, use_cache=False, num_beams=3, **GREEDY)
    assert (cache.batch_size, cache.get_seq_length()) == (1, 30)


def _identity(model: Any) -> tuple[Any, str]:
    return model.beacon_config, model.beacon_wrapping.owner


def test_beams_may_be_set_on_the_model() -> None:
    model, ids = wrapped(fixed(8, 2)), random_ids(2, 33)
    cache = model.compress(ids[:, :30])
    expected = model.generate(ids, past_key_values=cache.fork(), num_beams=3, **GREEDY)
    model.generation_config.num_beams = 3
    config = GenerationConfig(**GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=cache, generation_config=config), expected)


def test_retrieval_ratios_reach_what_is_generated() -> None:
    model, ids = wrapped(fixed(8, 2, ratio_policy="retrieval")), random_ids(1, 30)
    ratios = beacon.retrieval_ratios(ids, ids[0, 3:5], model.beacon_config, high=4, expected_length=30 + 12)
    assert len(ratios) == 6 and ratios[0] == 2 and ratios[-1] == 4
    assert model.generate(ids, ratios=ratios, **GREEDY)[0].tolist() == greedy(model, ids, 12, ratios=ratios)


def test_foreign_caches_are_refused_and_an_empty_dynamic_one_is_replaced(model: Any) -> None:
    ids = random_ids(1, 12)
    out = model(ids, past_key_values=DynamicCache())
    assert isinstance(out.past_key_values, beacon.BeaconCache)
    with beacon.disabled(model):
        full = model(ids, use_cache=True).past_key_values
    quantised = object.__new__(QuantizedCache)  # building one needs a package for it
    quantised.layers = []
    static = StaticCache(config=model.config, max_cache_len=64)
    for cache, name in ((full, "DynamicCache"), (static, "StaticCache"), (quantised, "QuantizedCache")):
        for read in (model, model.compress):
            with pytest.raises(TypeError, match=rf"got a {name}; read the text with model.compress"):
                read(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="made by another model"):
        model(ids, past_key_values=wrapped(model.beacon_config).compress(ids))
    with pytest.raises(ValueError, match="one row or as many as input_ids, got 2 rows for a batch of 3"):
        model(random_ids(3, 4), past_key_values=model.compress(random_ids(2, 4)))


def test_a_failing_call_leaves_the_cache_as_it_was(model: Any) -> None:
    ids = random_ids(1, 30)
    cache = model.compress(ids)
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(ids[:, :1], past_key_values=cache, **GREEDY, num_beams=2, num_return_sequences=3)
    assert cache.batch_size == 1 and cache.get_seq_length() == 30


def test_threads_do_not_disturb_each_other() -> None:
    """Two generate on two caches, a third uses the stock model meanwhile."""
    model, stock, ids = wrapped(fixed(8, 2)), tiny_model("qwen2"), random_ids(3, 40)
    caches = [model.compress(row[None, :30]) for row in ids]
    expected = [model.generate(ids[row : row + 1], past_key_values=caches[row].fork(), **GREEDY) for row in (0, 1)]
    expected.append(stock.generate(ids[2:], **GREEDY))
    results: list[list[torch.Tensor]] = [[], [], []]
    inside, done = threading.Barrier(3, timeout=60), threading.Barrier(3, timeout=60)

    def read(row: int) -> None:
        inside.wait()
        for _ in range(3):
            results[row].append(model.generate(ids[row : row + 1], past_key_values=caches[row].fork(), **GREEDY))
        done.wait()

    def plain() -> None:
        with beacon.disabled(model):
            inside.wait()
            for _ in range(3):
                results[2].append(model.generate(ids[2:], **GREEDY))
            done.wait()

    threads = [threading.Thread(target=read, args=(row,)) for row in (0, 1)] + [threading.Thread(target=plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert len(got) == 3 and all(torch.equal(out, wanted) for out in got)


def test_disabled_is_exactly_the_stock_model() -> None:
    model, stock, ids = wrapped(fixed(8, 2)), tiny_model("qwen2"), random_ids(2, 40)
    condensed = model(ids).logits
    with beacon.disabled(model), torch.no_grad():
        ours, theirs = model(ids, labels=ids, use_cache=True), stock(ids, labels=ids, use_cache=True)
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
        assert type(ours.past_key_values) is DynamicCache
        assert torch.equal(model.generate(ids, **GREEDY), stock.generate(ids, **GREEDY))
        assert model(ids, output_hidden_states=True).hidden_states is not None
        with beacon.disabled(model):
            pass
        assert torch.equal(model(ids).logits, theirs.logits)  # leaving the inner block leaves the outer one alone
        with pytest.raises(RuntimeError, match=r"inside beacon\.disabled"):
            model.compress(ids)
    assert torch.equal(model(ids).logits, condensed)
    with pytest.raises(TypeError, match="takes a wrapped model"), beacon.disabled(stock):
        pass
