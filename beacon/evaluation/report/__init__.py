"""Reports of results: means with intervals, tables, figures, a page; and two folders compared."""

from beacon.evaluation.report.changes import Change
from beacon.evaluation.report.comparing import Comparison, compare
from beacon.evaluation.report.losing import Loss
from beacon.evaluation.report.statistics import Difference, Estimate, estimate, paired
from beacon.evaluation.report.summary import Summary, TaskSummary, summarise
from beacon.evaluation.report.writing import write_report

__all__ = [
    "Change",
    "Comparison",
    "Difference",
    "Estimate",
    "Loss",
    "Summary",
    "TaskSummary",
    "compare",
    "estimate",
    "paired",
    "summarise",
    "write_report",
]
