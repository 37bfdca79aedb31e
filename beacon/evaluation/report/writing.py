"""The files of a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from beacon.evaluation.report.figures import draw
from beacon.evaluation.report.page import page
from beacon.evaluation.report.summary import Summary, summarise
from beacon.evaluation.report.tables import Table, conditions, every_place, markdown, matrix, problems, standard
from beacon.evaluation.results import Results
from beacon.evaluation.results.folder import FIGURES, REPORT
from beacon.weights import whole


def write_report(folder: str | Path) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``summary.json`` and ``figures/*.png`` from what a folder holds.

    Args:
        folder: Of results.

    Returns:
        The files, the page first.

    Raises:
        FileNotFoundError: No folder of results.
        ImportError: matplotlib is not installed.
        ValueError: A damaged file.
    """
    results = Results(folder)
    summary = summarise(results)
    figures = draw(summary)
    pictures = results.path / FIGURES
    pictures.mkdir(exist_ok=True)
    names = {name: pictures / _file_name(name) for name in figures}
    contents = {
        results.path / REPORT[0]: page(summary, figures).encode(),
        results.path / REPORT[1]: text(summary, list(figures)).encode(),
        results.path / REPORT[2]: (json.dumps(summary.to_json(), indent=1, allow_nan=False) + "\n").encode(),
        **{names[name]: picture for name, picture in figures.items()},
    }
    for file, content in contents.items():
        with whole(file) as partial:
            partial.write_bytes(content)
    for old in set(pictures.glob("*.png")) - set(names.values()):
        old.unlink()
    return list(contents)


def text(summary: Summary, figures: Sequence[str] = ()) -> str:
    """The report in Markdown.

    Args:
        summary: The results.
        figures: Names of those that lie beside it.
    """
    parts = ["# beacon eval\n"]
    for task in summary.parts:
        parts.append(f"## {task.name}\n")
        mine = [name for name in (task.name, f"{task.name}-map") if name in figures]
        parts += [f"![{name}]({FIGURES}/{quote(_file_name(name))})\n" for name in mine]
        tables: list[Table | None] = [matrix(task, metric) for metric in task.head.metrics]
        parts += [markdown(table) for table in (*tables, problems(task)) if table is not None]
        if len(task.axes) > 1:
            parts.append(markdown(every_place(task)))
    tables_of_harness = standard(summary)
    if tables_of_harness:
        parts.append("## Standard tasks\n")
        parts += map(markdown, tables_of_harness)
    parts.append(markdown(conditions(summary), 2))
    return "\n".join(parts)


def _file_name(figure: str) -> str:
    return f"{quote(figure, safe='')}.png"
