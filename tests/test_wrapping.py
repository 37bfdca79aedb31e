"""What `wrap` adds and `unwrap` takes away, on plain, hooked, offloaded, quantised, adapted and sharded models."""

from __future__ import annotations

import copy
import inspect
import json
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import beacon
from beacon.weights import beacon_parameters
from beacon.wrapping import new_parameter_shapes
from tests.tiny_models import TINY, assert_same, fingerprint, random_ids, randomize, tiny_config, tiny_model

CONFIG = beacon.BeaconConfig(window=16, ratios=(4,), ratio_policy="fixed")
SHORT, LONG = random_ids(2, 12), random_ids(2, 40)
STAGES = pytest.mark.parametrize("hook_first", [True, False], ids=["hook-wrap", "wrap-hook"])


def logits(model: Any, ids: torch.Tensor = LONG, **call: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **call).logits


@pytest.fixture(scope="module")
def expected() -> SimpleNamespace:
    """What the stock and the plainly wrapped model say."""
    model = tiny_model()
    short, long = logits(model, SHORT), logits(model)
    return SimpleNamespace(short=short, long=long, condensed=logits(beacon.wrap(model, CONFIG)))


# -- what a wrapped model is -------------------------------------------------------------------------------------------


def test_wrapped_model_is_the_same_object_of_its_class():
    stock = tiny_model()
    config = stock.config.to_dict()
    plans = copy.deepcopy((stock._tp_plan, stock._no_split_modules, type(stock)._tied_weights_keys))
    model = beacon.wrap(stock, CONFIG)
    assert model is stock
    for module, kind in (
        (model, "LlamaForCausalLM"),
        (model.model.layers[-1], "LlamaDecoderLayer"),
        (model.model.layers[0].self_attn, "LlamaAttention"),
    ):
        stock_class = getattr(transformers.models.llama.modeling_llama, kind)
        assert isinstance(module, stock_class)
        assert type(module).__name__ == kind
        assert type(module).__module__ == stock_class.__module__
    assert model.config.to_dict() == config  # no setting of ours gets into it
    assert (model._tp_plan, model._no_split_modules, type(model)._tied_weights_keys) == plans
    assert type(tiny_model()) is transformers.LlamaForCausalLM  # no class was patched


def test_forward_keeps_hugging_faces_parameters_and_names_its_own():
    stock = set(inspect.signature(tiny_model().forward).parameters)
    ours = set(inspect.signature(beacon.wrap(tiny_model(), CONFIG).forward).parameters)
    assert stock <= ours
    assert ours - stock == {"ratios", "expected_length", "keep_first", "keep_from"}


def test_added_parameters_have_the_references_names_and_only_they_train():
    for name in TINY:
        stock = tiny_model(name)
        before, shapes = list(stock.state_dict()), new_parameter_shapes(stock, CONFIG)
        model = beacon.wrap(stock, CONFIG)
        added = beacon_parameters(model)
        assert {key: tuple(p.shape) for key, p in added.items()} == shapes
        assert [key for key in model.state_dict() if key not in added] == before
        assert {key for key, p in model.named_parameters() if p.requires_grad} == set(added)
        assert "model.layers.0.self_attn.beacon_q_proj.weight" in added
        assert "model.beacon_embed_tokens.weight" in added


@pytest.mark.parametrize("name", ["qwen2", "llama-linear", "phi3"])
@pytest.mark.parametrize("projections", [("q", "k", "v", "o"), ("k",), ("q", "v")])
def test_projections_start_as_copies(name, projections):
    """Beacon weights of every subset give what the base's own give, and are no views of them."""
    model = beacon.wrap(tiny_model(name), CONFIG.replace(projections=projections))
    attention = model.model.layers[1].self_attn
    x = torch.randn(3, 32)
    own, base = attention.project(x, own=True, queries=True), attention.project(x, own=False, queries=True)
    for mine, theirs in zip(own, base, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    storages = {p.untyped_storage().data_ptr() for key, p in model.named_parameters() if "beacon_" not in key}
    assert storages.isdisjoint(p.untyped_storage().data_ptr() for p in beacon_parameters(model).values())


@pytest.mark.parametrize(
    "eos, bos, row",
    [(5, 1, 5), ([7, 5], 1, 7), (None, 1, 1), ([], 1, 1), (None, None, None), (32000, 1, 1), (-1, 96, None)],
    ids=str,
)
def test_embedding_starts_from_the_eos_row(eos, bos, row):
    stock = tiny_model("llama2")
    stock.config.eos_token_id, stock.config.bos_token_id = eos, bos
    table = stock.model.embed_tokens.weight.detach().clone()
    model = beacon.wrap(stock, CONFIG)
    expected = table.mean(dim=0, keepdim=True) if row is None else table[row : row + 1]
    assert torch.equal(model.model.beacon_embed_tokens.weight, expected)


def test_wrapping_twice_is_an_error_and_changes_nothing():
    model = beacon.wrap(tiny_model(), CONFIG)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="wrapped already"):
        beacon.wrap(model, CONFIG)
    assert_same(before, fingerprint(model))
    with pytest.raises(TypeError, match="unwrap"):
        beacon.unwrap(tiny_model())
    with pytest.raises(TypeError, match="BeaconConfig"):
        beacon.wrap(tiny_model(), {"window": 16})


