"""Ratio policies: which ratio each window of a row gets when the caller names none."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def _token_lists(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if values and isinstance(values[0], list):
        if len(values) != 1:
            raise ValueError(f"retrieval_ratios reads one text at a time, got {len(values)} rows; call it per row.")
        values = values[0]
    return [int(value) for value in values]


def retrieval_ratios(
    input_ids: Any,
    query_ids: Any,
    config: BeaconConfig,
    *,
    low: int | None = None,
    high: int | None = None,
    top: int = 3,
    keep_first: int = 0,
    expected_length: int | None = None,
) -> list[int]:
    """One ratio per window: ``low`` for the windows that a query points at, ``high`` for the rest.

    Windows are scored with BM25 (k1 = 1.5, b = 0.75) over token ids; the ``top`` best with a score above zero win.

    Args:
        input_ids: Token ids of one text, a sequence of ints or an integer tensor ``[T]`` or ``[1, T]``.
        query_ids: Token ids of the query, likewise.
        config: Configuration of the wrapped model.
        low: Ratio of the chosen windows; None takes the smallest listed above 0.
        high: Ratio of all others; None takes the largest listed.
        top: How many windows get ``low``.
        keep_first: Tokens before the first window, as in the call that reads the text.
        expected_length: Length in tokens that the text will have with what is generated after it; further windows get
            ``high``. None: nothing is.

    Returns:
        A ratio for every window that the text begins, from the first, and for those expected; pass it as ``ratios``.

    Raises:
        ValueError: Empty query, or a ratio that does not divide the stride.

    Source: arXiv 2401.03462, section 4.4 (retrieval-guided condensing).
    """
    text, query = _token_lists(input_ids)[keep_first:], set(_token_lists(query_ids))
    if not query:
        raise ValueError("query_ids must hold at least one token, got none; pass the tokenized question.")
    listed = sorted({ratio for ratio in config.ratios if ratio}) or [0]
    low = check_ratio(listed[0] if low is None else low, config.step)
    high = check_ratio(listed[-1] if high is None else high, config.step)
    starts = range(0, max(len(text), 1), config.step)
    counts = [Counter(token for token in text[start : start + config.window] if token in query) for start in starts]
    scores = _bm25(counts, config.window)
    best = sorted((number for number, score in enumerate(scores) if score > 0), key=lambda number: -scores[number])
    chosen = set(best[:top])
    more = 0 if expected_length is None else max(-(-(expected_length - keep_first) // config.step) - len(counts), 0)
    return [low if number in chosen else high for number in range(len(counts) + more)]


def _bm25(counts: Sequence[Counter[int]], length: int, k1: float = 1.5) -> list[float]:
    """BM25 of equally long windows (so the length normalisation is 1). Source: Robertson & Zaragoza, 2009."""
    seen = Counter(token for count in counts for token in count)
    total = len(counts)
    idf = {token: math.log(1 + (total - n + 0.5) / (n + 0.5)) for token, n in seen.items()}
    return [sum(idf[t] * n * (k1 + 1) / (n + k1) for t, n in count.items()) for count in counts]
