"""``beacon bench``: what moved between two folders of results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from beacon.cli.common import show_table
from beacon.evaluation.report import Change, compare, summarise
from beacon.evaluation.report.looks import Look, look, number, place_value
from beacon.evaluation.report.statistics import ENOUGH
from beacon.evaluation.results import Results

WORDS = {1: "better", -1: "WORSE", 0: ""}
ASIDE = {1: "(better)", -1: "(worse)", 0: ""}  # of what does not decide
HEAD = ("method", "task", "where", "metric", "before", "after", "change", "p", "texts", "moved")


def run(args: argparse.Namespace, console: Console) -> int:
    """Compare; 1 where something got worse."""
    before, after = (summarise(Results(folder)) for folder in (args.before, args.after))
    found = compare(before, after, args.threshold)
    show_table(console, HEAD, [_row(change) for change in found.overall], f"{args.before} and {args.after}")
    moved = [change for change in found.places if change.moved and change.decides]
    if moved:
        show_table(console, HEAD, [_row(change) for change in moved], "places that moved")
    if found.losses:
        rows = [[loss.method, loss.task, str(loss.lost), str(loss.gained), loss.reason] for loss in found.losses]
        show_table(console, ("method", "task", "items lost", "gained", "reason"), rows, "items not measured in both")
    _list(console, "not compared", found.only)
    _list(console, "settings differ", found.settings)
    _list(console, "options differ (metrics of tasks whose options differ do not decide)", found.options)
    deciding = sum(change.decides for change in found.overall)
    lost = sum(loss.lost for loss in found.losses)
    console.print(
        f"{len(found.overall)} comparisons, of which {deciding} decide: {len(found.better)} better, {len(found.worse)} "
        f"worse, {lost} items lost. (p: paired bootstrap over texts, corrected for as many as decide, and in brackets, "
        f"uncorrected, of what does not: fewer than {ENOUGH} texts never do. Worse counts from p < 0.05 and "
        f"{100 * args.threshold:g} % on.)"
    )
    return 1 if found.regressed else 0


def _row(change: Change) -> list[str]:
    difference = change.difference
    shown = look(change.metric, [difference.before, difference.after])
    where = ", ".join(f"{key} {place_value(key, value)}" for key, value in change.place.items())
    return [
        change.method,
        change.task,
        where or "all",
        shown.label,
        shown.write(difference.before),
        shown.write(difference.after),
        _change(change, shown),
        number(change.p, 3) if change.decides else f"({number(change.p, 3)})",
        str(difference.clusters),
        (WORDS if change.decides else ASIDE)[change.moved],
    ]


def _change(change: Change, shown: Look) -> str:
    low, high = change.difference.low, change.difference.high
    if low is None or high is None:
        return "–"
    if change.geometric:
        return f"× [{low:.3f}, {high:.3f}]"
    return f"[{shown.write(low).removesuffix(shown.sign)}, {shown.write(high).removesuffix(shown.sign)}]"


def _list(console: Console, what: str, lines: Sequence[str]) -> None:
    if lines:
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        console.print(f"[bold]{what}:[/] {escape('; '.join(lines[:8]))}{more}", soft_wrap=True)
