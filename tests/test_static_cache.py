"""Decoding in buffers of fixed size: what the ordinary cache gives, whatever happens between two tokens."""

from __future__ import annotations

import copy
import logging
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


def traced(function: Callable[[], Any], _: torch.device) -> Callable[[], Any]:
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
    assert 2 <= first <= 4  # the token's, and of what changes when a row's window is full
    cache.reset()
    assert torch.equal(model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY), theirs)
    assert traced.recorded - first <= 1  # type: ignore[attr-defined]


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
