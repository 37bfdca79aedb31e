"""Decoding in buffers of fixed size: what the ordinary cache gives, whatever happens between two tokens."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import beacon
from beacon.plan import RowState, Span, quiet_tokens, schedule
from tests.readers import close, configs, fixed, pad, wrapped
from tests.tiny_models import TINY, random_ids

INTERLEAVE = {"placement": "interleave", "attention": "full-coverage", "attend_beacons": True}
CONFIGS = {
    "append": fixed(8, 2, sink=1),
    "stride < window": fixed(8, 2, stride=4),
    "interleave": fixed(8, 2, sink=2, **INTERLEAVE),
    "interleave, unseen beacons": fixed(8, 4, placement="interleave"),
    "ratio 0": fixed(8, 0, stride=4),
    "stock first": fixed(32, 2),
}
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 40}
IDS, MASK = pad([random_ids(1, n, seed=n)[0] for n in (37, 9, 20)])


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return wrapped(CONFIGS[request.param])


@torch.no_grad()
def logits_of(model: Any, cache: Any, steps: int, **call: Any) -> list[torch.Tensor]:
    """A ragged batch, then given tokens one by one."""
    out = model(IDS, attention_mask=MASK, past_key_values=cache, use_cache=True, **call)
    found, cache = [out.logits[:, -1]], out.past_key_values
    for number in range(steps):
        out = model(random_ids(3, 1, seed=number), past_key_values=cache)
        found.append(out.logits[:, -1])
    return found


def alike(model: Any, steps: int, max_tokens: int, **call: Any) -> beacon.BeaconCache:
    cache = model.static_cache(max_tokens)
    ours, theirs = logits_of(model, cache, steps, **call), logits_of(model, None, steps, **call)
    for number, (mine, exact) in enumerate(zip(ours, theirs, strict=True)):
        close(mine, exact, 1e-6, f"token {number}")  # rotary tables are float32, and padding shifts the stock model's
    assert cache.in_slots == (steps > 0)
    return cache


@settings(max_examples=25, deadline=None)
@given(config=configs(), steps=st.integers(1, 30), room=st.integers(1, 80))
def test_every_token_has_the_logits_of_the_ordinary_cache(config: beacon.BeaconConfig, steps: int, room: int) -> None:
    alike(wrapped(config, dtype=torch.float64), steps, room)


@pytest.mark.parametrize("call", [{"keep_first": 12}, {"keep_from": 24}, {"keep_first": 4, "keep_from": 12}])
@pytest.mark.parametrize("changes", [{}, {"stride": 4}, INTERLEAVE])
def test_what_is_kept_raw(changes: dict[str, Any], call: dict[str, Any]) -> None:
    alike(wrapped(fixed(8, 4, **changes), dtype=torch.float64), 30, 60, **call)


@pytest.mark.parametrize("name", TINY)
def test_every_family(name: str) -> None:
    alike(wrapped(fixed(8, 2, sink=1), name, torch.float64), 12, 60)


def test_ratios_of_a_policy_that_looks_at_the_length() -> None:
    config = beacon.BeaconConfig(window=8, ratios=(0, 2, 8), reserve=4, native_context=32)
    with pytest.warns(UserWarning, match="even the largest ratio"):
        alike(wrapped(config, dtype=torch.float64), 40, 80)


def test_generate_and_the_lean_loop_give_the_tokens_of_the_ordinary_cache(model: Any) -> None:
    theirs = model.generate(IDS, attention_mask=MASK, **GREEDY)
    cache = model.static_cache(80)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY), theirs)
    cache.reset()
    ours = model.decode(IDS, cache, 40, attention_mask=MASK, eos_token_id=[])
    assert torch.equal(ours, theirs[:, IDS.shape[1] :])
    assert cache.stats()[1]["text_tokens"] == 9 + 39
    assert cache.stats()[0]["attention_path"] == "sdpa (static)"


def test_the_lean_loop_ends_where_generate_ends(model: Any) -> None:
    """Also where it has read on: the next turn sees the same text."""
    free = model.generate(IDS, attention_mask=MASK, **GREEDY)[:, IDS.shape[1] :]
    ends = [int(free[0, 20]), int(free[1, 35]), int(free[2, 13])]
    settings = {**GREEDY, "eos_token_id": ends, "pad_token_id": 5}
    theirs = model.generate(IDS, attention_mask=MASK, **settings, return_dict_in_generate=True)
    cache = model.static_cache(100)
    ours = model.decode(IDS, cache, 40, attention_mask=MASK, eos_token_id=ends, pad_token_id=5)
    assert torch.equal(ours, theirs.sequences[:, IDS.shape[1] :])
    assert cache.states == theirs.past_key_values.states
    turn = torch.cat([ours[:, -1:], random_ids(3, 6)], dim=1)
    with torch.no_grad():
        close(
            model(turn, past_key_values=cache).logits, model(turn, past_key_values=theirs.past_key_values).logits, 1e-4
        )


@pytest.mark.parametrize("changes", [{}, INTERLEAVE])
def test_sixty_four_ragged_rows(changes: dict[str, Any]) -> None:
    model = wrapped(fixed(8, 2, **changes))
    ids, mask = pad([random_ids(1, 5 + row % 13, seed=row)[0] for row in range(64)])
    theirs = model.generate(ids, attention_mask=mask, **GREEDY)
    ours = model.decode(ids, model.static_cache(80), 40, attention_mask=mask, eos_token_id=[])
    assert torch.equal(ours, theirs[:, ids.shape[1] :])


@torch.no_grad()
def test_turns_share_buffers(model: Any) -> None:
    """Text of several tokens leaves the buffers, decoded tokens come back to the same ones."""
    cache, ordinary = model.static_cache(200), None
    buffers = None
    for turn in range(3):
        ids = random_ids(2, 11, seed=turn)
        ours = model.decode(ids, cache, 9, eos_token_id=[])
        out = model(ids, past_key_values=ordinary, use_cache=True)
        for number in range(9):
            assert torch.equal(out.logits[:, -1].argmax(-1), ours[:, number]), (turn, number)
            if number < 8:
                out = model(ours[:, number : number + 1], past_key_values=out.past_key_values)
        ordinary = out.past_key_values
        assert buffers is None or cache.slots is buffers
        buffers = cache.slots


def test_forks_rows_files_and_copies(model: Any, tmp_path: Path) -> None:
    cache = model.static_cache(100)
    model.decode(IDS, cache, 17, attention_mask=MASK, eos_token_id=[])
    others = {
        "fork": cache.fork(),
        "copy": copy.deepcopy(cache),
        "file": beacon.load_cache(model, beacon.save_cache(cache, model, tmp_path / "a.safetensors")).reserve(100),
        "rows": cache.select([2, 0, 1]).select([1, 2, 0]),
    }
    assert others["copy"].in_slots and not others["fork"].in_slots
    ids = random_ids(3, 1)
    wanted = model.decode(ids, cache, 12, eos_token_id=[])
    for name, other in others.items():
        assert other.stats()[0]["text_tokens"] == 37 + 16, name
        assert torch.equal(model.decode(ids, other, 12, eos_token_id=[]), wanted), name


def test_taking_back_tokens(model: Any) -> None:
    cache, ids = model.static_cache(100), random_ids(1, 40)
    with torch.no_grad():
        model(ids[:, :33], past_key_values=cache)
        ordinary = model.compress(ids[:, :33])
        for at in range(33, 35):
            model(ids[:, at : at + 1], past_key_values=cache)
        cache.crop(-2)
        assert cache.in_slots
        for at in range(33, 40):
            ours = model(ids[:, at : at + 1], past_key_values=cache).logits
            close(ours, model(ids[:, at : at + 1], past_key_values=ordinary).logits, 1e-5)


def test_beams(model: Any) -> None:
    settings = {**GREEDY, "num_beams": 3, "max_new_tokens": 12}
    theirs = model.generate(IDS, attention_mask=MASK, **settings)
    ours = model.generate(IDS, attention_mask=MASK, past_key_values=model.static_cache(60), **settings)
    assert torch.equal(ours, theirs)


def test_a_longer_text_grows_the_buffers(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    theirs = model.generate(IDS, attention_mask=MASK, **GREEDY)
    cache = model.static_cache(38)
    with caplog.at_level(logging.WARNING, "beacon.decoding"):
        ours = model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
    assert torch.equal(ours, theirs)
    assert "the static cache for 38 tokens is full and grows" in caplog.text
    assert "make it with a larger max_tokens" in caplog.text
    caplog.clear()
    cache = model.static_cache(IDS.shape[1] + 40)
    with caplog.at_level(logging.WARNING, "beacon.decoding"):
        model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
    assert not caplog.text  # that was enough


def test_another_batch_size_gets_other_buffers(model: Any) -> None:
    cache = model.static_cache(80)
    for rows in (2, 3, 1):
        ids = random_ids(rows, 19, seed=rows)
        cache.reset()
        ours = model.generate(ids, past_key_values=cache, **GREEDY)
        assert torch.equal(ours, model.generate(ids, **GREEDY))
        assert cache.slots is not None and cache.slots.rows == rows


def test_a_row_without_a_new_token_is_read_as_ever(model: Any) -> None:
    cache, mask = model.static_cache(80), torch.tensor([[1], [0], [1]])
    with torch.no_grad():
        theirs = model(IDS, attention_mask=MASK, use_cache=True).past_key_values
        model(IDS, attention_mask=MASK, past_key_values=cache)
        for number in range(6):
            ids = random_ids(3, 1, seed=number)
            own = mask if number == 3 else None
            ours = model(ids, attention_mask=own, past_key_values=cache).logits
            exact = model(ids, attention_mask=own, past_key_values=theirs).logits
            close(ours[[0, 2]], exact[[0, 2]], 1e-5)
    assert cache.states == theirs.states


def test_sampling() -> None:
    model = wrapped(fixed(8, 2))
    greedy = model.decode(IDS, model.static_cache(80), 9, attention_mask=MASK, eos_token_id=[])
    drawn = model.decode(
        IDS, model.static_cache(80), 9, attention_mask=MASK, eos_token_id=[], do_sample=True, temperature=2.0, top_k=1
    )
    assert torch.equal(drawn, greedy)
    ids, texts = IDS[:1].expand(200, -1), []
    for _ in range(2):
        torch.manual_seed(1)
        texts.append(model.decode(ids, model.static_cache(80), 2, eos_token_id=[], do_sample=True, top_p=0.9))
    assert torch.equal(*texts) and len(texts[0][:, 0].unique()) > 5


# -- recorded passes -------------------------------------------------------------------------------------------------


def traced(function: Callable[[], Any], *_: Any) -> Callable[[], Any]:
    """A CUDA graph's stand-in: the operators of one run, replayed on the same tensors whatever the host thinks since.

    It refuses to be recorded where the function looks at a tensor's values, as a graph does.
    """
    outputs: list[Any] = []

    def run(_: torch.Tensor) -> Any:
        outputs.append(function())
        return outputs[0]

    graph = make_fx(run)(torch.zeros(1))
    traced.recorded += 1  # type: ignore[attr-defined]
    return lambda: outputs.pop() if outputs else graph(torch.zeros(1))  # tracing has run it once


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    traced.recorded = 0  # type: ignore[attr-defined]
    monkeypatch.setattr("beacon.decoder.can_record", lambda model, slots: True)
    monkeypatch.setattr("beacon.recording.record", traced)


@pytest.mark.usefixtures("recording")
def test_recorded_passes_serve_every_token(model: Any) -> None:
    theirs = model.generate(IDS, attention_mask=MASK, **GREEDY)
    cache = model.static_cache(80)
    ours = model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
    assert torch.equal(ours, theirs)
    first = traced.recorded  # type: ignore[attr-defined]
    assert 3 <= first <= 1 + 2 * 2 * 3  # the token's; of both shapes of a change, both halves, for up to three rows
    cache.reset()
    assert torch.equal(model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY), theirs)
    assert traced.recorded - first <= 4  # type: ignore[attr-defined]
    cache.refill(model.compress(IDS, attention_mask=MASK))
    before = traced.recorded  # type: ignore[attr-defined]
    model.decode(random_ids(3, 1), cache, 30, eos_token_id=[])
    assert traced.recorded - before <= 4  # type: ignore[attr-defined]


@pytest.mark.usefixtures("recording")
def test_a_model_in_another_mode_is_recorded_anew() -> None:
    model = wrapped(fixed(8, 2))
    cache = model.static_cache(80)
    logits_of(model, cache, 6)
    decoder = cache.decoder
    with torch.no_grad():
        model(random_ids(3, 1), past_key_values=cache)
        assert cache.decoder is decoder
        model.train()
        model(random_ids(3, 1), past_key_values=cache)
    assert cache.decoder is not decoder


@pytest.mark.usefixtures("recording")
def test_logits_of_a_call_stay_when_the_next_is_replayed() -> None:
    model = wrapped(fixed(8, 2))
    kept = logits_of(model, model.static_cache(80), 10)
    for ours, theirs in zip(kept, logits_of(model, None, 10), strict=True):
        close(ours, theirs, 1e-5)


def test_what_cannot_be_recorded_is_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("beacon.decoder.can_record", lambda model, slots: True)
    monkeypatch.setattr("beacon.recording.record", fails)
    model = wrapped(fixed(8, 2))
    with caplog.at_level(logging.WARNING, "beacon.recording"):
        ours = model.generate(IDS, attention_mask=MASK, past_key_values=model.static_cache(80), **GREEDY)
    assert "goes on without a CUDA graph" in caplog.text
    assert torch.equal(ours, model.generate(IDS, attention_mask=MASK, **GREEDY))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("changes", [{}, {"stride": 4}, INTERLEAVE])
def test_cuda_graphs(changes: dict[str, Any], rows: int) -> None:
    model = wrapped(fixed(8, 2, **changes), num_hidden_layers=3).cuda()
    ids, mask = pad([random_ids(1, 9 + row % 7, seed=row)[0] for row in range(rows)])
    ids, mask = ids.cuda(), mask.cuda()
    theirs = model.generate(ids, attention_mask=mask, **GREEDY)
    cache = model.static_cache(80)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), theirs)
    cache.reset()
    ours = model.decode(ids, cache, 40, attention_mask=mask, eos_token_id=[])
    assert torch.equal(ours, theirs[:, ids.shape[1] :])


@pytest.mark.gpu
def test_decoding_does_not_wait_for_the_gpu() -> None:
    """Once everything is recorded; the tokens fed are on the GPU."""
    model = wrapped(fixed(64, 2), num_hidden_layers=3).cuda()
    cache = model.compress(random_ids(2, 65).cuda(), past_key_values=model.static_cache(300))
    tokens = random_ids(2, 40).cuda()
    with torch.no_grad():
        for number in range(40):
            torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")
            try:
                model(tokens[:, number : number + 1], past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_pass_that_waits_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """And the stream is the caller's again."""
    model = wrapped(fixed(8, 2)).cuda()
    stock = type(model).beacon_head
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model), "beacon_head", lambda self, hidden: stock(self, hidden + 0 * hidden.sum().item()))
        before = torch.cuda.current_stream()
        ours = model.generate(IDS.cuda(), past_key_values=model.static_cache(80), **GREEDY)
        assert torch.cuda.current_stream() == before
    assert "could not be recorded" in caplog.text
    assert torch.equal(ours, model.generate(IDS.cuda(), **GREEDY))


