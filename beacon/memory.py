"""How memory is kept between passes: as attention reads it, or in eight bits, or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

import torch

EIGHT_BITS = {"int8": (torch.int8, 127.0), "float8_e4m3fn": (torch.float8_e4m3fn, 448.0)}  # and their largest code
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Quantized:
    """Entries in eight bits: codes times scales.

    Beside the rounding of the entries' own dtype, int8 errs by at most 1/254 of the largest magnitude in an entry's
    head, float8_e4m3fn by 1/16 of every number, or by 1/458,752 of the largest if that is more.

    Args:
        codes: int8 or float8_e4m3fn ``[entries, kv_heads, head_dim]``.
        scales: float32 ``[entries, kv_heads, 1]``.
        dtype: Of the entries.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, entries: torch.Tensor, name: str) -> Quantized:
        """Round entries ``[entries, kv_heads, head_dim]`` to ``int8`` or ``float8_e4m3fn``."""
        coded, most = EIGHT_BITS[name]
        numbers = entries.float()
        scales = (numbers.abs().amax(-1, keepdim=True) / most).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (numbers / scales).clamp(-most, most)
        return cls((codes.round() if coded == torch.int8 else codes).to(coded), scales, entries.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, which: slice) -> Quantized:
        return replace(self, codes=self.codes[which], scales=self.scales[which])

    def dense(self) -> torch.Tensor:
        """The entries in the dtype they came in."""
        return (self.codes.float() * self.scales).to(self.dtype)


Chunk: TypeAlias = "torch.Tensor | Quantized"


@dataclass(frozen=True)
class MemoryFormat:
    """How the entries of a memory rest between passes.

    Args:
        dtype: ``auto`` (as they are), ``int8`` or ``float8_e4m3fn``.
        offload: On the CPU (in pinned memory where there is a GPU).
    """

    dtype: str = "auto"
    offload: bool = False

    @property
    def packs(self) -> bool:
        """Whether entries rest in another way than attention reads them."""
        return self.dtype != "auto" or self.offload

    def rest(self, row: AtRest, home: torch.device) -> AtRest:
        """A row's memory in this format, whatever it was kept in before.

        Args:
            row: Memory keys or values.
            home: Where attention reads them.
        """
        if isinstance(row, Packed) and row.format == self:
            return row
        dense = row.dense() if isinstance(row, Packed) else row
        return Packed((self.chunk(dense),), home, self) if self.packs and len(dense) else dense.to(home)

    def commit(
        self,
        rows: Sequence[AtRest],
        dense: Sequence[torch.Tensor],
        new: torch.Tensor,
        counts: Sequence[int],
        grown: Sequence[Growing] | None = None,
    ) -> tuple[list[AtRest], list[torch.Tensor], torch.Tensor]:
        """Add entries to every row's memory.

        They are rounded at once, so that it does not matter how many windows a pass reads.

        Args:
            rows: Memory keys or values at rest, in this format or (where it does not pack) any.
            dense: The same as attention reads them, ``[m, kv_heads, head_dim]`` each.
            new: New entries, packed row after row ``[n, kv_heads, head_dim]``.
            counts: How many of them each row gets.
            grown: Where each row's memory grows, if all passes of a call share a place for it; not where it packs.

        Returns:
            The rows at rest, as attention reads them, and the new entries as it reads them.
        """
        coded = None if self.dtype == "auto" else Quantized.of(new, self.dtype)
        if coded is not None:
            new = coded.dense()
        parts = new.split(list(counts))
        if grown is not None and not self.packs:
            whole = [row.then(old, part) for row, old, part in zip(grown, dense, parts, strict=True)]
        else:
            whole = [torch.cat([old, part]) if len(part) else old for old, part in zip(dense, parts, strict=True)]
        if not self.packs:
            return list(whole), whole, new
        kept: list[AtRest] = []
        for row, part, end in zip(rows, parts, accumulate(counts), strict=True):
            if len(part):
                mine = self.chunk(part if coded is None else coded[end - len(part) : end])
                row = row.then(mine) if isinstance(row, Packed) else Packed((mine,), new.device, self)
            kept.append(row)
        return kept, whole, new

    def chunk(self, entries: Chunk) -> Chunk:
        """Entries as they rest, in memory of their own."""
        if self.dtype != "auto" and isinstance(entries, torch.Tensor):
            entries = Quantized.of(entries, self.dtype)
        return _each(entries, _offloaded if self.offload else torch.clone)


