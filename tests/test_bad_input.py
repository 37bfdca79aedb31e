"""Errors say what must hold, what came and what to do, and leave everything as it was."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch

import beacon
from beacon import BeaconConfig
from tests.readers import fixed, wrapped
from tests.tiny_models import random_ids, tiny_model

SEGMENTS = {"attention": "segmentation"}
BAD_CONFIGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"window": 0}, ValueError, "window must be at least 1, got 0; pass"),
    ({"window": 8.0}, TypeError, "window must be an int, got float 8.0; pass"),
    ({"window": True}, TypeError, "window must be an int, got bool"),
    ({"stride": 16}, ValueError, "stride must not exceed window, got stride=16 and window=8; lower"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    (
        {"ratios": (3,)},
        ValueError,
        "stride must divide by ratio, got stride=8 and ratio=3; choose a ratio from 0, 1, 2, 4, 8",
    ),
    ({"ratios": (8,), "stride": 4}, ValueError, "got stride=4 and ratio=8; choose"),
    ({"ratios": ()}, ValueError, "ratios must name at least one ratio, got an empty sequence; pass"),
    ({"ratios": 8}, TypeError, r"ratios must be a sequence of ints, got 8; pass for example"),
    ({"ratios": (-2,)}, ValueError, "ratio must be at least 0, got -2"),
    ({"ratios": (2.0,)}, TypeError, "ratio must be an int, got float"),
    ({"ratio_policy": "smart"}, ValueError, "ratio_policy must be one of fixed, .*, got 'smart'; choose"),
    ({"attention": "full"}, ValueError, "attention must be one of step-expansion, .*, got 'full'; choose"),
    ({"placement": "prepend"}, ValueError, "placement must be one of append, interleave, got 'prepend'"),
    ({"attention_path": "magic"}, ValueError, "attention_path must be one of auto, .*, got 'magic'"),
    ({"projections": ("q", "x")}, ValueError, "projections must be one of q, k, v, o, got 'x'"),
    ({"projections": ()}, ValueError, "projections must name each of q, k, v, o at most once and at least one"),
    ({"projections": ("q", "q")}, ValueError, "at most once"),
    ({"projections": "qkv"}, TypeError, "projections must be a sequence of names, got 'qkv'; pass"),
    ({"sink": 9}, ValueError, "sink must not exceed stride, got sink=9 and stride=8; lower"),
    ({"sink": -1}, ValueError, "sink must be at least 0"),
    ({"segment": 0}, ValueError, "segment must be at least 1, got 0"),
    ({"reserve": None}, TypeError, "reserve must be an int, got NoneType"),
    ({"attend_memory": 1}, TypeError, "attend_memory must be a bool, got 1; pass True or False"),
    ({"native_context": 4}, ValueError, "window must fit the native context, got window=8 and native_context=4; lower"),
    ({**SEGMENTS, "attend_beacons": True}, ValueError, "'segmentation' needs .* attend_beacons=False"),
    ({**SEGMENTS, "placement": "interleave"}, ValueError, "'segmentation' needs placement='append'"),
    (
        {"placement": "interleave", "stride": 4, "ratios": (2,)},
        ValueError,
        "needs stride == window, got stride=4 and window=8",
    ),
    (
        {"placement": "interleave", "attention": "full-coverage"},
        ValueError,
        "needs attend_beacons=True with attention='full",
    ),
    ({"placement": "interleave", "attend_beacons": True}, ValueError, "attend_beacons=False with 'step-expansion'"),
]


@pytest.mark.parametrize("wrong, error, message", BAD_CONFIGS, ids=[str(case[0]) for case in BAD_CONFIGS])
def test_configurations(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BeaconConfig(**{"window": 8, "ratios": (2,), **wrong})


def test_configurations_survive_json() -> None:
    for config in (
        BeaconConfig(),
        BeaconConfig.paper(),
        BeaconConfig.iclr2025(window=2048, sink=1),
        fixed(8, 2, stride=4),
    ):
        assert BeaconConfig.from_dict(json.loads(config.to_json())) == config
    values = json.loads(fixed().to_json())
    with pytest.warns(UserWarning, match="unknown keys in the beacon configuration are ignored: colour, size"):
        assert BeaconConfig.from_dict({**values, "size": 1, "colour": 2}) == fixed()
    with pytest.raises(ValueError, match="format_version must be at most 1, got 2; upgrade"):
        BeaconConfig.from_dict({**values, "format_version": 2})
    with pytest.raises(ValueError, match="got stride=8 and ratio=5"):
        BeaconConfig.from_dict({**values, "ratios": [5]})


def test_stride_follows_the_window_unless_it_was_its_own() -> None:
    assert BeaconConfig.paper().replace(window=2048).stride == 2048
    assert BeaconConfig.iclr2025().replace(window=2048).stride == 2048
    assert fixed(window=16, stride=8).replace(window=32).stride == 8
    assert fixed(window=16).replace(window=32, stride=16).stride == 16
    values = json.loads(fixed(window=16).to_json())
    assert BeaconConfig.from_dict(values, window=32).stride == 32


def test_presets() -> None:
    paper, later = BeaconConfig.paper(), BeaconConfig.iclr2025()
    assert (paper.window, paper.stride, paper.placement, paper.attention) == (1024, 1024, "append", "step-expansion")
    assert paper.projections == ("q", "k", "v", "o") and set(paper.ratios) == {2, 4, 8, 16, 32, 64, 128}
    assert (later.placement, later.attention, later.attend_beacons) == ("interleave", "full-coverage", True)
    assert later.projections == ("q", "k", "v") and later.ratios == (2, 4, 8, 16, 32)
    assert BeaconConfig.paper(window=2048, ratio_policy="step-random").ratio_policy == "step-random"


IDS = random_ids(2, 30)
ONES = torch.ones_like(IDS)
BAD_CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (IDS.tolist(), {}, TypeError, r"input_ids must be an integer tensor \[batch, seqlen\], got list .*; pass"),
    (IDS.float(), {}, TypeError, "got a torch.float32 tensor of shape"),
    (IDS[0], {}, ValueError, r"must have shape \[batch, seqlen\], got \(30,\); add a batch dimension"),
    (IDS[:, :0], {}, ValueError, r"must hold at least one token, got shape \(2, 0\); pass some text"),
    (IDS * 0 + 96, {}, ValueError, r"token ids must lie in \[0, 96\), got 96; use this model's own tokenizer"),
    (IDS - 90, {}, ValueError, r"token ids must lie in \[0, 96\), got -"),
    (IDS, {"attention_mask": ONES[:, :7]}, ValueError, r"attention_mask must have shape \[2, 30\], got \[2, 7\]; give"),
    (
        IDS,
        {"attention_mask": ONES[:, None]},
        TypeError,
        r"must be a tensor \[batch, columns\], got a torch.int64 tensor",
    ),
    (IDS, {"attention_mask": ONES * torch.tensor([[1], [0]])}, ValueError, "got only padding in row 1; drop that row"),
    (IDS, {"ratios": 3}, ValueError, "stride must divide by ratio, got stride=8 and ratio=3; choose"),
    (IDS, {"ratios": [2, 2]}, ValueError, "got 2 and row 0 needs one for window 2; pass a longer list or an int"),
    (IDS, {"ratios": "8"}, TypeError, "ratios must be an int or a list with one int per window, got str '8'"),
    (IDS, {"ratios": [[2], [2]]}, TypeError, "ratio must be an int, got list"),
    (IDS, {"keep_first": -1}, ValueError, "keep_first must not be negative, got -1"),
    (IDS, {"keep_first": 2.0}, TypeError, "keep_first must be an int, got 2.0"),
    (IDS, {"keep_first": 2, "keep_from": 12}, ValueError, "must be a multiple of stride, .*; the nearest below is 10"),
    (IDS, {"keep_first": 16, "keep_from": 8}, ValueError, "keep_from - keep_first must be a multiple of stride"),
    (IDS, {"expected_length": "long"}, TypeError, "expected_length must be an int, got 'long'"),
    (IDS, {"past_key_values": ((1, 2),)}, TypeError, "must be a BeaconCache or an empty DynamicCache, got a tuple"),
]


@pytest.mark.parametrize("ids, call, error, message", BAD_CALLS, ids=[case[3][:40] for case in BAD_CALLS])
def test_calls(ids: Any, call: dict[str, Any], error: type[Exception], message: str) -> None:
    """forward, compress and generate alike."""
    model = wrapped(fixed())
    with pytest.raises(error, match=message):
        model(ids, **call)
    if not isinstance(ids, list):  # of documents, for compress
        with pytest.raises(error, match=message):
            model.compress(ids, **call)
    if "past_key_values" not in call:  # Hugging Face looks at that first
        with pytest.raises(error, match=message):
            model.generate(ids, max_new_tokens=2, pad_token_id=0, **call)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            {"inputs_embeds": torch.zeros(1, 3, 32)},
            NotImplementedError,
            "inputs_embeds is not supported .*; pass input_ids",
        ),
        ({"output_attentions": True}, NotImplementedError, r"output_attentions is not supported .* beacon\.disabled"),
        ({"output_hidden_states": True}, NotImplementedError, "output_hidden_states is not supported"),
        ({"colour": 1}, TypeError, r"does not take colour; call it inside beacon\.disabled"),
        (
            {"labels": IDS[:, :9]},
            ValueError,
            r"labels must have the shape of input_ids, got \(2, 9\) for \(2, 30\); pass",
        ),
        ({"labels": IDS[0]}, TypeError, r"labels must be an integer tensor \[batch, seqlen\], got \(30,\)"),
        ({"labels": IDS.float()}, TypeError, "labels must be an integer tensor"),
        ({"labels": IDS > 5}, TypeError, r"labels must be an integer tensor .* of torch\.bool"),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep must not be negative, got -1; pass 1"),
        ({"logits_to_keep": "all"}, TypeError, "logits_to_keep must be an int or column indices"),
        ({"logits_to_keep": torch.tensor(3)}, TypeError, "got a torch.int64 tensor of shape"),
        ({"logits_to_keep": torch.tensor([30])}, ValueError, "logits_to_keep must name columns below 30"),
        ({"labels": IDS + 90}, ValueError, r"labels must be -100 or lie in \[0, 96\), got 95 to \d+; use"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_forward_only(call: dict[str, Any], error: type[Exception], message: str) -> None:
    model = wrapped(fixed())
    with pytest.raises(error, match=message):
        model(None if "inputs_embeds" in call else IDS, **call)


def test_a_cache_is_as_it_was_after_an_error() -> None:
    model, ids = wrapped(fixed()), random_ids(1, 60)
    cache = model.compress(ids[:, :30], ratios=[2, 4, 8, 1])
    before, tensors = cache.stats(), [t for store in cache.stores for t in store.memory_k + store.open_v]
    wrong: list[tuple[torch.Tensor, dict[str, Any], str]] = [
        (ids, {"ratios": [2, 2, 8]}, "got 2 for window 1 of row 0, which was read at ratio 4"),
        (ids, {"ratios": 2}, "got 2 for window 1 of row 0"),
        (ids, {"ratios": [2, 4]}, "got 2 for 3 windows read in row 0; pass the earlier ones too"),
        (ids, {}, "got 4 and row 0 needs one for window 4"),
        (ids, {"ratios": [2, 4, 8, 1, 3]}, "ratio=3"),
        (ids[:, :20], {}, "must bring something new"),
        (ids.expand(2, -1) * 0 + 99, {}, "token ids must lie in"),
        (ids, {"keep_first": 8}, "keep_first must be the same in every call on one cache, got 8 after 0"),
    ]
    for new, call, message in wrong:
        for read in (model, model.compress):
            with pytest.raises(ValueError, match=message):
                read(new, past_key_values=cache, **call)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 96\), got 200"):
        model(torch.tensor([[200]]), past_key_values=cache)
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(ids[:, 30:], past_key_values=cache, labels=ids[:, :3], ratios=[2, 4, 8, 1, 1, 1, 1])

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(ids, past_key_values=cache, ratios=[2, 4, 8, 1, 1, 1, 1], progress=stop)
    after = [t for store in cache.stores for t in store.memory_k + store.open_v]
    assert cache.stats() == before and all(a is b for a, b in zip(tensors, after, strict=True))
    model.compress(ids, past_key_values=cache, ratios=[2, 4, 8, 1, 1, 1, 1])
    assert cache.stats()[0]["text_tokens"] == 60


def test_sinks_and_keep_first_exclude_each_other() -> None:
    with pytest.raises(
        ValueError, match=r"keep_first and sink exclude each other, got keep_first=4 and sink=1; .* set sink=0"
    ):
        wrapped(fixed(sink=1))(IDS, keep_first=4)


def test_a_cache_of_another_configuration_is_refused() -> None:
    model = wrapped(fixed())
    cache = model.compress(IDS)
    cache.config = fixed(16, 4)
    with pytest.raises(ValueError, match="made with another configuration"):
        model(IDS[:, :1], past_key_values=cache)


def test_wrap_checks_the_native_context_and_wraps_once() -> None:
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match="window must fit the native context, got window=512 and native context 256"):
        beacon.wrap(model, fixed(512, 2))
    with pytest.raises(TypeError, match="config must be a BeaconConfig, got dict"):
        beacon.wrap(model, {"window": 8})
    beacon.wrap(model, fixed())
    with pytest.raises(ValueError, match=r"wrapped already; call beacon\.unwrap"):
        beacon.wrap(model, fixed())


def test_wrap_refuses_what_could_fail_only_in_the_middle_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="needs the triton package"):
            beacon.wrap(tiny_model(), fixed(attention_path="triton"))
    with pytest.raises(ValueError, match="native_context must not exceed 128 with a sliding window, got 256"):
        beacon.wrap(tiny_model("mistral-sliding"), fixed(native_context=256))
