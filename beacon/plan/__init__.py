"""Integers only: which windows a text falls into, who sees whom, and where."""

from beacon.plan.layout import Block, Keys, Plan, Queries, build_plan
from beacon.plan.schedule import Ratios, RowState, Span, WindowStep, schedule
from beacon.plan.slots import (
    Change,
    Room,
    beacons_in_slots,
    lay_out_change,
    next_slot,
    open_slots,
    quiet_tokens,
    room_for,
    uncondensed_tokens,
)
from beacon.plan.transfer import upload

__all__ = [
    "Block",
    "Change",
    "Keys",
    "Plan",
    "Queries",
    "Ratios",
    "Room",
    "RowState",
    "Span",
    "WindowStep",
    "beacons_in_slots",
    "build_plan",
    "lay_out_change",
    "next_slot",
    "open_slots",
    "quiet_tokens",
    "room_for",
    "schedule",
    "uncondensed_tokens",
    "upload",
]
