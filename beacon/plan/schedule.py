"""Cut a row's new tokens into windows: which are read, which are full, and what they leave in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from beacon.config import BeaconConfig


@dataclass(frozen=True)
class Span:
    """What part of a text is condensed.

    Args:
        keep_first: Tokens at the start that are read in one plain pass and kept as they are.
        keep_from: Text index from which on nothing is condensed, or None.
    """

    keep_first: int = 0
    keep_from: int | None = None

    def check(self, config: BeaconConfig) -> Span:
        """Return self if it fits the configuration.

        Raises:
            TypeError: A value is not an int.
            ValueError: A value is out of range, off the stride's grid, or combined with a sink.
        """
        for name in ("keep_first", "keep_from"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an int, got {value!r}; pass a number of tokens.")
        if self.keep_first < 0:
            raise ValueError(f"keep_first must not be negative, got {self.keep_first}; pass 0 or more.")
        if self.keep_first and config.sink:
            raise ValueError(
                f"keep_first and sink exclude each other, got keep_first={self.keep_first} and sink={config.sink}; "
                "keep_first already keeps the first tokens, so set sink=0."
            )
        if self.keep_from is not None:
            windows = self.keep_from - self.keep_first
            if windows < 0 or windows % config.step:
                near = self.keep_first + max(windows, 0) // config.step * config.step
                raise ValueError(
                    f"keep_from - keep_first must be a multiple of stride, got keep_from={self.keep_from}, "
                    f"keep_first={self.keep_first} and stride={config.step}; the nearest below is {near}."
                )
        return self


BLOCK = 64


@dataclass(frozen=True, eq=False)
class Ratios:
    """The ratios of a row's windows; equal to a tuple of the same, and cheap to lengthen by one (which copies a tuple).

    Args:
        blocks: Full blocks of `BLOCK` ratios.
        tail: The rest.
    """

    blocks: tuple[tuple[int, ...], ...] = ()
    tail: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Ratios, tuple, list)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __len__(self) -> int:
        return len(self.blocks) * BLOCK + len(self.tail)

    def __iter__(self) -> Iterator[int]:
        for block in self.blocks:
            yield from block
        yield from self.tail

    def __getitem__(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        block, place = divmod(index % len(self), BLOCK)
        return (self.blocks[block] if block < len(self.blocks) else self.tail)[place]

    def then(self, ratio: int) -> Ratios:
        """The same and one more."""
        if len(self.tail) == BLOCK - 1:
            return Ratios((*self.blocks, (*self.tail, ratio)))
        return Ratios(self.blocks, (*self.tail, ratio))


@dataclass(frozen=True)
class RowState:
    """Where one row of a batch stands between two calls. Immutable: reading returns a new one.

    Args:
        row: Number of the row in the batch it was first read in.
        tokens: Text tokens read.
        memory: Entries in memory.
        sinks: Entries in memory that are sinks.
        kept: Entries in memory that are raw tokens of windows with ratio 0 or of ``keep_first``.
        open_start: Text index of the first raw token of the open window.
        open_beacons: Beacons that stand in the open window (interleave).
        open_ratio: Ratio of the open window where it is already chosen (interleave), else None.
        ratios: Ratio of every committed window.
        committed_at: Text tokens read when the last window was committed.
    """

    row: int
    tokens: int = 0
    memory: int = 0
    sinks: int = 0
    kept: int = 0
    open_start: int = 0
    open_beacons: int = 0
    open_ratio: int | None = None
    ratios: Ratios = Ratios()
    committed_at: int = 0

    @property
    def open_raw(self) -> int:
        """Raw tokens of the open window read so far."""
        return self.tokens - self.open_start

    @property
    def beacons(self) -> int:
        """Entries in memory that are beacons."""
        return self.memory - self.sinks - self.kept


@dataclass(frozen=True)
class WindowStep:
    """The part of one window that one pass reads.

    Args:
        row: Index of the row in the batch.
        memory: Entries in memory before the window; also the origin of its positions.
        start: Text index of the window's first raw token.
        raw_lo: Offset in the window of the first new raw token.
        raw_hi: Offset after the last.
        ratio: Ratio of the window, 0 where it has no beacons.
        beacon_lo: Beacons that stood before.
        beacon_hi: Beacons that stand after.
        commit_raw: First raw tokens whose keys and values go to memory.
        commit_beacons: Beacons whose keys and values go to memory.
        consumed: Raw tokens that the condensation takes out of the window.
    """

    row: int
    memory: int
    start: int
    raw_lo: int
    raw_hi: int
    ratio: int
    beacon_lo: int
    beacon_hi: int
    commit_raw: int
    commit_beacons: int
    consumed: int

    @property
    def committed(self) -> int:
        """Entries that the window adds to memory."""
        return self.commit_raw + self.commit_beacons


def schedule(
    config: BeaconConfig,
    state: RowState,
    new_tokens: int,
    choose: Callable[[RowState], int],
    *,
    row: int,
    span: Span,
    text_ends: bool = False,
) -> list[tuple[WindowStep, RowState]]:
    """Cut ``new_tokens`` more tokens of one row into window steps.

    Args:
        config: Window, stride, placement, sink.
        state: Where the row stands.
        new_tokens: How many tokens are read now.
        choose: Gives the next window's ratio; asked in order, once per window.
        row: Index of the row in the batch.
        span: What part of the text is condensed.
        text_ends: The last new token ends the text (labels are given), so its window gets no beacons.

    Returns:
        The steps in reading order, each with the row's state after it.
    """
    steps: list[tuple[WindowStep, RowState]] = []
    left = new_tokens
    while left:
        step, state = _step(config, state, left, choose, row, span, text_ends)
        left -= step.raw_hi - step.raw_lo
        steps.append((step, state))
    return steps


def _step(
    config: BeaconConfig,
    state: RowState,
    left: int,
    choose: Callable[[RowState], int],
    row: int,
    span: Span,
    text_ends: bool,
) -> tuple[WindowStep, RowState]:
    a = state.open_raw
    head = state.tokens < span.keep_first
    tail = not head and span.keep_from is not None and state.open_start + config.window > span.keep_from
    length = span.keep_first if head else a + left if tail else config.window
    take = min(left, length - a)
    full = not tail and a + take == length
    last = text_ends and take == left
    condense = not head and not tail and not last

    ratio = 0
    if condense and config.placement == "interleave":
        ratio = choose(state) if state.open_ratio is None else state.open_ratio
    elif condense and full:
        ratio = choose(state)
    beacons = 0
    if ratio:
        beacons = (a + take) // ratio if config.placement == "interleave" else config.step // ratio

    commit = full and not last
    stride = length if head else config.step
    sink = config.sink if commit and not head and not state.ratios else 0
    step = WindowStep(
        row=row,
        memory=state.memory,
        start=state.open_start,
        raw_lo=a,
        raw_hi=a + take,
        ratio=ratio,
        beacon_lo=state.open_beacons,
        beacon_hi=beacons,
        commit_raw=(sink if ratio else stride) if commit else 0,
        commit_beacons=beacons if commit else 0,
        consumed=stride if commit else 0,
    )
    if not commit:
        chosen = ratio if condense and config.placement == "interleave" else state.open_ratio
        return step, replace(state, tokens=state.tokens + take, open_beacons=beacons, open_ratio=chosen)
    return step, replace(
        state,
        tokens=state.tokens + take,
        memory=state.memory + step.committed,
        sinks=state.sinks + sink,
        kept=state.kept + (0 if ratio else stride - sink),
        open_start=state.open_start + stride,
        open_beacons=0,
        open_ratio=None,
        ratios=state.ratios if head else state.ratios.then(ratio),
        committed_at=state.tokens + take,
    )
