"""Documents of text, one after the other: local files, or data sets by name from a folder or the hub."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beacon.evaluation.text import read_file

PLAIN = (".txt", ".text", ".md", ".rst", ".tex", ".py")
ROWS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json", ".json.gz": "json", ".json": "json"}
COLUMNS = ("text", "content")  # where rows have their text
SPLITS = tuple(re.compile(rf"(^|[^a-z])({names})", re.IGNORECASE) for names in ("test", "valid|val|dev"))


@dataclass(frozen=True)
class DataSet:
    """A data set of long texts.

    Args:
        hub: Its id on the Hugging Face hub.
        files: Pattern of the files there that are read: those of the test split, where it has several.
        joined: Whether its documents are short and are read one after the other.
    """

    hub: str
    files: str
    joined: bool = False


DATA_SETS = {
    "pg19": DataSet("emozilla/pg19-test", "data/*.parquet"),
    "proof-pile": DataSet("hoskinson-center/proof-pile", "test/*.jsonl.gz"),
    "codeparrot": DataSet("codeparrot/codeparrot-clean-valid", "*.json.gz", joined=True),
}


def data_set_texts(name: str, data: Path | None) -> Iterator[tuple[str, str]]:
    """The documents of one of :data:`DATA_SETS`.

    Args:
        name: Its name here.
        data: Folder that holds a folder of that name, with Parquet files or JSON lines (also gzipped) in it at any
            depth; where file names tell splits, the test split is read. None: from the hub.

    Yields:
        Names and texts.

    Raises:
        FileNotFoundError: There are no such files; says how to get them.
    """
    data_set = DATA_SETS[name]
    folder = (Path("data") if data is None else data) / name
    if data is not None:
        files = files_below(folder, ROWS)
        if not files:
            raise FileNotFoundError(_missing(name, folder, "found no Parquet or JSON lines"))
        for path in _test_split(files, folder):
            yield from _rows(_kind(path), glob.escape(str(path)), path.relative_to(folder).as_posix())
        return
    pattern = f"hf://datasets/{data_set.hub}/{data_set.files}"
    texts = _rows(_kind(Path(data_set.files)), pattern, data_set.hub)
    try:
        first = next(texts)
    except Exception as err:  # of datasets, huggingface_hub, httpx, fsspec
        told = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise FileNotFoundError(_missing(name, folder, f"could not read {data_set.hub} from the hub ({told})")) from err
    yield first
    yield from texts


def local_texts(path: Path) -> Iterator[tuple[str, str]]:
    """The documents of a file, or of all files below a folder.

    Plain text is one document per file (``.txt``, ``.md``, ``.py`` and the like); Parquet files and JSON lines are one
    per row, in the column ``text`` or ``content``. Hidden files are left out.

    Args:
        path: A file or folder.

    Yields:
        Names and texts, in the order of the paths.

    Raises:
        FileNotFoundError: No such file, or none of a known kind in the folder.
        ValueError: A file is not UTF-8, is empty, or has no column of text.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder of text: {path}; put text there or name another.")
    found = [path] if path.is_file() else files_below(path, (*PLAIN, *ROWS))
    if not found:
        known = ", ".join((*PLAIN, *ROWS))
        raise FileNotFoundError(
            f"the folder {path} must hold text in files ending in {known}, got none; put some there."
        )
    for file in found:
        name = file.name if file == path else file.relative_to(path).as_posix()
        if _ending(file, ROWS):
            yield from _rows(_kind(file), glob.escape(str(file)), name)
        else:
            yield name, read_file(file)


def files_below(folder: Path, endings: Iterable[str]) -> list[Path]:
    """Files with text in them below a folder, in order: not those hidden (``hf download`` keeps its notes so)."""
    known = tuple(endings)
    files = [path for path in folder.rglob("*") if path.name.lower().endswith(known) and path.is_file()]
    shown = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(path for path in shown if path.stat().st_size)


def _ending(path: Path, endings: Any) -> str | None:
    """The longest of ``endings`` that a file's name has."""
    return max((ending for ending in endings if path.name.lower().endswith(ending)), key=len, default=None)


def _kind(path: Path) -> str:
    return ROWS[_ending(path, ROWS) or ""]


def _test_split(files: Sequence[Path], folder: Path) -> Sequence[Path]:
    """The files whose names say that they are for testing, else those for validation, else all."""
    for split in SPLITS:
        named = [path for path in files if split.search(path.relative_to(folder).as_posix())]
        if named:
            return named
    return files


def _rows(kind: str, files: str, name: str) -> Iterator[tuple[str, str]]:
    """Texts of the rows of some files, streamed; ``name`` names the files in messages."""
    import datasets

    # Lines of JSON are parsed here: what other columns hold need not have one type for all rows.
    reader = "parquet" if kind == "parquet" else "text"
    for number, row in enumerate(datasets.load_dataset(reader, data_files=files, split="train", streaming=True)):
        where = f"{name}[{number}]"
        if kind == "json":
            if not row["text"].strip():
                continue
            row = _parsed(row["text"], where)
        column = next((column for column in COLUMNS if column in row), None)
        if column is None or not isinstance(row[column], str):
            raise ValueError(
                f"{where} must have text in a column {' or '.join(COLUMNS)}, got the columns "
                f"{', '.join(map(str, row))}; rename the column of the text."
            )
        yield where, row[column]


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as err:
        raise ValueError(f"{where} must be a JSON object on a line of its own, got other text ({err}).") from err
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object on a line of its own, got a {type(row).__name__}.")
    return row


def _missing(name: str, folder: Path, why: str) -> str:
    data_set = DATA_SETS[name]
    command = f"hf download {data_set.hub} --repo-type dataset --include '{data_set.files}' --local-dir {folder}"
    return f"{name} needs files in {folder}, {why}; get them with: {command} and give data={str(folder.parent)!r}."