# -- the plan's part ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(config=configs(), head=st.integers(0, 9), tail=st.integers(0, 4), tokens=st.integers(0, 40))
def test_quiet_tokens_change_nothing(config: beacon.BeaconConfig, head: int, tail: int, tokens: int) -> None:
    span = Span(0 if config.sink else head, (0 if config.sink else head) + tail * config.step if tail else None)
    ratios = config.ratios

    def read(state: RowState, count: int) -> list[Any]:
        return schedule(config, state, count, lambda at: ratios[len(at.ratios) % len(ratios)], row=0, span=span)

    state = RowState(0)
    for _ in range(tokens):
        state = read(state, 1)[-1][1]
    quiet = min(quiet_tokens(config, state, span), 30)
    for number in range(quiet):
        [(step, after)] = read(state, 1)
        assert step.beacon_hi == step.beacon_lo and step.consumed == 0, number
        assert after.open_ratio == state.open_ratio and after.memory == state.memory
        state = after


# -- refused -----------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    model = wrapped(fixed(8, 2))
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        model.static_cache(0)
    with pytest.raises(TypeError, match="max_tokens must be an int"):
        model.static_cache(10.0)
    with pytest.raises(NotImplementedError, match=r"memory_dtype='int8'.*ordinary cache"):
        wrapped(fixed(8, 2, memory_dtype="int8")).static_cache(10)
    with pytest.raises(NotImplementedError, match="read by attention_path='triton' or 'sdpa', got 'reference'"):
        wrapped(fixed(8, 2, attention_path="reference")).static_cache(10)
    with pytest.raises(ValueError, match=r"decode needs a cache with room reserved.*static_cache"):
        model.decode(IDS, model.compress(IDS), 5)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        model.decode(IDS, model.static_cache(10), 0)
    cache = model.compress(IDS, past_key_values=model.static_cache(10))
    with torch.no_grad(), pytest.raises(ValueError, match="token ids must lie in"):
        model(torch.full((3, 1), 1000), past_key_values=cache)
    assert cache.stats()[0]["text_tokens"] == 37


