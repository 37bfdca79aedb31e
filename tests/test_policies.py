"""Which ratio each window gets when the caller names none, and what the caller may name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from beacon import BeaconConfig, RatioRequest
from beacon.policies import choose_ratio
from tests.readers import fixed, wrapped
from tests.tiny_models import random_ids


def read(config: BeaconConfig, length: int, rows: int = 1, calls: int = 1, **call: Any) -> list[tuple[int, ...]]:
    """Ratios of the committed windows of every row, by a model whose weights do not matter here."""
    model, cache, past = wrapped(config), None, 0
    for ids in random_ids(rows, length).tensor_split(calls, dim=1):
        past += ids.shape[1]
        cache = model.compress(ids, torch.ones(rows, past), cache, **call)
    assert cache is not None
    return [state.ratios for state in cache.states]


def request(config: BeaconConfig, *, native: int = 100, length: int = 0, memory: int = 0, ratios: Any = ()) -> int:
    return choose_ratio(RatioRequest(config, native, 0, len(ratios), length, memory, tuple(ratios)))


def test_fixed_takes_the_first_and_sequence_cycles() -> None:
    assert read(BeaconConfig(window=8, ratios=(4, 2), ratio_policy="fixed"), 40) == [(4,) * 5]
    config = BeaconConfig(window=8, ratios=(4, 2, 2, 0), ratio_policy="sequence")
    assert read(config, 50) == read(config, 50, calls=7) == [(4, 2, 2, 0, 4, 2)]


@pytest.mark.parametrize("policy", ["step-random", "instance-random"])
def test_random_policies_follow_from_seed_row_and_window(policy: str) -> None:
    config = BeaconConfig(window=8, ratios=(0, 1, 2, 4, 8), ratio_policy=policy, seed=1)
    drawn = read(config, 160, rows=3)
    torch.manual_seed(123)
    assert drawn == read(config, 160, rows=3, calls=9)
    assert drawn[:2] == read(config, 160, rows=2) and drawn != read(config.replace(seed=2), 160, rows=3)
    each = [len(set(row)) for row in drawn]
    assert each == [1, 1, 1] if policy == "instance-random" else min(each) > 2
    assert len(set(drawn)) > 1


def test_repeats_weigh_random_draws() -> None:
    config = BeaconConfig(window=8, ratios=(2, 2, 2, 2, 8), ratio_policy="step-random")
    drawn = [choose_ratio(RatioRequest(config, 64, 0, window, 0, 0, ())) for window in range(2000)]
    assert 0.75 < drawn.count(2) / 2000 < 0.85


def test_adaptive_takes_the_smallest_that_fits() -> None:
    """(native - W) * r + W >= length + reserve: 60 * r + 40 here."""
    config = BeaconConfig(window=40, ratios=(8, 2, 4, 0), reserve=10)
    for length, ratio in ((1, 0), (90, 0), (91, 2), (150, 2), (151, 4), (270, 4), (271, 8), (510, 8), (9999, 8)):
        assert request(config, length=length) == ratio, length
    assert request(config.replace(ratios=(8, 2, 4)), length=1) == 2


def test_adaptive_never_goes_down_and_goes_up_before_the_native_context_overflows() -> None:
    """A commitment must leave memory + its entries + a window within 100; window = stride = 40."""
    config = BeaconConfig(window=40, ratios=(2, 4, 8, 0))
    for memory, before, ratio in ((0, 8, 8), (40, 2, 2), (41, 2, 4), (50, 2, 4), (51, 2, 8), (55, 4, 8), (60, 8, 8)):
        assert request(config, length=1, memory=memory, ratios=(before,)) == ratio, memory
    assert request(config, memory=20, ratios=(0,)) == 0 and request(config, memory=21, ratios=(0,)) == 2
    assert request(config, memory=0, ratios=(20,)) == 20  # named by a call: kept, for it never goes down


def test_adaptive_on_a_growing_text_warns_once_with_the_numbers() -> None:
    config = BeaconConfig(window=16, ratios=(0, 2, 4), reserve=0, native_context=40)
    with pytest.warns(
        UserWarning, match=r"even the largest ratio 4 .* memory 24 \+ 4 new entries \+ window 16 = 44 > 40"
    ):
        (ratios,) = read(config, 16 * 8, calls=16)
    assert ratios == (0, 2, 4, 4, 4, 4, 4, 4)[: len(ratios)] and len(ratios) == 8


def test_adaptive_is_silent_when_the_text_fits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = BeaconConfig(window=16, ratios=(0, 2), reserve=0, native_context=24)
        assert read(config, 24) == [(0,)]  # one more window would not fit, but none is coming
        config = BeaconConfig(window=16, ratios=(2, 4), reserve=0, native_context=40)
        assert read(config, 60) == [(2, 2, 2)]
        assert read(config, 60, expected_length=100) == [(4, 4, 4)]


def test_adaptive_decides_when_the_first_ratio_is_needed() -> None:
    """Append asks when the first window is full: what has come until then counts, in one call or in many."""
    config = BeaconConfig(window=16, ratios=(0, 2, 4), reserve=8, native_context=64)
    assert read(config, 96) == [(2,) * 6] and read(config, 120) == [(4,) * 7]
    assert read(config, 40, calls=5) == [(0, 0)]
    with pytest.warns(UserWarning, match="even the largest ratio 4 does not keep 64 tokens"):
        assert read(config, 96, calls=12) == [(0, 0, 0, 4, 4, 4)]
    assert read(config, 96, calls=12, expected_length=96) == [(2,) * 6]


def test_a_callable_is_a_policy() -> None:
    seen: list[RatioRequest] = []

    def policy(asked: RatioRequest) -> int:
        seen.append(asked)
        return (2, 8)[asked.window % 2]

    config = BeaconConfig(window=8, ratios=(2,), ratio_policy=policy)
    assert read(config, 26, rows=2) == [(2, 8, 2), (2, 8, 2)]
    assert [(ask.row, ask.window, ask.memory, ask.length) for ask in seen[:3]] == [
        (0, 0, 0, 26),
        (0, 1, 4, 26),
        (0, 2, 5, 26),
    ]
    assert seen[2].ratios == (2, 8) and seen[3].row == 1 and seen[0].native_context == 256
    with pytest.raises(ValueError, match="stride must divide by ratio, got stride=8 and ratio=3"):
        read(config.replace(ratio_policy=lambda asked: 3), 8)
    with pytest.raises(TypeError, match="ratio must be an int, got float"):
        read(config.replace(ratio_policy=lambda asked: 2.0), 8)
    with pytest.raises(ValueError, match="ratio_policy must be a name to be saved"):
        config.to_json()


def test_ratios_may_be_named_per_call() -> None:
    config = fixed(8, 2)
    assert read(config, 30, ratios=8) == [(8, 8, 8)]
    assert read(config, 30, ratios=[1, 0, 4]) == read(config, 30, ratios=(1, 0, 4, 8, 8), calls=4) == [(1, 0, 4)]
    assert read(config, 30, ratios=torch.tensor([1, 0, 4])) == [(1, 0, 4)]
    interleave = fixed(8, 2, placement="interleave")
    assert read(interleave, 30, ratios=[1, 0, 4, 2]) == [(1, 0, 4)]
    with pytest.raises(ValueError, match="got 3 and row 0 needs one for window 3"):
        read(interleave, 30, ratios=[1, 0, 4])  # the unfinished window needs one too
    model, ids = wrapped(interleave), random_ids(1, 30)
    assert torch.isfinite(model(ids, labels=ids, ratios=[1, 0, 4]).loss)  # except in training


def test_retrieval_needs_the_ratios_of_the_text() -> None:
    config = BeaconConfig(window=8, ratios=(0, 2, 8), ratio_policy="retrieval")
    assert read(config, 44, ratios=[8, 8, 2, 8, 2, 8]) == [(8, 8, 2, 8, 2)]
    with pytest.raises(ValueError, match=r"needs the ratios of this text.*beacon\.retrieval_ratios"):
        read(config, 44)
