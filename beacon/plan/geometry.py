"""Positions and visibility inside one window, vectorised over tokens (numpy int64 arrays).

Notation: ``a`` raw offset in its window, ``j`` beacon number from 1, ``r`` ratio (0 where the window has no
beacons). Positions are relative to the window's origin, the number of memory entries before it. For a window of
8 at ratio 4, who (rows) sees what (columns, raw a0..a7 then beacons b1 b2):

    append, step-expansion       append, segmentation        append, full-coverage
    a0  1 . . . . . . .  . .
    a7  1 1 1 1 1 1 1 1  . .     (raw tokens alike)          (raw tokens alike)
    b1  1 1 1 1 . . . .  1 .     1 1 1 1 . . . .  1 .        1 1 1 1 1 1 1 1  1 .
    b2  1 1 1 1 1 1 1 1  . 1     . . . . 1 1 1 1  . 1        1 1 1 1 1 1 1 1  . 1

    interleave, full-coverage: plain causal over a0 a1 a2 a3 b1 a4 a5 a6 a7 b2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from beacon.config import BeaconConfig

Ints = npt.NDArray[np.int64]


class View(NamedTuple):
    """Where tokens stand in their window and which of its keys they see (all arrays alike in shape)."""

    position: Ints
    raw_lo: Ints
    raw_hi: Ints
    beacon_lo: Ints
    beacon_hi: Ints


def raw_positions(config: BeaconConfig, a: Ints, r: Ints) -> Ints:
    """Window positions of raw tokens at offsets ``a``."""
    if config.placement == "interleave" and config.attention == "full-coverage":
        return a + np.where(r > 0, a // np.maximum(r, 1), 0)
    return a


def raw_view(config: BeaconConfig, a: Ints, r: Ints) -> View:
    """What raw tokens see of their window: everything before, themselves, and (interleaved) beacons before."""
    position = raw_positions(config, a, r)
    zero = np.zeros_like(a)
    return View(position, zero, a + 1, zero, position - a)


def beacon_view(config: BeaconConfig, j: Ints, r: Ints) -> View:
    """What beacons see of their window."""
    zero = np.zeros_like(j)
    end = j * r
    sisters = zero if config.attend_beacons else j - 1
    if config.placement == "interleave":
        position = j * (r + 1) - 1 if config.attention == "full-coverage" else end
        return View(position, zero, end, sisters, j)
    if config.attention == "segmentation":
        return View(r, end - r, end, sisters, j)
    covered = zero + config.window if config.attention == "full-coverage" else end
    position = covered - 1 + j if config.attend_beacons else covered
    return View(position, zero, covered, sisters, j)
