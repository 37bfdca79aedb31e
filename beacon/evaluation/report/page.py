"""The report as one HTML file that needs nothing beside it: figures inside, tables that sort."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping

from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.report.tables import Cell, Table, conditions, every_place, matrix, problems, standard

SHOWN = 0.66  # of a picture's own pixels, so that its letters are as large as the page's
BROAD = 700  # pixels from which on a picture is scrolled where it does not fit, rather than made small
WORDS = ("reason", "value", "metric", "where", "status")  # columns of words

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff; }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #eee; } h3 { margin: 1.6rem 0 .3rem; font-size: 1rem; }
nav a { margin-right: 1rem; } a { color: #0b5cad; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.words { text-align: left; white-space: normal; overflow-wrap: anywhere; }
th { background: #f5f5f5; padding: 0; }
th button { all: unset; box-sizing: border-box; width: 100%; padding: .3rem .7rem; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0b5cad; } th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
tr.ours { font-weight: 600; background: #fff4e6; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
img.broad { max-width: max(100%, 42rem); }
details { margin: .8rem 0; } summary { cursor: pointer; } small, .note { color: #666; font-size: .85rem; }
@media (max-width: 40rem) { body { margin: 1rem auto; font-size: 14px; } th button, td { padding: .25rem .4rem; } }
"""

# Numbers before words, and what has no number last whichever way it is sorted.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const cell = row.cells[column];
      return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    };
    const body = table.tBodies[0];
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      const sign = typeof x === "number" ? Math.sign(x - y) || 0 : x.localeCompare(y);
      return up ? sign : -sign;
    };
    body.append(...[...body.rows].sort(order));
  }));
}
"""


def page(summary: Summary, figures: Mapping[str, bytes]) -> str:
    """Write the page.

    Args:
        summary: The results.
        figures: PNG pictures by name, as :func:`beacon.evaluation.report.figures.draw` names them.
    """
    stated = conditions(summary)
    sections = [(task.name, _task(task, figures)) for task in summary.parts]
    tables = standard(summary)
    if tables:
        sections.append(("standard tasks", "".join(map(_table, tables))))
    sections.append(("conditions", _table(stated)))
    links = "".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name, _ in sections)
    body = "".join(
        f'<section id="{_anchor(n)}"><h2>{html.escape(n)}</h2>{content}</section>' for n, content in sections
    )
    when = html.escape(str(summary.run["starts"][-1]["utc"]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>beacon eval</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<h1>beacon eval</h1>
<p>{len(summary.methods)} methods, {when}. A click on a column's name sorts by it; pointing at a mean shows its interval
and the number of items.</p>
<nav>{links}</nav>
{body}
<script>{SCRIPT}</script>
</body></html>
"""


def _task(task: TaskSummary, figures: Mapping[str, bytes]) -> str:
    parts = []
    for name, what in ((task.name, "by method"), (f"{task.name}-map", "by method and place")):
        if name in figures:
            parts.append(_image(figures[name], f"{task.name} {what}"))
    metrics = [metric for metric in task.head.metrics if task.scores(metric)] or [task.main]
    parts.append(_table(matrix(task, metrics[0])))
    lost = problems(task)
    if lost is not None:
        parts.append(_table(lost))
    more = [matrix(task, metric) for metric in metrics[1:]] + [every_place(task)]
    parts.append(f"<details><summary>All metrics and places</summary>{''.join(map(_table, more))}</details>")
    return "".join(parts)


def _image(picture: bytes, text: str) -> str:
    width, height = (round(SHOWN * int.from_bytes(picture[at : at + 4])) for at in (16, 20))  # of a PNG's header
    data = base64.b64encode(picture).decode()
    size = f'width="{width}" height="{height}"' + (' class="broad"' if width > BROAD else "")
    return f'<div class="wide"><img alt="{html.escape(text)}" {size} src="data:image/png;base64,{data}"></div>'


def _table(table: Table) -> str:
    words = {at for at, name in enumerate(table.head) if name in WORDS}
    head = "".join(
        f'<th scope="col"{_words(at in words)}><button type="button">{html.escape(name)}</button></th>'
        for at, name in enumerate(table.head)
    )
    body = ""
    for row in table.rows:
        kind = ' class="ours"' if row[0].text.startswith("beacon") and table.head[0] == "method" else ""
        body += f"<tr{kind}>" + "".join(_cell(cell, at in words) for at, cell in enumerate(row)) + "</tr>"
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{html.escape(table.title)}</h3><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _cell(cell: Cell, words: bool) -> str:
    marks = _words(words)
    if cell.value is not None:
        marks += f' data-value="{_number(cell.value)}"'
    if cell.note:
        marks += f' title="{html.escape(cell.note)}"'
    return f"<td{marks}>{html.escape(cell.text)}</td>"


def _words(words: bool) -> str:
    return ' class="words"' if words else ""


def _number(value: float) -> str:
    """As JavaScript reads it."""
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(value) if not math.isnan(value) else "NaN"


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