def test_wrap_unwrap_wrap_starts_anew(expected):
    model = beacon.wrap(tiny_model(), CONFIG)
    randomize(model, only="beacon_")
    model = beacon.wrap(beacon.unwrap(model), CONFIG)
    assert torch.equal(logits(model), expected.condensed)


@pytest.mark.parametrize(
    "where", ["model.layers.1.self_attn.v_proj", "model.embed_tokens", "model.layers.2.mlp.up_proj", "model.norm"]
)
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_not_finite_base_weights_are_named_and_nothing_is_changed(where, value):
    stock = tiny_model()
    stock.get_submodule(where).weight.data[2] = float(value)
    parameters = [name for name, _ in stock.named_parameters()]
    with pytest.raises(ValueError, match=rf"{where}\.weight;"):
        beacon.wrap(stock, CONFIG)
    assert type(stock) is transformers.LlamaForCausalLM
    assert [name for name, p in stock.named_parameters() if p.requires_grad] == parameters


def test_deep_copy_is_a_model_of_its_own(expected):
    model = beacon.wrap(tiny_model(), CONFIG)
    twin = copy.deepcopy(model)
    randomize(model, only="beacon_")
    assert torch.equal(logits(twin), expected.condensed)
    assert not torch.equal(logits(model), expected.condensed)
    cache = twin.compress(LONG)
    with pytest.raises(ValueError, match="another model"):
        model(SHORT, past_key_values=cache)
    with beacon.disabled(model):
        assert torch.equal(logits(twin), expected.condensed)
        assert torch.equal(logits(model), expected.long)
    beacon.unwrap(model)
    assert torch.equal(logits(twin), expected.condensed)
    assert torch.equal(logits(model), expected.long)
    assert torch.equal(logits(beacon.unwrap(twin)), expected.long)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama-yarn", "phi3-longrope"])
def test_dtype_may_change_before_or_after(name, dtype):
    before = beacon.wrap(tiny_model(name).to(dtype), CONFIG)
    after = beacon.wrap(tiny_model(name), CONFIG).to(dtype)
    assert {p.dtype for p in after.parameters()} == {dtype}
    out = logits(after)
    assert out.dtype == dtype
    assert torch.equal(out, logits(before))
    stock = tiny_model(name).to(dtype)
    assert torch.equal(logits(after, SHORT), logits(stock, SHORT))


def test_whole_model_can_be_saved_and_loaded_by_torch(tmp_path, expected):
    model = randomize(beacon.wrap(tiny_model(), CONFIG), only="beacon_", seed=3)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(beacon.unwrap(loaded)), expected.long)


def test_replicas_for_data_parallel_are_wrapped_too():
    model = beacon.wrap(tiny_model(), CONFIG)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model) and replica.beacon_wrapping is model.beacon_wrapping


def test_class_of_a_wrapped_model_makes_stock_models(tmp_path):
    model = beacon.wrap(tiny_model(), CONFIG)
    model.save_pretrained(tmp_path)
    assert type(type(model)(model.config)) is transformers.LlamaForCausalLM
    assert type(type(model).from_pretrained(tmp_path)) is transformers.LlamaForCausalLM


def test_state_dict_can_be_saved_and_loaded_by_torch(tmp_path, expected):
    model = beacon.wrap(tiny_model(), CONFIG)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = beacon.wrap(tiny_model(seed=1), CONFIG)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(other), expected.condensed)


