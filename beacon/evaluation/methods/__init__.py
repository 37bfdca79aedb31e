"""Ways to read a text that is longer than the native context, all behind one interface.

:mod:`~beacon.evaluation.methods.by_name` lists them; a new one is a class and a line there.
"""

from beacon.evaluation.methods.by_name import METHODS, check_method, make_method, method_form, named_option
from beacon.evaluation.methods.condensed import Beacon
from beacon.evaluation.methods.dialogue import Dialogue
from beacon.evaluation.methods.fine_tuned import FineTuned
from beacon.evaluation.methods.interface import Method, Outcome, Progress
from beacon.evaluation.methods.kvpress import KVPress
from beacon.evaluation.methods.policy_ratios import BeaconPolicy
from beacon.evaluation.methods.rope_scaling import RopeScaled
from beacon.evaluation.methods.sliding_window import SlidingWindow
from beacon.evaluation.methods.stock import Stock, as_stock
from beacon.evaluation.methods.truncation import Truncated, TruncateLeft, TruncateMiddle

__all__ = [
    "METHODS",
    "Beacon",
    "BeaconPolicy",
    "Dialogue",
    "FineTuned",
    "KVPress",
    "Method",
    "Outcome",
    "Progress",
    "RopeScaled",
    "SlidingWindow",
    "Stock",
    "TruncateLeft",
    "TruncateMiddle",
    "Truncated",
    "as_stock",
    "check_method",
    "make_method",
    "method_form",
    "named_option",
]