def test_other_devices_are_named() -> None:
    model = wrapped(fixed(8, 2))
    with pytest.raises(ValueError, match="input_ids must be where the model is, cpu, got them on meta"):
        model(IDS.to("meta"))
    with pytest.raises(ValueError, match="input_ids must be where the model is"):
        model.compress(IDS.to("meta"))
    for empty in (None, model.static_cache(90)):
        cache = model.compress(IDS, past_key_values=empty)
        with torch.no_grad():
            model(random_ids(3, 1), past_key_values=cache)
        with pytest.raises(ValueError, match=r"past_key_values must be where the model is, cpu, got one on meta"):
            model(random_ids(3, 1), past_key_values=cache.to("meta"))


def test_short_texts_keep_the_stock_keys_bit_for_bit() -> None:
    model = wrapped(fixed(64, 2), dtype=torch.bfloat16)
    ids = random_ids(2, 20)
    with torch.no_grad():
        for cache in (model.static_cache(90), None):
            out = model(ids, past_key_values=cache, use_cache=True)
            found = [model(random_ids(2, 1, seed=n), past_key_values=out.past_key_values).logits for n in range(5)]
            if cache is not None:
                ours = found
    assert all(torch.equal(mine, exact) for mine, exact in zip(ours, found, strict=True))


