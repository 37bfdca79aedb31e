"""What is added to the next-token loss so that instruction data does not cost knowledge; all of it off by default."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from beacon.config import BeaconConfig
from beacon.identity import disabled
from beacon.loss import IGNORED
from beacon.training.lora import without_lora

CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the additional losses; 0 leaves one out.

    Args:
        distillation: Weight of the divergence of the stock model's predictions from ours, KL(stock || ours), at every
            counted token that the stock model foresees from its native context.
        temperature: Divides both logits; the divergence is multiplied by its square.
        reconstruction: Weight of the auto-encoding loss: a window of every document is repeated after an eos token, and
            its beacons have to say it.
        seed: Draws the repeated windows.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value is not allowed.

    Source: distillation: Hinton et al., arXiv 1503.02531 (the stock model as its own teacher: Askell et al., arXiv
    2112.00861, section 2.2.3). Reconstruction: Ge et al., arXiv 2307.06945, section 2.2.
    """

    distillation: float = 0.0
    temperature: float = 1.0
    reconstruction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("distillation", "temperature", "reconstruction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"objective: {name} must be a number, got {value!r}.")
            if value < 0:
                raise ValueError(f"objective: {name} must not be negative, got {value}.")
        if self.temperature == 0:
            raise ValueError("objective: temperature must be above 0, got 0; 1 leaves the logits as they are.")


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Sum of KL(teacher || student) over tokens, in chunks whose softmax is recomputed for gradients.

    Args:
        student: Logits ``[n, vocab]``.
        teacher: Logits ``[n, vocab]``, without gradient.
        counted: Which of them count, ``[n]``.
        temperature: Divides the logits; the result is multiplied by its square.

    Returns:
        The sum in nats, a float32 scalar.
    """

    def part(ours: torch.Tensor, theirs: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ours, theirs = ours.float() / temperature, theirs.float() / temperature
        each = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return each @ factor

    factors = counted.to(student.device, torch.float32)
    parts = zip(student.split(CHUNK), teacher.split(CHUNK), factors.split(CHUNK), strict=True)
    return temperature**2 * torch.stack([checkpoint(part, *rows, use_reentrant=False) for rows in parts]).sum()


def taught_columns(config: BeaconConfig, native_context: int, width: int) -> torch.Tensor:
    """Columns at which the stock model teaches, int64: those of its native context that beacons can change.

    In append placement the first window sees none. There is always one column: processes that share a sharded model
    have to call it equally often.
    """
    first = config.window if config.placement == "append" else 0
    return torch.arange(min(first, width - 1, native_context - 1), min(native_context, width))


def add_reconstruction(
    batch: dict[str, Any], lengths: list[int], config: BeaconConfig, separator: int, weight: float, rng: random.Random
) -> dict[str, Any]:
    """A batch with one row more for every row that fills a window: the window, an eos token, its condensed tokens.

    The next window sees beacons in place of those tokens, so it can only repeat them if the beacons hold them. The
    label weights of the new rows are ``weight``; their ratios are the batch's.

    Args:
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each ``[rows, columns]``, padded on the right;
            ``weights`` or none.
        lengths: Tokens of each row.
        config: Configuration of the wrapped model.
        separator: Token between a window and its repetition.
        weight: Of the new labels.
        rng: Draws the windows.

    Returns:
        A new batch; the same if no row fills a window.
    """
    ids = batch["input_ids"]
    again = min(config.step, config.window - 1)  # the repetition must not fill a window itself
    rows = []
    for row, length in enumerate(lengths):
        if length >= config.window:
            start = rng.randrange((length - config.window) // config.step + 1) * config.step
            window = ids[row, start : start + config.window]
            rows.append(torch.cat([window, window.new_tensor([separator]), window[:again]]))
    if not rows:
        return batch
    new = torch.stack(rows)
    targets = new.clone()
    targets[:, : config.window + 1] = IGNORED
    old = batch.get("weights")
    old = torch.ones(ids.shape, device=ids.device) if old is None else old
    parts = {
        "input_ids": (ids, new, 0),
        "labels": (batch["labels"], targets, IGNORED),
        "attention_mask": (batch["attention_mask"], torch.ones_like(new), 0),
        "weights": (old, torch.full(new.shape, float(weight), device=ids.device), 0.0),
    }
    width = max(ids.shape[1], new.shape[1])
    joined = {
        name: torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in (first, second.to(first))])
        for name, (first, second, fill) in parts.items()
    }
    return {**batch, **joined}


def separator_token(core: Any) -> int:
    """The token between a window and its repetition: the first eos, else 0."""
    token = core.config.eos_token_id
    token = token[0] if isinstance(token, (list, tuple)) else token
    return 0 if token is None else int(token)


def stock_logits(core: Any, inputs: dict[str, Any], columns: torch.Tensor) -> torch.Tensor:
    """The stock model's logits at ``columns``, ``[rows, columns, vocab]``, from its native context alone."""
    end = int(columns[-1]) + 1
    training = core.training
    core.eval()  # a teacher has no dropout
    try:
        with torch.no_grad(), disabled(core), without_lora(core):
            out = core(
                input_ids=inputs["input_ids"][:, :end],
                attention_mask=inputs["attention_mask"][:, :end],
                logits_to_keep=columns.to(inputs["input_ids"].device),
                use_cache=False,
            )
    finally:
        core.train(training)
    logits: torch.Tensor = out.logits
    return logits
