"""Compile every kernel for sm_80 and sm_90 without a GPU, with every tile of the table, and write what each takes.

python benchmarks/aot.py        # -> benchmarks/results/aot/kernels.csv; minutes, less where Triton's cache is warm
"""

import csv
import dataclasses
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from beacon_kernels.testing import ITEMSIZES, KERNELS, SHARED_LIMITS, compile_kernel, tile_of  # noqa: E402
from beacon_kernels.tiles import ARCHITECTURES, HEAD_DIMS  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "aot" / "kernels.csv"


def main() -> None:
    """Compile and write, a row per (kernel, capability, head_dim, dtype)."""
    rows = []
    for name in KERNELS:
        for capability in ARCHITECTURES:
            for head_dim in HEAD_DIMS:
                for dtype in ITEMSIZES:
                    found = dataclasses.asdict(compile_kernel(name, head_dim, dtype, capability))
                    tile = tile_of(name, head_dim, dtype, capability)
                    fits = found["shared"] <= SHARED_LIMITS[capability]
                    rows.append({**found, "fits": fits, **dataclasses.asdict(tile), "triton": triton.__version__})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    spilling = [row for row in rows if row["spilled"]]
    sys.stdout.write(f"{len(rows)} rows in {OUT.relative_to(ROOT)}; {len(spilling)} spill registers:\n")
    for row in spilling:
        kind = f"{row['kernel']} head_dim {row['head_dim']} {row['dtype']} sm_{row['capability']}"
        sys.stdout.write(f"  {kind}: {row['spilled']} bytes per thread\n")


if __name__ == "__main__":
    main()