@pytest.mark.parametrize("ratios", [[2] * 8, [0] * 8])
def test_ratios_for_some_windows_make_buffers_grow_now_and_then(ratios: list[int], caplog: Any) -> None:
    model, ids = wrapped(fixed(8, 4)), random_ids(1, 35)
    cache = model.static_cache(64)
    with caplog.at_level(logging.WARNING, "beacon.decoding"):
        model.decode(ids, cache, 29, ratios=ratios, eos_token_id=[])
    assert caplog.text.count("is full and grows") <= 2 and cache.max_tokens == 64


def test_the_adaptive_policy_gets_room_enough(caplog: pytest.LogCaptureFixture) -> None:
    """Its ratio follows from what is known by then, which is less than will be."""
    config = beacon.BeaconConfig(window=8, ratios=(2, 8), reserve=4, native_context=64)
    model = wrapped(config)
    with caplog.at_level(logging.WARNING, "beacon.decoding"):
        model.decode(random_ids(1, 10), model.static_cache(120), 100, eos_token_id=[])
    assert not caplog.text


def test_padding_is_inferred_from_the_pad_token_given() -> None:
    model = wrapped(fixed(8, 2))
    model.generation_config.pad_token_id = None
    ids = IDS.clone()
    ids[~MASK.bool()] = 7
    ids[(ids == 7) & MASK.bool()] = 8
    theirs = model.generate(ids, **{**GREEDY, "pad_token_id": 7})
    ours = model.decode(ids, model.static_cache(80), 40, pad_token_id=7, eos_token_id=[])
    assert torch.equal(ours, theirs[:, ids.shape[1] :])