class Growing:
    """One row's memory keys or values while a call reads in several passes: a place of the final size, filled in order.

    What a pass gets is a view of what is there by then, which nobody writes any more.

    Args:
        size: Entries after the call.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._place: torch.Tensor | None = None

    def then(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """``old`` (which is there already, but for the first time) and ``new``."""
        if not len(new):
            return old
        if self._place is None:
            self._place = new.new_empty(self._size, *new.shape[1:])
            self._place[: len(old)] = old
        end = len(old) + len(new)
        self._place[len(old) : end] = new
        return self._place[:end]


@dataclass(frozen=True)
class Packed:
    """One row's memory keys or values at rest, at least one entry. Immutable, like the tensors of a store.

    Args:
        chunks: Entries in order.
        home: Where attention reads them.
        format: What they are kept in.
    """

    chunks: tuple[Chunk, ...]
    home: torch.device
    format: MemoryFormat

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(chunk.nbytes for chunk in self.chunks)

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def to(self, device: torch.device | str) -> Packed:
        """The same to be read on another device; what rests on the CPU stays there."""
        home = torch.device(device)
        if self.format.offload:
            return replace(self, home=home)
        return replace(self, home=home, chunks=tuple(_each(chunk, lambda part: part.to(home)) for chunk in self.chunks))

    def then(self, chunk: Chunk) -> Packed:
        """The same and more entries; older ones are joined into larger chunks, but for those on the CPU.

        There copies from a GPU may still be on their way.
        """
        chunks = [*self.chunks, chunk]
        while not self.format.offload and len(chunks) > 1 and len(chunks[-2]) <= len(chunks[-1]):
            chunks[-2:] = [join(chunks[-2:])]
        return replace(self, chunks=tuple(chunks))

    def dense(self) -> torch.Tensor:
        """The entries as attention reads them, at home."""
        away = self.format.offload and self.home.type == "cuda"
        here = (_each(chunk, lambda part: part.to(self.home, non_blocking=away)) for chunk in self.chunks)
        parts = [part.dense() if isinstance(part, Quantized) else part for part in here]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self) -> Chunk:
        """All entries in one chunk where they rest, once they have arrived there."""
        if self.format.offload and self.home.type == "cuda":
            torch.cuda.synchronize(self.home)
        return join(self.chunks)


AtRest: TypeAlias = "torch.Tensor | Packed"
_Dense: TypeAlias = tuple[list[torch.Tensor], list[torch.Tensor]]


class Bringing:
    """Brings the memory of a pass's layers to where it is read; on a GPU that of the next layer ahead, beside the work.

    Args:
        memories: Keys and values of every row at rest, by layer.
    """

    def __init__(self, memories: Sequence[tuple[Sequence[AtRest], Sequence[AtRest]]]) -> None:
        self.memories = memories
        self._ahead: dict[int, tuple[_Dense, torch.cuda.Stream]] = {}

    def take(self, layer: int) -> _Dense:
        """Keys and values of a layer, one ``[m, kv_heads, head_dim]`` per row."""
        if layer in self._ahead:
            dense, stream = self._ahead.pop(layer)
            here = torch.cuda.current_stream(stream.device)
            here.wait_stream(stream)
            for tensor in (*dense[0], *dense[1]):
                tensor.record_stream(here)
        else:
            dense = take_in(*self.memories[layer])
        if layer + 1 < len(self.memories) and not torch.is_grad_enabled():
            self._start(layer + 1)
        return dense

    def _start(self, layer: int) -> None:
        homes = {
            row.home
            for rows in self.memories[layer]
            for row in rows
            if isinstance(row, Packed) and row.format.offload and row.home.type == "cuda"
        }
        for home in homes:  # one: a layer computes in one place
            stream = _streams.setdefault(home, torch.cuda.Stream(home))
            stream.wait_stream(torch.cuda.current_stream(home))  # what is on its way out has to arrive first
            with torch.cuda.stream(stream):
                self._ahead[layer] = take_in(*self.memories[layer]), stream


_streams: dict[torch.device, torch.cuda.Stream] = {}  # one per GPU: its allocator keeps memory by stream


def take_in(keys: Sequence[AtRest], values: Sequence[AtRest]) -> _Dense:
    """Keys and values of every row as attention reads them."""
    dense_k, dense_v = ([row.dense() if isinstance(row, Packed) else row for row in rows] for rows in (keys, values))
    return dense_k, dense_v


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one kind in one.

    Raises:
        TypeError: They are of several.
    """
    coded = [chunk for chunk in chunks if isinstance(chunk, Quantized)]
    plain = [chunk for chunk in chunks if isinstance(chunk, torch.Tensor)]
    if coded and plain:
        raise TypeError("chunks to join must be of one kind, got coded and plain ones; bring them to one format first.")
    if plain:
        return torch.cat(plain)
    codes, scales = (torch.cat([getattr(chunk, part) for chunk in coded]) for part in ("codes", "scales"))
    return replace(coded[0], codes=codes, scales=scales)


def _each(chunk: Chunk, change: Callable[[torch.Tensor], torch.Tensor]) -> Chunk:
    if isinstance(chunk, Quantized):
        return replace(chunk, codes=change(chunk.codes), scales=change(chunk.scales))
    return change(chunk)


def _offloaded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; from a GPU into pinned memory, without waiting for it to arrive."""
    if tensor.device.type == "cuda":
        return torch.empty_like(tensor, device=CPU, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(CPU, copy=True)
