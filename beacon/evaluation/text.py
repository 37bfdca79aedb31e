"""Long real text that is on every machine: the sources of the running interpreter's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HELD_OUT = {"asyncio", "email", "idlelib"}  # packages of the standard library
MAX_BYTES = 400_000
MIN_CHARACTERS = 1000
MAX_LINE = 400
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "data", "cjkencodings"}


@dataclass(frozen=True)
class Text:
    """A long text.

    Args:
        name: Where it is from.
        ids: Token ids ``[T]``.
        held_out: Whether the shipped model was trained without it.
    """

    name: str
    ids: torch.Tensor
    held_out: bool


def is_held_out(name: str) -> bool:
    """Whether a file of the standard library, by its path there, is of a package that is kept from training."""
    return name.split("/")[0] in HELD_OUT


def read_documents(root: Path | None = None) -> dict[str, str]:
    """Read the sources of the running interpreter's standard library.

    Files that are no UTF-8, that repeat another one, that exceed ``MAX_BYTES`` or hold a line beyond ``MAX_LINE``
    characters (generated tables), and short stubs are left out.

    Args:
        root: Folder to read instead.

    Returns:
        Text by relative path, in sorted order.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents: dict[str, str] = {}
    seen = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts[:-1]) or path.stat().st_size > MAX_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < MIN_CHARACTERS or digest in seen or max(map(len, text.split("\n"))) > MAX_LINE:
            continue
        seen.add(digest)
        documents[name.as_posix()] = text
    return documents


def library_documents() -> list[tuple[str, str]]:
    """Names and texts of :func:`read_documents`: held-out files first, the longest first."""
    documents = read_documents()
    order = sorted(documents, key=lambda name: (not is_held_out(name), -len(documents[name]), name))
    return [(name, documents[name]) for name in order]


def library_texts(tokenizer: Any, length: int, count: int) -> list[Text]:
    """Long texts from the standard library: held-out files first, the longest first.

    Files shorter than ``length`` are joined, with the tokenizer's eos token between them.

    Args:
        tokenizer: The model's tokenizer.
        length: Tokens of each text.
        count: How many.

    Returns:
        ``count`` texts of exactly ``length`` tokens.

    Raises:
        ValueError: The whole library does not hold that much text.
    """
    texts = []
    for text in _joined(tokenizer, library_documents(), length):
        texts.append(text)
        if len(texts) == count:
            return texts
    raise ValueError(f"the standard library holds {len(texts)} texts of {length} tokens, got {count} asked; ask less.")


def file_texts(tokenizer: Any, path: Path, length: int, count: int) -> list[Text]:
    """Consecutive stretches of a file.

    Args:
        tokenizer: The model's tokenizer.
        path: A UTF-8 file.
        length: Tokens of each stretch at most.
        count: Stretches at most.

    Returns:
        At least one text; of exactly ``length`` tokens where the file has as many, else the whole file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not UTF-8, or empty.
    """
    ids = encode(tokenizer, read_file(path))
    if len(ids) <= length:
        return [Text(path.name, ids, False)]
    starts = range(0, len(ids) - length + 1, length)
    return [Text(f"{path.name}[{start}:]", ids[start : start + length], False) for start in starts[:count]]


def read_file(path: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not UTF-8, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} must be UTF-8 text, got other bytes ({err}); convert it first.") from err
    if not text.strip():
        raise ValueError(f"{path} must hold some text, got an empty file.")
    return text


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids ``[T]`` without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _joined(tokenizer: Any, documents: Iterable[tuple[str, str]], length: int) -> Iterator[Text]:
    names: list[str] = []
    parts: list[torch.Tensor] = []
    held = True
    end = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=torch.int64)
    for name, document in documents:
        ids = encode(tokenizer, document)
        if len(ids) >= length:
            yield Text(name, ids[:length], is_held_out(name))
            continue
        held = held and is_held_out(name)
        names.append(name)
        parts += [ids, end]
        if sum(map(len, parts)) >= length:
            yield Text(" + ".join(names), torch.cat(parts)[:length], held)
            names, parts, held = [], [], True


def nearest_line_end(tokenizer: Any, ids: Sequence[int], wanted: int) -> int:
    """Index of the token beginning with a line feed that is nearest to ``wanted``; without one, ``wanted`` itself."""
    begins = {token: tokenizer.decode([token]).startswith("\n") for token in set(ids)}
    ends = [at for at, token in enumerate(ids) if begins[token]]
    return min(ends, key=lambda at: abs(at - wanted), default=wanted)


def split_question(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a question and of its answer, as they stand one after the other.

    Some tokenizers join the last space of the question to what follows; it then counts as the answer's.

    Args:
        tokenizer: The model's tokenizer.
        question: Text up to the answer.
        answer: What follows at once, not empty.

    Returns:
        Token ids of both, at least one of the answer; together those of the whole text.
    """
    alone, line = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (question, question + answer)
    )
    count = 0
    while count < min(len(line) - 1, len(alone)) and line[count] == alone[count]:
        count += 1
    return line[:count], line[count:]
