"""Draw what the kernels walk over: the mask of a plan as 0/1, cut into tiles (the figure of kernels/README.md).

python examples/draw_schedule.py docs/schedule.png
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib.pyplot as plt
import numpy as np
from draw_plan import one_pass
from matplotlib.patches import Rectangle

import beacon
from beacon.attention.kernels import query_runs
from beacon_kernels.beacon_attention import Schedule, build_schedule
from beacon_kernels.tiles import Tile

TILE = Tile(block_m=8, block_n=4, num_warps=4, num_stages=1)
STORES = ("memory", "raw slots", "beacon slots")
WHOLE, MASKED = "#2a6f97", "#e07a1f"


def draw_list(axes: plt.Axes, schedule: Schedule, title: str) -> None:
    """One list of queries: 1 where a query sees a key, blocks outlined where no mask is needed and where one is."""
    at = [0, *np.cumsum(schedule.sizes[1:]).tolist()]  # store 0, memory of earlier calls, is empty here
    queries = schedule.runs.shape[2]
    for store in range(1, 4):
        for query, (lo, hi) in enumerate(schedule.runs[store].T.tolist()):
            for key in range(lo, hi):
                axes.text(at[store - 1] + key + 0.5, query + 0.5, "1", ha="center", va="center", fontsize=6)
    for tile in schedule.forward.items.tolist():
        first, end = tile[:2]
        axes.axhline(end, color="0.8", linewidth=0.6)
        for store in range(1, 4):
            lo, mid, hi = tile[2 + 3 * store : 5 + 3 * store]
            blocks = [(x, min(x + TILE.block_n, hi), x < mid) for x in range(lo, hi, TILE.block_n)]
            for left, right, whole in blocks:
                corner, width = (at[store - 1] + left + 0.08, first + 0.08), right - left - 0.16
                color = WHOLE if whole else MASKED
                style = {"edgecolor": color, "facecolor": color, "alpha": 0.28, "linewidth": 0}
                axes.add_patch(Rectangle(corner, width, end - first - 0.16, **style))
    for edge in at[1:-1]:
        axes.axvline(edge, color="black", linewidth=1)
    axes.set_xlim(0, at[-1])
    axes.set_ylim(queries, 0)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(at)]
    axes.set_xticks(middles, STORES)
    axes.set_yticks([0.5, queries - 0.5], ["1", str(queries)])
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10, loc="left")


def main() -> None:
    """Two windows of 16 and a half one, ratios 4 and 8; tiles of 8 queries and 4 keys."""
    plan = one_pass(beacon.BeaconConfig(window=16, ratios=(4, 8), ratio_policy="sequence"), 40, (4, 8))
    sizes = [0, len(plan.commits), len(plan.raw_slots), len(plan.beacon_slots)]
    lists = [("raw", plan.raw, 1), ("beacon", plan.beacon, 2)]
    counts = [len(queries) for _, queries, _ in lists]
    figure, panels = plt.subplots(2, 1, figsize=(8, 7.6), height_ratios=[counts[0], counts[1] + 2])
    for axes, (name, queries, packed) in zip(panels, lists, strict=True):
        blocks = [getattr(block, f"{name}_queries") for block in plan.blocks]
        starts = [block.start for block in blocks if block.stop > block.start]
        runs = query_runs(queries, [0], list(plan.commit_counts))
        schedule = build_schedule(runs, sizes, starts, tile=TILE, packed=packed)
        draw_list(axes, schedule, f"Queries of {'raw tokens' if name == 'raw' else 'beacons, two heads to a tile'}")
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, alpha=0.28) for color in (WHOLE, MASKED)]
    figure.legend(
        handles,
        ["all see it: no mask", "some see it, or it ends short: masked"],
        loc="lower center",
        ncols=2,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "schedule.png", dpi=130)


if __name__ == "__main__":
    main()
