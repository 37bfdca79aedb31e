"""What a step should take, before it is measured: FLOPs and bytes per component at the rates of a GPU.

FLOPs follow from `beacon.training.flops`, times from a few rates. Three of them are measured or aimed for (GOALS.md): a
large product, a copy on the device, our attention kernels. The others are judgements, marked so where they stand. The
components are added up: nothing overlaps, and the device never waits; `PACE` is what is then expected of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import OURS
from benchmarks.training.contenders import FULL, LOOP, NAMES, PUBLISHED
from benchmarks.training.setting import Setting

PEAK = 989e12
PACE = 0.85  # judgement: launches, clocks that sink under sustained load, imperfect tiles
SMS = 132
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 128, 0.75))  # rows, columns, rate beside the best
FULL_WAVE = 64 * 32 / (16 * SMS)  # of the 8192 x 8192 x 8192 product whose rate is measured
ATTENTION = {  # FLOP/s forward and backward
    OURS: (470e12, 350e12),  # the aims; of visible pairs
    LOOP: (470e12, 350e12),
    FULL: (370e12, 300e12),  # judgement: FlashAttention-2 in PyTorch, head_dim 128, 8K; of visible pairs
    PUBLISHED: (150e12, 100e12),  # judgement: the memory-efficient kernel with a mask; of all pairs, masked or not
}
# Bytes per token, channel and layer of all that is neither product nor attention, forward and backward. Counted from
# the operations of a small model under autocast, without casts of weights; ours less what the kernels fuse (rotation,
# gathering).
ELEMENTWISE = {OURS: (125, 290), LOOP: (125, 290), FULL: (153, 306), PUBLISHED: (202, 390)}
OPERATIONS = {OURS: 210, LOOP: 247, FULL: 150, PUBLISHED: 183}  # per layer and pass, with gradients; counted likewise
HOST = 8e-6  # judgement: seconds of the host per operation
LOSS = 48  # bytes per logit, with recomputation
CAST = 6  # bytes per parameter: float32 to bfloat16 or back; also one addition in bfloat16
ADAMW = 28  # bytes per parameter: four float32 read, three written


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU: FLOP/s of a large product, bytes/s of a copy (read and written)."""

    name: str
    product: float
    copy: float


MACHINES = (Machine("H100", 780e12, 3.0e12), Machine("H200", 780e12, 4.3e12))


def account(setting: Setting) -> str:
    """The account as Markdown, one table per GPU."""
    parts = [f"`{setting.case}`: {setting.shape}", _flops_table(setting)]
    for machine in MACHINES:
        columns = {name: components(setting, machine, name) for name in NAMES}
        parts.append(f"### {machine.name}: {machine.product / 1e12:.0f} TFLOP/s, {machine.copy / 1e12:.1f} TB/s")
        parts.append(_time_table(setting, columns))
    return "\n\n".join(parts)


def components(setting: Setting, machine: Machine, name: str) -> dict[str, float]:
    """Seconds by component of a contender's step; `host` is beside the others, not among them."""
    shape, scale = setting.model_shape, setting.scale
    flops = setting.full_flops if name == FULL else setting.flops
    passes = _passes(setting, name)
    with_beacons = [beacons for _, beacons in passes if beacons]
    trained = shape.layers * sum(shape.projections.values())
    raw = [(tokens, 0) for tokens, _ in passes]
    forward, again = (_matrices(setting, machine, raw, tail) for tail in (True, False))
    extra = sum(
        _matrices(setting, machine, passes, tail) - _matrices(setting, machine, raw, tail)
        for tail in (True, True, False)
    )
    ahead, back = ATTENTION[name]
    pairs = flops.attention if name != PUBLISHED else _all_pairs(setting, passes)
    fwd, bwd = ELEMENTWISE[name]
    moved = (flops.raw_tokens + flops.beacons) * shape.hidden * shape.layers
    head = 3 * flops.head / machine.product + LOSS * flops.raw_tokens * shape.vocab / machine.copy
    windows = 1 if name == FULL else len(with_beacons)
    return {
        "matrices, raw tokens: forward": forward,
        "matrices, raw tokens: recomputed": again,
        "matrices, raw tokens: gradients of inputs": forward,
        "matrices, beacons: all three": extra,
        "gradients of weights": _weight_gradients(setting, machine, name, with_beacons),
        "attention forward and recomputed": 2 * pairs / ahead,
        "attention backward": 2.5 * pairs / back,
        "elementwise forward and recomputed": 2 * fwd * moved / machine.copy,
        "elementwise backward": bwd * moved / machine.copy,
        "head and loss": head,
        "casts of weights": CAST * trained * (1 + windows) / machine.copy,
        "gradients cast and added": CAST * trained * windows / machine.copy,
        "AdamW": ADAMW * trained / machine.copy,
        "host": HOST * OPERATIONS[name] * len(passes) * scale.layers,
    }


def expected(found: dict[str, float]) -> float:
    """Seconds that a step of these components is expected to take."""
    return max((sum(found.values()) - found["host"]) / PACE, found["host"])


