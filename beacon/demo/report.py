"""Tables, figure and page of a demo. Nothing here prints."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from beacon import __version__
from beacon.demo.measure import Demo
from beacon.evaluation import Perplexity, recall

ENTRIES = "sliding window, as many entries"

Table = tuple[list[str], list[list[str]]]


def machine_stamp() -> dict[str, str]:
    """Where and with what figures were measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "activation-beacon": __version__,
        "commit": _commit(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def perplexity_table(demo: Demo) -> Table:
    """Perplexity by method (rows) and tokens read (columns)."""
    curves = perplexity_curves(demo.perplexity, demo.window)
    lengths = sorted({length for curve in curves.values() for length in curve})
    rows = [[name, *(_number(curve[n]) if n in curve else "" for n in lengths)] for name, curve in curves.items()]
    return ["perplexity after", *(f"{n:,}" for n in lengths)], rows


def perplexity_curves(results: Sequence[Perplexity], window: int) -> dict[str, dict[int, float]]:
    """Perplexity by method and tokens read; the sliding window that grows with the beacons' entries is one method."""
    curves: dict[str, dict[int, float]] = {}
    for result in results:
        name = result.method
        repeated = result.context - 1 in curves.get(name, {})
        if name.startswith("sliding") and (_window(name) != window or repeated):
            name = ENTRIES
        curves.setdefault(name, {})[result.context - 1] = result.perplexity
    return curves


def passkey_table(demo: Demo, length: int) -> Table:
    """Digits found in texts of one length, by method (rows) and depth (columns), and exact answers."""
    scores = [score for score in demo.passkeys if score.length == length]
    depths = sorted({score.depth for score in scores})
    rows = []
    for method in dict.fromkeys(score.method for score in scores):
        mine = [score for score in scores if score.method == method]
        cells = [_percent(recall([s for s in mine if s.depth == depth]).per_digit) for depth in depths]
        rows.append([method, *cells, _percent(recall(mine).per_digit), _percent(recall(mine).exact)])
    return [f"digits at depth ({length:,} tokens)", *map(_percent, depths), "all", "exact"], rows


def cost_table(demo: Demo) -> Table:
    """Bytes and speed."""
    longest = max(result.context for result in demo.perplexity) - 1
    ratio = demo.full_bytes / demo.cache_bytes
    return (
        ["cost of reading", f"{longest:,} tokens"],
        [
            [f"cache, ratio {demo.settings.ratio}", f"{demo.cache_bytes / 1e6:.2f} MB ({ratio:.1f} times less)"],
            ["cache, full attention", f"{demo.full_bytes / 1e6:.2f} MB"],
            ["reading", f"{demo.tokens_per_second:,.0f} tokens/s"],
            ["decoding after it", f"{demo.decoded_per_second:,.0f} tokens/s"],
        ],
    )


def tables(demo: Demo) -> list[Table]:
    """All that was measured: perplexity, passkeys by length, cost."""
    lengths = sorted({score.length for score in demo.passkeys})
    return [perplexity_table(demo), *(passkey_table(demo, length) for length in lengths), cost_table(demo)]


def write_report(demo: Demo, folder: Path) -> list[Path]:
    """Write ``demo.json``, ``demo.png`` and ``demo.html``.

    Args:
        demo: What was measured.
        folder: Where to; made if missing.

    Returns:
        The three files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = machine_stamp()
    numbers = {**asdict(demo), "machine": stamp}
    for entry, result in zip(numbers["perplexity"], demo.perplexity, strict=True):
        entry["perplexity"] = result.perplexity
    files = [folder / name for name in ("demo.json", "demo.png", "demo.html")]
    files[0].write_text(json.dumps(numbers, indent=1, default=str))
    picture = _figure(demo)
    files[1].write_bytes(picture)
    files[2].write_text(_page(demo, picture, stamp), encoding="utf-8")
    return files


def _figure(demo: Demo) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = perplexity_curves(demo.perplexity, demo.window)
    colors = {name: f"C{number}" for number, name in enumerate(curves)}  # one colour per method in both panels
    for name, curve in curves.items():
        lengths = sorted(curve)
        strong = name.startswith("beacon")
        look = {"color": colors[name], "linewidth": 2.6 if strong else 1.5, "marker": "o"}
        left.plot(lengths, [curve[n] for n in lengths], label=name, **look)
    useful = [v for name, curve in curves.items() if name != "stock" for v in curve.values()]
    left.set_ylim(min(useful) * 0.9, max(useful) * 1.35)
    left.set_xscale("log", base=2)
    left.set_xticks(sorted({n for curve in curves.values() for n in curve}))
    left.get_xaxis().set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.set_xlabel("tokens read")
    left.set_ylabel("perplexity of the last tokens")
    left.set_title("Lower is better; the stock model leaves the picture", fontsize=10)
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    depths = sorted({score.depth for score in demo.passkeys})
    longest = max(score.length for score in demo.passkeys)
    for name in dict.fromkeys(score.method for score in demo.passkeys):
        mine = [score for score in demo.passkeys if score.method == name and score.length == longest]
        found = [100 * recall([score for score in mine if score.depth == depth]).per_digit for depth in depths]
        look = {"color": colors[name], "linewidth": 2.6 if name.startswith("beacon") else 1.5, "marker": "o"}
        right.plot([100 * depth for depth in depths], found, label=name, **look)
    right.set_title(f"Passkeys in texts of {longest:,} tokens; higher is better", fontsize=10)
    right.set_ylim(-4, 104)
    right.set_xlabel("depth of the passkey in the text (%)")
    right.set_ylabel("digits found (%)")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _page(demo: Demo, picture: bytes, stamp: dict[str, str]) -> str:
    body = "".join(map(_html_table, tables(demo)))
    texts = ", ".join(html.escape(name) + (" (held out)" if held else "") for name, held in demo.texts)
    conditions = ", ".join(f"{html.escape(key)} {html.escape(value)}" for key, value in stamp.items())
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Activation Beacon demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1.2rem 0; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.ours {{ font-weight: 600; background: #fff4e6; }}
img {{ max-width: 100%; }} small {{ color: #666; }}
</style></head><body>
<h1>Activation Beacon: a long text read by a small model</h1>
<p>The last {demo.settings.targets} tokens of {len(demo.texts)} texts, read after more and more context; passkeys hidden
in the same texts; what the cache costs. All of it was measured in one run of {demo.seconds:.0f} seconds.</p>
<img alt="Perplexity by tokens read, and passkey digits found by depth" src="data:image/png;base64,{image}">
{body}
<p><small>Texts: {texts}.</small></p><p><small>{conditions}</small></p>
</body></html>
"""


def _html_table(table: Table) -> str:
    head, rows = table
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = ""
    for row in rows:
        kind = ' class="ours"' if row[0].startswith("beacon") else ""
        body += f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _window(name: str) -> int:
    return int(name.rsplit(" ", 1)[1])


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of the source tree this runs from, if it is one, with a mark where files differ from it."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
