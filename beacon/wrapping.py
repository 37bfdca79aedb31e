"""Turn a stock model into a long-context one in place, and back."""

from __future__ import annotations

import functools
import logging
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from beacon.attention import check_path, check_triton
from beacon.config import BeaconConfig
from beacon.families import Family, family_of, is_longrope, trained_context, uniform_sliding_window
from beacon.identity import Wrapping
from beacon.model import BeaconModel
from beacon.modules import BeaconAttention, LastLayer, split_qkv
from beacon.weights import is_sharded, is_tensor_parallel

logger = logging.getLogger(__name__)

EMBEDDING = "beacon_embed_tokens"
GATHERED = ("colwise_gather_output", "colwise_rep")  # styles of tensor parallelism whose outputs are whole


def wrap(hf_model: Any, config: BeaconConfig | None = None) -> Any:
    """Give a stock causal LM beacons, in place.

    The base is frozen; beacon projections start as copies of the base's (dequantised if need be), the beacon
    embedding as the eos token's (first of a list; else bos; else the mean of all).

    Args:
        hf_model: A causal LM of a supported family.
        config: How it reads; None for the defaults.

    Returns:
        The same object, still an instance of its Hugging Face class.

    Raises:
        ImportError: ``attention_path`` needs a package that is not installed.
        NotImplementedError: Unsupported model type, rotary flavour or layer mix; a PEFT model; a sharded model, or one
            whose ``forward`` has been replaced; an ``attention_path`` that does not serve its dtype or head_dim.
        TypeError: Not a causal LM, or config of another type.
        ValueError: Wrapped already, a window beyond the native context, a ``native_context`` beyond a sliding
            window or what longrope's short factors serve, NaN or inf in the weights.
    """
    config = BeaconConfig() if config is None else config
    if not isinstance(config, BeaconConfig):
        raise TypeError(
            f"config must be a BeaconConfig, got {type(config).__name__}; build one with BeaconConfig(...)."
        )
    check_path(config.attention_path)
    family = _check_model(hf_model)
    trained = trained_context(hf_model.config)
    native = config.native_context or trained
    sliding = uniform_sliding_window(hf_model.config)
    if native > trained and (is_longrope(hf_model.config) or (sliding is not None and native > sliding)):
        why = (
            "with a sliding window"
            if sliding is not None
            else "with longrope, whose factors are fixed to the short ones"
        )
        raise ValueError(f"native_context must not exceed {trained} {why}, got {native}; lower it or leave it out.")
    if config.window > native:
        raise ValueError(
            f"window must fit the native context, got window={config.window} and native context {native} of "
            f"{type(hf_model).__name__}; lower window."
        )
    attentions = [layer.self_attn for layer in hf_model.model.layers]
    if config.attention_path == "triton":
        check_triton(hf_model.model.embed_tokens.weight.dtype, attentions[0].head_dim)
    with torch.no_grad():
        _check_finite(hf_model)
        # Everything that can fail comes before the first change.
        plan = getattr(hf_model, "_tp_plan", None) or {}
        projections = [_new_projections(attention, family, config, n, plan) for n, attention in enumerate(attentions)]
        embedding = _new_embedding(hf_model)
    if getattr(hf_model.config, "attention_dropout", 0.0):
        logger.warning(
            "attention_dropout=%s applies to texts below one window only: condensed attention has none",
            hf_model.config.attention_dropout,
        )
    flags = {name: parameter.requires_grad for name, parameter in hf_model.named_parameters()}

    hf_model.requires_grad_(False)
    for attention, own in zip(attentions, projections, strict=True):
        for name, projection in own.items():
            attention.add_module(f"beacon_{name}_proj", projection.train(attention.training))
        _adopt(attention, BeaconAttention, family)
    _adopt(hf_model.model.layers[-1], LastLayer, family)
    hf_model.model.add_module(EMBEDDING, embedding.train(hf_model.model.training))
    _adopt(hf_model, BeaconModel, family)
    hf_model.beacon_wrapping = Wrapping(config, family, native, flags=flags)
    return hf_model


