"""Ratios while training: from the seed and the batch's number alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from beacon import BeaconConfig
from beacon.training.ratios import Draw, RatioConfig, check_drawn

CONFIG = BeaconConfig(window=64, ratios=(0, 2, 4, 8))


def draw(number: int = 0, windows: int = 4, progress: float = 0.0) -> Draw:
    return Draw(number, windows, progress, CONFIG)


def test_the_same_batch_has_the_same_ratios_and_another_has_others() -> None:
    ratios = RatioConfig(seed=3)
    drawn = [ratios(draw(number, 20)) for number in range(4)]
    assert drawn == [RatioConfig(seed=3)(draw(number, 20)) for number in range(4)]
    assert len({tuple(one) for one in drawn}) == 4
    assert RatioConfig(seed=4)(draw(0, 20)) != drawn[0]
    assert ratios(draw(0, 5)) == drawn[0][:5]  # a longer batch goes on, it does not begin anew


def test_policies() -> None:
    assert set(RatioConfig()(draw(windows=100))) == {2, 4, 8}  # those of the configuration, 0 left out
    assert len(set(RatioConfig(policy="instance-random")(draw(windows=100)))) == 1
    one_each = {RatioConfig(policy="instance-random")(draw(number))[0] for number in range(50)}
    assert one_each == {2, 4, 8}
    assert RatioConfig(policy="sequence", choices=[2, 8])(draw(windows=5)) == [2, 8, 2, 8, 2]
    assert RatioConfig(policy="fixed", choices=[16, 2])(draw()) == [16] * 4
    assert RatioConfig(choices=(0,))(draw()) == [0] * 4


def test_repeats_weigh() -> None:
    counts = Counter(RatioConfig(choices=(2, 2, 2, 4))(draw(windows=4000)))
    assert 0.72 < counts[2] / 4000 < 0.78


def test_a_curriculum_moves_on_with_the_training() -> None:
    stages = [{"until": 0.3, "choices": [2]}, {"until": 1, "choices": [4, 8]}]
    ratios = RatioConfig(choices=(16,), curriculum=stages)
    assert set(ratios(draw(windows=50, progress=0.29))) == {2}
    for progress in (0.3, 0.9, 1.0):
        assert set(ratios(draw(windows=50, progress=progress))) == {4, 8}


def test_what_a_function_of_the_users_returns_is_checked() -> None:
    assert check_drawn(8, draw()) == [8] * 4 and check_drawn((2, 4, 8, 2, 2), draw()) == [2, 4, 8, 2, 2]
    with pytest.raises(ValueError, match="got 3 for 4 windows of batch 0"):
        check_drawn([2, 2, 2], draw())
    with pytest.raises(ValueError, match="stride must divide by ratio"):
        check_drawn([2, 2, 2, 3], draw())


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"policy": "adaptive"}, ValueError, "policy must be one of step-random"),
        ({"choices": []}, TypeError, "choices must be a list"),
        ({"choices": "2"}, TypeError, "choices must be a list"),
        ({"choices": [2.5]}, TypeError, "ratio must be an int"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
        ({"same_on_all_ranks": 1}, TypeError, "true or false"),
        ({"curriculum": [{"until": 0.5, "choices": [2]}]}, ValueError, "the last one at 1"),
        ({"curriculum": [{"until": 2, "choices": [2]}]}, ValueError, "until must lie"),
    ],
)
def test_bad_settings(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RatioConfig(**fields)


def test_ratios_that_do_not_divide_the_stride_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="stride=64 and ratio=3"):
        RatioConfig(choices=(2, 3)).check(CONFIG)
    with pytest.raises(ValueError, match="stride=64 and ratio=5"):
        RatioConfig(curriculum=[{"until": 1, "choices": [5]}]).check(CONFIG)
