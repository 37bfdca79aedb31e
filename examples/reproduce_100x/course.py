"""The course of the adapter's training: which sequences, at which ratios, when."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from scales import NATIVE_CONTEXT, STRIDE, WINDOW
from sequences import KINDS, Sequences


@dataclass(frozen=True)
class Phase:
    """A stretch of the course.

    Args:
        until: Share of the steps at which it ends.
        kind: ``lesson`` (what beacons hold is compared, `lookups.py`), ``questions`` (and asked for, `questions.py`,
            beside a little plain text that is read end to end) or ``reading`` (all of it, needles in longer texts too).
        rate: Of Muon where phases of this kind begin.
        ratios: What is drawn from, for all windows of a batch or for each.
        lengths: Tokens of a text, one of these.
        needles: Share of rows with needles and questions.
        copies: Share of rows that repeat a chunk.
        reads: Tokens of texts that are read beside questions, as a share of those of a step.
    """

    until: float
    kind: Literal["lesson", "questions", "reading"]
    rate: float
    ratios: tuple[int, ...]
    lengths: tuple[int, ...]
    needles: float
    copies: float
    reads: float = 0.0


KIND_SHARES = (0.35, 0.35, 0.3)  # of needles, as in `sequences.KINDS`; the base has seen topics least
BORDERS = 0.3  # of the needles are moved to the border of two strides, which cuts 13 % of answers; by chance 1.5 % are
RATIOS = (4, 4, 8, 8, 16, 32, 64, 128, 128)  # of the memory that questions are read with
PHASES = (
    Phase(0.387, "lesson", 0.15, (1,), (512,), 0.55, 0.15),
    Phase(0.722, "questions", 0.03, RATIOS, (512, 896, 1280), 0.0, 0.0, reads=0.5),
    Phase(1.000, "reading", 0.015, (2, 2, *RATIOS), (512, 896, 1280, 2048), 0.5, 0.0, reads=1.0),
)


def muon_rate(progress: float) -> float:
    """Learning rate at a share of the steps: falls towards nothing over all phases of a kind.

    In the lesson 0.12 to 0.3 are alike and far ahead of 0.02; reading at 0.1 loses what 0.02 gains.
    """
    phase = phase_at(progress)
    first = min(number for number, other in enumerate(PHASES) if other.kind == phase.kind)
    begin = PHASES[first - 1].until if first else 0.0
    end = max(other.until for other in PHASES if other.kind == phase.kind)
    return phase.rate * max(0.02, 1.0 - (progress - begin) / (end - begin))


@dataclass(frozen=True)
class Batch:
    """Rows of one length, read with the same ratios.

    Args:
        ids: Token ids, int64 ``[rows, seqlen]``.
        weights: Loss weights as `Sequences` gives them, float32 ``[rows, seqlen]``.
        ratios: One per full window.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    ratios: list[int]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.weights.to(device), self.ratios)


def phase_at(progress: float) -> Phase:
    """The phase at a share of the steps."""
    return next((phase for phase in PHASES if progress < phase.until), PHASES[-1])


def draw_ratios(rng: np.random.Generator, choice: tuple[int, ...], windows: int) -> list[int]:
    """One ratio per window: the same for all, or a new draw for each, or mostly a low one.

    Low ones fill the memory with up to 1,024 entries, as texts far longer than these leave at high ratios, so that
    a beacon of a high ratio is not lost among them.
    """
    mode = rng.random()
    if mode < 0.4:
        ratios = np.full(windows, rng.choice(choice))
    elif mode < 0.7:
        ratios = rng.choice(choice, windows)
    else:
        low = np.full(windows, rng.choice([ratio for ratio in choice if ratio <= 4] or choice))
        ratios = np.where(rng.random(windows) < 0.6, low, rng.choice(choice, windows))
    return [int(ratio) for ratio in ratios]


def draw_batch(sequences: Sequences, tokens: int, phase: Phase) -> Batch:
    """Draw rows of one length, ``tokens`` in all, and ratios."""
    rng = sequences.rng
    seqlen = int(rng.choice(phase.lengths))
    rows = []
    for kind in rng.random(max(1, tokens // seqlen)):
        if kind < phase.needles:
            needles = str(rng.choice(KINDS, p=KIND_SHARES))
            most = 1 + seqlen // (2 * STRIDE)
            rows.append(sequences.needles(seqlen, needles, apart=WINDOW, most=most, borders=BORDERS))
        elif kind < phase.needles + phase.copies and seqlen <= NATIVE_CONTEXT:
            rows.append(sequences.far_copy(seqlen, WINDOW))
        else:
            rows.append((sequences.code(seqlen), np.ones(seqlen, np.float32)))
    ids, weights = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    ratios = draw_ratios(rng, phase.ratios, seqlen // STRIDE)
    return Batch(ids, weights, ratios)
