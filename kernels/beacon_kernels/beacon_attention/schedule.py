"""Which queries or keys each program of a kernel works on, and what it walks over. Integers, on the host.

Every query of a list (raw tokens, or beacons) sees one contiguous run of each store. Tiles of queries never straddle
windows, whose runs begin elsewhere. The costliest come first: a GPU hands programs out in order.

The backward pass asks the inverse: which queries see a key. In a plan's list they are one contiguous run as well, so
tiles of keys walk queries the way tiles of queries walk keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from beacon_kernels.dispatch import upload
from beacon_kernels.tiles import Tile, tile_for

STORES = 4
MANY = 10**6  # rows that fill any tile
SMS = 132  # multiprocessors of an H100, where there is no GPU to ask
PARTS = 2**30  # bytes that partial dk and dv may take
ENTRIES = 2**31 - 1  # entries are numbered in int32


@dataclass(frozen=True)
class Work:
    """A kernel's work list.

    Args:
        items: int32. Of tiles of queries ``[tiles, 14]``: first query, end, then for each store lo, mid, hi: every
            query of the tile sees ``[lo, mid)``, a multiple of ``tile.block_n``, and some may see ``[mid, hi)``.
            Of tiles of keys ``[tiles, 7]``: store, first key, end, then lo, mid_lo, mid_hi, hi: every key of the tile
            is seen by the queries ``[mid_lo, mid_hi)``, a multiple of ``tile.block_m``, and some keys by others
            in ``[lo, hi)``.
        tile: Sizes of the tiles.
        count: Queries, or keys of all stores, that the tiles cover.
    """

    items: torch.Tensor
    tile: Tile
    count: int

    def to(self, device: torch.device | str) -> Work:
        """The same list on another device."""
        return replace(self, items=upload(self.items, device))


@dataclass(frozen=True)
class Schedule:
    """Who sees what, and the work lists that follow, for one list of queries.

    Args:
        runs: int32 ``[4, 2, n]``: what query i sees of each store, half-open.
        sizes: Entries of each store it was built for.
        packed: Heads of a group that share a tile of queries.
        forward: Tiles of queries of the forward pass.
        dq: Tiles of queries of the backward pass; None without gradients.
        dkv: Tiles of keys of the backward pass.
        key_runs: int32 ``[2, entries of all stores]``: which queries see each key, half-open.
        splits: Programs that share the heads of a group for dk and dv, a divisor of their number.
    """

    runs: torch.Tensor
    sizes: tuple[int, ...]
    packed: int
    forward: Work
    dq: Work | None = None
    dkv: Work | None = None
    key_runs: torch.Tensor | None = None
    splits: int = 1

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule on another device."""
        return replace(
            self,
            runs=upload(self.runs, device),
            forward=self.forward.to(device),
            dq=None if self.dq is None else self.dq.to(device),
            dkv=None if self.dkv is None else self.dkv.to(device),
            key_runs=None if self.key_runs is None else upload(self.key_runs, device),
        )


def schedule_for(
    runs: torch.Tensor,
    sizes: Sequence[int],
    starts: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    gradients: bool = False,
    tiles: dict[str, Tile] | None = None,
) -> Schedule:
    """A schedule with the table's tiles, on the device that computes.

    Args:
        runs: See :func:`build_schedule`.
        sizes: Likewise.
        starts: Likewise.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_dim: Channels per head.
        dtype: Of queries, keys and values.
        device: Where they are.
        gradients: Whether there will be a backward pass.
        tiles: Tiles to take in place of the table's (``forward``, ``backward_dq``, ``backward_dkv``), for tuning.

    Raises:
        ValueError: See :func:`build_schedule`; or no tile for this head_dim, dtype or GPU.
    """
    device, itemsize = torch.device(device), torch.empty((), dtype=dtype).element_size()
    capability = 80
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    rows = -(-runs.shape[-1] // max(len(starts), 1))  # queries of a window, on average

    def tile(kernel: str, rows: int) -> Tile:
        if tiles and kernel in tiles:
            return tiles[kernel]
        return tile_for(kernel, head_dim, itemsize, capability, rows=rows)

    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} heads and {kv_heads} kv_heads.")
    group = heads // kv_heads
    widest = min(tile(kernel, MANY).block_m for kernel in ("forward", "backward_dq")[: 1 + gradients])
    fitting = [divisor for divisor in range(1, group + 1) if group % divisor == 0 and divisor <= widest]
    packed = next((divisor for divisor in fitting if rows * divisor >= widest), fitting[-1])
    backward = (tile("backward_dq", rows * packed), tile("backward_dkv", MANY)) if gradients else None
    forward = tile("forward", rows * packed)
    schedule = build_schedule(runs, sizes, starts, tile=forward, packed=packed, backward=backward)
    if schedule.dkv is not None:
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS
        splits = _splits(schedule.dkv, group, kv_heads, sms)
        fits = 8 * splits * kv_heads * head_dim * schedule.dkv.count <= PARTS  # bytes of dk and dv in float32
        schedule = replace(schedule, splits=splits if fits else 1)
    return schedule.to(device)


