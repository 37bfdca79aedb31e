"""Which windows a query points at, by BM25 or a scorer of the caller's."""

from __future__ import annotations

import logging
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from beacon import BeaconConfig, BM25Scorer, retrieval_ratios

CONFIG = BeaconConfig(window=8, ratios=(0, 2, 8), ratio_policy="retrieval")
NEEDLE = [100, 101, 102, 103, 104]


def two_needles() -> torch.Tensor:
    """Six windows ``[1, 44]``; token 50 in windows 2 and 4, token 51 behind it in window 4 alone."""
    ids = torch.full((1, 44), 10)
    ids[0, 18], ids[0, 33], ids[0, 34] = 50, 50, 51
    return ids


def haystack(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(50), k=length)


def test_windows_that_the_query_points_at_get_a_low_ratio() -> None:
    ids = two_needles()
    assert retrieval_ratios(ids, [50, 51], CONFIG) == [8, 8, 2, 8, 2, 8]
    assert retrieval_ratios(ids, torch.tensor([[50, 51]]), CONFIG, top=1, low=0, high=4) == [4, 4, 4, 4, 0, 4]
    assert retrieval_ratios(ids[0].tolist(), [50, 51, 77], CONFIG, top=0) == [8] * 6
    assert retrieval_ratios(ids, [77], CONFIG) == [8] * 6
    with pytest.raises(ValueError, match="at least one token, got none"):
        retrieval_ratios(ids, [], CONFIG)
    with pytest.raises(ValueError, match="one text at a time, got 2 rows"):
        retrieval_ratios(ids.expand(2, -1), [50], CONFIG)
    with pytest.raises(ValueError, match="stride must divide by ratio, got stride=8 and ratio=3"):
        retrieval_ratios(ids, [50], CONFIG, low=3)


@pytest.mark.parametrize("text", [[], torch.empty(1, 0, dtype=torch.long), [7]])
def test_an_empty_or_short_text_is_one_window(text: Any) -> None:
    assert retrieval_ratios(text, [50], CONFIG) == [8]


def test_keep_first_shifts_the_windows_and_is_not_searched() -> None:
    ids = two_needles()
    assert retrieval_ratios(ids, [50], CONFIG, keep_first=3, overlap=0) == [8, 2, 8, 2, 8, 8]
    ids[0, :3] = 52
    assert retrieval_ratios(ids, [52], CONFIG, keep_first=3) == [8] * 6
    assert retrieval_ratios(ids, [52], CONFIG, keep_first=2) == [2] + [8] * 5


def test_expected_windows_get_the_high_ratio() -> None:
    ids = two_needles()
    assert retrieval_ratios(ids, [50], CONFIG, expected_length=60) == [8, 8, 2, 8, 2, 8, 8, 8]
    assert retrieval_ratios(ids, [50], CONFIG, expected_length=60, keep_first=12, overlap=0) == [2, 8, 2, 8, 8, 8]
    assert retrieval_ratios(ids, [50], CONFIG, expected_length=10) == [8, 8, 2, 8, 2, 8]