def test_a_refused_token_leaves_the_last_hidden_state() -> None:
    """A label of the next call's first token still counts."""
    model, ids = wrapped(fixed(8, 2)), random_ids(1, 23)
    caches = [model.static_cache(60), None]
    losses = []
    for cache in caches:
        with torch.no_grad():
            past = model(ids, past_key_values=cache, ratios=[2, 2], use_cache=True).past_key_values
            if cache is not None:
                with pytest.raises(ValueError, match="ratios must name every window"):
                    model(random_ids(1, 1), past_key_values=past)
            more = random_ids(1, 9, seed=4)
            losses.append(model(more, labels=more, past_key_values=past, ratios=[2] * 9).loss)
    torch.testing.assert_close(*losses)


def test_nothing_of_the_text_before_is_left() -> None:
    """Not even NaN, which a mask does not hide."""
    model = wrapped(fixed(8, 2))
    cache = model.static_cache(80)
    model.decode(IDS, cache, 10, attention_mask=MASK, eos_token_id=[])
    for layer in cache.slots.layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    cache.reset()
    ours = model.decode(IDS, cache, 10, attention_mask=MASK, eos_token_id=[])
    assert torch.equal(ours, model.generate(IDS, attention_mask=MASK, **GREEDY)[:, IDS.shape[1] :][:, :10])