def test_disabled_is_the_stock_model(expected):
    model = beacon.wrap(tiny_model(), CONFIG)
    with beacon.disabled(model) as same:
        assert same is model
        assert torch.equal(logits(model), expected.long)
        out = model.generate(LONG, max_new_tokens=4, do_sample=False)
        with pytest.raises(RuntimeError, match="disabled"):
            model.compress(LONG)
    assert torch.equal(out, tiny_model().generate(LONG, max_new_tokens=4, do_sample=False))
    assert torch.equal(logits(model), expected.condensed)


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [None, 1])
def test_gradient_checkpointing_gives_the_same_gradients(segment):
    gradients = []
    for checkpointing in (False, True):
        model = beacon.wrap(tiny_model(), CONFIG.replace(segment=segment)).train()
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)()
            assert model.model.layers[-1].gradient_checkpointing
        model(LONG, labels=LONG).loss.backward()
        gradients.append({name: p.grad for name, p in beacon_parameters(model).items()})
        assert beacon.unwrap(model).model.layers[-1].gradient_checkpointing == checkpointing
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][name] is None
        else:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


# -- accelerate hooks --------------------------------------------------------------------------------------------------


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def _hook(model: Any) -> list[Counting]:
    hooks = [Counting(), Counting(), Counting()]
    for module, hook in zip((model, model.model.layers[-1], model.model.layers[0].self_attn), hooks, strict=True):
        add_hook_to_module(module, hook)
    return hooks


@STAGES
@pytest.mark.parametrize("unhook_first", [True, False])
def test_hooks_and_wrapping_in_every_order(expected, hook_first, unhook_first):
    model = tiny_model()
    before = fingerprint(model)
    hooks = _hook(model) if hook_first else []
    beacon.wrap(model, CONFIG)
    hooks = hooks or _hook(model)
    assert "ratios" in inspect.signature(model.forward).parameters
    assert torch.equal(logits(model), expected.condensed)
    assert [hook.calls for hook in hooks] == [1, 1, 1]
    assert torch.equal(logits(copy.deepcopy(model)), expected.condensed)
    assert model.generate(LONG, ratios=4, max_new_tokens=2, min_new_tokens=2).shape == (2, 42)
    if unhook_first:
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), expected.condensed)
    beacon.unwrap(model)
    assert torch.equal(logits(model), expected.long)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), expected.long)
    for module in model.modules():  # accelerate leaves the plain bound method behind
        assert module.__dict__.pop("forward", module.forward) == module.forward
    assert_same(before, fingerprint(model))


@STAGES
@pytest.mark.parametrize("placed", ["cpu_offload", "dispatch_model"])
def test_offloaded_models(expected, hook_first, placed, tmp_path):
    """Weights on the meta device, brought in by hooks for the time of a call."""

    def offload(model: Any) -> Any:
        if placed == "cpu_offload":
            return accelerate.cpu_offload(model, execution_device="cpu")
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.1": "disk", "model.layers.2": "disk", "model.rotary_emb": "cpu"}
        if not hook_first:
            places["model.beacon_embed_tokens"] = "disk"
        return accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True
        )

    model = tiny_model()
    model = beacon.wrap(offload(model), CONFIG) if hook_first else offload(beacon.wrap(model, CONFIG))
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    torch.testing.assert_close(logits(model), expected.condensed, rtol=0, atol=1e-6)
    beacon.save_adapter(model, tmp_path / "adapter")
    fresh = beacon.load_adapter(tiny_model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), expected.condensed, rtol=0, atol=1e-6)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    static = model.generate(LONG, past_key_values=model.static_cache(2 * LONG.shape[1]), **settings)
    assert torch.equal(static, fresh.generate(LONG, **settings))
    if not hook_first:
        with pytest.raises(ValueError, match="offloaded"):
            beacon.load_reference(model, tmp_path / "adapter")
    beacon.unwrap(model)
    assert torch.equal(logits(model), expected.long)
    assert torch.equal(logits(model, SHORT), expected.short)


