"""Parity with the reference implementation's recorded numbers, through the public API."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beacon.modules import unrotate
from tests.golden_cases import Case, case_folders

LOGITS = 1e-4
GRADIENTS = 2e-5

FOLDERS = case_folders()
EVAL = [folder for folder in FOLDERS if not (folder / "grads.safetensors").exists()]
TRAIN = [folder for folder in FOLDERS if (folder / "grads.safetensors").exists()]

INTERPRETED = {"v1-stride-half", "v1-train"}  # kernels are slow in the interpreter
INTERPRETED_STEPS = 3


def _cases(folders: list[Path], segments: tuple[int | None, ...] = ()) -> list[object]:
    """Every case through every path; most of those in Triton's interpreter only where slow tests run."""
    params = []
    for path in ("auto", "reference", "triton"):
        for folder in folders:
            for segment in segments or ("",):
                slow = path == "triton" and (folder.name not in INTERPRETED or segment in (1, 2))
                own = (segment,) if segments else ()
                name = "-".join([path, *map(str, own), folder.name])
                params.append(pytest.param(folder, path, *own, id=name, marks=pytest.mark.slow if slow else []))
    return params


def _device(path: str) -> str:
    return "cuda" if path == "triton" and torch.cuda.is_available() else "cpu"


def _close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    error = (ours - theirs).abs().max().item()
    assert error < LOGITS, f"{what}: largest difference {error:.2e}"


@pytest.mark.parametrize("folder, path", _cases(EVAL))
def test_reads_as_the_reference(folder: Path, path: str) -> None:
    device = _device(path)
    case = Case.load(folder)
    model = case.model(attention_path=path).to(device)
    for run in case.spec["runs"]:
        io = {name.removeprefix(run["prefix"]): t for name, t in case.io.items() if name.startswith(run["prefix"])}
        ratios = [*run["ratios_prefill"], *run["ratios_decode"]]
        call = {**case.call, "ratios": ratios} if ratios else case.call
        with torch.no_grad():
            cache, logits = None, []
            for chunk in io["input_ids"].split(run["chunks"] or io["input_ids"].shape[1], dim=1):
                out = model(chunk.to(device), past_key_values=cache, use_cache=True, **call)
                cache = out.past_key_values
                logits.append(out.logits.cpu())
            _close(torch.cat(logits, dim=1), io["logits"], "logits")
            _check_memory(model, cache.to("cpu"), io)
            steps = io.get("gen_ids", torch.zeros(1, 0)).unbind(dim=1)
            for step, token in enumerate(steps[:INTERPRETED_STEPS] if path == "triton" else steps):
                out = model(token[:, None].to(device), past_key_values=cache, **call)
                _close(out.logits[:, -1].cpu(), io["gen_logits"][:, step], f"logits of decoded token {step}")


def _check_memory(model, cache, io) -> None:
    """Memory and open window after the prefill: sinks, beacons, then what is still raw."""
    rotary = model.beacon_rotary()
    state, stores = cache.states[0], cache.condensed_stores(rotary)
    recorded = [
        layer for layer in range(len(stores)) if any(f"mem.{name}_k.{layer}" in io for name in ("beacon", "raw"))
    ]
    assert recorded, "no memory was recorded"
    for layer in recorded:  # some cases have the last layer only
        store = stores[layer]
        names = [name for name in ("sink", "beacon", "raw") if f"mem.{name}_k.{layer}" in io]
        k = unrotate(store.memory_k[0], rotary.table(torch.arange(state.memory), torch.float32))
        order = _reading_order(state)
        k, v = torch.cat([k, store.open_k[0][order]]), torch.cat([store.memory_v[0], store.open_v[0][order]])
        theirs_k = torch.cat([io[f"mem.{name}_k.{layer}"][0] for name in names], dim=1).transpose(0, 1)
        theirs_v = torch.cat([io[f"mem.{name}_v.{layer}"][0] for name in names], dim=1).transpose(0, 1)
        assert len(k) == len(theirs_k), f"{len(k)} entries instead of {len(theirs_k)} ({names})"
        _close(v, theirs_v, f"memory values of layer {layer}")
        _close(k, theirs_k, f"memory keys of layer {layer}")


def _reading_order(state) -> list[int]:
    """Our open entries are raws, then beacons; the reference keeps interleaved ones in the order of reading."""
    order: list[int] = []
    for a in range(state.open_raw):
        order.append(a)
        if state.open_beacons and (a + 1) % state.open_ratio == 0:
            order.append(state.open_raw + (a + 1) // state.open_ratio - 1)
    return order


@pytest.mark.parametrize("folder, path, segment", _cases(TRAIN, (None, 1, 2)))
def test_trains_as_the_reference(folder: Path, path: str, segment: int | None) -> None:
    device = _device(path)
    case = Case.load(folder)
    model = case.model(segment=segment, attention_path=path).to(device).train()
    run = case.spec["runs"][0]
    prefix = run["prefix"]
    labels = case.io[prefix + "labels"].clone()
    config = model.beacon_config
    everything = config.placement == "interleave" and config.attention == "full-coverage"
    if case.version == "v2" and not everything:
        labels[:, : config.window] = -100
    out = model(case.io[prefix + "input_ids"].to(device), labels=labels.to(device), ratios=run["ratios"])
    assert out.past_key_values is None and out.logits is None
    assert abs(out.loss.item() - case.io[prefix + "loss"].item()) < 1e-5
    out.loss.backward()
    gradients = load_file(folder / "grads.safetensors")
    parameters = dict(model.named_parameters())
    last = f"layers.{model.config.num_hidden_layers - 1}.self_attn.beacon_"
    for name, theirs in gradients.items():
        ours = parameters[name.removeprefix(prefix)].grad
        if f"{last}q" in name or f"{last}o" in name:
            assert not ours.any() and theirs.abs().max() == 0, name
            continue
        assert ours is not None, name
        ours = ours.cpu()
        assert (ours - theirs).norm() <= GRADIENTS * theirs.norm(), name
