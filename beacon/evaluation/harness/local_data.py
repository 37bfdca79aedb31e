"""Local copies of the data sets that tasks are made from: where they are looked for, and what to say if they miss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}  # file name ending, reader of `datasets`


def local_overrides(task: str, config: Mapping[str, Any], data: Path, shots: int) -> dict[str, Any]:
    """What to change in a task's configuration so that it reads local files.

    Args:
        task: Name of the task.
        config: The harness's configuration of it.
        data: Folder that holds a folder per data set.
        shots: Solved examples in each prompt.

    Returns:
        Fields of the configuration.

    Raises:
        FileNotFoundError: Files that are needed are not there.
        ValueError: Splits in files of different kinds.
    """
    folder = data / hub_name(config)
    evaluated = config.get("test_split") or config["validation_split"]
    shown = config.get("fewshot_split") or config.get("training_split") or evaluated
    drawn = shots > 0 and "samples" not in (config.get("fewshot_config") or {})
    files = {
        split: split_files(folder, config.get("dataset_name"), split, split == evaluated)
        for split in ({evaluated, shown} if drawn else {evaluated})
    }
    for split, found in files.items():
        if not found:
            raise FileNotFoundError(missing(task, config, folder, split))
    kinds = {KINDS[path.suffix] for found in files.values() for path in found}
    if len(kinds) > 1:
        raise ValueError(f"files of one data set must be of one kind, got Parquet and JSON in {folder}; convert some.")
    kwargs: dict[str, Any] = {"data_files": {split: [str(path) for path in found] for split, found in files.items()}}
    features = (config.get("dataset_kwargs") or {}).get("features")
    if features:
        kwargs["features"] = _features(features)
    changes: dict[str, Any] = {"dataset_path": kinds.pop(), "dataset_name": None, "dataset_kwargs": kwargs}
    for key in ("training_split", "validation_split", "fewshot_split"):
        if config.get(key) not in files:  # the harness would read it, needed or not
            changes[key] = None
    if hub_name(config) == "LongBench":
        changes["process_docs"] = _with_question
    return changes


def split_files(folder: Path, config: str | None, split: str, whole: bool = True) -> list[Path]:
    """Files of one split of a data set.

    ``CONFIG/SPLIT.jsonl`` and, as hub copies have it, ``CONFIG/SPLIT-00000-of-00002.parquet``, in the folder or in its
    ``data``; without a configuration the same without its folder. A configuration may also be one file,
    ``CONFIG.jsonl``.

    Args:
        folder: The data set's folder.
        config: Name of the configuration, if there are several.
        split: Name of the split.
        whole: Whether a file for the whole configuration may stand for this split.

    Returns:
        Files of one kind, sorted; none if there are none.
    """
    names = [split, f"{split}g"] if split.endswith("_en") else [split]  # InfiniteBench's own files end in _eng
    homes = [folder / (config or ""), folder / "data" / (config or "")]
    for home in homes:
        for ending in KINDS:
            for name in names:
                part = re.compile(rf"{re.escape(name)}(-\d+-of-\d+)?{re.escape(ending)}")
                found = sorted(path for path in home.glob(f"*{ending}") if part.fullmatch(path.name))
                if found:
                    return found
    alone = [home.with_name(home.name + ending) for home in homes for ending in KINDS] if config and whole else []
    return [path for path in alone if path.is_file()][:1]


def hub_name(config: Mapping[str, Any]) -> str:
    """The last part of a data set's name on the hub, which is the name of its local folder."""
    return str(config["dataset_path"]).rpartition("/")[2]


def missing(task: str, config: Mapping[str, Any], folder: Path, split: str) -> str:
    """What to say about files that are not there."""
    hub, name = config["dataset_path"], config.get("dataset_name")
    stem = f"{name}/{split}" if name else split
    return (
        f"{task} needs the split {split} of {hub}, got no {stem}.jsonl or {stem}.parquet (or {stem}-00000-of-0000N) "
        f"in {folder}; copy the data set's files there, for example with: "
        f"hf download {hub} --repo-type dataset --local-dir {folder}"
    )


def _with_question(documents: Any) -> Any:
    """LongBench's own files call ``input`` what the harness's copy calls ``question``."""
    renames = "input" in documents.column_names and "question" not in documents.column_names
    return documents.rename_column("input", "question") if renames else documents


def _features(declared: Mapping[str, Any]) -> Any:
    """Column types as the task declares them, for columns that files hold in several types."""
    import datasets

    return datasets.Features(
        {
            name: datasets.List(datasets.Value(kind["dtype"]))
            if kind.get("sequence")
            else datasets.Value(kind["dtype"])
            for name, kind in declared.items()
        }
    )
