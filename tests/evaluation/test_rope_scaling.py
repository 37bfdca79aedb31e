import threading

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import LlamaForCausalLM

import beacon
from beacon.evaluation import RopeScaled, Stock, measure_perplexity
from tests.evaluation.tiny import NATIVE, tiny_llama
from tests.tiny_models import assert_same, fingerprint, random_ids, tiny_model

ROPE = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": NATIVE},
}


def loaded(kind: str, factor: float) -> LlamaForCausalLM:
    """The same weights as the fixture's, with the rope type in the configuration."""
    return tiny_llama(rope_parameters={**ROPE[kind], "factor": factor})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("length", [40, NATIVE, 150])
@pytest.mark.parametrize("factor", [None, 1.0, 3.0])
def test_reads_as_a_model_configured_so(model, ids, kind, length, factor):
    used = factor or (1.0 if kind == "dynamic" else max(1.0, length / NATIVE))
    with torch.no_grad():
        expected = loaded(kind, used)(ids[None, :length]).logits[0, -20:]
    outcome = RopeScaled(kind, factor).read(model, ids[:length], 20)
    torch.testing.assert_close(outcome.logits, expected, atol=2e-5, rtol=1e-4)
    assert outcome.entries == length


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_decodes_as_a_model_configured_so(model, ids, kind, factor):
    text, count = ids[:100], 6
    used = factor or (1.0 if kind == "dynamic" else 106 / NATIVE)
    out = loaded(kind, used).generate(
        text[None],
        attention_mask=torch.ones(1, len(text), dtype=torch.int64),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    assert RopeScaled(kind, factor).continue_text(model, text, count) == out[0, -count:].tolist()


@pytest.mark.parametrize("factor", [2.0, 3.7])
@pytest.mark.parametrize("name", ["llama2", "phi3"])
def test_linear_divides_positions(name, factor):
    model, ids = beacon.wrap(tiny_model(name), beacon.BeaconConfig(window=32, ratios=(4,))), random_ids(1, 400)
    positions = torch.arange(ids.shape[1])[None] / factor
    with torch.no_grad(), beacon.disabled(model):
        expected = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0, -20:]
    actual = RopeScaled("linear", factor).read(model, ids[0], 20).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_is_the_stock_model_on_a_text_that_fits(model, ids, kind):
    text = ids[: NATIVE - 6]
    stock = Stock().read(model, text, 20)
    torch.testing.assert_close(RopeScaled(kind).read(model, text, 20).logits, stock.logits, atol=2e-5, rtol=1e-4)
    assert RopeScaled(kind).continue_text(model, text, 6) == Stock().continue_text(model, text, 6)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_the_model_stays_as_it_is(model, ids, kind):
    def logits():
        with torch.no_grad(), beacon.disabled(model):
            return model(ids[None]).logits

    parts, before, stock = [*model.modules()], fingerprint(model), logits()
    condensed = model(ids[None], ratios=4).logits
    RopeScaled(kind).read(model, ids, 5)
    RopeScaled(kind, 2.0).continue_text(model, ids, 2)
    assert torch.equal(logits(), stock) and torch.equal(model(ids[None], ratios=4).logits, condensed)
    assert all(one is other for one, other in zip(parts, model.modules(), strict=True))
    assert_same(before, fingerprint(model))


def test_threads_read_at_once(model, ids):
    methods = [RopeScaled("linear"), RopeScaled("yarn"), RopeScaled("dynamic"), Stock()]
    alone = [method.read(model, ids, 20).logits for method in methods]
    results: dict[int, list[torch.Tensor]] = {}

    def read(number):
        results[number] = [methods[number].read(model, ids, 20).logits for _ in range(5)]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(methods))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert all(torch.equal(logits, expected) for logits in results[number])


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_builds_no_mask_and_few_logits(model, ids, kind, monkeypatch):
    calls, heads = [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(*args, **kwargs):
        calls.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    model.lm_head.register_forward_hook(lambda _, args, out: heads.append(out.shape[-2]))
    RopeScaled(kind).read(model, ids, 7)
    assert calls == [(None, True)] * model.config.num_hidden_layers
    assert heads == [7]


@pytest.mark.parametrize("name", ["mistral", "qwen3", "granite", "olmo2"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_families(name, kind):
    ids = random_ids(1, 400)[0]
    stock = tiny_model(name)
    changes = {**ROPE[kind], "factor": 2.0}
    if kind == "yarn":
        changes["original_max_position_embeddings"] = 256
    with torch.no_grad():
        expected = tiny_model(name, rope_parameters=changes)(ids[None]).logits[0, -9:]
    wrapped = beacon.wrap(stock, beacon.BeaconConfig(window=32, ratios=(4,)))
    torch.testing.assert_close(RopeScaled(kind, 2.0).read(wrapped, ids, 9).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_counts_from_the_native_context_of_the_configuration(ids, kind):
    wide = tiny_llama(max_position_embeddings=512)
    model = beacon.wrap(wide, beacon.BeaconConfig(window=16, ratios=(4,), native_context=NATIVE))
    with torch.no_grad():
        expected = loaded(kind, 1.0 if kind == "dynamic" else len(ids) / NATIVE)(ids[None]).logits[0, -20:]
    torch.testing.assert_close(RopeScaled(kind).read(model, ids, 20).logits, expected, atol=2e-5, rtol=1e-4)


def test_reads_a_dispatched_model(model, ids):
    expected = RopeScaled("linear").read(model, ids, 20).logits
    for module in (model.model, model):
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    assert torch.equal(RopeScaled("linear").read(model, ids, 20).logits, expected)


def test_perplexity_names_the_method(model, ids):
    result = measure_perplexity(model, [ids], 128, 30, RopeScaled("linear"))
    assert (result.method, result.entries) == ("position interpolation", 127)
    names = [RopeScaled("dynamic").name, RopeScaled("yarn").name, RopeScaled("yarn", 4.0).name]
    assert names == ["dynamic NTK", "YaRN", "YaRN, factor 4"]


def test_bad_input(ids):
    with pytest.raises(ValueError, match="kind must be one of linear, dynamic, yarn, got 'ntk'"):
        RopeScaled("ntk")
    for factor in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"factor must be at least 1 and finite, got {factor}"):
            RopeScaled("yarn", factor)
    scaled = beacon.wrap(loaded("linear", 4.0), beacon.BeaconConfig(window=16, ratios=(2,)))
    with pytest.raises(NotImplementedError, match="rope type must be 'default' to be rescaled, got 'linear'"):
        RopeScaled("yarn").read(scaled, ids, 5)
