"""What a wrapped model is worth on long text, beside the stock model and a sliding window. Nothing here prints."""

from beacon.evaluation.baselines import METHODS, check_method, make_method, method_form
from beacon.evaluation.fine_tuned import FineTuned
from beacon.evaluation.held import full_cache_bytes, held_entries, native_context
from beacon.evaluation.kvpress import KVPress
from beacon.evaluation.methods import Beacon, Method, Outcome, Stock
from beacon.evaluation.passkey import (
    PasskeyPrompt,
    PasskeyScore,
    Recall,
    ask_passkey,
    build_passkey,
    passkey_line,
    recall,
)
from beacon.evaluation.perplexity import Perplexity, measure_perplexity, negative_log_likelihoods
from beacon.evaluation.policy_ratios import BeaconPolicy
from beacon.evaluation.rope_scaling import RopeScaled
from beacon.evaluation.sliding_window import SlidingWindow
from beacon.evaluation.text import Text, encode, file_texts, is_held_out, library_texts, read_documents, read_file
from beacon.evaluation.truncation import Truncated, TruncateLeft, TruncateMiddle

__all__ = [
    "METHODS",
    "Beacon",
    "BeaconPolicy",
    "FineTuned",
    "KVPress",
    "Method",
    "Outcome",
    "PasskeyPrompt",
    "PasskeyScore",
    "Perplexity",
    "Recall",
    "RopeScaled",
    "SlidingWindow",
    "Stock",
    "Text",
    "TruncateLeft",
    "TruncateMiddle",
    "Truncated",
    "ask_passkey",
    "build_passkey",
    "check_method",
    "encode",
    "file_texts",
    "full_cache_bytes",
    "held_entries",
    "is_held_out",
    "library_texts",
    "make_method",
    "measure_perplexity",
    "method_form",
    "native_context",
    "negative_log_likelihoods",
    "passkey_line",
    "read_documents",
    "read_file",
    "recall",
]
