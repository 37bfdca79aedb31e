"""Draw who sees whom: the plan of a short text as a picture (the README's figure).

python examples/draw_plan.py docs/plan.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import beacon
from beacon.plan import Plan, RowState, Span, build_plan, schedule

RATIOS = (4, 8)


def one_pass(config: beacon.BeaconConfig, tokens: int, ratios: tuple[int, ...]) -> Plan:
    """The plan that reads a whole text of one row in one pass."""
    start = RowState(row=0)
    steps = schedule(config, start, tokens, lambda state: ratios[len(state.ratios)], row=0, span=Span())
    return build_plan(config, [start], [[step for step, _ in steps]], [steps[-1][1]])


def picture(plan: Plan) -> tuple[np.ndarray, list[str]]:
    """Visibility in reading order: 1 a raw token or own beacon, 2 memory, 0 hidden; and the kind of every entry."""
    order: list[tuple[str, int]] = []
    for block in plan.blocks:
        order += [("raw", n) for n in range(block.raw_queries.start, block.raw_queries.stop)]
        order += [("beacon", n) for n in range(block.beacon_queries.start, block.beacon_queries.stop)]
    place = {entry: number for number, entry in enumerate(order)}
    kinds = [("raw", n) for n in range(len(plan.raw))] + [("beacon", n) for n in range(len(plan.beacon))]
    seen = np.zeros((len(order), len(order)), dtype=int)
    for kind, queries in (("raw", plan.raw), ("beacon", plan.beacon)):
        for n in range(len(queries)):
            row = seen[place[kind, n]]
            for entry in range(int(queries.memory[n])):
                row[place[kinds[int(plan.commits.pool[entry])]]] = 2
            for slot in range(int(queries.raw_lo[n]), int(queries.raw_hi[n])):
                row[place[kinds[int(plan.raw_slots.pool[slot])]]] = 1
            for slot in range(int(queries.beacon_lo[n]), int(queries.beacon_hi[n])):
                row[place[kinds[int(plan.beacon_slots.pool[slot])]]] = 1
    return seen, [kind for kind, _ in order]


def main() -> None:
    """Draw a text of two and a half windows of 16 tokens, condensed at ratios 4 and 8."""
    config = beacon.BeaconConfig(window=16, ratios=RATIOS, ratio_policy="sequence")
    seen, kinds = picture(one_pass(config, 40, RATIOS))
    shade = np.ones((*seen.shape, 3))
    shade[seen == 1] = (0.55, 0.68, 0.85)
    shade[seen == 2] = (0.95, 0.60, 0.20)
    figure, axes = plt.subplots(figsize=(7.2, 6.6))
    axes.imshow(shade)
    axes.set_xticks(np.arange(-0.5, len(kinds)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(kinds)), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    beacons = [n for n, kind in enumerate(kinds) if kind == "beacon"]
    axes.set_xticks(beacons, ["b"] * len(beacons), color="tab:orange", fontweight="bold")
    axes.set_yticks(beacons, ["b"] * len(beacons), color="tab:orange", fontweight="bold")
    axes.set_xlabel("is seen (text in reading order, beacons b after each full window)")
    axes.set_ylabel("sees")
    axes.set_title("Windows of 16 tokens at ratios 4 and 8: text in blue, memory in orange", fontsize=11)
    figure.tight_layout()
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "plan.png", dpi=130)


if __name__ == "__main__":
    main()
