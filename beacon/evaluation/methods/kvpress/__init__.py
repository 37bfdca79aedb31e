"""kvpress's methods as baselines: full attention, then keys and values dropped, in a process of their own."""

from beacon.evaluation.methods.kvpress.method import PRESSES, KVPress

__all__ = ["PRESSES", "KVPress"]
