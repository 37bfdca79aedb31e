"""What a wrapped model is worth on long text, beside the stock model and a sliding window. Nothing here prints."""

from beacon.evaluation.methods import (
    Beacon,
    Method,
    Outcome,
    SlidingWindow,
    Stock,
    Truncated,
    full_cache_bytes,
    held_entries,
    native_context,
)
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
from beacon.evaluation.rope_scaling import RopeScaled
from beacon.evaluation.text import Text, encode, file_texts, is_held_out, library_texts, read_documents, read_file

__all__ = [
    "Beacon",
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
    "Truncated",
    "ask_passkey",
    "build_passkey",
    "encode",
    "file_texts",
    "full_cache_bytes",
    "held_entries",
    "is_held_out",
    "library_texts",
    "measure_perplexity",
    "native_context",
    "negative_log_likelihoods",
    "passkey_line",
    "read_documents",
    "read_file",
    "recall",
]
