"""A wrapped model that reads through the kernels: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import beacon
from tests.readers import close, fixed, wrapped
from tests.test_checkpointing import checkpoint
from tests.tiny_models import random_ids, tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = random_ids(2, 21)
PADDED = torch.ones(2, 21, dtype=torch.long)
PADDED[1, :9] = 0


def pair(name: str = "qwen2", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """The same model, reading through the kernels and through the definition."""
    paths = ("triton", "reference")
    return tuple(wrapped(fixed(attention_path=path, **changes), name, dtype).to(DEVICE) for path in paths)  # type: ignore[return-value]


def read(model: Any, **options: Any) -> list[torch.Tensor]:
    """A ragged batch, then more tokens in several calls, one of which fills a window."""
    out = model(IDS.to(DEVICE), attention_mask=PADDED.to(DEVICE), use_cache=True, **options)
    logits, cache = [out.logits], out.past_key_values
    for count in (1, 2, 9):
        out = model(random_ids(2, count, seed=count).to(DEVICE), past_key_values=cache, **options)
        logits.append(out.logits)
    return [chunk.float().cpu() for chunk in logits]


@pytest.mark.parametrize("name, changes", [("qwen3", {"sink": 2}), ("phi3", {"stride": 4})])
def test_reads_as_the_definition(name: str, changes: dict[str, Any]) -> None:
    ours, theirs = pair(name, **changes)
    with torch.no_grad():
        for mine, exact in zip(read(ours), read(theirs), strict=True):
            close(mine, exact, 1e-4)


def gradients(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    model.train()
    loss = model(input_ids=IDS.to(DEVICE), labels=IDS.to(DEVICE), **options).loss
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().float().cpu(), **found}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains_as_the_definition(checkpointing: bool) -> None:
    found = []
    for model in pair("llama2"):
        if checkpointing:
            checkpoint(model, use_reentrant=False)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    for name, exact in found[1].items():
        close(found[0][name], exact, 1e-4, name)


def test_autocast_that_leaves_keys_and_values_in_different_dtypes() -> None:
    """Qwen-3's norms give back float32, its value projection float16."""
    ours, theirs = pair("qwen3")
    with torch.no_grad():
        expected = read(theirs)
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            found = read(ours)
    for mine, exact in zip(found, expected, strict=True):
        close(mine, exact, 3e-2)


def test_a_text_read_in_one_dtype_goes_on_in_another() -> None:
    ours, theirs = pair()
    more = random_ids(1, 3, seed=5).to(DEVICE)
    with torch.no_grad():
        caches = [model(IDS[:1].to(DEVICE), use_cache=True).past_key_values for model in (ours, theirs)]
        expected = theirs(more, past_key_values=caches[1]).logits
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            found = ours(more, past_key_values=caches[0]).logits
    close(found.float(), expected, 3e-2)


def test_a_cache_made_in_inference_mode_serves_where_gradients_are_recorded() -> None:
    ours, theirs = pair()
    more = random_ids(1, 9, seed=5).to(DEVICE)
    logits = []
    for model in (ours, theirs):
        with torch.inference_mode():
            cache = model(IDS[:1].to(DEVICE), use_cache=True).past_key_values
        logits.append(model(more, past_key_values=cache).logits)
        logits[-1].sum().backward()
    close(logits[0].detach(), logits[1].detach(), 1e-4)


def test_what_the_kernels_cannot_serve_is_refused_before_wrapping() -> None:
    config = fixed(attention_path="triton")
    for model, got in (
        (tiny_model("qwen3", dtype=torch.float64), "got float64 and head_dim=16"),
        (tiny_model("qwen3", head_dim=288), "got float32 and head_dim=288"),
    ):
        with pytest.raises(
            NotImplementedError, match=rf"even head_dim of at most 256, {got}; use attention_path='auto'"
        ):
            beacon.wrap(model, config)
        assert not hasattr(model, "beacon_config")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama2", "phi3", "qwen3"])
def test_bfloat16_on_a_gpu(name: str) -> None:
    ours, _ = pair(name, torch.bfloat16)
    _, theirs = pair(name)
    with torch.no_grad():
        for mine, exact in zip(read(ours), read(theirs), strict=True):
            close(mine, exact, 5e-2)
    ours_found, exact_found = gradients(ours), gradients(theirs)
    for key, exact in exact_found.items():
        assert (ours_found[key] - exact).norm() <= 0.1 * exact.norm(), key


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which is another one where layers are spread over GPUs."""
    guarded: list[torch.Tensor] = []
    guard = torch.cuda.device_of

    def spy(tensor: torch.Tensor) -> Any:
        guarded.append(tensor)
        return guard(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", spy)
    model, _ = pair()
    with torch.no_grad():
        cache = model(IDS[:1].to(DEVICE), use_cache=True).past_key_values
        before = len(guarded)
        model(IDS[:1, :1].to(DEVICE), past_key_values=cache)
    layers = model.config.num_hidden_layers
    assert (
        before >= 4 * layers - 2
    )  # queries of both lists and keys rotated, both lists attended; less in the last layer
    assert len(guarded) - before == 3 * layers  # queries, keys, decoding


@pytest.mark.parametrize(
    "changes", [{"sink": 1}, {"placement": "interleave", "attend_beacons": True, "attention": "full-coverage"}]
)
def test_decodes_in_slots_as_the_definition(changes: dict[str, Any]) -> None:
    """The decode kernel over buffers of fixed size: rows that fill their windows at different tokens."""
    ours, theirs = pair("qwen3", **changes)
    caches = [ours.static_cache(50), None]
    with torch.no_grad():
        for number, ids in enumerate([IDS, *(random_ids(2, 1, seed=n) for n in range(9))]):
            found = []
            for at, model in enumerate((ours, theirs)):
                mask = {} if number else {"attention_mask": PADDED.to(DEVICE)}
                out = model(ids.to(DEVICE), past_key_values=caches[at], use_cache=True, **mask)
                caches[at] = out.past_key_values
                found.append(out.logits[:, -1].float().cpu())
            close(*found, 1e-4, f"token {number}")
    assert caches[0].stats()[0]["attention_path"] == "triton (static)"
