"""Every supported family against the stock model, the reference path, and a dense mask laid over the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import beacon
from beacon.families import FAMILIES, trained_context
from tests.tiny_models import BASE, ROPE, TINY, assert_same, fingerprint, random_ids, randomize, tiny_config, tiny_model

WINDOW, RATIO = 16, 4
BEACONS = WINDOW // RATIO
APPEND = beacon.BeaconConfig(window=WINDOW, ratios=(RATIO,), ratio_policy="fixed")
INTERLEAVE = beacon.BeaconConfig.iclr2025(window=WINDOW, ratios=(RATIO,), ratio_policy="fixed")
CASES = pytest.mark.parametrize("name", TINY)


def wrapped(name: str, config: beacon.BeaconConfig = APPEND, **changes: Any) -> Any:
    """A wrapped model whose beacon weights differ from the base's."""
    model = beacon.wrap(tiny_model(name, **changes), config)
    return randomize(model, seed=1, only="beacon_")


def test_every_family_has_a_case():
    assert {tiny_config(name).model_type for name in TINY} == set(FAMILIES)


# -- short texts -------------------------------------------------------------------------------------------------------


@CASES
def test_short_text_is_bitwise_stock(name):
    stock = tiny_model(name)
    stock.set_attn_implementation("eager" if name == "mistral" else "sdpa")
    ids = random_ids(2, WINDOW - 1)
    with torch.no_grad():
        first = stock(ids[:, :9], use_cache=True)
        theirs = [first.logits, stock(ids[:, 9:], past_key_values=first.past_key_values).logits]
        model = randomize(beacon.wrap(stock, APPEND), seed=1, only="beacon_")
        first = model(ids[:, :9])
        ours = [first.logits, model(ids[:, 9:], past_key_values=first.past_key_values).logits]
    assert all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