@pytest.fixture
def fresh_accelerator():
    """One process has one state of accelerate: what a test chooses there is for itself alone."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_forward_replaced_by_accelerator_is_refused(expected):
    """Mixed precision puts a forward of its own on the model, which would go past ours."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(tiny_model())
    before = fingerprint(model)
    with pytest.raises(NotImplementedError, match=r"unwrap_model\(model, keep_fp32_wrapper=False\)"):
        beacon.wrap(model, CONFIG)
    assert_same(before, fingerprint(model))
    model = beacon.wrap(accelerator.unwrap_model(model, keep_fp32_wrapper=False), CONFIG)
    assert torch.equal(logits(model), expected.condensed)
    model = accelerator.prepare_model(beacon.wrap(tiny_model(), CONFIG))
    out = logits(model)
    assert out.dtype == torch.float32
    assert 0 < (out - expected.condensed).abs().max() < 0.3  # bf16 inside
    with pytest.raises(NotImplementedError, match="has been replaced"):
        beacon.unwrap(model)
    model = beacon.unwrap(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    assert torch.equal(logits(model), expected.long)


# -- quantised, adapted, sharded ---------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A quantised projection as quantisers make them: integer rows, a scale per row, no `weight` in floating point."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale[:, None].to(x.dtype), self.bias)


def _int8(linear: nn.Linear) -> nn.Module:
    return Int8Linear(linear)


def _bitsandbytes(kind: str, **options: Any) -> Any:
    def make(linear: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        quantised = getattr(bnb.nn, kind)(
            linear.in_features, linear.out_features, bias=linear.bias is not None, **options
        )
        quantised.load_state_dict(linear.state_dict())
        return quantised.to("cpu")

    return make


@pytest.mark.parametrize(
    "make, tolerance",
    [
        pytest.param(_int8, 1e-5, id="int8"),
        pytest.param(_bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32), 1e-5, id="nf4"),
        pytest.param(_bitsandbytes("Linear8bitLt", has_fp16_weights=False), 0.3, id="llm.int8"),
    ],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantised_base(make, tolerance):
    model = tiny_model("qwen2", hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))
    before, short = list(model.state_dict()), logits(model, SHORT)
    model = beacon.wrap(model, CONFIG)
    assert torch.equal(logits(model, SHORT), short)
    attention, x = model.model.layers[0].self_attn, torch.randn(5, 64)
    for name in ("q", "k", "v"):
        own, base = getattr(attention, f"beacon_{name}_proj"), getattr(attention, f"{name}_proj")
        assert type(own) is nn.Linear and own.weight.dtype == torch.float32
        torch.testing.assert_close(own(x), base(x), rtol=0, atol=tolerance)
    model(LONG, labels=LONG).loss.backward()
    assert attention.beacon_k_proj.weight.grad.abs().max() > 0
    assert list(beacon.unwrap(model).state_dict()) == before
    assert torch.equal(logits(model, SHORT), short)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_base_that_torchao_has_quantised(kind, tmp_path):
    """As users load it: beacons start as its dequantised projections, and read, decode and train beside it."""
    quantization = pytest.importorskip("torchao.quantization")
    tiny_model("qwen2", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    settings = transformers.TorchAoConfig(getattr(quantization, kind)())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    attention, x = model.model.layers[0].self_attn, torch.eye(64)
    assert type(attention.k_proj.weight.data) is not torch.Tensor
    short = logits(model, SHORT)
    model = beacon.wrap(model, CONFIG)
    assert torch.equal(logits(model, SHORT), short)
    assert attention.beacon_k_proj.weight.dtype == torch.float32
    torch.testing.assert_close(attention.beacon_k_proj(x), attention.k_proj(x), rtol=0, atol=0.01)
    cache = model.static_cache(2 * LONG.shape[1])
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    out = model.generate(LONG, past_key_values=cache, **settings)
    assert torch.equal(out, model.generate(LONG, **settings))
    if kind == "Int8WeightOnlyConfig":  # products of int8 activations have no gradient
        model(LONG, labels=LONG).loss.backward()
        assert attention.beacon_k_proj.weight.grad.abs().max() > 0


class _Unreadable(nn.Module):
    """A quantised module whose kernels do not run here."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.packed = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("kernel needs CUDA")


def test_weights_that_cannot_be_read_are_named():
    stock = tiny_model()
    stock.model.layers[1].self_attn.k_proj = _Unreadable(stock.model.layers[1].self_attn.k_proj)
    before = fingerprint(stock)
    wanted = r"layers\.1\.self_attn\.k_proj \(_Unreadable\) cannot be read.*kernel needs CUDA.*dequantise"
    with pytest.raises(NotImplementedError, match=wanted):
        beacon.wrap(stock, CONFIG)
    assert_same(before, fingerprint(stock))
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(tiny_config("llama2"))
    with pytest.raises(NotImplementedError, match="meta device"):
        beacon.wrap(empty, CONFIG)


PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5, "init_lora_weights": False}


@PEFT
def test_peft_models_are_refused_by_name():
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    with pytest.raises(NotImplementedError, match=r"PeftModelForCausalLM.*merge_and_unload"):
        beacon.wrap(model, CONFIG)
    beacon.wrap(model.merge_and_unload(), CONFIG)


@PEFT
def test_lora_layers_inside_a_base_count_as_the_base():
    model = tiny_model().train()
    model.add_adapter(peft.LoraConfig(**LORA))
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    beacon.wrap(model, CONFIG)
    assert model.model.layers[0].self_attn.q_proj.training  # its dropout was off for the copy only
    model.eval()
    attention, x = model.model.layers[0].self_attn, torch.randn(5, 32)
    torch.testing.assert_close(attention.beacon_q_proj(x), attention.q_proj(x), rtol=1e-5, atol=1e-5)
    merged = peft.get_peft_model(tiny_model(), peft.LoraConfig(**LORA))
    merged.load_state_dict({f"base_model.model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    plain = beacon.wrap(merged.merge_and_unload().eval(), CONFIG)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4)
    beacon.unwrap(model)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == flags


@PEFT
def test_lora_added_to_a_wrapped_model_keeps_its_flags_and_both_are_saved(tmp_path):
    model = randomize(beacon.wrap(tiny_model(), CONFIG), only="beacon_", seed=3)
    model.add_adapter(peft.LoraConfig(**LORA))
    model.eval().save_pretrained(tmp_path)
    loaded = beacon.load_adapter(tiny_model(), tmp_path)
    for name, parameter in beacon_parameters(model).items():
        assert torch.equal(parameter, dict(loaded.named_parameters())[name]), name
    beacon.unwrap(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@PEFT
def test_lora_around_a_wrapped_model_trains_both():
    model = peft.get_peft_model(beacon.wrap(tiny_model(), CONFIG), peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "beacon_" in name)
    model(input_ids=LONG, labels=LONG).loss.backward()
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.lora_B["default"].weight.grad.abs().max() > 0
    assert attention.beacon_q_proj.weight.grad.abs().max() > 0


def test_compiled_or_parallel_wrappers_are_refused():
    with pytest.raises(TypeError, match="before compiling or parallelising"):
        beacon.wrap(nn.DataParallel(tiny_model()), CONFIG)


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_fully_sharded_by_decoder_layer(one_process_group, expected, tmp_path):
    from torch.distributed.fsdp import fully_shard

    reference = beacon.wrap(tiny_model(), CONFIG).train()
    reference(LONG, labels=LONG).loss.backward()
    model = beacon.wrap(tiny_model(), CONFIG).train()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(logits(model), expected.condensed)
    model(LONG, labels=LONG).loss.backward()
    for (name, ours), theirs in zip(
        beacon_parameters(model).items(), beacon_parameters(reference).values(), strict=True
    ):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
    with pytest.raises(NotImplementedError, match="fully_shard"):
        beacon.unwrap(model)
    assert torch.equal(logits(model), expected.condensed)  # the refusal changed nothing
    beacon.save_adapter(model, tmp_path)
    assert torch.equal(logits(beacon.load_adapter(tiny_model(), tmp_path)), expected.condensed)
    with pytest.raises(ValueError, match="sharded"):
        beacon.load_reference(model, tmp_path)
    sharded = tiny_model()
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(NotImplementedError, match="before fully_shard"):
        beacon.wrap(sharded, CONFIG)


# -- save_pretrained and Trainer ---------------------------------------------------------------------------------------


def test_save_pretrained_loads_as_the_stock_model_and_as_an_adapter(tmp_path, expected):
    model = randomize(beacon.wrap(tiny_model(), CONFIG), only="beacon_", seed=3)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "beacon" not in json.dumps(written)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(stock) is transformers.LlamaForCausalLM
    assert torch.equal(logits(stock), expected.long)
    assert torch.equal(logits(beacon.load_adapter(stock, tmp_path)), logits(model))


def test_save_pretrained_in_shards_and_of_tied_embeddings(tmp_path):
    model = randomize(beacon.wrap(tiny_model("llama-yarn"), CONFIG), only="beacon_", seed=3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert torch.equal(logits(beacon.load_adapter(stock, tmp_path)), logits(model))
    assert beacon.unwrap(model).lm_head.weight is model.model.embed_tokens.weight


def _trainer(folder: Any, steps: int) -> transformers.Trainer:
    texts = random_ids(8, 40, seed=5)
    return transformers.Trainer(
        model=beacon.wrap(tiny_model(seed=7), CONFIG),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=3,
        ),
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
        eval_dataset=[{"input_ids": text, "labels": text} for text in texts[:2]],
    )


def test_trainer_runs_and_resumes(tmp_path):
    whole = _trainer(tmp_path / "whole", 4)
    first = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < first
    _trainer(tmp_path / "parts", 2).train()
    resumed = _trainer(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=True)
    theirs = beacon_parameters(whole.model)
    for name, parameter in beacon_parameters(resumed.model).items():
        assert torch.equal(parameter, theirs[name]), name
    base = tiny_model(seed=7).state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert name not in base or torch.equal(tensor, base[name]), name
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4").eval()
    again = beacon.load_adapter(stock, tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(logits(again), logits(whole.model.eval()))
