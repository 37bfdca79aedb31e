"""Every kernel against float64, on small plans of every kind, before anything is timed.

Memory that a kernel did not write is NaN here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from beacon.plan import Span
from benchmarks.gpu.attempts import said
from benchmarks.gpu.comparisons import Sizes, backward, decode, forward, rotate
from tests.attention.plans import CASES, Case

SCALE = 16  # windows of the tests' plans are 16 tokens: on a GPU they fill several tiles


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        kernel: Which kernel it vouches for.
        name: What is compared.
        dtype: Of the tensors.
        shape: Heads and channels.
        run: Gives the worst quotient of error and what is allowed.
    """

    kernel: str
    name: str
    dtype: torch.dtype
    shape: str
    run: Callable[[], float]

    def result(self) -> tuple[float, str]:
        """The worst quotient, and why the check fails (empty where the kernel is right).

        A kernel may break in any way: that is its failure, not the end of the run.
        """
        try:
            worst = self.run()
        except Exception as err:
            return math.inf, said(err)
        return worst, "" if worst <= 1 else f"error is {worst:.3g} times what is allowed"


def checks(device: torch.device, *, thorough: bool = False) -> list[Check]:
    """All comparisons, the most telling ones of every kernel first.

    Args:
        device: A GPU, or the CPU for the interpreter: smaller plans, no bfloat16.
        thorough: Every plan in every dtype and head_dim.
    """
    on_gpu = device.type == "cuda"
    plans = _plans(device)
    usual = Sizes(torch.bfloat16) if on_gpu else Sizes(torch.float16, 2, 1, 64)
    others = list(_others(thorough)) if on_gpu else [Sizes(torch.float32, 2, 2, 64)]

    def attention(cases: Sequence[Case], sizes: Sizes) -> Iterator[Check]:
        for kernel, compare in (("forward", forward), ("backward", backward)):
            for case in cases:
                yield _check(kernel, case.name, sizes, compare, case, sizes, device)

    def rest(sizes: Sizes) -> Iterator[Check]:
        for seqlen_q in (1, 3):
            yield _check("decode", f"{seqlen_q} queries", sizes, decode, seqlen_q, sizes, device)
        yield _check("rotate_commit", "three sources", sizes, rotate, sizes, device)

    first = [*attention(plans[:2], usual), *rest(usual)]
    more = [check for sizes in others for check in (*attention(plans if thorough else plans[:1], sizes), *rest(sizes))]
    return [*first, *attention(plans[2:], usual), *more]


def check_tiles(kernel: str, sizes: Sizes, device: torch.device, *, thorough: bool) -> str:
    """What is wrong with ``forward``, ``backward`` or ``decode`` with the tiles as they stand; empty if nothing is.

    Args:
        kernel: Which one.
        sizes: Heads, channels, dtype.
        device: A GPU, or the CPU.
        thorough: Plans of every kind, else the first call of two of them.
    """
    if kernel == "decode":
        found = [_check(kernel, "", sizes, decode, seqlen_q, sizes, device) for seqlen_q in (1, 3)[: 1 + thorough]]
    else:
        compare = {"forward": forward, "backward": backward}[kernel]
        cases = _plans(device)
        if not thorough:
            cases = [replace(case, cuts=case.cuts[:1]) for case in cases[:2]]
        found = [_check(kernel, case.name, sizes, compare, case, sizes, device) for case in cases]
    return next((reason for check in found if (reason := check.result()[1])), "")


def _plans(device: torch.device) -> list[Case]:
    """Plans of every kind, first those that use all tables of tiles."""
    if device.type == "cpu":
        return [replace(CASES[8], cuts=CASES[8].cuts[:1]), replace(CASES[1], cuts=CASES[1].cuts[:2])]
    few = replace(CASES[0], name="few-beacons", ratios=(64,))
    return [_scaled(case) for case in (CASES[1], few, CASES[0], *CASES[2:])]


def _check(kernel: str, name: str, sizes: Sizes, compare: Callable[..., float], *arguments: object) -> Check:
    def run() -> float:
        with poisoned():
            return compare(*arguments)

    return Check(kernel, name, sizes.dtype, sizes.name, run)


@contextmanager
def poisoned() -> Iterator[None]:
    """While it lasts, new memory is NaN and warnings that determinism costs speed are silent."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _others(thorough: bool) -> Iterator[Sizes]:
    yield Sizes(torch.float16, 4, 4)
    yield Sizes(torch.bfloat16, 4, 1, 64)
    yield Sizes(torch.bfloat16, 6, 2, 96)
    yield Sizes(torch.bfloat16, 4, 2, 256)
    if thorough:
        yield from (Sizes(torch.float16, 8, 2, head_dim) for head_dim in (64, 96, 256))
        yield from (Sizes(torch.float32, 4, 2, head_dim) for head_dim in (64, 96, 128, 256))


def _scaled(case: Case) -> Case:
    """The same plan with windows of 256 tokens, and calls that end off every grid."""
    config = {"window": 16, "stride": 8, **case.config}
    config |= {"window": config["window"] * SCALE, "stride": config["stride"] * SCALE}
    span = Span(case.span.keep_first * SCALE, None if case.span.keep_from is None else case.span.keep_from * SCALE)
    cuts = tuple(tuple(count * SCALE - 3 if count > 1 else count for count in cut) for cut in case.cuts)
    return replace(case, config=config, span=span, cuts=cuts)