def _splits(work: Work, group: int, kv_heads: int, sms: int) -> int:
    """As few as keep the longest item below half of what every multiprocessor gets: it would be the last to end."""
    blocks = -(-(work.items[:, 6] - work.items[:, 3]).long() // work.tile.block_m)
    if not len(blocks):
        return 1
    longest, share = int(blocks.max()) * group, int(blocks.sum()) * group * kv_heads / sms
    return next(n for n in range(1, group + 1) if group % n == 0 and (longest / n <= share / 2 or n == group))


def build_schedule(
    runs: torch.Tensor,
    sizes: Sequence[int],
    starts: Sequence[int],
    *,
    tile: Tile,
    packed: int = 1,
    backward: tuple[Tile, Tile] | None = None,
) -> Schedule:
    """Cut queries, and for a backward pass keys, into tiles.

    Args:
        runs: Integers ``[stores, 2, n]`` on the CPU, at most 4 stores: query i sees ``[runs[s, 0, i], runs[s, 1, i])``.
        sizes: Entries of each store.
        starts: First query of every window, ascending, the first 0.
        tile: Sizes of the tiles; ``block_m`` counts queries times packed heads.
        packed: Heads that share a tile of queries, a divisor of a group: many for lists of few queries a window.
        backward: Tiles for dq and for dk and dv, if there will be a backward pass.

    Raises:
        ValueError: Shapes that do not fit, a run that points outside its store, ``starts`` out of order, or, with
            ``backward``, a key that is not seen by one contiguous run of queries.
    """
    stores, count = runs.shape[0], runs.shape[-1]
    if runs.ndim != 3 or runs.shape[1] != 2 or stores > STORES or stores != len(sizes):
        raise ValueError(
            f"runs must have shape [stores, 2, n] with at most {STORES} stores, one per size, got {list(runs.shape)} "
            f"and {len(sizes)} sizes; build them from one plan."
        )
    tiles_of_queries = [tile] if backward is None else [tile, backward[0]]
    for one in tiles_of_queries:
        if not 1 <= packed <= one.block_m:
            raise ValueError(
                f"packed must be from 1 to block_m, got packed={packed} for block_m={one.block_m}; pack fewer heads."
            )
    if max(count, *sizes, sum(sizes)) > ENTRIES:
        raise ValueError(
            f"entries must number at most {ENTRIES}, got {count} queries and {list(sizes)}; split the pass."
        )
    begin = torch.tensor(starts, dtype=torch.int64)
    rising = len(begin) and begin[0] == 0 and begin[-1] < count and bool((begin.diff() > 0).all())
    if count and not rising:
        raise ValueError(f"starts must begin with 0 and rise below {count} queries, got {list(starts)[:8]}.")
    lo_hi = torch.zeros(STORES, 2, count, dtype=torch.int64)
    lo_hi[:stores] = runs
    sizes = (*sizes, *[0] * (STORES - stores))
    _check(lo_hi, sizes)
    work = [_query_work(lo_hi, sizes, begin, one, packed) for one in tiles_of_queries]
    if backward is None:
        return Schedule(lo_hi.int(), sizes, packed, work[0])
    inverse = [_inverse(lo_hi[store, 0], lo_hi[store, 1], size, store) for store, size in enumerate(sizes)]
    dkv = _key_work(inverse, begin, count, backward[1])
    return Schedule(lo_hi.int(), sizes, packed, work[0], work[1], dkv, torch.cat(inverse, dim=1).int())


def _check(lo_hi: torch.Tensor, sizes: Sequence[int]) -> None:
    for store, size in enumerate(sizes):
        lo, hi = lo_hi[store, 0], lo_hi[store, 1]
        bad = ((lo < hi) & ((lo < 0) | (hi > size))).nonzero()
        if len(bad):
            query = int(bad[0])
            raise ValueError(
                f"runs must lie within their store, got [{int(lo[query])}, {int(hi[query])}) for query {query} in "
                f"store {store} of {size} entries; build them for these stores."
            )


def _query_work(lo_hi: torch.Tensor, sizes: Sequence[int], begin: torch.Tensor, tile: Tile, packed: int) -> Work:
    first, end = _cut(begin, lo_hi.shape[2], tile.block_m // packed)
    tiles = torch.zeros(len(first), 2 + 3 * STORES, dtype=torch.int64)
    tiles[:, 0], tiles[:, 1] = first, end
    cost = torch.zeros(len(first), dtype=torch.int64)
    for store, size in enumerate(sizes):
        if not size:
            continue
        any_lo, all_lo, all_hi, any_hi = _bounds(lo_hi[store, 0], lo_hi[store, 1], size, first, end)
        whole = torch.where(all_lo == any_lo, (all_hi - any_lo).clamp(min=0) // tile.block_n * tile.block_n, 0)
        tiles[:, 2 + 3 * store : 5 + 3 * store] = torch.stack([any_lo, any_lo + whole, any_hi], dim=1)
        cost += -(-(any_hi - any_lo) // tile.block_n)
    return Work(_ordered(tiles, cost), tile, lo_hi.shape[2])


def _key_work(inverse: Sequence[torch.Tensor], begin: torch.Tensor, count: int, tile: Tile) -> Work:
    window = torch.bucketize(torch.arange(count), begin, right=True)
    parts = []
    for store, (lo, hi) in enumerate(inverse):
        first, end = _cut(_key_starts(lo, hi, window), len(lo), tile.block_n)
        any_lo, all_lo, all_hi, any_hi = _bounds(lo, hi, count, first, end)
        mid_lo = torch.minimum(any_lo + -(-(all_lo - any_lo) // tile.block_m) * tile.block_m, any_hi)
        whole = (torch.minimum(all_hi, any_hi) - mid_lo).clamp(min=0) // tile.block_m * tile.block_m
        mid_lo = torch.where(whole > 0, mid_lo, any_lo)
        number = torch.full_like(first, store)
        parts.append(torch.stack([number, first, end, any_lo, mid_lo, mid_lo + whole, any_hi], dim=1))
    tiles = torch.cat(parts)
    return Work(_ordered(tiles, tiles[:, 6] - tiles[:, 3]), tile, sum(len(lo) for lo, _ in inverse))


def _key_starts(lo: torch.Tensor, hi: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Where keys of one window's queries end and those of another's begin: there a tile of keys is cut."""
    at = torch.arange(len(lo))
    seen = lo < hi
    before = torch.where(seen, at, -1).cummax(0).values[:-1]  # the last seen key before 1, 2, ...
    fresh = (seen[1:] & (before >= 0)).nonzero()[:, 0] + 1
    before = before[fresh - 1]
    apart = (lo[fresh] >= hi[before]) | (hi[fresh] <= lo[before])
    fresh, before = fresh[apart], before[apart]
    cuts = fresh[window[lo[fresh]] != window[hi[before] - 1]]
    return torch.cat([torch.zeros(1, dtype=torch.int64), cuts])[: len(lo)]


def _inverse(lo: torch.Tensor, hi: torch.Tensor, size: int, store: int) -> torch.Tensor:
    """The queries that see each key, half-open ``[2, size]``, from their number, sum and sum of squares.

    Of all sets of integers with one size and sum, consecutive ones have the smallest sum of squares: so the three
    numbers also prove that the queries are consecutive.
    """
    query = (lo < hi).nonzero()[:, 0]
    terms = torch.stack([torch.ones_like(query), query, query * query])
    sums = torch.zeros(3, size + 1, dtype=torch.int64)
    sums.index_add_(1, lo[query], terms)
    sums.index_add_(1, hi[query], -terms)
    number, total, squares = sums.cumsum(1)[:, :size]
    steps = number * (number - 1) // 2
    first = torch.div(total - steps, number.clamp(min=1), rounding_mode="floor")
    consecutive = number * first * first + 2 * first * steps + steps * (2 * number - 1) // 3
    bad = ((number * first + steps != total) | (consecutive != squares)).nonzero()
    if len(bad):
        raise ValueError(
            "with gradients every key must be seen by one contiguous run of queries, got several for entry "
            f"{int(bad[0])} of store {store}; give raw tokens and beacons as two lists, in reading order."
        )
    return torch.stack([first, first + number])


def _cut(starts: torch.Tensor, count: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First entry and end of every tile of at most ``block`` entries; no tile straddles starts."""
    ends = torch.cat([starts[1:], starts.new_tensor([count] * bool(len(starts)))])
    tiles = (ends - starts + block - 1) // block
    window = torch.repeat_interleave(torch.arange(len(starts)), tiles)
    number = torch.arange(len(window)) - (tiles.cumsum(0) - tiles)[window]
    first = starts[window] + number * block
    return first, torch.minimum(first + block, ends[window])


def _bounds(
    lo: torch.Tensor, hi: torch.Tensor, size: int, first: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every tile: the least lo, the largest lo, the least hi, the largest hi; an empty run spoils what all share."""
    if not len(first):
        return first, first, first, first
    none = lo >= hi
    lo, hi = lo.masked_fill(none, size), hi.masked_fill(none, 0)
    length = int((end - first).max())
    entries = torch.minimum(
        first[:, None] + torch.arange(length), end[:, None] - 1
    )  # the last one stands for what lacks
    (any_lo, all_lo), (all_hi, any_hi) = lo[entries].aminmax(dim=1), hi[entries].aminmax(dim=1)
    return torch.minimum(any_lo, any_hi), all_lo, all_hi, any_hi


def _ordered(tiles: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    return tiles[cost.argsort(descending=True, stable=True)].int()
