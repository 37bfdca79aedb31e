"""Figures of a file of results, from its rows only.

python -m benchmarks.gpu.plots benchmarks/results/<machine>/kernels.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.aims import figures, rate
from benchmarks.gpu.ceilings import COPY, PRODUCT
from benchmarks.gpu.implementations import GRAPH
from benchmarks.results import OURS, latest, read

COLOURS = {
    OURS: "#1b6ca8",
    OURS + GRAPH: "#6fb1dd",
    "flex": "#e07b39",
    "cudnn": "#6a9f58",
    "flash": "#a3c586",
    "flash-attn": "#c9b458",
    "flash-attn-3": "#d9a0c0",
    "sdpa": "#967bb6",
    "sdpa" + GRAPH: "#c9b8dc",
    "sdpa-mask": "#b0b0b0",
    "eager": "#b0b0b0",
}
UNITS = {"forward": "TFLOP/s", "backward": "TFLOP/s", "decode": "GB/s", "rotate_commit": "GB/s"}
CEILINGS = {"TFLOP/s": (PRODUCT, "bf16 product"), "GB/s": (COPY, "copy bandwidth")}


def draw(path: Path) -> list[Path]:
    """A figure per kernel beside the file: bars of TFLOP/s or GB/s per cell, higher is better.

    Returns:
        The figures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = latest(read(path))
    found = figures(rows)
    machine = rows[0]["machine"] if rows else ""
    drawn = []
    for kernel, unit in UNITS.items():
        cases = [case for case in found if case.split()[0] == kernel]
        impls = [impl for impl in COLOURS if any(rate(found[case], impl) is not None for case in cases)]
        if not impls:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.16 * len(cases) * (len(impls) + 1.5)), layout="constrained")
        for number, impl in enumerate(impls):
            rates = [(at, rate(found[case], impl)) for at, case in enumerate(cases)]
            bars = [(at, value) for at, value in rates if value is not None]
            width = 0.85 / len(impls)
            places = [at + (number - (len(impls) - 1) / 2) * width for at, _ in bars]
            patches = axes.barh(places, [value for _, value in bars], width, label=impl, color=COLOURS[impl])
            axes.bar_label(patches, fmt="%.0f", padding=2, fontsize=6)
        case, label = CEILINGS[unit]
        ceiling = rate(found.get(case, {}), "torch")
        if ceiling is not None:
            axes.axvline(ceiling, color="black", linestyle=":", label=f"{label}: {ceiling:.0f}")
        axes.set_yticks(range(len(cases)), [case.removeprefix(f"{kernel} ") for case in cases])
        axes.invert_yaxis()
        axes.set_xlabel(f"{unit}, median")
        axes.set_title(f"{kernel} on {machine}: ratio, length, heads/kv_heads")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawn.append(path.with_name(f"{path.stem}-{kernel}.png"))
        figure.savefig(drawn[-1], dpi=130)
        pyplot.close(figure)
    return drawn


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for figure in draw(Path(name)):
            sys.stdout.write(f"{figure}\n")