@CASES
def test_loss_of_a_short_text_is_the_stock_loss(name):
    stock = tiny_model(name)
    ids = random_ids(2, WINDOW - 1)
    labels = ids.clone()
    labels[0, :5] = -100
    theirs = stock(ids, labels=labels).loss
    ours = wrapped(name)(ids, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# -- long texts --------------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("config", [APPEND, INTERLEAVE], ids=["append", "interleave"])
def test_paths_agree_on_a_long_text(name, config):
    ids = random_ids(2, 3 * WINDOW + 5)
    out = {}
    for path in ("sdpa", "reference"):
        model = wrapped(name, config.replace(attention_path=path), dtype=torch.float64)
        with torch.no_grad():
            out[path] = model(ids).logits
    torch.testing.assert_close(out["sdpa"], out["reference"], rtol=0, atol=1e-10)


def _read_window_by_stock(stock: Any, model: Any, ids: torch.Tensor, order: list[int], position: list[int], seen: Any):
    """One window through the stock model: raw tokens and beacons as embeddings, mask and positions given.

    ``order`` holds a raw token's offset, or -1 for a beacon. Forward hooks let beacon rows use the beacons' own
    projections; all the rest is the stock model's own code.
    """
    is_beacon = torch.tensor(order) < 0
    handles = []
    for layer, own in zip(stock.model.layers, model.model.layers, strict=True):
        for name in model.beacon_config.projections:
            handles.append(_use_own(layer.self_attn, own.self_attn, name, is_beacon))
    table, beacon_row = stock.model.embed_tokens.weight, model.model.beacon_embed_tokens.weight[0]
    embeds = torch.stack([beacon_row if a < 0 else table[ids[0, a]] for a in order])[None]
    mask = torch.zeros(seen.shape, dtype=embeds.dtype).masked_fill(~seen, float("-inf"))[None, None]
    cache = DynamicCache()
    out = stock(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=torch.tensor([position]),
        past_key_values=cache,
        use_cache=True,
    )
    for handle in handles:
        handle.remove()
    kv = [(layer.keys[0][:, is_beacon], layer.values[0][:, is_beacon]) for layer in cache.layers]
    return out.logits[:, ~is_beacon], kv


def _use_own(stock_attention: Any, own_attention: Any, name: str, is_beacon: torch.Tensor):
    """Hook: beacon rows of the stock projection get what the beacons' own projection says."""
    own = getattr(own_attention, f"beacon_{name}_proj")
    heads = stock_attention.config.num_attention_heads * stock_attention.head_dim
    kv = stock_attention.config.num_key_value_heads * stock_attention.head_dim
    fused = hasattr(stock_attention, "qkv_proj") and name != "o"
    begin = {"q": 0, "k": heads, "v": heads + kv}[name] if fused else 0

    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        mine = own(args[0])
        out = out.clone()
        out[:, is_beacon, begin : begin + mine.shape[-1]] = mine[:, is_beacon]
        return out

    target = stock_attention.qkv_proj if fused else getattr(stock_attention, f"{name}_proj")
    return target.register_forward_hook(hook)


def _turn(stock: Any, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Rotate keys ``[kv_heads, n, head_dim]``, rotated already, by a further angle per entry."""
    rotary = stock.model.rotary_emb
    angles = by[:, None].to(keys) * rotary.inv_freq.to(keys)
    cos, sin = (torch.cat([part(angles)] * 2, dim=-1) for part in (torch.cos, torch.sin))
    width = cos.shape[-1]
    part, rest = keys[..., :width], keys[..., width:]
    left, right = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-right, left], dim=-1) * sin, rest], dim=-1)


def _append_window() -> tuple[list[int], list[int], torch.Tensor]:
    order = [*range(WINDOW), *[-1] * BEACONS]
    position = [*range(WINDOW), *(RATIO * j for j in range(1, BEACONS + 1))]
    seen = torch.zeros(len(order), len(order), dtype=torch.bool)
    seen[:WINDOW, :WINDOW] = torch.ones(WINDOW, WINDOW).tril().bool()
    for j in range(1, BEACONS + 1):
        seen[WINDOW + j - 1, : j * RATIO] = True
        seen[WINDOW + j - 1, WINDOW + j - 1] = True
    return order, position, seen


def _interleaved_window() -> tuple[list[int], list[int], torch.Tensor]:
    order = []
    for a in range(WINDOW):
        order += [a, -1] if (a + 1) % RATIO == 0 else [a]
    count = len(order)
    return order, list(range(count)), torch.ones(count, count).tril().bool()


@CASES
@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_stock_model_under_a_dense_mask_agrees(name, placement):
    """Window 1 by the stock model under a hand-made mask, its beacons' K/V as the cache of window 2."""
    config = APPEND if placement == "append" else INTERLEAVE
    order, position, seen = _append_window() if placement == "append" else _interleaved_window()
    model = wrapped(name, config, dtype=torch.float64)
    stock = tiny_model(name, dtype=torch.float64)
    ids = random_ids(1, WINDOW + RATIO - 1)
    with torch.no_grad():
        out = model(ids)
        first, kv = _read_window_by_stock(stock, model, ids, order, position, seen)
        at = torch.tensor([u for u, a in zip(position, order, strict=True) if a < 0])
        kv = [(_turn(stock, k, torch.arange(BEACONS) - at), v) for k, v in kv]
        memory = DynamicCache()
        for layer, (k, v) in enumerate(kv):
            memory.update(k[None], v[None], layer)
        second = stock(ids[:, WINDOW:], past_key_values=memory, use_cache=True).logits
    for store, (k, v) in zip(out.past_key_values.stores, kv, strict=True):
        torch.testing.assert_close(store.memory_k[0].transpose(0, 1), k, rtol=0, atol=2e-6)
        torch.testing.assert_close(store.memory_v[0].transpose(0, 1), v, rtol=0, atol=2e-6)
    torch.testing.assert_close(out.logits, torch.cat([first, second], dim=1), rtol=0, atol=1e-5)
    assert out.logits.std() > 0.1  # random enough for a wrong norm, split or multiplier to show


@CASES
def test_loss_of_a_long_text_is_the_loss_of_its_logits(name):
    model = wrapped(name, dtype=torch.float64)
    ids = random_ids(2, 2 * WINDOW + 5)
    with torch.no_grad():
        logits = model(ids).logits
        loss = model(ids, labels=ids).loss
    theirs = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, theirs, rtol=1e-9, atol=0)


@CASES
def test_generates_as_its_logits_say(name):
    model = wrapped(name)
    ids = random_ids(1, 2 * WINDOW + 11)
    out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 8)
    with torch.no_grad():
        logits = model(out[:, :-1]).logits[0, -8:]
    logits[:, tiny_config(name).eos_token_id] = float("-inf")
    assert torch.equal(logits.argmax(dim=-1), out[0, -8:])


