"""FLOPs of a training step: the matrices against PyTorch's own counter, the pairs by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beacon.training.flops import ModelShape, StepFlops, peak_flops
from tests.readers import fixed, pad, wrapped
from tests.test_checkpointing import checkpoint
from tests.tiny_models import TINY, random_ids, tiny_model

MATRICES = ("aten.mm", "aten.addmm")  # the reference path's attention and the rotary tables are aten.bmm


def counted(counter: FlopCounterMode) -> int:
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    return sum(found.get(name, 0) for name in MATRICES)


def executed(model: Any, rows: list[torch.Tensor], ratios: Any) -> tuple[int, int]:
    """FLOPs of matrix products in the forward and in the backward pass."""
    ids, mask = pad(rows)
    labels = ids.masked_fill(mask == 0, -100)
    with FlopCounterMode(display=False) as forward:
        loss = model.train()(ids, mask, labels=labels, ratios=ratios).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return counted(forward), counted(backward)


CONFIGS = {
    "append": fixed(8, 2),
    "own q, k, v": fixed(8, 4, projections=("q", "k", "v")),
    "own k": fixed(8, 2, projections=("k",)),
    "short strides": fixed(8, 2, stride=4, sink=2),
    "interleave": fixed(8, 2, placement="interleave", attention="full-coverage", attend_beacons=True),
    "one window per pass": fixed(8, 2, segment=1),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_are_those_that_run(name: str, checkpointing: bool) -> None:
    config, lengths = CONFIGS[name].replace(attention_path="reference"), [45, 24, 7]
    model = wrapped(config)
    if checkpointing:
        checkpoint(model, use_reentrant=False)
    forward, backward = executed(model, [random_ids(1, n)[0] for n in lengths], config.ratios[0])
    step = StepFlops.of(ModelShape.of(model), config, lengths, config.ratios[0], checkpointing=checkpointing)
    assert forward == step.matrices + step.head
    attention = 3 * step.attention + step.attention // 2 + (step.attention if checkpointing else 0)
    assert backward == step.hardware - attention - forward
    assert step.hardware > step.model > 0


@pytest.mark.parametrize("name", ["llama2", "llama-linear", "mistral", "phi3", "qwen3", "granite", "olmo2"])
def test_every_family(name: str) -> None:
    config = fixed(8, 2, attention_path="reference")
    model = wrapped(config, name)
    checkpoint(model, use_reentrant=False)
    _, backward = executed(model, [random_ids(1, 21)[0]], 2)
    step = StepFlops.of(ModelShape.of(model), config, [21], 2)
    expected = step.model - 3 * step.attention - (step.matrices + step.head)
    assert backward == expected + step.recomputed - step.attention + step.head


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_the_modules(name: str) -> None:
    model = tiny_model(name)
    linear = [m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    shape = ModelShape.of(model)
    assert shape.layers * shape.layer == sum(linear)
    assert shape.hidden * shape.vocab == model.lm_head.weight.numel()
    assert shape.own == shape.trainable == ()


def test_frozen_projections_have_no_gradients_of_weights() -> None:
    config = fixed(8, 2, attention_path="reference")
    model = wrapped(config)
    for layer in model.model.layers:
        layer.self_attn.beacon_q_proj.requires_grad_(False)
    shape = ModelShape.of(model)
    assert shape.own == ("q", "k", "v", "o") and shape.trainable == ("k", "v", "o")
    forward, backward = executed(model, [random_ids(1, 20)[0]], 2)
    step = StepFlops.of(shape, config, [20], 2, checkpointing=False)
    assert forward + backward == step.model - 3 * step.attention + step.head


SHAPE = ModelShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocab=10, own=("k",))


def test_pairs_by_hand() -> None:
    """Windows of 4 at ratios 2 and 4, then 2 raw tokens that end the text; step-expansion."""
    step = StepFlops.of(SHAPE, fixed(4, 2), [10], [2, 4], loss_tokens=9)
    # first window: 1 + 2 + 3 + 4; second behind 2 entries; third behind 3
    assert step.raw_pairs == 10 + (4 * 2 + 10) + (2 * 3 + 3)
    # beacons see their raw tokens, themselves, and memory: 2 + 1, 4 + 1; 2 + 4 + 1
    assert step.beacon_pairs == 3 + 5 + 7
    assert (step.raw_tokens, step.beacons) == (10, 3)
    assert step.attention == 4 * 2 * 4 * (2 * step.raw_pairs + step.beacon_pairs)  # none of beacons in the last layer
    assert step.matrices == 2 * (2 * 10 * SHAPE.layer + 3 * SHAPE.layer + 3 * 2 * 8 * 4)
    assert step.head == 2 * 9 * 8 * 10
    assert step.weight_gradients == 0  # own, but not trainable
    assert step.model == 2 * (step.matrices + step.head) + 3 * step.attention
    again = step.matrices + step.attention - 2 * 8 * 16 * (2 * 10 + 3)
    assert step.hardware == step.model + step.attention // 2 + step.head + again


def test_memory_may_be_hidden_from_beacons() -> None:
    hidden = StepFlops.of(SHAPE, fixed(4, 2, attend_memory=False), [10], [2, 4])
    assert hidden.beacon_pairs == 3 + 5 + 5


def test_texts_are_counted_one_by_one() -> None:
    config = fixed(8, 2)
    together = StepFlops.of(SHAPE, config, [40, 17, 5], [[2, 4, 8, 1], [8, 2], []])
    alone = [StepFlops.of(SHAPE, config, [n], r) for n, r in ((40, [2, 4, 8, 1]), (17, [8, 2]), (5, []))]
    for part in ("raw_tokens", "beacons", "raw_pairs", "beacon_pairs", "matrices", "attention", "head", "forward"):
        assert getattr(together, part) == sum(getattr(step, part) for step in alone)


def test_a_text_that_fills_its_last_window_has_no_beacons_there() -> None:
    assert StepFlops.of(SHAPE, fixed(8, 2), [16], 2).beacons == 4
    assert StepFlops.of(SHAPE, fixed(8, 2), [17], 2).beacons == 8


def test_texts_without_beacons() -> None:
    """They read through the same pass: gradients of inputs are computed, though nothing learns from them."""
    config = fixed(64, 2, attention_path="reference")
    model = wrapped(config)
    forward, backward = executed(model, [random_ids(1, 20)[0]], 2)
    step = StepFlops.of(ModelShape.of(model), config, [20], 2, checkpointing=False)
    assert step.beacons == step.weight_gradients == 0
    assert forward == step.matrices + step.head and backward == step.matrices + 2 * step.head


def test_ratio_0_sees_like_full_attention() -> None:
    step = StepFlops.of(SHAPE, fixed(8, 0), [30], 0)
    assert step.beacons == 0 and step.raw_pairs == 30 * 31 // 2


def test_wrong_ratios_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and window 1 needs one"):
        StepFlops.of(SHAPE, fixed(8, 2), [30], [2])
    with pytest.raises(ValueError, match="one list per text, got 1 for 2"):
        StepFlops.of(SHAPE, fixed(8, 2), [30, 30], [[2, 2, 2]])
    with pytest.raises(ValueError, match="stride must divide by ratio"):
        StepFlops.of(SHAPE, fixed(8, 2), [30], 3)


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10", 125),
    ],
)
def test_peaks(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100X",
        "AMD EPYC",
        "",
    ],
)
def test_peaks_are_never_guessed(name: str) -> None:
    assert peak_flops(name) is None
