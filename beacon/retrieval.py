"""Retrieval-guided ratios: the windows of a text that a query points at keep more detail than the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from beacon.config import BeaconConfig, check_ratio, check_whole

Scorer = Callable[[list[list[int]], list[int]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class BM25Scorer:
    """Scores windows against a query with BM25 over n-grams of token ids, by the library bm25s.

    Phrases count beside tokens: "the pass key" is rare in a text where each of its words is common. A term of the query
    counts once, however often the query repeats it.

    Args:
        ngrams: Terms are all runs of 1 to ``ngrams`` tokens.
        k1: How slowly repeats of a term within a window cease to add to its score; 0 counts none.
        b: How far windows longer than the mean are marked down, from 0 (not at all) to 1.

    Raises:
        TypeError: A field of the wrong type.
        ValueError: A field out of range.

    Source: Robertson & Zaragoza, 2009; the variant with idf above 0 of Kamphuis et al., 2020 ("Lucene, accurate").
    """

    ngrams: int = 2
    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        check_whole("ngrams", self.ngrams, 1)
        for name, most in (("k1", math.inf), ("b", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}; pass a float.")
            if not (0 <= value <= most and math.isfinite(value)):
                allowed = "finite and at least 0" if most == math.inf else "from 0 to 1"
                raise ValueError(f"{name} must be {allowed}, got {value}; the usual are k1=1.5 and b=0.75.")

    def __call__(self, windows: list[list[int]], query: list[int]) -> list[float]:
        """One score per window, 0 where it shares no term with the query.

        Args:
            windows: Token ids of each window.
            query: Token ids of the query.

        Raises:
            ImportError: bm25s is not installed.
        """
        try:
            from bm25s import BM25
        except ImportError as err:
            raise ImportError(
                "BM25Scorer needs the package bm25s, which is not installed; "
                'pip install "activation-beacon[retrieval]", or pass a scorer of your own.'
            ) from err
        known = {term: number for number, term in enumerate(dict.fromkeys(self._terms(query)))}
        other = len(known)  # one number for all that the query lacks: it counts for the length alone
        numbered = [[known.get(term, other) for term in self._terms(window)] for window in windows]
        if all(number == other for numbers in numbered for number in numbers):
            return [0.0] * len(windows)
        # Not by `index`, whose debug messages pass the root logger's level.
        bm25 = BM25(k1=self.k1, b=self.b, method="lucene", dtype="float64")
        bm25.scores = bm25.build_index_from_ids(list(range(other + 1)), numbered, show_progress=False)
        return [float(score) for score in bm25.get_scores_from_ids(list(range(other)))]

    def _terms(self, ids: list[int]) -> Iterator[tuple[int, ...]]:
        for length in range(1, self.ngrams + 1):
            yield from zip(*(ids[start:] for start in range(length)))


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
    scorer: Scorer | None = None,
    overlap: int | None = None,
) -> list[int]:
    """One ratio per window: ``low`` for the windows that a query points at, ``high`` for the rest.

    The ``top`` windows with the best scores above zero win, of equal ones the earlier.

    Args:
        input_ids: Token ids of one text, a sequence of ints or an integer tensor ``[T]`` or ``[1, T]``.
        query_ids: Token ids of the query, likewise; without special tokens, or they point somewhere, too.
        config: Configuration of the wrapped model.
        low: Ratio of the chosen windows; None takes the smallest listed above 0.
        high: Ratio of all others; None takes the largest listed.
        top: How many windows get ``low``.
        keep_first: Tokens before the first window, as in the call that reads the text.
        expected_length: Length in tokens that the text will have with what is generated after it; further windows get
            ``high``. None: nothing is.
        scorer: Called with the token ids of every window and those of the query, returns one score per window, higher
            is better, 0 or less is never chosen. None: ``BM25Scorer(b=0)``, as windows are short only where the
            text ends.
        overlap: Tokens before each window, from ``keep_first`` on, that count as part of it when it is scored, so that
            what begins in one window and ends in the next is found in full. What lies in it whole points at both
            windows, so leave ``top`` above 1. None: a quarter of the window.

    Returns:
        A ratio for every window that the text begins, from the first, and for those expected; pass it as ``ratios``.

    Raises:
        ImportError: No ``scorer`` is given and bm25s is not installed.
        TypeError: ``scorer`` cannot be called or returns what are no numbers, or ``overlap`` is no int.
        ValueError: Empty query, a ratio that does not divide the stride, a negative ``overlap``, or scores that are not
            finite or not one per window.

    Source: arXiv 2401.03462, section 4.4 (retrieval-guided condensing).
    """
    text, query = _token_list(input_ids)[keep_first:], _token_list(query_ids)
    if not query:
        raise ValueError("query_ids must hold at least one token, got none; pass the tokenized question.")
    listed = sorted({ratio for ratio in config.ratios if ratio}) or [0]
    low = check_ratio(listed[0] if low is None else low, config.step)
    high = check_ratio(listed[-1] if high is None else high, config.step)
    overlap = config.window // 4 if overlap is None else overlap
    check_whole("overlap", overlap, 0)
    starts = range(0, max(len(text), 1), config.step)
    windows = [text[max(start - overlap, 0) : start + config.window] for start in starts]
    scores = _scores(BM25Scorer(b=0) if scorer is None else scorer, windows, query)
    best = sorted((number for number, score in enumerate(scores) if score > 0), key=lambda number: -scores[number])
    chosen = set(best[:top])
    more = 0 if expected_length is None else max(-(-(expected_length - keep_first) // config.step) - len(windows), 0)
    return [low if number in chosen else high for number in range(len(windows) + more)]


def _token_list(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if values and isinstance(values[0], list):
        if len(values) != 1:
            raise ValueError(f"retrieval_ratios reads one text at a time, got {len(values)} rows; call it per row.")
        values = values[0]
    return [int(value) for value in values]


def _scores(scorer: Scorer, windows: list[list[int]], query: list[int]) -> list[float]:
    """What the scorer returns, checked."""
    if not callable(scorer):
        raise TypeError(
            f"scorer must be callable, got {type(scorer).__name__} {scorer!r}; "
            "pass a function of windows and query, or None for BM25."
        )
    returned: Any = scorer(windows, query)
    must = "scorer must return one finite number per window"
    if hasattr(returned, "tolist"):  # an array or a tensor
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise TypeError(f"{must}, got {type(returned).__name__}; return a list of floats.")
    if len(returned) != len(windows):
        raise ValueError(f"{must}, got {len(returned)} for {len(windows)} windows; score each, 0 for no match.")
    scores = []
    for number, score in enumerate(returned):
        value = score.item() if hasattr(score, "item") else score
        if not isinstance(value, Real):
            raise TypeError(f"{must}, got {type(score).__name__} for window {number}; return a list of floats.")
        if not math.isfinite(value):
            raise ValueError(f"{must}, got {value} for window {number}; return 0 for a window that does not match.")
        scores.append(float(value))
    return scores
