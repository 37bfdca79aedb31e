"""Integers only: which windows a text falls into, who sees whom, and where."""

from beacon.plan.layout import Block, Keys, Plan, Queries, build_plan
from beacon.plan.schedule import Ratios, RowState, Span, WindowStep, schedule

__all__ = ["Block", "Keys", "Plan", "Queries", "Ratios", "RowState", "Span", "WindowStep", "build_plan", "schedule"]