def unwrap(model: Any) -> Any:
    """Take the beacons away again: bit for bit the stock model.

    Args:
        model: A wrapped model.

    Returns:
        The same object with its stock class, state dict and ``requires_grad`` flags; it stays in train or eval mode,
        and LoRA layers added since keep their flags.

    Raises:
        NotImplementedError: Its ``forward`` has been replaced since, or it has been sharded.
        TypeError: ``model`` is not wrapped.
    """
    if not isinstance(model, BeaconModel):
        raise TypeError(f"unwrap() takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")
    for module in _adopted(model):
        if "beacon_stock" not in type(module).__dict__:
            raise NotImplementedError(
                f"{type(module).__name__} has changed its class since beacon.wrap (fully_shard does that), so it "
                "cannot be unwrapped; use beacon.disabled(model) for the stock model."
            )
        _check_forward(module)
    flags = model.beacon_wrapping.flags
    for layer in model.model.layers:
        for name in ("q", "k", "v", "o"):
            if hasattr(layer.self_attn, f"beacon_{name}_proj"):
                delattr(layer.self_attn, f"beacon_{name}_proj")
        _release(layer.self_attn)
    _release(model.model.layers[-1])
    delattr(model.model, EMBEDDING)
    del model.__dict__["beacon_wrapping"]
    _release(model)
    for name, parameter in model.named_parameters():
        stock_name = name.replace(".base_layer.", ".")  # where PEFT has put it
        parameter.requires_grad_(flags.get(stock_name, parameter.requires_grad))
    return model


def new_parameter_shapes(hf_model: Any, config: BeaconConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that :func:`wrap` would add."""
    _check_model(hf_model)
    own = hf_model.config
    width = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    inner, outer = own.num_attention_heads * width, (own.num_key_value_heads or own.num_attention_heads) * width
    sizes = {"q": (inner, own.hidden_size), "k": (outer, own.hidden_size), "v": (outer, own.hidden_size)}
    sizes["o"] = (own.hidden_size, inner)
    shapes: dict[str, tuple[int, ...]] = {f"model.{EMBEDDING}.weight": (1, own.hidden_size)}
    for number, layer in enumerate(hf_model.model.layers):
        for name in config.projections:
            prefix = f"model.layers.{number}.self_attn.beacon_{name}_proj"
            shapes[f"{prefix}.weight"] = sizes[name]
            source = getattr(layer.self_attn, f"{name}_proj", None)
            if source is not None and getattr(source, "bias", None) is not None:
                shapes[f"{prefix}.bias"] = sizes[name][:1]
    return shapes


# -- checks --------------------------------------------------------------------------------------------------------


def _check_model(hf_model: Any) -> Family:
    if isinstance(hf_model, BeaconModel):
        raise ValueError("the model is wrapped already; call beacon.unwrap(model) first to wrap it anew.")
    kind = type(hf_model).__name__
    if not isinstance(hf_model, PreTrainedModel) and ("Peft" in kind or hasattr(hf_model, "peft_config")):
        raise NotImplementedError(
            f"a PEFT model ({kind}) cannot be wrapped; merge its adapter first with model.merge_and_unload()."
        )
    if not isinstance(hf_model, PreTrainedModel):
        raise TypeError(
            f"wrap() takes a Hugging Face causal LM itself, got {kind}; load one with AutoModelForCausalLM, and wrap "
            "before compiling or parallelising it."
        )
    family = family_of(hf_model.config)
    body = getattr(hf_model, "model", None)
    if body is None or not hasattr(hf_model, "lm_head") or not hasattr(body, "layers"):
        raise TypeError(
            f"wrap() takes a causal LM with its head, got {kind}; load it with AutoModelForCausalLM.from_pretrained."
        )
    if any(is_sharded(parameter) and not is_tensor_parallel(parameter) for parameter in hf_model.parameters()):
        raise NotImplementedError(
            f"the parameters of {kind} are sharded over processes (DTensor); call beacon.wrap before fully_shard."
        )
    for module in _adopted(hf_model):
        _check_forward(module)
    return family


def _adopted(model: Any) -> list[nn.Module]:
    """The modules that get a class of our own."""
    layers = list(model.model.layers)
    return [model, layers[-1], *(layer.self_attn for layer in layers)]


def _check_forward(module: nn.Module) -> None:
    """Refuse a ``forward`` stored on the module that is not its class's, for ours would never be called."""
    stored = module.__dict__.get("forward")
    if isinstance(stored, functools.partial):  # accelerate's hooks
        stored = module.__dict__.get("_old_forward")
    if stored is not None and not _is_bound(stored, module, type(module)):
        raise NotImplementedError(
            f"the forward of this {type(module).__name__} has been replaced (accelerator.prepare does that for mixed "
            "precision); undo it with accelerator.unwrap_model(model, keep_fp32_wrapper=False), and prepare the model "
            "after beacon.wrap."
        )


def _check_finite(hf_model: Any) -> None:
    """Refuse NaN and inf in any plain floating-point parameter that is here, before beacons inherit them."""
    bad = []
    for name, whole in hf_model.named_parameters():
        parameter: Any = whole.to_local() if is_tensor_parallel(whole) else whole
        plain = parameter.is_floating_point() and parameter.dtype.itemsize > 1 and type(parameter.data) is torch.Tensor
        if plain and not parameter.is_meta and parameter.numel():
            low, high = parameter.aminmax()  # both are NaN where any is; no mask as large as the weight
            if not bool(low.isfinite() & high.isfinite()):
                bad.append(name)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(f"weights must be finite, got NaN or inf in {', '.join(bad[:3])}{more}; check the checkpoint.")


# -- new parameters ------------------------------------------------------------------------------------------------


def _new_projections(
    attention: Any, family: Family, config: BeaconConfig, layer: int, plan: dict[str, str]
) -> dict[str, nn.Linear]:
    own = {}
    for name in config.projections:
        fused = family.fused_qkv if name != "o" else None
        leaf = fused or f"{name}_proj"
        source = f"model.layers.{layer}.self_attn.{leaf}"
        projection = getattr(attention, leaf)
        if is_tensor_parallel(getattr(projection, "weight", None)):
            style = plan.get(f"model.layers.*.self_attn.{leaf}")
            if style is None or (fused is not None and style not in GATHERED):
                raise NotImplementedError(
                    f"{source} is spread over processes as {style!r}, which beacons cannot follow; load the model "
                    f"without tensor parallelism, or with {GATHERED[0]!r} for this module."
                )
            if fused is None:
                own[name] = _parallel_copy(projection, style)
                continue
        weight, bias = _dense(projection, source)
        if fused is not None:
            place = "qkv".index(name)
            weight = split_qkv(attention, weight.T)[place].T.contiguous()
            bias = None if bias is None else split_qkv(attention, bias)[place].clone()
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"weights must be finite, got NaN or inf in {source}.{kind}; check the checkpoint.")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        own[name] = linear
    return own