@pytest.mark.parametrize("stride", [32, 16])
def test_a_needle_is_found_at_every_position(stride: int) -> None:
    """The query has what stands before the answer; the window with the answer must be among the chosen."""
    config = BeaconConfig(window=32, stride=stride, ratios=(2, 8), ratio_policy="retrieval")
    for position in range(175 - len(NEEDLE)):
        ids = haystack(175, position)
        ids[position : position + len(NEEDLE)] = [*NEEDLE[:-1], 3]
        ratios = retrieval_ratios(ids, [7, *NEEDLE[:-1], 9], config)
        assert len(ratios) == -(-175 // stride) and ratios.count(2) == 3
        assert ratios[(position + len(NEEDLE) - 1) // stride] == 2, position


def test_overlap_finds_what_straddles_two_windows() -> None:
    ids = [10] * 44
    ids[14:17] = [50, 51, 60]  # the answer, 60, alone in window 2
    assert retrieval_ratios(ids, [50, 51], CONFIG, overlap=0) == [8, 2, 8, 8, 8, 8]
    assert retrieval_ratios(ids, [50, 51], CONFIG) == [8, 2, 2, 8, 8, 8]
    assert retrieval_ratios(ids, [50, 51], CONFIG, top=1, overlap=9) == [8, 2, 8, 8, 8, 8]  # of equals the earlier
    ids = [10] * 40
    ids[30:32] = [50, 51]  # also where the later window is a short one
    assert retrieval_ratios([*ids[:32], 10], [50, 51], CONFIG, top=1) == [8, 8, 8, 2, 8]


@pytest.mark.parametrize("overlap, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_overlaps_are_refused(overlap: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"overlap must be (at least 0|an int), got"):
        retrieval_ratios(two_needles(), [50], CONFIG, overlap=overlap)


def test_a_phrase_beats_windows_full_of_its_words() -> None:
    phrase = [1, 2, 3]
    windows = [random.Random(seed).choices([9, 8, 7], k=8) for seed in range(12)]
    for number in range(0, 12, 2):
        windows[number] = [3, 2, 1, 3, 2, 1, 9, 9]  # all of its words, twice, never in its order
    windows[5] = [9, 8, *phrase, 7, 7, 8]
    single, pairs = (BM25Scorer(ngrams=n)(windows, phrase) for n in (1, 2))
    assert max(single) > single[5] and max(pairs) == pairs[5]
    assert pairs.count(max(pairs)) == 1 and pairs[1] == pairs[3] == 0


def test_bm25_is_the_textbook_sum() -> None:
    windows, query = [[1, 1, 2], [2, 3], [4, 5, 6, 7]], [1, 2, 1, 99]
    k1, b, mean = 1.2, 0.5, 3

    def part(count: int, length: int, holders: int) -> float:
        return np.log(1 + (3 - holders + 0.5) / (holders + 0.5)) * count / (count + k1 * (1 - b + b * length / mean))

    expected = [part(2, 3, 1) + part(1, 3, 2), part(1, 2, 2), 0]
    assert BM25Scorer(ngrams=1, k1=k1, b=b)(windows, query) == pytest.approx(expected, rel=1e-12)


def test_bm25_takes_windows_of_any_length() -> None:
    scores = BM25Scorer(ngrams=3)([[], [5], [5, 6], [5, 6, 7], [1]], [5, 6, 7])
    assert scores[0] == scores[4] == 0 and 0 < scores[1] < scores[2] < scores[3]
    assert BM25Scorer()([], [5]) == [] and BM25Scorer()([[], []], [5]) == [0, 0]


def test_bm25_is_quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.NOTSET):
        assert len(BM25Scorer()([haystack(40, seed) for seed in range(9)], [1, 2])) == 9
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "field, value, error, message",
    [
        ("ngrams", 0, ValueError, "ngrams must be at least 1, got 0"),
        ("ngrams", 1.0, TypeError, "ngrams must be an int, got float"),
        ("k1", -0.1, ValueError, "k1 must be finite and at least 0, got -0.1"),
        ("k1", float("inf"), ValueError, "k1 must be finite"),
        ("b", 1.5, ValueError, "b must be from 0 to 1, got 1.5"),
        ("b", float("nan"), ValueError, "b must be from 0 to 1, got nan"),
        ("b", "0.5", TypeError, "b must be a number, got str"),
    ],
)
def test_bad_settings_of_bm25_are_refused(field: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BM25Scorer(**{field: value})


def test_any_callable_scores() -> None:
    seen: dict[str, Any] = {}

    def last_first(windows: list[list[int]], query: list[int]) -> list[float]:
        seen.update(windows=windows, query=query)
        return [number - 3 for number in range(len(windows))]

    ids = list(range(44))
    assert retrieval_ratios(torch.tensor(ids), (1, 2), CONFIG, scorer=last_first) == [8, 8, 8, 8, 2, 2]
    assert seen["query"] == [1, 2]
    assert seen["windows"] == [ids[:8], ids[6:16], ids[14:24], ids[22:32], ids[30:40], ids[38:]]
    for scores in (np.array([0, 0, 1, 0, 0, 2]), torch.tensor([0, 0, 1.5, -1, 0, 2]), [np.float32(1)] * 6, (True,) * 6):
        ratios = retrieval_ratios(ids, [1], CONFIG, scorer=lambda windows, query, scores=scores: scores)
        assert ratios == [8, 8, 2, 8, 8, 2] if len({float(score) for score in scores}) > 1 else [2, 2, 2, 8, 8, 8]


@pytest.mark.parametrize(
    "returned, error, message",
    [
        ([1.0] * 5, ValueError, r"one finite number per window, got 5 for 6 windows; score each"),
        ([0, float("nan"), 0, 0, 0, 0], ValueError, r"finite number per window, got nan for window 1; return 0"),
        (torch.tensor([0, 0, 0, 0, 0, float("inf")]), ValueError, "got inf for window 5"),
        ([0, 0, "1", 0, 0, 0], TypeError, "got str for window 2; return a list of floats"),
        (np.zeros((6, 1)), TypeError, "got list for window 0"),
        ([None] * 6, TypeError, "got NoneType for window 0"),
        (None, TypeError, "got NoneType; return a list"),
        ("aaaaaa", TypeError, "got str; return a list"),
        (np.float64(1), TypeError, "got float; return a list"),
    ],
)
def test_bad_scores_are_refused(returned: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        retrieval_ratios(two_needles(), [50], CONFIG, scorer=lambda windows, query: returned)


def test_a_scorer_must_be_callable() -> None:
    with pytest.raises(TypeError, match="scorer must be callable, got str 'bm25'; pass a function"):
        retrieval_ratios(two_needles(), [50], CONFIG, scorer="bm25")  # type: ignore[arg-type]


def test_without_bm25s_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r'pip install "activation-beacon\[retrieval\]"') as caught:
        retrieval_ratios(two_needles(), [50], CONFIG)
    assert isinstance(caught.value.__cause__, ImportError)
    assert retrieval_ratios(two_needles(), [50], CONFIG, scorer=lambda windows, query: [0] * 6) == [8] * 6
