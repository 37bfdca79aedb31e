"""Sources as data sets of rows, stored in Arrow files or streamed."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beacon.evaluation.text import is_held_out, read_documents
from beacon.training.data.config import LIBRARY, SourceConfig
from beacon.training.data.files import read_lines, read_texts, resolve, stamps
from beacon.training.data.fingerprints import CACHE_VERSION, library_stamp

if TYPE_CHECKING:
    import datasets

WRITTEN = 64  # rows in memory while they are stored: texts may be whole books


@dataclass(frozen=True)
class Rows:
    """The rows of a source.

    Args:
        dataset: With the columns ``line`` (bytes) and ``origin``, ``text`` and ``origin``, or whatever the source has.
        kind: ``lines``, ``texts`` or ``table``, which of these.
        columns: Names of its columns.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    kind: str
    columns: list[str]


def open_source(source: SourceConfig, *, streaming: bool) -> Rows:
    """The rows of a source, unchanged.

    Args:
        source: Where from.
        streaming: Read when iterated instead of storing them first.

    Raises:
        FileNotFoundError: There is no such file or hub id.
        ValueError: What is there cannot be read, or lacks the named columns.
    """
    import datasets

    form, files = resolve(source)
    if form != "hub":
        _only_for_hub(source, form)
    if form in ("hub", "parquet"):
        dataset = _load(source, form, files, streaming)
        needed = _needed_columns(source, dataset)
        return Rows(dataset.select_columns(needed), "table", needed)
    content = "line" if form == "jsonl" else "text"
    features = datasets.Features(
        {content: datasets.Value("binary" if form == "jsonl" else "string"), "origin": datasets.Value("string")}
    )
    arguments: dict[str, Any] = {"version": CACHE_VERSION}
    if form == LIBRARY:
        generator: Any = read_library
        arguments |= {"split": source.split, "stamp": library_stamp()}
    else:
        generator = read_lines if form == "jsonl" else read_texts
        arguments |= {"files": stamps(files)} | ({} if form == "jsonl" else {"sample_by": source.sample_by})
        if next(generator(**arguments), None) is None:  # datasets would say that a split has no data
            raise ValueError(f"{source.path!r} must hold documents, got none; leave it out or correct its path.")
    if streaming:
        rows = datasets.IterableDataset.from_generator(generator, features=features, gen_kwargs=arguments)
    else:
        with _plain_errors():
            rows = datasets.Dataset.from_generator(
                generator, features=features, gen_kwargs=arguments, writer_batch_size=WRITTEN
            )
    return Rows(rows, f"{content}s", [content, "origin"])


def read_library(version: int, split: str, stamp: str) -> Iterator[dict[str, Any]]:
    """The files of the standard library: those that the shipped model was trained on, or for ``validation`` others."""
    for name, text in read_documents().items():
        if is_held_out(name) == (split != "train"):
            yield {"text": text, "origin": name}


def _only_for_hub(source: SourceConfig, form: str) -> None:
    splits = ("train", "validation") if form == LIBRARY else ("train",)
    if source.split not in splits:
        raise ValueError(
            f"split must be {' or '.join(splits)} for {source.path!r} ({form}), got {source.split!r}; "
            "name the files of that split."
        )
    if source.name is not None:
        raise ValueError(f"name must be left out for {source.path!r} ({form}), got {source.name!r}; it is for hub ids.")


def _load(source: SourceConfig, form: str, files: Sequence[Path], streaming: bool) -> Any:
    import datasets

    try:
        with _plain_errors():
            if form == "parquet":
                names = [glob.escape(str(path)) for path in files]  # datasets takes them for patterns
                return datasets.load_dataset("parquet", data_files=names, split="train", streaming=streaming)
            return datasets.load_dataset(source.path, source.name, split=source.split, streaming=streaming)
    except Exception as err:  # of datasets, huggingface_hub, httpx, fsspec, pyarrow
        told = (str(err).strip() or type(err).__name__).splitlines()[0]
        if form == "parquet":
            raise ValueError(f"{source.path!r} must hold rows in Parquet files, got none: {told}") from err
        asked = f"split {source.split!r}" + ("" if source.name is None else f", name {source.name!r}")
        raise (FileNotFoundError if isinstance(err, OSError) else ValueError)(
            f"{source.path!r} must be a file here or a data set on the hub ({asked}), got neither: {told}; correct the "
            "path, split or name. Offline, only what was loaded once before is found."
        ) from err


def _needed_columns(source: SourceConfig, dataset: Any) -> list[str]:
    """The columns that are read: the others need not be decoded."""
    present = dataset.column_names
    if present is None:  # a stream that does not tell
        present = list(next(iter(dataset.take(1)), {}))
    contents = ("input_ids", source.text_column, source.messages_column)
    if not any(column in present for column in contents):
        raise ValueError(
            f"{source.path!r} must have one of the columns {', '.join(map(repr, contents))}, got "
            f"{', '.join(map(repr, present)) or 'none'}; set text_column or messages_column to what is there."
        )
    weights = source.weights_column
    if weights is not None and weights not in present:
        raise ValueError(
            f"{source.path!r} must have the column {weights!r} (weights_column), got "
            f"{', '.join(map(repr, present))}; name one of these or leave weights_column out."
        )
    read = {*contents, "labels", weights}
    return [column for column in present if column in read]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a file is to blame for, without the ``An error occurred while generating the dataset`` around it."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except DatasetGenerationError as err:
        if isinstance(err.__cause__, (ValueError, OSError)):
            raise err.__cause__ from None
        raise
