"""Names of cached results. They depend on what goes in, and are the same in every process and run.

``datasets`` would hash the functions it is given, with a tokenizer inside whose state changes when it is used.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from typing import Any

CACHE_VERSION = 2  # raise it whenever the same data should become other examples


def fingerprint(*parts: Any) -> str:
    """A name for what these JSON values determine."""
    content = json.dumps([CACHE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def tokenizer_state(tokenizer: Any) -> str:
    """A digest of all that decides how a tokenizer encodes texts and chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        return Hasher.hash(tokenizer)
    state = json.loads(backend.to_str())
    state.pop("truncation", None)  # what the last call left
    state.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint(type(tokenizer).__qualname__, state, tokenizer.chat_template, special)


def library_stamp() -> str:
    """A name for the standard library of the running interpreter."""
    return f"{sysconfig.get_paths()['stdlib']} {sys.version}"
