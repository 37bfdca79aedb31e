"""The course of the adapter's training: which sequences, at which ratios, when."""

import dataclasses

import numpy as np
import torch

import beacon
from tasks import TaskSampler

WINDOW, STRIDE, NATIVE_CONTEXT = 128, 32, 512
LONGEST = 8 * WINDOW
CONFIG = beacon.BeaconConfig(window=WINDOW, stride=STRIDE, ratios=(0, 2, 4, 8, 16, 32), reserve=64, sink=4)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the course.

    Args:
        until: Share of the time at which it ends.
        ratios: What is drawn from, for all windows of a batch or for each.
        long: Share of batches of more than the native context, up to `LONGEST`.
        passkey: Share of rows with a passkey and questions.
        copy: Share of rows that repeat a chunk, in batches that are not long.
        text_weight: Weight of the divergence from the stock model on plain text; passkey digits and copies have 1.
    """

    until: float
    ratios: tuple[int, ...]
    long: float
    passkey: float
    copy: float
    text_weight: float


LESSON = 0.09  # share of the time before any reading
PHASES = (
    Phase(0.37, (2, 4, 8, 8, 8), 0.3, 0.5, 0.15, 0.5),
    Phase(0.54, (2, 4, 8, 8, 8, 16), 0.5, 0.5, 0.15, 1.0),
    Phase(0.70, (2, 4, 8, 8, 8, 8, 16, 32), 0.75, 0.5, 0.15, 1.0),
    Phase(1.00, (2, 4, 8, 8, 8, 8, 8, 8, 8, 8, 16, 32), 0.85, 0.6, 0.15, 1.0),
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one length, read with the same ratios.

    Args:
        ids: Token ids, int64 ``[rows, seqlen]``.
        weights: Loss weights as `TaskSampler` gives them, float32 ``[rows, seqlen]``.
        ratios: One per full window.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    ratios: list[int]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.weights.to(device), self.ratios)


def draw_ratios(rng: np.random.Generator, choice: tuple[int, ...], seqlen: int) -> list[int]:
    """One ratio per window: the same for all (mostly), or a new draw for each.

    In most long texts some windows get ratio 1, until the memory holds up to as many entries as a text of 4,096 tokens
    leaves at ratio 8 (496; 1,024 tokens leave 116), among which a beacon must not be lost.
    """
    windows = (seqlen - WINDOW) // STRIDE + 1
    ratios = np.full(windows, rng.choice(choice)) if rng.random() < 0.6 else rng.choice(choice, windows)
    if seqlen > NATIVE_CONTEXT and rng.random() < 0.75:
        wanted = rng.integers(NATIVE_CONTEXT // 2, NATIVE_CONTEXT + WINDOW // 4)
        for window in rng.permutation(windows):
            if (STRIDE // ratios).sum() >= wanted:
                break
            ratios[window] = 1
    return [int(ratio) for ratio in ratios]


def draw_batch(sampler: TaskSampler, tokens: int, phase: Phase) -> Batch:
    """Draw rows of one random length, about ``tokens`` in all."""
    long = sampler.rng.random() < phase.long
    least, most = (NATIVE_CONTEXT + 1, LONGEST) if long else (2 * WINDOW, NATIVE_CONTEXT)
    seqlen = int(sampler.rng.integers(least, most + 1))
    rows = []
    for kind in sampler.rng.random(max(1, tokens // seqlen)):
        if kind < phase.passkey:
            rows.append(sampler.passkey(seqlen, apart=WINDOW + STRIDE))
        elif kind < phase.passkey + phase.copy and not long:
            rows.append(sampler.far_copy(seqlen))
        else:
            rows.append((sampler.code(seqlen), np.ones(seqlen, np.float32)))
    ids, weights = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return Batch(ids, weights, draw_ratios(sampler.rng, phase.ratios, seqlen))


def taught_spans(seqlen: int) -> list[tuple[int, int, int]]:
    """Where the stock model, which reads no more than its native context, can tell beacons what it foresees.

    Returns:
        (begin, end, first): the stock model reads ``[begin, end)`` and teaches from ``first`` on.
    """
    if seqlen <= NATIVE_CONTEXT:
        return [(0, seqlen, WINDOW)]
    last = max(NATIVE_CONTEXT, seqlen - NATIVE_CONTEXT // 2)
    return [(0, NATIVE_CONTEXT, WINDOW), (seqlen - NATIVE_CONTEXT, seqlen, last)]


def draw_lesson(sampler: TaskSampler, tokens: int) -> torch.Tensor:
    """Token ids of single windows ``[rows, WINDOW]``: code, passkeys and repeated chunks."""
    rows = []
    for kind in sampler.rng.random(max(1, tokens // WINDOW)):
        if kind < 0.45:
            rows.append((sampler.passkey if kind < 0.3 else sampler.copy)(WINDOW)[0])
        else:
            rows.append(sampler.code(WINDOW))
    return torch.from_numpy(np.stack(rows))