def test_many_questions_to_one_document_share_buffers(model: Any) -> None:
    document, work = model.compress(random_ids(1, 37)), model.static_cache(90)
    buffers = None
    for seed in range(1, 4):
        question = random_ids(1, 5, seed=seed)
        ours = model.decode(question, work.refill(document), 20, eos_token_id=[])
        theirs = model.generate(question, past_key_values=document.fork(), **{**GREEDY, "max_new_tokens": 20})
        assert torch.equal(ours, theirs[:, 5:])
        assert buffers is None or work.slots is buffers
        buffers = work.slots
    assert document.get_seq_length() == 37 and work.max_tokens == 90
    with pytest.raises(ValueError, match="refill takes a cache of the same model"):
        work.refill(wrapped(fixed(8, 4)).compress(random_ids(1, 9)))


@pytest.mark.usefixtures("recording")
def test_a_cache_that_nobody_holds_frees_its_buffers_at_once(model: Any) -> None:
    cache = model.static_cache(80)
    model.decode(IDS, cache, 20, attention_mask=MASK, eos_token_id=[])
    buffers = weakref.ref(cache.slots)
    gc.disable()
    try:
        del cache
        assert buffers() is None
    finally:
        gc.enable()


def test_a_path_that_reads_no_slots_is_refused_before_anything_changes() -> None:
    model = wrapped(fixed(8, 2, attention_path="reference"))
    cache = model.compress(random_ids(1, 20)).reserve(60)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="read by attention_path"):
        model(random_ids(1, 1), past_key_values=cache)
    assert not cache.in_slots and len(cache.stores[0].memory_k[0]) == cache.states[0].memory


def test_out_of_memory_at_the_second_of_two_ratios() -> None:
    """The rows of the first are not condensed yet."""
    config = beacon.BeaconConfig(window=8, ratios=(2, 4), ratio_policy="step-random")
    model = wrapped(config)
    ids = random_ids(6, 15)
    ordinary, cache = model.compress(ids), model.compress(ids, past_key_values=model.static_cache(60))
    token, calls = random_ids(6, 1), 0
    stock = beacon.decoder._read_beacons

    def fails(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError
        stock(*args)

    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("beacon.decoder._read_beacons", fails)
            with pytest.raises(torch.OutOfMemoryError):
                model(token, past_key_values=cache)
        assert calls == 2
        for number in range(12):
            ids = random_ids(6, 1, seed=number)
            close(model(ids, past_key_values=cache).logits, model(ids, past_key_values=ordinary).logits, 1e-5)


def test_a_cache_interrupted_while_it_condenses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = wrapped(fixed(8, 2)), 0
    cache = model.compress(random_ids(1, 15), past_key_values=model.static_cache(60))
    before = cache.fork()
    stock = beacon.slot_passes.rearrange

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        stock(*args)

    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr("beacon.decoder.rearrange", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(random_ids(1, 1), past_key_values=cache)
        with pytest.raises(ValueError, match=r"interrupted while a window was condensed.*read the text again"):
            model(random_ids(1, 1), past_key_values=cache)
        model(random_ids(1, 1), past_key_values=before)


def test_a_failure_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory while beacons are read: the same token can be read again."""
    model, cache = wrapped(fixed(8, 2)), None
    ids = random_ids(1, 24)
    with torch.no_grad():
        cache = model.static_cache(60)
        model(ids[:, :15], past_key_values=cache)
        with monkeypatch.context() as patched:
            patched.setattr("beacon.decoder.ChangePass.run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
            with pytest.raises(torch.OutOfMemoryError):
                model(ids[:, 15:16], past_key_values=cache)
        assert cache.stats()[0]["text_tokens"] == cache.get_seq_length() == 15
        ordinary = model.compress(ids[:, :15])
        for at in range(15, 24):
            token = ids[:, at : at + 1]
            close(model(token, past_key_values=cache).logits, model(token, past_key_values=ordinary).logits, 1e-5)
