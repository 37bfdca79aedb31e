"""The adapter's lesson: its beacons are the library's, and what they should hold is what was put into the text."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "reproduce_100x"))

import beacon
from ablations import VARIANTS
from beacon.modules import rotate
from lookups import DISTANCES, GAINS, Lookups, answer_ends
from questions import Questions, answer_loss, draw_memory, draw_strangers, gather_memory
from scales import CONFIG, STRIDE, mixed_precision
from sequences import ANSWER_WEIGHT, COPY_WEIGHT
from strides import EVERY, memory_entries, read_strides
from teacher import read_whole

LAYERS, HEADS = 3, 2


def wrapped(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=99, max_position_embeddings=512, **sizes)).double()
    config = dataclasses.replace(CONFIG, window=STRIDE, sink=0, **changes)
    model = beacon.wrap(base, config).eval()
    for name, parameter in model.named_parameters():
        if "beacon_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("every", [EVERY, 32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_beacons_of_the_lesson_are_the_library_s(variant, every):
    """In a text's first stride, where the library has no memory yet.

    Interleaved beacons are seen by the raw tokens after them, whose entries the lesson takes from the stock model all
    the same: there the first layer alone agrees.
    """
    model = wrapped(**VARIANTS[variant])
    ids = torch.randint(99, (2, STRIDE))
    ends = torch.arange(every, STRIDE + 1, every)
    with torch.no_grad():
        cache = model.compress(ids, ratios=every)
        lesson = list(read_strides(model, ids, ends, memory=0))
    table = model.beacon_rotary().table(torch.arange(len(ends)), torch.float64)
    depth = 1 if variant == "interleave" else LAYERS
    for layer, store in zip(lesson[:depth], cache.stores[:depth], strict=True):
        for row in range(2):
            torch.testing.assert_close(layer.values[row], store.memory_v[row], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(rotate(layer.keys[row], table), store.memory_k[row], atol=1e-6, rtol=1e-5)


def test_answers_begin_and_end_where_their_weights_do():
    """One that is cut by the border of two strides has ends in both; repeated chunks are no answers."""
    weights = torch.ones(3, 2 * STRIDE)
    weights[0, 1:3], weights[0, 4:7], weights[0, STRIDE - 2 : STRIDE + 1] = 0.0, ANSWER_WEIGHT, 0.0
    weights[1, 0] = weights[1, -1] = 0.0
    weights[2, :150], weights[2, 150:] = 0.0, COPY_WEIGHT
    first, last = answer_ends(weights)
    assert first.nonzero().tolist() == [[0, 0, 1], [0, 0, 4], [0, 0, 126], [0, 1, 0], [1, 0, 0], [1, 1, 127]]
    assert last.nonzero().tolist() == [[0, 0, 2], [0, 0, 6], [0, 0, 127], [0, 1, 0], [1, 0, 0], [1, 1, 127]]


def test_heads_that_hold_what_they_should_have_no_error():
    """Entries made by hand, from the rule itself: a needle's tokens from its end on, else the token at a distance."""
    model = wrapped()
    ids, weights = torch.randint(99, (1, STRIDE)), torch.ones(1, STRIDE)
    weights[0, 50:53] = 0.0  # an answer of three tokens
    ends = torch.arange(EVERY, STRIDE + 1, EVERY)
    heads = [(0, 1), (1, 0), (2, 1)]  # the second keeps a needle's last token
    entries = list(read_strides(model, ids, ends, memory=0))
    ideal = []
    for number, layer in enumerate(entries):
        keys, values = layer.keys.clone(), layer.values.clone()
        for head in range(HEADS):
            place = heads.index((number, head)) if (number, head) in heads else None
            for n, end in enumerate(ends.tolist()):
                at, kind = end - 1 - (place or 0) % DISTANCES, "near" if place is not None else "other"
                if place is not None and end >= 53:
                    at, kind = (52 if place == 1 else 50), "needle"
                keys[0, n, head] = GAINS.get(f"{kind} keys", 1.0) * layer.raw_keys[0, at, head]
                values[0, n, head] = GAINS.get(f"{kind} values", 1.0) * layer.raw_values[0, at, head]
        ideal.append(dataclasses.replace(layer, keys=keys, values=values))
    errors = Lookups(model, heads).errors(ideal, weights, ends)
    assert set(errors) == {f"{kind} {name}" for kind in ("near", "needle", "other") for name in ("keys", "values")}
    assert max(errors.values()) == 0.0
    assert min(Lookups(model, heads).errors(entries, weights, ends).values()) > 0.1


def test_memory_of_the_lesson_is_what_came_before():
    """A stride's beacons depend on the few tokens of earlier strides that stand in memory, and on no later one."""
    model = wrapped()
    ids = torch.randint(99, (1, 3 * STRIDE))
    memory = len(memory_entries(model.beacon_config, ids.shape[1]))
    ends = torch.arange(EVERY, STRIDE + 1, EVERY)

    def values(changed: int | None):
        other = ids.clone()
        if changed is not None:
            other[0, changed] = (other[0, changed] + 1) % 99
        return torch.stack([layer.values for layer in read_strides(model, other, ends, memory)])[-1].detach()

    plain = values(None)
    assert torch.equal(values(2 * STRIDE)[:2], plain[:2])
    assert not torch.allclose(values(2 * STRIDE)[2], plain[2])
    assert not torch.allclose(values(STRIDE + 3)[2], plain[2])


