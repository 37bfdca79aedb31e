"""The plan against a brute-force reading of the same texts, for random windows, ratios, cuts and segments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beacon import BeaconConfig
from beacon.plan import Plan, RowState, Span, build_plan, schedule
from tests.brute import Brute, Name, Seen

SHAPES = [
    ("append", "step-expansion", False),
    ("append", "step-expansion", True),
    ("append", "segmentation", False),
    ("append", "full-coverage", False),
    ("append", "full-coverage", True),
    ("interleave", "full-coverage", True),
    ("interleave", "step-expansion", False),
]


@dataclass
class Row:
    """What the plans of one row said, under names."""

    state: RowState
    memory: list[Name] = field(default_factory=list)
    open: list[Name] = field(default_factory=list)
    raw: list[Seen] = field(default_factory=list)
    beacons: list[Seen] = field(default_factory=list)


def follow(config: BeaconConfig, rows: list[Row], plan: Plan, steps: list[list[Any]]) -> None:
    """Give the plan's stores names and note down what every query of the pass sees."""
    pool = [name for row in rows for name in row.open]
    pool += [("raw", s.start + a) for mine in steps for s in mine for a in range(s.raw_lo, s.raw_hi)]
    pool += [("beacon", s.start, j + 1) for mine in steps for s in mine for j in range(s.beacon_lo, s.beacon_hi)]
    raws = [(pool[p], at) for p, at in zip(plan.raw_slots.pool.tolist(), plan.raw_slots.position.tolist(), strict=True)]
    beacons = [
        (pool[p], at)
        for p, at in zip(plan.beacon_slots.pool.tolist(), plan.beacon_slots.position.tolist(), strict=True)
    ]
    committed = list(zip(plan.commits.pool.tolist(), plan.commits.position.tolist(), strict=True))
    opened = [pool[p] for p in plan.opens.pool.tolist()]
    for row, commits, opens in zip(rows, plan.commit_counts, plan.open_counts, strict=True):
        places = [at for _, at in committed[:commits]]
        assert places == list(range(len(row.memory), len(row.memory) + commits))
        row.memory += [pool[p] for p, _ in committed[:commits]]
        row.open = opened[:opens]
        committed, opened = committed[commits:], opened[opens:]
    assert not committed and not opened
    cached = sum(len(name) > 0 for name in pool) - len(plan.raw) - len(plan.beacon)
    for queries, first, kind in ((plan.raw, cached, "raw"), (plan.beacon, cached + len(plan.raw), "beacons")):
        runs = [getattr(queries, name).tolist() for name in queries.__dataclass_fields__]
        for number, (row, at, memory, raw_lo, raw_hi, beacon_lo, beacon_hi) in enumerate(zip(*runs, strict=True)):
            keys = [(name, i) for i, name in enumerate(rows[row].memory[:memory])]
            keys += raws[raw_lo:raw_hi] + beacons[beacon_lo:beacon_hi]
            assert len(keys) == len(set(keys)) and memory <= len(rows[row].memory)
            getattr(rows[row], kind).append(Seen(pool[first + number], at, frozenset(keys)))


def check_blocks(plan: Plan) -> None:
    """Blocks tile both query lists in order, hold all their window's keys, and equal shapes mean equal masks."""
    shapes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    ends = [0, 0]
    for block in plan.blocks:
        view: list[tuple[int, ...]] = []
        for which, queries in enumerate((plan.raw, plan.beacon)):
            mine = (block.raw_queries, block.beacon_queries)[which]
            assert mine.start == ends[which]
            ends[which] = mine.stop
            for i in range(mine.start, mine.stop):
                assert queries.row[i] == block.step.row
                raw = (int(queries.raw_lo[i]) - block.raw_slots.start, int(queries.raw_hi[i]) - block.raw_slots.start)
                seen = (int(queries.beacon_lo[i]), int(queries.beacon_hi[i]))
                if seen[0] < seen[1]:
                    assert block.beacon_slots.start <= seen[0] and seen[1] <= block.beacon_slots.stop
                    seen = (seen[0] - block.beacon_slots.start, seen[1] - block.beacon_slots.start)
                else:
                    seen = (0, 0)
                assert 0 <= raw[0] < raw[1] <= block.raw_slots.stop - block.raw_slots.start
                view.append((which, int(queries.memory[i]), *raw, *seen))
        assert shapes.setdefault(block.shape, view) == view
    assert ends == [len(plan.raw), len(plan.beacon)]


