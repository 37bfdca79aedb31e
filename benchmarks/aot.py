"""Compile every tile of the table for sm_80 and sm_90 without a GPU and write what it takes on the chip.

python benchmarks/aot.py        # -> benchmarks/results/aot/forward.csv
"""

import csv
import dataclasses
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from beacon_kernels.testing import ITEMSIZES, compile_kernel  # noqa: E402
from beacon_kernels.tiles import ARCHITECTURES, HEAD_DIMS, tile_for  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "aot" / "forward.csv"


def main() -> None:
    """Compile and write, a row per (capability, head_dim, dtype, packed heads)."""
    rows = []
    for capability in ARCHITECTURES:
        for head_dim in HEAD_DIMS:
            for dtype in ITEMSIZES:
                for packed in (1, 4):
                    tile = tile_for("forward", head_dim, ITEMSIZES[dtype], capability)
                    found = compile_kernel("forward", head_dim, dtype, capability, packed=packed)
                    row = {**dataclasses.asdict(found), "packed": packed, **dataclasses.asdict(tile)}
                    rows.append({**row, "triton": triton.__version__})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    sys.stdout.write(f"{len(rows)} rows in {OUT.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
