"""Floating-point operations of one training step, counted from shapes and from the library's own plan.

A product ``[m, k] x [k, n]`` counts 2 m k n. Only useful work counts: pairs of query and key that the plan makes
visible. Norms, rotations, softmax and the optimiser are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beacon.config import BeaconConfig, check_ratio
from beacon.plan import RowState, Span, build_plan, schedule

LAST = ("k", "v")  # projections that beacons still pass in the last layer
TFLOPS = 1e12


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a causal LM with a gated MLP (all supported families), from which its matrices follow.

    Args:
        layers: Decoder layers.
        hidden: Channels of the residual stream.
        intermediate: Channels inside the MLP.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_dim: Channels per head.
        vocab: Rows of the head.
        own: Projections (of q, k, v, o) of which beacons have their own copy.
        trainable: Those of them that get gradients.
        norm_last: Whether a norm follows the MLP's last matrix (olmo2).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    own: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    norm_last: bool = False

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a wrapped model, or of a stock one (``own`` is empty then).

        The base counts as frozen: LoRA layers are ignored. Which projections train is read off the first layer.
        """
        config, first = model.config, model.model.layers[0]
        beacon_config = getattr(model, "beacon_config", None)
        own = () if beacon_config is None else tuple(beacon_config.projections)
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            own=own,
            trainable=tuple(n for n in own if getattr(first.self_attn, f"beacon_{n}_proj").weight.requires_grad),
            norm_last=hasattr(first, "post_feedforward_layernorm"),
        )

    @property
    def projections(self) -> dict[str, int]:
        """Parameters of a layer's q, k, v and o matrices."""
        inner, outer = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {name: self.hidden * width for name, width in zip("qkvo", (inner, outer, outer, inner), strict=True)}

    @property
    def mlp(self) -> int:
        """Parameters of a layer's MLP."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Parameters of all matrices of a layer, which is what a token passes in it."""
        return sum(self.projections.values()) + self.mlp

    @property
    def tail(self) -> int:
        """Parameters of a layer's last matrix, where no gradient needs its output: a recomputation stops before it."""
        return 0 if self.norm_last else self.hidden * self.intermediate


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one training step (forward and backward over one batch), by part.

    With P visible pairs, ``attention = 4 P heads head_dim`` forward (two products). Of its backward pass four products
    are the model's and a fifth (the scores) is recomputation, together 2.5 times the forward pass. Frozen matrices are
    passed backward for gradients of their inputs only, as expensive as forward; gradients of weights exist for the
    trainable beacon projections alone. Hence

        model    = 2 (matrices + head) + weight_gradients + 3 attention
        hardware = model + attention / 2 + head + recomputed

    where the head's logits are always computed twice (``beacon.loss``), and ``recomputed`` is what per-layer
    checkpointing computes again: the layers' forward pass but for their last matrix, before which non-reentrant
    checkpointing stops (reentrant checkpointing computes ``skipped`` more).

    Args:
        raw_tokens: Raw tokens of the batch.
        beacons: Beacons of the batch.
        raw_pairs: Keys seen by raw tokens, summed.
        beacon_pairs: Keys seen by beacons, summed.
        matrices: The layers' matrices forward.
        attention: Attention forward, all layers.
        head: The head forward.
        weight_gradients: Gradients of weights.
        skipped: Last matrix of every layer, forward.
        checkpointing: Whether layers are checkpointed.

    Source: MFU (``model`` over the peak): Chowdhery et al. 2022 (PaLM), appendix B, which leaves out recomputation;
        HFU (``hardware`` over the peak): Korthikanti et al. 2022 (arXiv 2205.05198), section 6. Unlike both, masked
        pairs are not counted, nor gradients of weights that are frozen.
    """

    raw_tokens: int
    beacons: int
    raw_pairs: int
    beacon_pairs: int
    matrices: int
    attention: int
    head: int
    weight_gradients: int
    skipped: int
    checkpointing: bool

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        config: BeaconConfig,
        lengths: Sequence[int],
        ratios: int | Sequence[int] | Sequence[Sequence[int]],
        *,
        loss_tokens: int | None = None,
        checkpointing: bool = True,
    ) -> StepFlops:
        """Count a step with labels, so the window that ends a text has no beacons.

        Args:
            shape: The model's sizes.
            config: How texts are cut and read.
            lengths: Tokens of every text of the batch, padding left out.
            ratios: Of every window (an int), one per window, or such a list for every text.
            loss_tokens: Tokens whose logits are computed; None: all raw ones, which is what the loss does unless no
                token of a chunk of 1024 has a label.
            checkpointing: Whether layers are checkpointed.

        Raises:
            ValueError: A ratio does not divide the stride, or ``ratios`` names fewer windows or texts than there are.
        """
        each = _ratios_of_texts(ratios, len(lengths))
        states = [RowState(row) for row in range(len(lengths))]
        steps = []
        for row, (length, own) in enumerate(zip(lengths, each, strict=True)):

            def choose(at: RowState, own: int | Sequence[int] = own) -> int:
                return check_ratio(_ratio(own, len(at.ratios)), config.step)

            steps.append(schedule(config, states[row], length, choose, row=row, span=Span(), text_ends=True))
        ends = [row[-1][1] if row else state for row, state in zip(steps, states, strict=True)]
        plan = build_plan(config, states, [[step for step, _ in row] for row in steps], ends)
        raw_pairs, beacon_pairs = (
            int((q.memory + q.raw_hi - q.raw_lo + q.beacon_hi - q.beacon_lo).sum()) for q in (plan.raw, plan.beacon)
        )
        raw, beacons, inner = len(plan.raw), len(plan.beacon), shape.layers - 1
        sizes = shape.projections
        trained = sum(sizes[n] * (shape.layers if n in LAST else inner) for n in shape.trainable)
        passed = shape.layers * raw * shape.layer + beacons * (inner * shape.layer + sum(sizes[n] for n in LAST))
        pairs = shape.layers * raw_pairs + inner * beacon_pairs
        return cls(
            raw_tokens=raw,
            beacons=beacons,
            raw_pairs=raw_pairs,
            beacon_pairs=beacon_pairs,
            matrices=2 * passed,
            attention=4 * pairs * shape.heads * shape.head_dim,
            head=2 * shape.hidden * shape.vocab * (raw if loss_tokens is None else loss_tokens),
            weight_gradients=2 * beacons * trained,
            skipped=2 * shape.tail * (shape.layers * raw + inner * beacons),
            checkpointing=checkpointing,
        )

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.matrices + self.attention + self.head

    @property
    def recomputed(self) -> int:
        """What checkpointed layers compute once more."""
        return self.matrices + self.attention - self.skipped if self.checkpointing else 0

    @property
    def model(self) -> int:
        """Without any recomputation: for MFU."""
        return 2 * (self.matrices + self.head) + self.weight_gradients + 3 * self.attention

    @property
    def hardware(self) -> int:
        """With all recomputation: for HFU."""
        return self.model + self.attention // 2 + self.head + self.recomputed


# Words of the device's name that must be there, words that must not, and the peak (dense bfloat16, vendor's data).
PEAKS: tuple[tuple[set[str], set[str], float], ...] = (
    ({"a100"}, set(), 312 * TFLOPS),
    ({"a800"}, set(), 312 * TFLOPS),
    ({"h100", "pcie"}, set(), 756 * TFLOPS),
    ({"h100", "hbm3"}, {"pcie", "nvl"}, 989 * TFLOPS),
    ({"h100", "sxm"}, {"pcie", "nvl"}, 989 * TFLOPS),
    ({"h100", "sxm5"}, {"pcie", "nvl"}, 989 * TFLOPS),
    ({"h200"}, {"nvl"}, 989 * TFLOPS),
    ({"l40s"}, set(), 362 * TFLOPS),
    ({"rtx", "4090"}, {"d", "laptop"}, 165 * TFLOPS),
    ({"a10"}, set(), 125 * TFLOPS),
)


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU in dense bfloat16, FLOP/s; None where it is not known for certain.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it. A slice of a GPU (MIG) has no entry.
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if "mig" in words:
        return None
    return next((peak for need, never, peak in PEAKS if need <= words and not never & words), None)


def _ratios_of_texts(ratios: Any, rows: int) -> Sequence[int | Sequence[int]]:
    if isinstance(ratios, int) or not ratios or isinstance(ratios[0], int):
        return [ratios] * rows
    if len(ratios) != rows:
        raise ValueError(
            f"ratios must be one list per text, got {len(ratios)} for {rows} texts; pass one list for all, or an int."
        )
    found: Sequence[Sequence[int]] = ratios
    return found


def _ratio(ratios: int | Sequence[int], window: int) -> int:
    if isinstance(ratios, int):
        return ratios
    if window >= len(ratios):
        raise ValueError(
            f"ratios must name every window with beacons, got {len(ratios)} and window {window} needs one; pass a "
            "longer list or an int."
        )
    return ratios[window]
