"""Ratios while training: drawn anew for every batch, from the seed and the batch's number alone.

Nothing is state, so a resumed run draws what an uninterrupted one would have drawn, and one process that accumulates
four batches draws what four processes draw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from beacon.config import BeaconConfig, check_ratio

POLICIES = ("step-random", "instance-random", "sequence", "fixed")


@dataclass(frozen=True)
class Draw:
    """What a batch's ratios are drawn for.

    Args:
        number: Number of the batch in the run, over all processes and accumulated batches, from 0.
        windows: Windows of the batch's longest document.
        progress: Share of the training that is over, 0 to 1.
        config: Configuration of the wrapped model.
    """

    number: int
    windows: int
    progress: float
    config: BeaconConfig


RatioSampler: TypeAlias = Callable[[Draw], Sequence[int] | int]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a curriculum.

    Args:
        until: Share of the training at which it ends, above 0 and at most 1.
        choices: Ratios drawn from (repeats weigh).
    """

    until: float
    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.until, bool) or not isinstance(self.until, (int, float)) or not 0 < self.until <= 1:
            raise ValueError(f"curriculum: until must lie above 0 and at most at 1, got {self.until!r}.")
        object.__setattr__(self, "choices", _ratios("curriculum: choices", self.choices))


@dataclass(frozen=True, kw_only=True)
class RatioConfig:
    """How a batch's ratios are drawn.

    Args:
        policy: ``step-random`` (one per window), ``instance-random`` (one per batch), ``sequence`` (cycle by window
            number) or ``fixed`` (the first).
        choices: Ratios drawn from, repeats weigh; None takes those of the beacon configuration without 0.
        curriculum: Stages that replace ``choices`` as training goes on, in order, the last one until 1.
        same_on_all_ranks: Draw per accumulated batch, not per process, so that all processes of a step have the same
            shapes (no process waits for the others).
        seed: Of the draws.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value is not allowed.

    Source: arXiv 2401.03462, section 3.3: a random ratio for every window; one fixed ratio fails (table 5 there).
    """

    policy: str = "step-random"
    choices: tuple[int, ...] | None = None
    curriculum: tuple[Stage, ...] = ()
    same_on_all_ranks: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"ratios: policy must be one of {', '.join(POLICIES)}, got {self.policy!r}.")
        if self.choices is not None:
            object.__setattr__(self, "choices", _ratios("ratios: choices", self.choices))
        if not isinstance(self.same_on_all_ranks, bool):
            raise TypeError(f"ratios: same_on_all_ranks must be true or false, got {self.same_on_all_ranks!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"ratios: seed must be an int, got {self.seed!r}.")
        stages = tuple(Stage(**stage) if isinstance(stage, Mapping) else stage for stage in self.curriculum)
        ends = [stage.until for stage in stages]
        if stages and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise ValueError(f"curriculum: stages must end later and later, the last one at 1, got {ends}.")
        object.__setattr__(self, "curriculum", stages)

    def check(self, config: BeaconConfig) -> None:
        """Refuse ratios that do not divide the stride.

        Raises:
            ValueError: Names the ratio.
        """
        for choices in (self.choices or (), *(stage.choices for stage in self.curriculum)):
            for ratio in choices:
                check_ratio(ratio, config.step)

    def __call__(self, draw: Draw) -> list[int]:
        """One ratio per window."""
        choices = self._choices(draw)
        if self.policy == "fixed":
            return [choices[0]] * draw.windows
        if self.policy == "sequence":
            return [choices[window % len(choices)] for window in range(draw.windows)]
        rng = random.Random(f"ratios-{self.seed}-{draw.number}")
        if self.policy == "instance-random":
            return [rng.choice(choices)] * draw.windows
        return rng.choices(choices, k=draw.windows)

    def _choices(self, draw: Draw) -> tuple[int, ...]:
        for stage in self.curriculum:
            if draw.progress < stage.until or stage.until == 1:
                return stage.choices
        if self.choices is not None:
            return self.choices
        return tuple(ratio for ratio in draw.config.ratios if ratio) or draw.config.ratios


def check_drawn(ratios: Any, draw: Draw) -> list[int]:
    """A ratio for every window of what a sampler returned.

    Raises:
        TypeError: No int and no sequence of ints.
        ValueError: Too few, or one does not divide the stride.
    """
    wanted = [ratios] * draw.windows if isinstance(ratios, int) else list(ratios)
    if len(wanted) < draw.windows:
        raise ValueError(
            f"a ratio sampler must return one ratio per window, got {len(wanted)} for {draw.windows} windows of batch "
            f"{draw.number}; return a longer list or an int."
        )
    return [check_ratio(ratio, draw.config.step) for ratio in wanted]


def _ratios(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, int)) or not isinstance(values, Sequence) or not values:
        raise TypeError(f"{name} must be a list of ratios, got {values!r}; write for example [2, 4, 8].")
    return tuple(check_ratio(ratio, 0) for ratio in values)