@pytest.mark.parametrize("ratio", [4, 32])
def test_questions_are_read_as_the_library_reads_them(ratio):
    """Behind the memory of one stride, on which the lesson's beacons are the library's."""
    model = wrapped()
    texts, asked = torch.randint(99, (2, STRIDE)), torch.randint(99, (2, 3, 10))
    answers = torch.zeros(asked.shape, dtype=torch.bool)
    answers[0, :, -2:] = answers[1, 1:, -3:] = True
    questions = Questions(texts, torch.ones(2, STRIDE), asked, answers, np.ones((2, 1), bool))
    ends = torch.arange(EVERY, STRIDE + 1, EVERY)
    places = draw_memory(np.random.default_rng(0), questions.holds, (ratio,))
    assert places.shape == (2, STRIDE // ratio)
    with torch.no_grad():
        layers = list(read_strides(model, texts, ends, memory=0))
        ours = answer_loss(model, questions, layers, places, gap=0)
        cache = model.compress(texts, ratios=ratio)
        losses = []
        for number in range(3):
            logits = model(asked[:, number], past_key_values=cache.fork()).logits[:, :-1].log_softmax(-1)
            targets = asked[:, number, 1:]
            losses.append(-logits.gather(-1, targets[..., None])[..., 0][answers[:, number, 1:]])
    torch.testing.assert_close(ours, torch.cat(losses).mean().to(ours), atol=1e-5, rtol=1e-5)


def test_texts_behind_a_memory_are_read_as_the_library_reads_them():
    """Behind the memory of one stride, on which the lesson's beacons are the library's."""
    model = wrapped()
    past, ids = torch.randint(99, (1, STRIDE)), torch.randint(99, (2, 2 * STRIDE + 20))
    ends = torch.arange(EVERY, STRIDE + 1, EVERY)
    with torch.no_grad():
        cache = model.compress(past, ratios=[8, 4, 32])
        layers = list(read_strides(model, past, ends, memory=0))
        memory = gather_memory(layers, torch.arange(1, len(ends), 2)[None], strides=1, sink=0)
        ours = read_whole(model, ids, [4, 32], [(keys[0], values[0]) for keys, values in memory])
        for row in range(2):
            logits = model(ids[row : row + 1], past_key_values=cache.fork()).logits[0]
            torch.testing.assert_close(model.beacon_head(ours[row]), logits, atol=1e-5, rtol=1e-5)


def test_sinks_come_first_in_a_memory():
    layers = list(read_strides(wrapped(), torch.randint(99, (2, 3 * STRIDE)), torch.arange(64, STRIDE + 1, 64), 96))
    places = torch.tensor([[1, 4], [6, 11]])
    for layer, (keys, values) in zip(layers, gather_memory(layers, places, strides=3, sink=4), strict=True):
        assert torch.equal(keys[:, :4], layer.raw_keys[[0, 3], :4])
        assert torch.equal(values[:, 4:], torch.stack([layer.values[[0, 2], [1, 0]], layer.values[[3, 5], [0, 1]]]))


def test_strangers_are_beacons_of_strides_without_needles():
    holds = np.array([[True, False, False], [False, True, True]])
    rng, sizes = np.random.default_rng(0), set()
    for _ in range(100):
        places = draw_strangers(rng, holds, (4, 8, 128), 300).numpy()
        sizes.add(len(places))
        assert not holds.flat[np.unique(places // (STRIDE // EVERY))].any()
    assert 0 in sizes and 200 < max(sizes) < 300
    assert len(draw_strangers(rng, holds, (4,), -5)) == len(draw_strangers(rng, ~(holds & False), (4,), 300)) == 0


def test_memory_of_one_ratio_takes_all_beacons():
    holds = np.array([[True, False, True]])
    places = draw_memory(np.random.default_rng(1), holds, (32,), every=32)
    assert {4 * stride + n for stride in range(3) for n in range(4)} <= set(places[0].tolist())


def test_memory_is_a_text_s_own_strides_in_order_among_strides_without_needles():
    holds = np.array([[True, False, False], [False, True, True], [True, True, True]])
    beacons, rng = STRIDE // EVERY, np.random.default_rng(0)
    sizes = set()
    for _ in range(200):
        places = draw_memory(rng, holds, (4, 8, 128)).numpy()
        sizes.add(places.shape[1])
        for row, entries in enumerate(places // beacons):
            strides = entries[np.flatnonzero(np.diff(entries, prepend=-1))]
            own = [stride for stride in strides.tolist() if holds.flat[stride]]
            assert own == sorted(own) and set(own) == {3 * row + n for n in range(3) if holds[row, n]}
            assert set(range(3 * row, 3 * row + 3)) <= set(strides.tolist())
    assert min(sizes) == 3 and max(sizes) > 150


@pytest.mark.parametrize("has, wanted", [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "no")])
def test_products_are_in_bfloat16_only_where_the_processor_has_them(has, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert mixed_precision(cpu=True) == wanted
