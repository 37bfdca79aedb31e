"""BABILong: facts in long texts, published for a row of lengths; each length is a metric here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beacon.evaluation.harness.local_data import KINDS, missing, split_files
from beacon.evaluation.harness.ruler import length_metrics

FOLDERS = ("babilong-1k-samples", "babilong")  # 1000 questions up to 128k tokens; 100 up to ten millions


def babilong_overrides(
    task: str, config: Mapping[str, Any], lengths: Sequence[int], data: Path | None
) -> dict[str, Any]:
    """What to change in a BABILong task so that it is asked at these lengths.

    Args:
        task: Its name.
        config: The harness's configuration of it.
        lengths: Tokens of a text, of those that were published; 0 for the facts alone.
        data: Folder with local copies; None takes the hub's.

    Returns:
        Fields of the configuration.

    Raises:
        FileNotFoundError: A length is not there.
    """
    split = config["test_split"]
    files = babilong_files(task, config, lengths, data)

    def build(**_: Any) -> dict[str, Any]:
        import datasets

        parts = []
        for name, found in files.items():
            if found:
                paths = [str(path) for path in found]
                part = datasets.load_dataset(KINDS[found[0].suffix], data_files=paths, split="train")
            else:
                part = datasets.load_dataset(config["dataset_path"], name=name, split=split)
            parts.append(part.add_column("max_length", [name] * len(part)))
        return {split: datasets.concatenate_datasets(parts)}

    def grade(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        from lm_eval.tasks.babilong.common_utils import process_results

        return {document["max_length"]: process_results(document, results)["acc"]}

    return {
        "custom_dataset": build,
        "dataset_kwargs": None,
        "process_results": grade,
        "metric_list": length_metrics(files),
    }


def babilong_files(
    task: str, config: Mapping[str, Any], lengths: Sequence[int], data: Path | None
) -> dict[str, list[Path]]:
    """Local files by the name of a length; none without a folder.

    Raises:
        FileNotFoundError: A length is not there.
    """
    names = [length_name(length) for length in lengths]
    split = config["test_split"]
    return {name: [] if data is None else _files(task, config, data, name, split) for name in names}


def length_name(length: int) -> str:
    """How the data set calls a length: 4096 (or 4000) is 4k, a million 1M.

    Raises:
        ValueError: It is no whole number of thousands.
    """
    for unit, letter in ((1_000_000, "M"), (1024, "k"), (1000, "k")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{letter}"
    if length == 0:
        return "0k"
    raise ValueError(
        f"BABILong has lengths of whole thousands of tokens, got {length}; choose from 0, 1024, 2048, 4096, ... "
        "131072, 1000000, 10000000."
    )


def _files(task: str, config: Mapping[str, Any], data: Path, name: str, split: str) -> list[Path]:
    for folder in FOLDERS:
        found = split_files(data / folder, name, split, whole=False)
        if found:
            return found
    raise FileNotFoundError(missing(task, {**config, "dataset_name": name}, data / FOLDERS[0], split))
