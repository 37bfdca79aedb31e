"""What is measured: cells of kernel x ratio x length x heads, the headline first and the whole grid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

ATTENTION = ("forward", "backward")
KERNELS = (*ATTENTION, "decode", "rotate_commit")
FLOPS = {"forward": 4, "backward": 10}  # per visible pair, channel and head: two products, and five


@dataclass(frozen=True)
class Cell:
    """One set of sizes.

    Args:
        kernel: One of ``KERNELS``. ``forward``, ``backward`` and ``rotate_commit`` read ``length`` new tokens in one
            pass; ``decode`` reads one more token (per row) after them, with the last ``window`` tokens raw.
        ratio: Raw tokens per beacon.
        length: Tokens of the text.
        heads: Heads of q.
        kv_heads: Heads of k and v.
        head_dim: Channels per head.
        dtype: Name of the tensors' dtype.
        window: Tokens per window.
        rows: Rows of the batch (decode).
    """

    kernel: str
    ratio: int
    length: int
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    dtype: str = "bfloat16"
    window: int = 1024
    rows: int = 1

    @property
    def name(self) -> str:
        """As in ``forward r8 32K 32/8``; what is not as usual follows."""
        length = f"{self.length // 1024}K" if self.length % 1024 == 0 else str(self.length)
        usual = [f"{self.kernel} r{self.ratio} {length} {self.heads}/{self.kv_heads}"]
        unusual = [f"d{self.head_dim}"] * (self.head_dim != 128) + [self.dtype] * (self.dtype != "bfloat16")
        return " ".join(usual + unusual + [f"x{self.rows}"] * (self.rows != 1))

    @property
    def shape(self) -> str:
        """All sizes."""
        return (
            f"window={self.window} ratio={self.ratio} length={self.length} heads={self.heads}/{self.kv_heads} "
            f"head_dim={self.head_dim} rows={self.rows}"
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


K = 1024
HEADLINE = (  # by importance: what no longer fits into the time comes last
    Cell("forward", 2, 32 * K, kv_heads=8),
    Cell("decode", 2, 128 * K, kv_heads=8),
    Cell("backward", 8, 32 * K, kv_heads=8),
    Cell("forward", 8, 32 * K),
    Cell("decode", 2, 128 * K),
    Cell("decode", 8, 32 * K, kv_heads=8),
    Cell("decode", 8, 128 * K, kv_heads=8),
    Cell("forward", 32, 128 * K, kv_heads=8),
    Cell("rotate_commit", 8, 32 * K, kv_heads=8),
    Cell("backward", 2, 8 * K),
    Cell("forward", 8, 8 * K, kv_heads=8),
    Cell("backward", 32, 128 * K, kv_heads=8),
    Cell("forward", 128, 128 * K),
)


def _grid() -> tuple[Cell, ...]:
    lengths, heads = (8 * K, 32 * K, 128 * K), ((32, 8), (32, 32))
    ratios = (2, 8, 32, 128)
    whole = [Cell(k, r, t, h, kv) for k, t, r, (h, kv) in product(ATTENTION, lengths, ratios, heads)]
    whole += [Cell("decode", r, t, h, kv) for t, r, (h, kv) in product(lengths, ratios, heads)]
    whole += [Cell("decode", r, 32 * K, 32, 8, rows=rows) for r, rows in product((2, 8), (8, 32))]
    whole += [Cell("rotate_commit", r, t, 32, 8) for t, r in product(lengths, ratios)]
    others = [(64, "bfloat16"), (96, "bfloat16"), (256, "bfloat16"), (128, "float16"), (128, "float32")]
    whole += [
        Cell(kernel, 8, 32 * K, 16, 4, head_dim=head_dim, dtype=dtype)
        for kernel, (head_dim, dtype) in product((*ATTENTION, "decode"), others)
    ]
    return tuple(dict.fromkeys((*HEADLINE, *whole)))


GRID = _grid()

# Every code path in the interpreter: half precision by NumPy is float16 there.
REHEARSAL = (
    Cell("forward", 4, 48, 2, 1, 64, "float16", window=16),
    Cell("backward", 4, 32, 2, 1, 64, "float32", window=16),
    Cell("decode", 4, 64, 2, 1, 64, "float16", window=16),
    Cell("rotate_commit", 4, 32, 2, 1, 64, "float32", window=16),
)
REHEARSAL_GRID = (*REHEARSAL, Cell("forward", 8, 32, 2, 2, 64, "float32", window=16))
