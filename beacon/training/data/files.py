"""Which files a source names, and reading them line by line or whole. Every error names the file.

Files are read here rather than by the builders of ``datasets``, which tell neither the file and line that a row is
from nor the file that is no UTF-8, and give up on a whole file for one broken line of JSON.
"""

from __future__ import annotations

import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beacon.training.data.config import LIBRARY, SourceConfig

SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst", ".txt.gz"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "parquet": (".parquet", ".pq"),
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

# Path, name in messages, size in bytes and time of change: what a cache of the contents depends on.
Stamp = tuple[str, str, int, int]


def resolve(source: SourceConfig) -> tuple[str, list[Path]]:
    """The format of a source (never ``auto``) and its files in sorted order, none for hub ids and the library.

    Raises:
        FileNotFoundError: There is no such file, or no fitting file in a folder.
        ValueError: The format cannot be told, or all files are empty.
    """
    if source.format in ("hub", LIBRARY) or (source.format == "auto" and source.path == LIBRARY):
        return (LIBRARY if source.path == LIBRARY and source.format == "auto" else source.format), []
    found = _found(source.path)
    if not found:
        if source.format == "auto" and HUB_ID.fullmatch(source.path) and _suffix_format(source.path) is None:
            return "hub", []
        raise FileNotFoundError(f"no such file: {source.path}; correct the path (it is relative to {Path.cwd()}).")
    if Path(source.path).expanduser().is_dir():
        found = _fitting(source, found)
    kind = source.format if source.format != "auto" else _common_format(source, found)
    if not any(path.stat().st_size for path in found):
        raise ValueError(f"{source.path} must hold some text, got an empty file; leave it out.")
    return kind, found


def stamps(files: Sequence[Path]) -> list[Stamp]:
    """The files with what a cache of their contents depends on."""
    if len(files) == 1:
        root = files[0].parent
    else:
        root = Path(os.path.commonpath([path.parent for path in files]))
    states = [(path, path.stat()) for path in files]
    return [(str(path), path.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for path, s in states]


def read_lines(files: list[Stamp], version: int) -> Iterator[dict[str, Any]]:
    """The lines of files as bytes, without blank ones: ``line`` and ``origin`` (file and number)."""
    for path, name, _, _ in files:
        for number, line in _lines(path):
            if line.strip():
                yield {"line": line, "origin": f"{name}:{number}"}


def read_texts(files: list[Stamp], version: int, sample_by: str) -> Iterator[dict[str, Any]]:
    """The documents of text files: ``text`` and ``origin`` (the file, and the line at which the document begins).

    Raises:
        ValueError: A file is not UTF-8.
    """
    for path, name, _, _ in files:
        if sample_by == "document":
            yield {"text": _decoded(b"".join(line for _, line in _lines(path)), path), "origin": name}
            continue
        lines: list[tuple[int, bytes]] = []
        for number, line in _lines(path):
            blank = not line.strip()
            if not blank:
                lines.append((number, line))
            if lines and (blank or sample_by == "line"):
                yield _document(lines, path, name)
                lines = []
        if lines:
            yield _document(lines, path, name)


def _document(lines: list[tuple[int, bytes]], path: str, name: str) -> dict[str, Any]:
    text = _decoded(b"".join(line for _, line in lines), f"{path}:{lines[0][0]}")
    return {"text": text.rstrip("\n"), "origin": f"{name}:{lines[0][0]}"}


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as err:
        raise ValueError(f"{where} must be UTF-8 text, got other bytes ({err}); convert it first.") from err


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield from enumerate(file, start=1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        raise ValueError(f"{path} must be a whole gzip file, got a broken one ({err}); write it again.") from err


def _found(path: str) -> list[Path]:
    expanded = os.path.expanduser(path)
    if os.path.exists(expanded) and not os.path.isdir(expanded):
        return [Path(expanded)]
    pattern = os.path.join(glob.escape(expanded), "**") if os.path.isdir(expanded) else expanded
    return sorted(path for path in map(Path, glob.iglob(pattern, recursive=True)) if path.is_file())


def _fitting(source: SourceConfig, found: list[Path]) -> list[Path]:
    """Files of a folder whose suffix fits the format."""
    kinds = {path: _suffix_format(path.name) for path in found}
    fitting = [path for path, kind in kinds.items() if kind is not None and source.format in ("auto", kind)]
    if not fitting:
        suffixes = [s for kind, known in SUFFIXES.items() if source.format in ("auto", kind) for s in known]
        raise FileNotFoundError(
            f"the folder {source.path} must hold files with one of the suffixes {', '.join(suffixes)}, got none among "
            f"{len(found)} files; name them with a glob such as {source.path.rstrip('/')}/**/*.py and a format."
        )
    return fitting


def _common_format(source: SourceConfig, found: list[Path]) -> str:
    kinds = {_suffix_format(path.name) for path in found}
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind
    if None in kinds or not kinds:
        suffixes = ", ".join(sorted({"".join(path.suffixes) or path.name for path in found})[:5])
        known = ", ".join(suffix for group in SUFFIXES.values() for suffix in group)
        raise ValueError(f"the suffix of a file must be one of {known} to tell its format, got {suffixes}; set format.")
    raise ValueError(
        f"{source.path} must hold files of one format, got {', '.join(sorted(map(str, kinds)))}; make them several "
        "sources, each with its format."
    )


def _suffix_format(name: str) -> str | None:
    return next((kind for kind, suffixes in SUFFIXES.items() if name.lower().endswith(suffixes)), None)
