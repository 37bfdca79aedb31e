"""Write the shipped model's evaluation into benchmarks/README.md, from the results alone.

python benchmarks/evaluation_table.py            # after `beacon eval ... --out benchmarks/results/evaluation`
python benchmarks/evaluation_table.py --check    # exit code 1 if README.md says something else
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation"
README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- written by benchmarks/evaluation_table.py -->", "<!-- end of what it writes -->"


def main(arguments: list[str] | None = None) -> int:
    """Write or check; 0 when README.md says what the results say."""
    parser = argparse.ArgumentParser(prog="benchmarks/evaluation_table.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    before = README.read_text()
    after = replaced(before, tables(RESULTS))
    if before == after:
        return 0
    if options.check:
        sys.stderr.write(f"{README.name} differs from {RESULTS}; run python benchmarks/evaluation_table.py.\n")
        return 1
    README.write_text(after)
    return 0


def tables(folder: Path) -> str:
    """Main metrics, times and sizes by method and length, standard tasks, and the conditions, in Markdown."""
    from beacon.evaluation.report.looks import look
    from beacon.evaluation.report.summary import summarise
    from beacon.evaluation.report.tables import conditions, markdown, matrix, standard
    from beacon.evaluation.results import Results

    summary = summarise(Results(folder))
    parts = []
    for task in summary.parts:
        for metric in task.head.metrics:
            if task.scores(metric) and (metric == task.main or look(metric, task.scores(metric)).cost):
                table = matrix(task, metric)
                parts.append(markdown(dataclasses.replace(table, title=f"{task.name}: {table.title}")))
    return "\n".join([*parts, *map(markdown, standard(summary)), markdown(conditions(summary))])


def replaced(page: str, text: str) -> str:
    """The page with ``text`` between the two marks.

    Raises:
        ValueError: The page lacks the marks.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once each, got another; put them back.")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    sys.exit(main())
