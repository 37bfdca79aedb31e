"""Which queries each program of a kernel works on, and which keys it walks. Integers, on the host.

Every query of a list (raw tokens, or beacons) sees one contiguous run of each store. Tiles of queries never straddle
windows, whose runs begin elsewhere. The costliest come first: a GPU hands programs out in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from beacon_kernels.tiles import Tile

STORES = 4


@dataclass(frozen=True)
class Schedule:
    """Work list of one list of queries. All tensors int32.

    Args:
        runs: ``[4, 2, n]``: what query i sees of each store, half-open.
        tiles: ``[query tiles, 14]``: first query, end, then for each store lo, mid, hi: every query of the tile sees
            ``[lo, mid)``, a multiple of ``tile.block_n``, and some may see ``[mid, hi)``.
        sizes: Entries of each store it was built for.
        tile: Sizes of the tiles.
        packed: Heads of a group that share a tile.
    """

    runs: torch.Tensor
    tiles: torch.Tensor
    sizes: tuple[int, ...]
    tile: Tile
    packed: int

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule on another device."""
        runs, tiles = (tensor.to(device, non_blocking=True) for tensor in (self.runs, self.tiles))
        return replace(self, runs=runs, tiles=tiles)


def build_schedule(
    runs: torch.Tensor, sizes: Sequence[int], starts: Sequence[int], *, tile: Tile, packed: int = 1
) -> Schedule:
    """Cut queries into tiles.

    Args:
        runs: Integers ``[stores, 2, n]`` on the CPU, at most 4 stores: query i sees ``[runs[s, 0, i], runs[s, 1, i])``.
        sizes: Entries of each store.
        starts: First query of every window, ascending, the first 0.
        tile: Sizes of the tiles; ``block_m`` counts queries times packed heads.
        packed: Heads that share a tile of queries, a divisor of ``block_m``: many for lists of few queries a window.

    Raises:
        ValueError: Shapes that do not fit, a run that points outside its store, or ``starts`` out of order.
    """
    stores, count = runs.shape[0], runs.shape[-1]
    if runs.ndim != 3 or runs.shape[1] != 2 or stores > STORES or stores != len(sizes):
        raise ValueError(
            f"runs must have shape [stores, 2, n] with at most {STORES} stores, one per size, got {list(runs.shape)} "
            f"and {len(sizes)} sizes; build them from one plan."
        )
    if packed < 1 or tile.block_m % packed:
        raise ValueError(
            f"packed must divide block_m, got packed={packed} for block_m={tile.block_m}; pack fewer heads."
        )
    begin = torch.tensor(starts, dtype=torch.int64)
    rising = len(begin) and begin[0] == 0 and begin[-1] < count and bool((begin.diff() > 0).all())
    if count and not rising:
        raise ValueError(f"starts must begin with 0 and rise below {count} queries, got {list(starts)[:8]}.")
    lo_hi = torch.zeros(STORES, 2, count, dtype=torch.int64)
    lo_hi[:stores] = runs
    sizes = (*sizes, *[0] * (STORES - stores))
    _check(lo_hi, sizes)
    first, end, tile_of = _query_tiles(begin, count, tile.block_m // packed)
    tiles = torch.zeros(len(first), 2 + 3 * STORES, dtype=torch.int64)
    tiles[:, 0], tiles[:, 1] = first, end
    cost = torch.zeros(len(first), dtype=torch.int64)
    for store, size in enumerate(sizes):
        none = lo_hi[store, 0] >= lo_hi[store, 1]
        lo, hi = lo_hi[store, 0].masked_fill(none, size), lo_hi[store, 1].masked_fill(none, 0)
        any_hi = _reduce(hi, tile_of, len(first), "amax")
        any_lo = torch.minimum(_reduce(lo, tile_of, len(first), "amin"), any_hi)
        all_lo, all_hi = (_reduce(lo, tile_of, len(first), "amax"), _reduce(hi, tile_of, len(first), "amin"))
        whole = torch.where(all_lo == any_lo, (all_hi - any_lo).clamp(min=0) // tile.block_n * tile.block_n, 0)
        tiles[:, 2 + 3 * store : 5 + 3 * store] = torch.stack([any_lo, any_lo + whole, any_hi], dim=1)
        cost += -(-(any_hi - any_lo) // tile.block_n)
    order = cost.argsort(descending=True, stable=True)
    return Schedule(lo_hi.int(), tiles[order].int(), sizes, tile, packed)


def _check(lo_hi: torch.Tensor, sizes: Sequence[int]) -> None:
    for store, size in enumerate(sizes):
        lo, hi = lo_hi[store]
        bad = ((lo < hi) & ((lo < 0) | (hi > size))).nonzero()
        if len(bad):
            query = int(bad[0])
            raise ValueError(
                f"runs must lie within their store, got [{int(lo[query])}, {int(hi[query])}) for query {query} in "
                f"store {store} of {size} entries; build them for these stores."
            )


def _query_tiles(starts: torch.Tensor, count: int, block_q: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First query and end of every tile, and the tile of every query."""
    ends = torch.cat([starts[1:], starts.new_tensor([count] * bool(len(starts)))])
    tiles = (ends - starts + block_q - 1) // block_q
    window = torch.repeat_interleave(torch.arange(len(starts)), tiles)
    number = torch.arange(len(window)) - (tiles.cumsum(0) - tiles)[window]
    first = starts[window] + number * block_q
    end = torch.minimum(first + block_q, ends[window])
    return first, end, torch.repeat_interleave(torch.arange(len(first)), end - first)


def _reduce(values: torch.Tensor, tile_of: torch.Tensor, tiles: int, how: str) -> torch.Tensor:
    return values.new_zeros(tiles).scatter_reduce(0, tile_of, values, how, include_self=False)
