"""Ratio policies: which ratio each window of a row gets when the caller names none."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

from beacon.config import BeaconConfig, check_ratio
from beacon.plan import Ratios

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RatioRequest:
    """What a policy knows when it chooses the ratio of one window.

    Args:
        config: The configuration of the wrapped model.
        native_context: Longest position of the base model, in tokens.
        row: Number of the row in the batch it was first read in.
        window: Number of the window in the row's text, from 0.
        length: Tokens of the row known by now, or the caller's ``expected_length``.
        memory: Entries in memory before this window.
        ratios: Ratios of the row's earlier windows, a sequence (``len``, index, iteration).
    """

    config: BeaconConfig
    native_context: int
    row: int
    window: int
    length: int
    memory: int
    ratios: Ratios


def _draw(request: RatioRequest, *key: int) -> int:
    seed = "-".join(str(part) for part in (request.config.seed, request.row, *key))
    return random.Random(seed).choice(request.config.ratios)


def _fits(request: RatioRequest, ratio: int) -> bool:
    """Whether committing this window at ``ratio`` leaves room for one more window in the native context."""
    config = request.config
    entries = config.step // ratio if ratio else config.step
    return request.memory + entries + config.window <= request.native_context


def _suffices(request: RatioRequest, ratio: int) -> bool:
    """Whether text and reserve fit the native context at this ratio from the first window on."""
    need, free = request.length + request.config.reserve, request.native_context - request.config.window
    return need <= (free * ratio + request.config.window if ratio else request.native_context)


def overfull(request: RatioRequest, ratio: int) -> bool:
    """Whether the adaptive policy chose ``ratio`` only because it has none that is large enough."""
    return not _fits(request, ratio) and (bool(request.ratios) or not _suffices(request, ratio))


def adaptive_ratio(request: RatioRequest) -> int:
    """The smallest listed ratio with which text and reserve fit the native context.

    It never goes down from one window to the next, and goes up as soon as memory, this window's entries and one more
    window would pass the native context.

    Source: ``(native - W) * r + W >= length + reserve``, the reference's adaptive ratio.
    """
    config = request.config
    ratios = sorted(set(config.ratios))
    if not request.ratios:
        return next((ratio for ratio in ratios if _suffices(request, ratio)), ratios[-1])
    last = request.ratios[-1]
    rising = [ratio for ratio in ratios if ratio >= last] or [last]
    return next((ratio for ratio in rising if _fits(request, ratio)), rising[-1])


def choose_ratio(request: RatioRequest) -> int:
    """The ratio that the configured policy gives a window.

    Raises:
        ValueError: The policy is ``retrieval`` (its ratios come with the call) or a callable returned a bad ratio.
    """
    config = request.config
    policy = config.ratio_policy
    if callable(policy):
        return check_ratio(policy(request), config.step)
    if policy == "fixed":
        return config.ratios[0]
    if policy == "sequence":
        return config.ratios[request.window % len(config.ratios)]
    if policy == "step-random":
        return _draw(request, request.window)
    if policy == "instance-random":
        return _draw(request)
    if policy == "adaptive":
        return adaptive_ratio(request)
    raise ValueError(
        "ratio_policy='retrieval' needs the ratios of this text, got none; "
        "pass ratios=beacon.retrieval_ratios(input_ids, query_ids, model.beacon_config)."
    )