def _parallel_copy(projection: nn.Linear, style: str) -> nn.Linear:
    """A copy of a projection that tensor parallelism has spread over processes, spread in the same way."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    weight: Any = projection.weight
    bias = projection.bias
    linear = nn.Linear(projection.in_features, projection.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    ALL_PARALLEL_STYLES[style].install_forward(linear, weight.device_mesh)
    return linear


def _dense(projection: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear module in floating point, copied, where it computes.

    A quantised, offloaded or otherwise special module is asked: its output for unit vectors is its weight.
    """
    bias = getattr(projection, "bias", None)
    weight: Any = getattr(projection, "weight", None)
    if is_sharded(weight):
        parts: list[Any] = [weight, bias]
        weight, bias = (part.full_tensor() if is_sharded(part) else part for part in parts)
        return weight.detach().clone(), None if bias is None else bias.detach().clone()
    if type(projection) is nn.Linear and type(weight.data) is torch.Tensor and not weight.is_meta:
        return weight.detach().clone(), None if bias is None else bias.detach().clone()
    try:
        zero, rows = _ask(projection)
    except Exception as err:
        raise NotImplementedError(
            f"the weights of {name} ({type(projection).__name__}) cannot be read: {type(err).__name__}: {err}; "
            "load the model on a device where its kernels run, or dequantise it first."
        ) from err
    return (rows - zero).T.detach().clone(), None if bias is None else zero.detach().clone()


