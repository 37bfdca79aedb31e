"""Tile sizes by (kernel, architecture, head_dim, bytes per element): a table, no tuning in the call path.

No GPU has measured these yet: they are guesses, compiled for both chips by `tests/kernels/test_aot.py`. Up to
head_dim 128 in half precision none spills with Triton 3.6 and 3.7. Ampere's serve every chip but Hopper and datacenter
Blackwell.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (64, 96, 128, 256)
ARCHITECTURES = (80, 90)  # Ampere (A100, A800), Hopper (H100, H200)


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's tiles.

    Args:
        block_m: Queries (times packed heads) of a tile.
        block_n: Keys of a tile.
        num_warps: Warps per program.
        num_stages: Depth of software pipelining.
        programs_per_sm: Persistent programs per multiprocessor; 0 for one program per work item, which the GPU hands
            out in order.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 0


# (head_dim, bytes per element): Ampere, Hopper
_FORWARD = {
    (64, 2): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 4)),
    (96, 2): (Tile(64, 32, 8, 3), Tile(128, 64, 8, 3)),
    (128, 2): (Tile(128, 32, 8, 3), Tile(128, 64, 8, 3)),
    (256, 2): (Tile(64, 32, 8, 2), Tile(128, 32, 8, 2)),
    (64, 4): (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
    (96, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (128, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_FORWARD_MIDDLE = {
    (64, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 4)),
    (96, 2): (Tile(64, 32, 8, 3), Tile(64, 64, 8, 3)),
    (128, 2): (Tile(64, 32, 8, 3), Tile(64, 64, 8, 3)),
    (256, 2): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (64, 4): (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
    (96, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (128, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_FORWARD_NARROW = {  # few rows per window: beacons at high ratios
    (64, 2): (Tile(32, 128, 4, 3), Tile(32, 64, 4, 4)),
    (96, 2): (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3)),
    (128, 2): (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3)),
    (256, 2): (Tile(32, 32, 4, 3), Tile(32, 32, 4, 3)),
    (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (96, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (128, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_BACKWARD_DQ = {
    (64, 2): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    (96, 2): (Tile(64, 64, 8, 2), Tile(128, 32, 8, 3)),
    (128, 2): (Tile(64, 32, 8, 3), Tile(128, 64, 8, 3)),
    (256, 2): (Tile(32, 32, 8, 1), Tile(64, 32, 8, 2)),
    (64, 4): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (96, 4): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    (128, 4): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_BACKWARD_DQ_MIDDLE = {
    (64, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (96, 2): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 3)),
    (128, 2): (Tile(64, 32, 8, 3), Tile(64, 64, 8, 3)),
    (256, 2): (Tile(32, 32, 8, 1), Tile(64, 32, 8, 2)),
    (64, 4): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (96, 4): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    (128, 4): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_BACKWARD_DQ_NARROW = {
    (64, 2): (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3)),
    (96, 2): (Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
    (128, 2): (Tile(32, 32, 4, 3), Tile(32, 64, 4, 3)),
    (256, 2): (Tile(32, 32, 4, 1), Tile(32, 32, 8, 2)),
    (64, 4): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (96, 4): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    (128, 4): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_BACKWARD_DKV = {
    (64, 2): (Tile(32, 64, 4, 3), Tile(32, 128, 8, 3)),
    (96, 2): (Tile(32, 64, 8, 2), Tile(32, 64, 8, 3)),
    (128, 2): (Tile(64, 64, 8, 2), Tile(32, 128, 8, 3)),
    (256, 2): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (64, 4): (Tile(16, 64, 8, 1), Tile(16, 64, 8, 1)),
    (96, 4): (Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
    (128, 4): (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_DECODE = {  # block_m is the most: a launch takes what the packed heads of a group and the few queries need
    (64, 2): (Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)),
    (96, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (128, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (256, 2): (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
    (64, 4): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
    (96, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    (128, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    (256, 4): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
TABLES = {
    "forward": _FORWARD,
    "forward_middle": _FORWARD_MIDDLE,
    "forward_narrow": _FORWARD_NARROW,
    "backward_dq": _BACKWARD_DQ,
    "backward_dq_middle": _BACKWARD_DQ_MIDDLE,
    "backward_dq_narrow": _BACKWARD_DQ_NARROW,
    "backward_dkv": _BACKWARD_DKV,
    "decode": _DECODE,
}


def tile_for(kernel: str, head_dim: int, itemsize: int, capability: int, *, rows: int | None = None) -> Tile:
    """The table's entry.

    Args:
        kernel: A key of ``TABLES``.
        head_dim: Channels per head; between two of ``HEAD_DIMS`` the larger one's tile serves.
        itemsize: Bytes per element of q, k and v.
        capability: Compute capability as in 80, 86, 90.
        rows: Rows that a tile of queries would have; where they fit the kernel's narrow or middle
            tile, that one is taken.

    Raises:
        ValueError: No tile for this head_dim or element size, or a GPU older than Ampere.
    """
    served = next((dim for dim in HEAD_DIMS if 0 < head_dim <= dim), 0)
    if (served, itemsize) not in TABLES[kernel]:
        raise ValueError(
            f"head_dim must be at most {HEAD_DIMS[-1]} in float16, bfloat16 or float32, got head_dim={head_dim} with "
            f"{itemsize} bytes per element; use another attention path."
        )
    if capability < 80:
        raise ValueError(
            f"the kernels need compute capability 8.0 or more, got {capability / 10}; use another attention path."
        )
    column = 1 if 90 <= capability < 110 else 0  # others have less shared memory than Hopper, 99 KB at least
    for smaller in (f"{kernel}_narrow", f"{kernel}_middle"):
        if rows is not None and smaller in TABLES and rows <= TABLES[smaller][served, itemsize][column].block_m:
            return TABLES[smaller][served, itemsize][column]
    return TABLES[kernel][served, itemsize][column]
