"""Integers only: which windows a text falls into, who sees whom, and where."""

from beacon.plan.layout import Block, Keys, Plan, Queries, build_plan
from beacon.plan.schedule import RowState, Span, WindowStep, schedule

__all__ = ["Block", "Keys", "Plan", "Queries", "RowState", "Span", "WindowStep", "build_plan", "schedule"]