def _passes(setting: Setting, name: str) -> list[tuple[int, int]]:
    """Raw tokens and beacons that are computed together."""
    window = setting.scale.window
    if name == FULL:
        return [(setting.tokens, 0)]
    each = [(window, window // ratio) for ratio in setting.ratios]
    each.append((setting.tokens - window * len(each), 0))
    if name == OURS:
        return [(setting.tokens, sum(beacons for _, beacons in each))]
    return each


def _matrices(setting: Setting, machine: Machine, passes: Sequence[tuple[int, int]], tail: bool) -> float:
    """Seconds of the layers' products in one pass over everything (beacons in the last layer count like elsewhere)."""
    s, shape = setting.scale, setting.model_shape
    kv = s.kv_heads * shape.head_dim
    total = 0.0
    for tokens, beacons in passes:
        for rows in (tokens, beacons):
            total += sum(_product(machine, rows, n, s.hidden) for n in (s.hidden, kv, kv, s.hidden))
        total += 2 * _product(machine, tokens + beacons, s.intermediate, s.hidden)
        total += _product(machine, tokens + beacons, s.hidden, s.intermediate) if tail else 0.0
    return s.layers * total


def _weight_gradients(setting: Setting, machine: Machine, name: str, beacons: Sequence[int]) -> float:
    s = setting.scale
    kv = s.kv_heads * setting.model_shape.head_dim
    summed = [setting.tokens] if name == FULL else beacons
    return s.layers * sum(_product(machine, n, s.hidden, rows) for rows in summed for n in (s.hidden, kv, kv, s.hidden))


def _product(machine: Machine, m: int, n: int, k: int) -> float:
    """Seconds of a bfloat16 product ``[m, k] x [k, n]``: whole waves of tiles, or its bytes."""
    if not m:
        return 0.0
    rate = machine.product / FULL_WAVE
    waves = max(
        factor * m * n / (-(-(-(-m // rows) * -(-n // columns)) // SMS) * SMS * rows * columns)
        for rows, columns, factor in TILES
    )
    return max(2 * m * n * k / (rate * waves), 2 * (m * k + k * n + m * n) / machine.copy)


def _all_pairs(setting: Setting, passes: Sequence[tuple[int, int]]) -> float:
    """FLOPs of attention forward over every entry of the masks."""
    shape, memory, total = setting.model_shape, 0, 0
    for tokens, beacons in passes:
        total += (tokens + beacons) * (memory + tokens + beacons)
        memory += beacons
    return 4 * shape.layers * shape.heads * shape.head_dim * total


def _flops_table(setting: Setting) -> str:
    step, full = setting.flops, setting.full_flops
    lines = ["| TFLOP per step | beacons | full |", "|---|---|---|"]
    for label, value in {
        "raw tokens / beacons": lambda s: f"{s.raw_tokens} / {s.beacons}",
        "visible keys per raw token": lambda s: f"{s.raw_pairs / s.raw_tokens:.0f}",
        "matrices forward": lambda s: f"{s.matrices / 1e12:.1f}",
        "gradients of weights": lambda s: f"{s.weight_gradients / 1e12:.1f}",
        "attention forward": lambda s: f"{s.attention / 1e12:.1f}",
        "head forward": lambda s: f"{s.head / 1e12:.1f}",
        "model (MFU)": lambda s: f"{s.model / 1e12:.1f}",
        "hardware (HFU)": lambda s: f"{s.hardware / 1e12:.1f}",
    }.items():
        lines.append(f"| {label} | {value(step)} | {value(full)} |")
    return "\n".join(lines)


def _time_table(setting: Setting, columns: dict[str, dict[str, float]]) -> str:
    lines = ["| ms | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    sums = {name: sum(found.values()) - found["host"] for name, found in columns.items()}
    times = {name: expected(found) for name, found in columns.items()}
    flops = {name: setting.full_flops if name == FULL else setting.flops for name in columns}

    def line(label: str, form: str, values: dict[str, float]) -> None:
        lines.append(f"| {label} | " + " | ".join(format(value, form) for value in values.values()) + " |")

    for label in columns[OURS]:
        if label != "host":
            line(label, ".1f", {name: 1e3 * found[label] for name, found in columns.items()})
    line("sum", ".0f", {name: 1e3 * value for name, value in sums.items()})
    line("host, hidden where below", ".0f", {name: 1e3 * found["host"] for name, found in columns.items()})
    line(f"**expected** (sum / {PACE})", ".0f", {name: 1e3 * value for name, value in times.items()})
    line("**raw tokens/s**", ".0f", {name: setting.tokens / value for name, value in times.items()})
    line("HFU", ".0%", {name: flops[name].hardware / times[name] / PEAK for name in columns})
    line("MFU", ".0%", {name: flops[name].model / times[name] / PEAK for name in columns})
    line("**x ours**", ".2f", {name: times[name] / times[OURS] for name in columns})
    return "\n".join(lines)
