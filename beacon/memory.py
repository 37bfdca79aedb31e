"""How memory is kept between passes: as attention reads it, or in eight bits, or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch

EIGHT_BITS = {"int8": (torch.int8, 127.0), "float8_e4m3fn": (torch.float8_e4m3fn, 448.0)}  # and their largest code
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Quantized:
    """Entries in eight bits: codes times scales.

    Rounding errs by at most half a step: with int8 by 1/254 of the largest magnitude in an entry's head, with
    float8_e4m3fn by 1/16 of every number, or 1/458,752 of the largest if that is more.

    Args:
        codes: int8 or float8_e4m3fn ``[entries, kv_heads, head_dim]``.
        scales: ``[entries, kv_heads, 1]`` in the dtype of the entries.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, entries: torch.Tensor, dtype: str) -> Quantized:
        """Round entries ``[entries, kv_heads, head_dim]`` to eight bits, a scale for every entry and head."""
        coded, most = EIGHT_BITS[dtype]
        largest = entries.float().abs().amax(-1, keepdim=True)
        scales = (largest / most).clamp(min=torch.finfo(entries.dtype).tiny).to(entries.dtype)
        codes = (entries.float() / scales.float()).clamp(-most, most)
        return cls((codes.round() if coded == torch.int8 else codes).to(coded), scales)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, which: slice) -> Quantized:
        return Quantized(self.codes[which], self.scales[which])

    def dense(self) -> torch.Tensor:
        """The entries in the dtype they came in."""
        return self.codes.to(self.scales.dtype) * self.scales


Chunk: TypeAlias = "torch.Tensor | Quantized"


@dataclass(frozen=True)
class Packed:
    """One row's memory keys or values at rest. Immutable, like the tensors of a store.

    Args:
        chunks: Entries in order, the older ones in larger chunks, so that there are few.
        home: Where attention reads them.
    """

    chunks: tuple[Chunk, ...]
    home: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(chunk.nbytes for chunk in self.chunks)

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def to(self, device: torch.device | str) -> Packed:
        """The same to be read on another device; what rests on the CPU while that is not its home stays there."""
        home = torch.device(device)
        if self.chunks and self.chunks[0].device == CPU != self.home:
            return Packed(self.chunks, home)
        return Packed(tuple(_moved(chunk, home) for chunk in self.chunks), home)

    def then(self, chunk: Chunk) -> Packed:
        """The same and more entries."""
        chunks = [*self.chunks, chunk]
        while len(chunks) > 1 and len(chunks[-2]) <= len(chunks[-1]):
            chunks[-2:] = [_joined(chunks[-2:])]
        return Packed(tuple(chunks), self.home)

    def dense(self) -> torch.Tensor:
        """The entries as attention reads them, at home (there is at least one)."""
        parts = [_moved(chunk, self.home) for chunk in self.chunks]
        tensors = [part.dense() if isinstance(part, Quantized) else part for part in parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


AtRest: TypeAlias = "torch.Tensor | Packed"


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
        """A row's memory at rest in this format, also what was kept as it was while gradients were recorded.

        Args:
            row: Memory keys or values.
            home: Where attention reads them.
        """
        if isinstance(row, Packed) or not self.packs or not len(row):
            return row
        return Packed((self._chunk(row),), home)

    def commit(
        self, rows: Sequence[AtRest], dense: Sequence[torch.Tensor], new: torch.Tensor, counts: Sequence[int]
    ) -> tuple[list[AtRest], list[torch.Tensor], torch.Tensor]:
        """Add entries to every row's memory.

        They are rounded at once, so that it does not matter how many windows a pass reads.

        Args:
            rows: Memory keys or values at rest.
            dense: The same as attention reads them, ``[m, kv_heads, head_dim]`` each.
            new: New entries, packed row after row ``[n, kv_heads, head_dim]``.
            counts: How many of them each row gets.

        Returns:
            The rows at rest, as attention reads them, and the new entries as it reads them.
        """
        chunk = None if self.dtype == "auto" else Quantized.of(new, self.dtype)
        if chunk is not None:
            new = chunk.dense()
        parts = new.split(list(counts))
        whole = [torch.cat([old, part]) if len(part) else old for old, part in zip(dense, parts, strict=True)]
        if not self.packs:
            return list(whole), whole, new
        kept: list[AtRest] = []
        for row, part, end in zip(rows, parts, accumulate(counts), strict=True):
            at_rest = self.rest(row, new.device)
            if len(part):
                mine = self._chunk(part if chunk is None else chunk[end - len(part) : end])
                at_rest = at_rest.then(mine) if isinstance(at_rest, Packed) else Packed((mine,), new.device)
            kept.append(at_rest)
        return kept, whole, new

    def _chunk(self, entries: Chunk) -> Chunk:
        """Entries as they rest, in memory of their own."""
        if self.dtype != "auto" and isinstance(entries, torch.Tensor):
            entries = Quantized.of(entries, self.dtype)
        return _moved(entries, CPU if self.offload else entries.device, copy=True)


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
        away = [row for rows in self.memories[layer] for row in rows if isinstance(row, Packed) and _is_away(row)]
        if not away:
            return
        stream = torch.cuda.Stream(away[0].home)
        stream.wait_stream(torch.cuda.current_stream(away[0].home))  # what is on its way out has to arrive first
        with torch.cuda.stream(stream):
            self._ahead[layer] = take_in(*self.memories[layer]), stream


def take_in(keys: Sequence[AtRest], values: Sequence[AtRest]) -> _Dense:
    """Keys and values of every row as attention reads them."""
    dense_k, dense_v = ([row.dense() if isinstance(row, Packed) else row for row in rows] for rows in (keys, values))
    return dense_k, dense_v


def _is_away(row: Packed) -> bool:
    return row.home.type == "cuda" and any(chunk.device == CPU for chunk in row.chunks)


def _moved(chunk: Chunk, device: torch.device, copy: bool = False) -> Chunk:
    """A chunk on another device, without waiting for it to arrive there."""
    if isinstance(chunk, Quantized):
        return Quantized(_tensor_moved(chunk.codes, device, copy), _tensor_moved(chunk.scales, device, copy))
    return _tensor_moved(chunk, device, copy)


def _tensor_moved(tensor: torch.Tensor, device: torch.device, copy: bool) -> torch.Tensor:
    if device == CPU and tensor.device.type == "cuda":
        return torch.empty_like(tensor, device=CPU, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=True, copy=copy)


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    if isinstance(chunks[0], Quantized):
        codes = _cat([chunk.codes for chunk in chunks if isinstance(chunk, Quantized)])
        return Quantized(codes, _cat([chunk.scales for chunk in chunks if isinstance(chunk, Quantized)]))
    return _cat([chunk for chunk in chunks if isinstance(chunk, torch.Tensor)])


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not any(tensor.is_pinned() for tensor in tensors):
        return torch.cat(tensors)
    torch.cuda.synchronize()  # copies to pinned memory may be on their way
    size = sum(map(len, tensors))
    return torch.cat(tensors, out=torch.empty(size, *tensors[0].shape[1:], dtype=tensors[0].dtype, pin_memory=True))
