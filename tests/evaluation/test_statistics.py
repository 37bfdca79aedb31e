"""Means with intervals, and differences of pairs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies

from beacon.evaluation.report import estimate, paired
from beacon.evaluation.report.statistics import ENOUGH, holm, normal


def test_intervals_hold_the_mean_of_as_many_draws_as_they_say():
    import numpy as np

    random = np.random.default_rng(5)
    draws = random.normal(3, 2, size=(200, 40))
    found = [estimate(list(draw)) for draw in draws]
    assert all(one.low < one.value < one.high for one in found)
    inside = sum(one.low <= 3 <= one.high for one in found)
    assert 178 <= inside <= 198  # 95 % of 200 are 190, with a standard error of 3; the bootstrap is a little narrow


def test_estimates_of_few_or_no_items():
    assert math.isnan(estimate([]).value) and estimate([]).n == 0
    assert estimate([2.0]).value == 2 and estimate([2.0]).low is None
    assert estimate([1.0, math.inf]).value == math.inf and estimate([1.0, math.inf]).low is None
    assert estimate([4.0, 9.0], geometric=True).value == pytest.approx(6)
    assert estimate([1.0, 2.0, 4.0]) == estimate([1.0, 2.0, 4.0])


def test_pairs_tell_what_unpaired_items_could_not():
    import numpy as np

    before = np.random.default_rng(0).normal(0, 10, 60)
    found = paired(list(before), list(before + 1))
    assert found.p < 0.002 and found.low == pytest.approx(1) and found.high == pytest.approx(1)
    noise = np.random.default_rng(1).normal(0, 1, 60)
    assert paired(list(before), list(before + noise - noise.mean())).p > 0.5


@pytest.mark.parametrize("count, least", [(1, 1.0), (2, 0.5), (5, 0.0625)])
def test_few_pairs_are_never_sure(count, least):
    assert paired([0.0] * count, [1.0] * count).p == least


def test_many_comparisons_leave_room_for_a_clear_change():
    import numpy as np

    changes = np.random.default_rng(0).normal(1, 1, 80)
    clear = paired([0.0] * 80, list(changes)).p
    assert 0 < clear < 1e-9  # 4,000 resamples alone would say 0.0005
    assert holm([clear, *[0.5] * 1000])[0] < 0.05
    assert paired([0.0] * 20, [1.0] * 20).p == 2 / 2**20


def test_pairs_with_infinities():
    same = paired([math.inf, 1.0], [math.inf, 1.0])
    assert same.p == 1
    worse = paired([1.0] * 8, [math.inf] * 8, geometric=True)
    assert worse.p == pytest.approx(2 / 2**8) and worse.low is None and worse.after == math.inf
    with pytest.raises(ValueError, match="pairs need two numbers"):
        paired([], [])


@given(strategies.lists(strategies.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_is_no_smaller(probabilities):
    found = holm(probabilities)
    assert all(0 <= p <= q <= 1 for p, q in zip(probabilities, found, strict=True))
    assert sorted(range(len(found)), key=lambda at: (probabilities[at], at)) == sorted(
        range(len(found)), key=lambda at: (found[at], probabilities[at], at)
    )
    assert min(found) == pytest.approx(min(1, len(found) * min(probabilities)))


def test_normal():
    assert normal(0.5, 0.5 + 1.959964 * 0.1, 0.1, (9, 9)).p == pytest.approx(0.05, abs=1e-6)
    assert normal(20.0, 30.0, None, (9, 9)).p == 1  # no shares, so nothing tells how sure they are


@pytest.mark.parametrize("error", [0.0, None])
def test_shares_without_an_error_have_that_of_both_together(error):
    assert 2 / math.comb(40, 20) <= normal(1.0, 0.0, error, (20, 20)).p < 1e-9  # no less than Fisher's exact test
    assert normal(1.0, 0.0, error, (4, 4)).p == 2 / math.comb(8, 4)
    found = normal(0.9, 0.6, error, (100, 300))
    assert found.high - found.low == pytest.approx(2 * 1.959964 * math.sqrt(0.675 * 0.325 * (1 / 100 + 1 / 300)))
    assert normal(1.0, 0.0, error, (1, 1)).p == 1 and normal(1.0, 0.0, error, (3, 3)).p > 0.05
    assert normal(1.0, 1.0, error, (20, 20)).p == 1 and normal(1.0, 0.0, error, (0, 20)).p == 1


def test_items_of_one_document_are_no_more_sure_than_one():
    import numpy as np

    random, documents = np.random.default_rng(3), np.repeat(np.arange(8), 3)
    draws = [
        math.sqrt(0.95) * random.normal(size=8)[documents] + math.sqrt(0.05) * random.normal(size=24)
        for _ in range(200)
    ]
    names = [f"document {at}" for at in range(8) for _ in range(3)]
    false = sum(paired([0.0] * 24, list(draw), clusters=names).p < 0.05 for draw in draws)
    assert 0 < false < 0.15 * 200
    assert sum(paired([0.0] * 24, list(draw)).p < 0.05 for draw in draws) > 0.25 * 200  # as if independent
    found = [estimate(list(draw), clusters=names) for draw in draws]
    assert sum(one.low <= 0 <= one.high for one in found) > 0.85 * 200
    assert all(one.n == 24 for one in found)


def test_clusters_of_different_sizes():
    values, names = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    found = estimate(values, clusters=names)
    assert found.value == 2 and found.low is None  # two clusters say nothing of the others
    many = estimate([1.0, 1.0, *range(1, 6)], clusters=["a", "a", *"bcdef"])
    assert many.low < many.value < many.high
    assert paired([0.0] * 4, values, clusters=names).p == 0.5  # the sign test's, of two
    assert paired([0.0] * 20, [1.0] * 20, clusters=[at % 5 for at in range(20)]).p == 0.0625
    assert paired([1.0] * 4, [math.inf] * 4, clusters=names).p == 0.5


@pytest.mark.parametrize("count, t, p", [(6, 2.5706, 0.05), (7, 2.4469, 0.05), (8, 5.4079, 0.001), (41, 2.7045, 0.01)])
def test_few_clusters_need_as_much_as_students_t(count, t, p):
    import numpy as np

    from beacon.evaluation.report.statistics import _student

    numbers = np.random.default_rng(0).normal(size=count)
    numbers = (numbers - numbers.mean()) / numbers.std(ddof=1) * math.sqrt(count) + t
    assert _student(numbers, np.ones(count)) == pytest.approx(p, rel=1e-3)
    assert paired([0.0] * count, list(numbers)).p >= p * 0.999


@settings(max_examples=30, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.floats(-5, 5), strategies.floats(-5, 5)), min_size=1, max_size=30))
def test_comparing_the_other_way_round_gives_the_reverse(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    there, back = paired(first, second), paired(second, first)
    assert there.p == pytest.approx(back.p, abs=0.002) and (there.before, there.after) == (back.after, back.before)
    if len(pairs) < ENOUGH:
        assert there.low is there.high is back.low is None
    else:
        assert there.low == pytest.approx(-back.high, abs=1e-9)
