"""Attention of queries that each see one contiguous run of up to four stores of keys and values."""

from beacon_kernels.beacon_attention.api import beacon_attention
from beacon_kernels.beacon_attention.decode_api import beacon_decode
from beacon_kernels.beacon_attention.schedule import Schedule, build_schedule, schedule_for

__all__ = ["Schedule", "beacon_attention", "beacon_decode", "build_schedule", "schedule_for"]