@CASES
def test_unwrapping_restores_every_bit(name):
    model = tiny_model(name).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    ids = random_ids(1, WINDOW + 3)
    with torch.no_grad():
        logits = model(ids).logits
        before = fingerprint(model)
        beacon.wrap(model, APPEND)
        assert not torch.equal(model(ids).logits, logits)
        beacon.unwrap(model)
        assert torch.equal(model(ids).logits, logits)
    assert_same(before, fingerprint(model))


# -- longrope ----------------------------------------------------------------------------------------------------------


def test_longrope_keeps_its_short_factors():
    """A text beyond the original context must not switch the frequencies, of the wrapped or the stock model."""
    model = wrapped("phi3-longrope", dtype=torch.float64)
    ids = random_ids(1, 160)
    short = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :140])
        second = model(ids[:, 140:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, rtol=0, atol=1e-6)
    assert torch.equal(model.model.rotary_emb.inv_freq, short)


def test_longrope_does_not_read_raw_beyond_its_short_factors():
    """Ratio 0 hands short texts to the stock model; a longer one must not switch to the long factors midway."""
    model = wrapped("phi3-longrope", dtype=torch.float64)
    ids = random_ids(1, 150)
    with torch.no_grad():
        whole = model(ids, ratios=0).logits
        cache, parts = None, []
        for part in ids.split(50, dim=1):
            out = model(part, past_key_values=cache, ratios=0)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)


# -- native context ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, native", [("llama2", 256), ("llama-yarn", 256), ("mistral", 256), ("mistral-sliding", 128)]
)
def test_native_context_is_the_models_own(name, native):
    model = beacon.wrap(tiny_model(name), APPEND)
    assert model.beacon_wrapping.native_context == native


def test_native_context_of_a_uniform_sliding_window():
    assert trained_context(tiny_config("qwen2-sliding")) == 128
    assert trained_context(tiny_config("qwen2", sliding_window=64)) == 256  # named but not used
    assert trained_context(tiny_config("phi3", sliding_window=64)) == 64


def test_native_context_of_longrope_is_that_of_its_short_factors():
    assert trained_context(tiny_config("phi3-longrope")) == 128
    with pytest.raises(ValueError, match="native_context must not exceed 128 with longrope"):
        beacon.wrap(tiny_model("phi3-longrope"), APPEND.replace(native_context=256))


def test_native_context_can_be_set():
    model = beacon.wrap(tiny_model("mistral-sliding"), APPEND.replace(native_context=64))
    assert model.beacon_wrapping.native_context == 64


def test_window_beyond_the_native_context_is_an_error():
    model = tiny_model("mistral-sliding")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="window=256 and native context 128"):
        beacon.wrap(model, beacon.BeaconConfig(window=256))
    assert_same(before, fingerprint(model))


# -- what is not supported ---------------------------------------------------------------------------------------------


def _unsupported() -> dict[str, Any]:
    t = transformers
    sizes = {**BASE, "head_dim": 8}
    return {
        "dynamic rope": lambda: tiny_model("llama2", rope_parameters=ROPE["dynamic"]),
        "mixed layers": lambda: tiny_model("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**sizes)),
        "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**sizes)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)),
        "lfm2": lambda: t.Lfm2ForCausalLM(
            t.Lfm2Config(**{**sizes, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16})
        ),
    }


@pytest.mark.parametrize("name", _unsupported())
def test_unsupported_models_are_refused_by_name(name):
    model = _unsupported()[name]()
    before = fingerprint(model)
    with pytest.raises(NotImplementedError, match="supported") as caught:
        beacon.wrap(model, APPEND)
    assert model.config.model_type in str(caught.value)
    assert "llama" in str(caught.value)
    assert_same(before, fingerprint(model))


def test_models_without_a_language_head_are_refused():
    for kind in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        with pytest.raises(TypeError, match="causal LM"):
            beacon.wrap(kind(tiny_config("llama2")), APPEND)
    with pytest.raises(TypeError, match="Linear"):
        beacon.wrap(torch.nn.Linear(2, 2), APPEND)
