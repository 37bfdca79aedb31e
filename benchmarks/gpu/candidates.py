"""Tiles that the tuner tries, by table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from beacon_kernels.tiles import Tile
from benchmarks.gpu.retile import Entry

PERSISTENT = (0, 1, 2)  # programs per multiprocessor
CANDIDATES = {  # block_m (0: the table's own), block_n, num_warps, num_stages
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "forward_middle": ((64,), (32, 64, 128), (4, 8), (2, 3, 4)),
    "forward_narrow": ((16, 32, 64), (32, 64, 128), (4,), (2, 3, 4)),
    "backward_dq": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "backward_dq_middle": ((64,), (32, 64), (4, 8), (2, 3)),
    "backward_dq_narrow": ((16, 32, 64), (32, 64), (4,), (1, 2, 3)),
    "backward_dkv": ((16, 32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "decode": ((0,), (32, 64, 128), (2, 4, 8), (2, 3, 4, 5)),
}


def candidates(entry: Entry, shared: int) -> Iterator[Tile]:
    """All but the table's own that may fit into ``shared`` bytes of shared memory; the compiler has the last word."""
    current = entry.current
    for block_m, block_n, num_warps, num_stages in product(*CANDIDATES[entry.kernel]):
        tile = Tile(block_m or current.block_m, block_n, num_warps, num_stages, current.programs_per_sm)
        if tile != current and _streamed(entry, tile) <= shared:
            yield tile


def persistent(tile: Tile) -> Iterator[Tile]:
    """The same tile with other numbers of persistent programs."""
    return (replace(tile, programs_per_sm=programs) for programs in PERSISTENT if programs != tile.programs_per_sm)


def _streamed(entry: Entry, tile: Tile) -> int:
    """Bytes of the two tensors that are streamed through shared memory, in every stage of the pipeline but one."""
    block = tile.block_m if entry.kernel == "backward_dkv" else tile.block_n
    return 2 * max(tile.num_stages - 1, 1) * block * entry.head_dim * entry.itemsize
