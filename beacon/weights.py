"""Beacon weights of a wrapped model: which they are, brought together, and written whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

CONFIG_FILE = "beacon_config.json"
WEIGHTS_FILE = "beacon_model.safetensors"
SAMPLES = 64  # numbers of each weight in `sample_weights`


def is_beacon_weight(name: str) -> bool:
    """Whether a parameter of this full name is one that :func:`beacon.wrap` adds."""
    return ".beacon_" in f".{name}"


def beacon_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that :func:`beacon.wrap` added, by their full names (without what engines put into them)."""
    named = ((name, p) for name, p in model.named_parameters() if is_beacon_weight(name))
    return {name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): p for name, p in named}


def write_adapter(folder: Path, manifest: str, weights: dict[str, torch.Tensor]) -> None:
    """Write configuration and weights, both or none (each written whole, then renamed).

    Args:
        folder: Where to; made if missing.
        manifest: What ``beacon_config.json`` holds.
        weights: Beacon weights by their full names, on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / CONFIG_FILE) as settings_file, whole(folder / WEIGHTS_FILE) as weights_file:
        save_file(weights, weights_file, metadata={"format": "pt"})
        settings_file.write_text(manifest)


def collect_weights(model: Any) -> dict[str, torch.Tensor]:
    """The beacon weights, whole, on the CPU; those that accelerate has offloaded are brought in one by one."""
    weights = {}
    for name, tensor in _brought_in(model):
        weights[name] = (tensor.full_tensor() if is_sharded(tensor) else tensor).to("cpu").contiguous()
    return weights


def sample_weights(model: Any) -> torch.Tensor:
    """Some numbers of every beacon weight, by which to know them again: float32 on the CPU."""
    samples = []
    for _, tensor in _brought_in(model):
        flat = tensor.flatten()
        places = torch.arange(SAMPLES, device=flat.device) * (len(flat) - 1) // (SAMPLES - 1)
        samples.append(flat[places].to("cpu", torch.float32))
    return torch.cat(samples)


def _brought_in(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and beacon weights, each here for as long as it is looked at."""
    for name, parameter in beacon_parameters(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with _whole(module, parameter):
            yield name, getattr(module, leaf).detach()


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over processes (DTensor)."""
    return hasattr(tensor, "full_tensor")


def is_tensor_parallel(tensor: Any) -> bool:
    """Whether Hugging Face's tensor parallelism has spread a tensor over processes."""
    return is_sharded(tensor) and tuple(tensor.device_mesh.mesh_dim_names or ()) == ("tp",)


def spread_like(tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A whole tensor, which every process has, spread as a parameter is under tensor parallelism; else as it is."""
    if not is_tensor_parallel(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    here = tensor.to(parameter.device)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 has spread a parameter over processes."""
    return hasattr(parameter, "ds_id")


def is_spread(parameter: Any) -> bool:
    """Whether all processes together hold a parameter, so that gathering it takes all of them."""
    return is_sharded(parameter) or is_partitioned(parameter)


def _whole(module: Any, parameter: nn.Parameter) -> AbstractContextManager[None]:
    """Where the parameter is here, brought in from where accelerate has offloaded it or gathered under ZeRO-3."""
    here: AbstractContextManager[None] = nullcontext()
    if is_partitioned(parameter):
        import deepspeed

        here = deepspeed.zero.GatheredParameters([parameter])
    elif parameter.is_meta:
        from accelerate.utils import align_module_device

        here = align_module_device(module)
    return here


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    """Refuse NaN and inf.

    Raises:
        ValueError: Names the weights.
    """
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"weights must be finite, got NaN or inf in {some(bad)}; train or download again.")


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