def _ask(projection: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a linear module for zero ``[out]`` and for the unit vectors ``[in, out]``."""
    device = getattr(getattr(projection, "_hf_hook", None), "execution_device", None)
    if device is None:
        device = next(iter(projection.state_dict().values())).device
    if torch.device(device).type == "meta":
        raise RuntimeError("it has no weights (meta device)")
    floats = [p.dtype for p in projection.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    dtype = getattr(projection, "compute_dtype", None) or (floats[0] if floats else torch.get_default_dtype())
    unit = torch.eye(projection.in_features, device=device, dtype=dtype)
    # Of LoRA layers. The mode of nothing else is touched: bitsandbytes packs weights anew at a first call in eval mode.
    training = {module: module.training for module in projection.modules() if isinstance(module, nn.Dropout)}
    try:
        for module in training:
            module.eval()
        return projection(torch.zeros_like(unit[:1]))[0], projection(unit)
    finally:
        for module, mode in training.items():
            module.training = mode


def _new_embedding(hf_model: Any) -> nn.Embedding:
    table = hf_model.model.embed_tokens
    token = _first_token(hf_model.config, table.num_embeddings)
    if table.weight.is_meta or is_sharded(table.weight):
        device = table._hf_hook.execution_device if table.weight.is_meta else table.weight.device
        every = torch.arange(table.num_embeddings) if token is None else torch.tensor([token])
        row = table(every.to(device)).mean(dim=0, keepdim=True)
    else:
        weight = table.weight.detach()
        row = weight.mean(dim=0, keepdim=True) if token is None else weight[token : token + 1]
    if not bool(torch.isfinite(row).all()):
        raise ValueError("weights must be finite, got NaN or inf in model.embed_tokens.weight; check the checkpoint.")
    embedding = nn.Embedding(1, row.shape[1], device="meta")
    embedding.weight = nn.Parameter(row.clone())
    return embedding


def _first_token(config: Any, count: int) -> int | None:
    """The eos token (the first of a list), else bos, whichever the embedding has a row for; None: neither."""
    for token in (config.eos_token_id, config.bos_token_id):
        first = token[0] if isinstance(token, (list, tuple)) and token else token
        if isinstance(first, int) and 0 <= first < count:
            return first
    return None


# -- classes -------------------------------------------------------------------------------------------------------


@functools.cache
def _mixed(mixin: type, stock: type, family: Family) -> type:
    """A subclass of both under the stock class's name (FSDP, save_pretrained and reports go by names).

    Only :func:`wrap` makes instances: calling it, or its ``from_pretrained``, gives a stock module. Pickles name the
    parts it is made of, for no module holds it under its name.
    """

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:  # nn.DataParallel makes its replicas so
            return object.__new__(cls)
        return stock(*args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _empty, (mixin, stock, family), self.__getstate__()

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    own = {"beacon_family": family, "beacon_stock": stock, "__new__": new, "__reduce_ex__": reduce}
    return type(stock.__name__, (mixin, stock), {**names, **own})


def _empty(mixin: type, stock: type, family: Family) -> Any:
    """An instance of a mixed class without its state."""
    return object.__new__(_mixed(mixin, stock, family))


def _adopt(module: nn.Module, mixin: type, family: Family) -> None:
    stock: type = type(module)
    _change_class(module, _mixed(mixin, stock, family))


def _release(module: nn.Module) -> None:
    _change_class(module, type(module).beacon_stock)  # type: ignore[attr-defined]


def _change_class(module: nn.Module, new: type) -> None:
    """Change the class, and with it the bound ``forward`` methods that accelerate's hooks have stored."""
    old = type(module)
    module.__class__ = new
    for name in ("forward", "_old_forward"):
        if _is_bound(module.__dict__.get(name), module, old):
            module.__dict__[name] = MethodType(type(module).forward, module)
    hooked = module.__dict__.get("forward")
    if isinstance(hooked, functools.partial):
        hooked.__wrapped__ = module.__dict__["_old_forward"]  # type: ignore[attr-defined]  # for the signature


def _is_bound(method: Any, module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``method`` is the forward of the module's class, maybe without decorators (accelerate strips them)."""
    if not isinstance(method, MethodType) or method.__self__ is not module:
        return False
    forward: Any = kind.forward
    while forward is not method.__func__ and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward is method.__func__
