"""Documents of the default model (the standard library's sources) and the passkey line."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from tokenizer import load_or_train

HELD_OUT_PERCENT = 5
MAX_BYTES = 400_000
MAX_LINE = 400
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "data", "cjkencodings"}


def passkey_line(digits: str) -> str:
    """The line that hides a passkey, and that is asked for again at the end of a text.

    Args:
        digits: five decimal digits.

    Returns:
        One line of Python, a comment, with its line feed.
    """
    return f"# the pass key is {digits}\n"


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training, by a hash of its path relative to the library."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_documents() -> dict[str, str]:
    """Read the sources of the running interpreter's standard library.

    Files that are no UTF-8, that repeat another one, that exceed `MAX_BYTES` or hold a line beyond
    `MAX_LINE` characters (generated tables), and short stubs are left out.

    Returns:
        Text by relative path, in sorted order.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents, seen = {}, set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts[:-1]) or path.stat().st_size > MAX_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 1000 or digest in seen or max(map(len, text.split("\n"))) > MAX_LINE:
            continue
        seen.add(digest)
        documents[name.as_posix()] = text
    return documents


class Corpus:
    """Encoded documents of one split: one stream of tokens and the borders of the documents in it.

    Attributes:
        tokens: uint16 [length]; each document begins and ends with the end-of-text token.
        starts: int64 [documents + 1]; document i is `tokens[starts[i] : starts[i + 1]]`.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens, self.starts = tokens, starts

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, uint16 [length]."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1


def load_corpus(work: Path) -> tuple[PreTrainedTokenizerFast, Corpus, Corpus]:
    """Tokenizer and both splits, from the cache in `work` or made anew.

    Args:
        work: folder of build products.

    Returns:
        The tokenizer, the training split and the held-out split.
    """
    data = work / "data"
    if not (data / "held_out_starts.npy").exists():
        data.mkdir(parents=True, exist_ok=True)
        documents = read_documents()
        tokenizer = load_or_train(
            work / "tokenizer", (text for name, text in documents.items() if not is_held_out(name))
        )
        for split, wanted in (("train", False), ("held_out", True)):
            texts = [text for name, text in documents.items() if is_held_out(name) == wanted]
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            arrays = [np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], np.uint16) for ids in encoded]
            np.save(data / f"{split}_tokens.npy", np.concatenate(arrays))
            np.save(data / f"{split}_starts.npy", np.cumsum([0, *map(len, arrays)]))
    tokenizer = load_or_train(work / "tokenizer", iter(()))
    splits = [
        Corpus(np.load(data / f"{split}_tokens.npy", mmap_mode="r"), np.load(data / f"{split}_starts.npy"))
        for split in ("train", "held_out")
    ]
    return tokenizer, *splits
