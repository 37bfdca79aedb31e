"""DESIGN section 2 acted out for one row, token by token, in plain Python: who sees whom, and where.

Keys have names that outlive the call that read them: ``("raw", text index)`` and ``("beacon", first text index of its
window, number from 1)``. What a query sees is a set of (name, position).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from beacon import BeaconConfig

Name = tuple[str | int, ...]


class Seen(NamedTuple):
    """One query: its name, its position, and the keys it sees with theirs."""

    name: Name
    position: int
    keys: frozenset[tuple[Name, int]]


class Brute:
    """Read the tokens of one row one by one.

    Args:
        config: The configuration.
        ratio: Gives a window's ratio by its number.
        keep_first: Tokens kept as they are.
        keep_from: Text index from which on nothing is condensed.
        text_ends: Length of the text if its last window gets no beacons, else None.
    """

    def __init__(
        self,
        config: BeaconConfig,
        ratio: Callable[[int], int],
        keep_first: int = 0,
        keep_from: int | None = None,
        text_ends: int | None = None,
    ) -> None:
        self.config, self.ratio = config, ratio
        self.keep_first, self.keep_from, self.text_ends = keep_first, keep_from, text_ends
        self.memory: list[Name] = []
        self.open: list[int] = []  # text indices of the open window's raw tokens
        self.sisters: list[Name] = []  # beacons of the open window
        self.windows: list[int] = []  # ratios of committed windows
        self.raw: list[Seen] = []
        self.beacons: list[Seen] = []

    def read(self, token: int) -> None:
        """Read the text's token number ``token``."""
        config, head = self.config, token < self.keep_first
        self.open.append(token)
        start = self.open[0]
        in_tail = not head and self.keep_from is not None and start + config.window > self.keep_from
        end = self.keep_first if head else start + config.window
        in_last = self.text_ends is not None and not in_tail and self.text_ends <= end
        plain = head or in_tail or in_last
        interleave = config.placement == "interleave"
        full = len(self.open) == config.window and not plain
        ratio = self.ratio(len(self.windows)) if not plain and (interleave or full) else 0

        self.raw.append(self._see(("raw", token), self._raw_at(len(self.open) - 1, ratio), len(self.open), ratio))
        if interleave and ratio and len(self.open) % ratio == 0:
            self._beacon(len(self.open) // ratio, ratio)
        if head and len(self.open) == self.keep_first and not in_last:
            self.memory += [("raw", t) for t in self.open]
            self.open = []
        if full:
            if not interleave and ratio:
                for number in range(1, config.step // ratio + 1):
                    self._beacon(number, ratio)
            self._commit(ratio)

    def _commit(self, ratio: int) -> None:
        step = self.config.step
        if ratio:
            sinks = self.open[: self.config.sink] if not self.windows else []
            self.memory += [("raw", t) for t in sinks] + self.sisters
        else:
            self.memory += [("raw", t) for t in self.open[:step]]
        self.open, self.sisters = self.open[step:], []
        self.windows.append(ratio)

    def _beacon(self, j: int, r: int) -> None:
        """Beacon ``j`` of the open window reads, and then stands."""
        config = self.config
        reach = {
            "step-expansion": (0, j * r),
            "segmentation": ((j - 1) * r, j * r),
            "full-coverage": (0, config.window),
        }
        low, high = reach[config.attention]
        if config.placement == "interleave":
            low, high = 0, j * r
        name = ("beacon", self.open[0], j)
        origin = len(self.memory)
        at = origin + self._beacon_at(j, r)
        keys = {(name, at)}
        if config.attend_memory:
            keys |= {(entry, i) for i, entry in enumerate(self.memory)}
        keys |= {(("raw", self.open[a]), origin + self._raw_at(a, r)) for a in range(low, high)}
        if config.attend_beacons:
            keys |= {(sister, origin + self._beacon_at(i + 1, r)) for i, sister in enumerate(self.sisters)}
        self.beacons.append(Seen(name, at, frozenset(keys)))
        self.sisters.append(name)

    def _see(self, name: Name, u: int, count: int, r: int) -> Seen:
        """What a raw token sees: all memory, ``count`` raw tokens, and beacons where they stand in causal order."""
        origin = len(self.memory)
        keys = {(entry, i) for i, entry in enumerate(self.memory)}
        keys |= {(("raw", self.open[a]), origin + self._raw_at(a, r)) for a in range(count)}
        if self._causal():
            keys |= {(sister, origin + self._beacon_at(i + 1, r)) for i, sister in enumerate(self.sisters)}
        return Seen(name, origin + u, frozenset(keys))

    def _causal(self) -> bool:
        return self.config.placement == "interleave" and self.config.attention == "full-coverage"

    def _raw_at(self, a: int, r: int) -> int:
        return a + a // r if r and self._causal() else a

    def _beacon_at(self, j: int, r: int) -> int:
        config = self.config
        if config.placement == "interleave":
            return j * (r + 1) - 1 if self._causal() else j * r
        if config.attention == "segmentation":
            return r
        last = config.window if config.attention == "full-coverage" else j * r
        return last - 1 + j if config.attend_beacons else last