def run(
    config: BeaconConfig,
    calls: list[list[int]],
    choose: Callable[[int, int], int],
    segment: int,
    span: Span,
    text_ends: bool,
) -> list[Row]:
    """Plan the calls (new tokens per row each) in passes of ``segment`` windows."""
    rows = [Row(RowState(number)) for number in range(len(calls[0]))]
    for counts in calls:
        steps = [
            schedule(
                config,
                row.state,
                count,
                lambda at, n=n: choose(n, len(at.ratios)),
                row=n,
                span=span,
                text_ends=text_ends,
            )
            for n, (row, count) in enumerate(zip(rows, counts, strict=True))
        ]
        for low in range(0, max(len(mine) for mine in steps), segment):
            part = [mine[low : low + segment] for mine in steps]
            ends = [mine[-1][1] if mine else row.state for mine, row in zip(part, rows, strict=True)]
            only = [[step for step, _ in mine] for mine in part]
            plan = build_plan(config, [row.state for row in rows], only, ends)
            check_blocks(plan)
            follow(config, rows, plan, only)
            for row, end in zip(rows, ends, strict=True):
                row.state = end
    return rows


@st.composite
def readings(draw: Any) -> dict[str, Any]:
    placement, attention, attend_beacons = draw(st.sampled_from(SHAPES))
    window = draw(st.integers(1, 12))
    stride = window if placement == "interleave" else draw(st.integers(1, window))
    keep_first = draw(st.sampled_from([0, 0, 1, 5, 14]))
    config = BeaconConfig(
        window=window,
        stride=stride,
        ratios=(1,),
        placement=placement,
        attention=attention,
        attend_beacons=attend_beacons,
        attend_memory=draw(st.booleans()),
        sink=0 if keep_first else draw(st.integers(0, stride)),
    )
    tail = draw(st.none() | st.integers(0, 4))
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    whole = draw(st.booleans())
    calls = [lengths]
    if not whole:
        cuts = [sorted(draw(st.lists(st.integers(0, n), max_size=4))) for n in lengths]
        ends = [[0, *c, *[n] * (4 - len(c)), n] for c, n in zip(cuts, lengths, strict=True)]
        calls = [[end[i + 1] - end[i] for end in ends] for i in range(5)]
        calls = [counts for counts in calls if sum(counts)]
    divisors = [0] + [r for r in range(1, stride + 1) if stride % r == 0]
    return {
        "config": config,
        "calls": calls,
        "ratios": [draw(st.lists(st.sampled_from(divisors), min_size=1, max_size=5)) for _ in lengths],
        "segment": draw(st.sampled_from([1, 2, 3, 100])),
        "span": Span(keep_first, None if tail is None else keep_first + tail * stride),
        "text_ends": whole and draw(st.booleans()),
    }


# A kept tail with stride < window: the window that would reach into the tail is not condensed any more.
PINNED = {
    "config": BeaconConfig(window=8, stride=4, ratios=(2,), ratio_policy="fixed"),
    "calls": [[9, 3], [11, 17]],
    "ratios": [[2], [4]],
    "segment": 2,
    "span": Span(3, 15),
    "text_ends": False,
}


@given(readings())
@settings(max_examples=150)
@example(PINNED)
def test_plan_is_the_brute_force_reading(case: dict[str, Any]) -> None:
    config, span, ratios = case["config"], case["span"].check(case["config"]), case["ratios"]
    rows = run(
        config, case["calls"], lambda n, w: ratios[n][w % len(ratios[n])], case["segment"], span, case["text_ends"]
    )
    for number, row in enumerate(rows):
        length = sum(counts[number] for counts in case["calls"])
        brute = Brute(
            config,
            lambda w, mine=ratios[number]: mine[w % len(mine)],
            span.keep_first,
            span.keep_from,
            length if case["text_ends"] else None,
        )
        for token in range(length):
            brute.read(token)
        assert row.raw == brute.raw
        assert row.beacons == brute.beacons
        assert row.memory == brute.memory
        if span == Span():  # else the kept text stretches positions
            furthest = max(seen.position for seen in (*row.raw, *row.beacons))
            assert furthest <= len(row.memory) + config.window + config.step
        assert row.open == [*(("raw", t) for t in brute.open), *brute.sisters]
        state = row.state
        assert state.ratios == tuple(brute.windows) and state.tokens == length and state.open_raw == len(brute.open)
        assert state.beacons == sum(name[0] == "beacon" for name in brute.memory)
        assert state.memory == len(brute.memory) == state.sinks + state.kept + state.beacons


@pytest.mark.parametrize("window, budget", [(1024, 0.05), (128, 0.25)])
def test_planning_128k_tokens_is_quick(window: int, budget: float) -> None:
    """CPU time of this thread, so that a busy machine does not matter."""
    config = BeaconConfig(window=window, ratios=(8,), ratio_policy="fixed")
    times = []
    for _ in range(3):
        begin = time.thread_time()
        state = RowState(0)
        steps = schedule(config, state, 131072, lambda at: 8, row=0, span=Span())
        plan = build_plan(config, [state], [[step for step, _ in steps]], [steps[-1][1]])
        times.append(time.thread_time() - begin)
    assert len(plan.raw) == 131072 and len(plan.beacon) == 131072 // 8
    assert min(times) < budget, f"planning took {min(times) * 1e3:.0f} ms"
