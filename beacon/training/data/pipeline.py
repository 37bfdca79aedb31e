"""From sources to the data set that a trainer reads."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from beacon.training.data.config import DataConfig, SourceConfig
from beacon.training.data.examples import BROKEN, WITH_TOKENS, Cutter
from beacon.training.data.fingerprints import fingerprint, tokenizer_state
from beacon.training.data.packing import Packer
from beacon.training.data.report import FIRST, Counts, Report
from beacon.training.data.rows import Encoder
from beacon.training.data.sources import Rows, open_source
from beacon.training.data.tokenizing import Streamed, Tokenize

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

STORED_BATCH = 64  # rows tokenized together: few enough for books, enough to keep a fast tokenizer busy
STREAMED_BATCH = 8  # the same while streaming, where every source reads so far ahead
PACKED_BATCH = 1000  # examples that are packed with one another
STREAMED_PACKED_BATCH = 128


def build_dataset(
    config: DataConfig, tokenizer: Any, *, window: int, stride: int
) -> tuple[datasets.Dataset | datasets.IterableDataset, Report]:
    """Read, tokenize, cut, mix and pack the documents of all sources.

    Without streaming, the result lies in files of the cache of ``datasets``, memory-mapped, and is found there the next
    time. Of several processes one should be first, while the others wait and then find its files: call this inside
    ``training_arguments.main_process_first()`` (or accelerate's). Nothing breaks otherwise, but all do the same work.

    While streaming, files are read as far as examples are asked for, plus a shuffle buffer. ``set_epoch`` draws a new
    order, the same for the same seed and epoch. Workers of a data loader share out files, not lines.

    Args:
        config: What is read.
        tokenizer: The model's tokenizer.
        window: Window in tokens that the column ``windows`` is counted with.
        stride: Stride likewise.

    Returns:
        The data set and what it was made of. Columns: ``input_ids``; ``labels``, -100 where the loss does not count;
        ``weights`` if any source has them, one number per token; ``position_ids`` if packed, which start again at 0
        with every document; ``windows``, the full windows of an example (of a packed one, of its documents together);
        ``origin``, where it is from: ``corpus.jsonl:17`` (a line), ``book.txt``, ``id[5]`` (a row, in reading order),
        with ``[8192:]`` for a piece that begins at that token, and ``+ 3 more`` for a packed example.

    Raises:
        FileNotFoundError: There is no such file, or no such data set on the hub.
        ValueError: A file or row holds something else than it must, or nothing of a source is left (unless streaming).
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to window, got stride={stride} and window={window}; lower stride.")
    tokenizer("", verbose=False)  # drops what an earlier call left in it before threads, one per source, share it
    report = Report(tuple(Counts(source.path) for source in config.sources))
    state = "" if config.streaming else tokenizer_state(tokenizer)
    parts = []
    for source, counts in zip(config.sources, report.sources):
        rows = open_source(source, streaming=config.streaming)
        encoder = Encoder(source, tokenizer, config.append_eos)
        cutter = Cutter.of(config, window, stride)
        tokenize = Tokenize(encoder, cutter, rows.kind, config.broken_lines == "skip")
        if config.streaming:
            parts.append(_streamed(rows, tokenize, counts))
        else:
            parts.append(_stored(rows, tokenize, counts, config, state))
    dataset = _mixed(parts, config)
    if config.packing:
        dataset = _packed(dataset, config, Packer(config.max_length, window, stride))
    if not config.streaming:
        report.examples = len(dataset)
        for line in report.lines():
            logger.info("%s", line)
    return dataset, report


def _streamed(rows: Rows, tokenize: Tokenize, counts: Counts) -> datasets.IterableDataset:
    return rows.dataset.map(
        Streamed(tokenize, counts),
        with_indices=True,
        batched=True,
        batch_size=STREAMED_BATCH,
        remove_columns=rows.columns,
        features=_features(weighted=tokenize.cut.weighted),
    )


def _stored(rows: Rows, tokenize: Tokenize, counts: Counts, config: DataConfig, state: str) -> datasets.Dataset:
    source = tokenize.encode.source
    if not len(rows.dataset):
        raise ValueError(_nothing_left(source, counts, config))
    processes = min(config.num_proc or 1, len(rows.dataset))
    name = fingerprint(
        rows.dataset._fingerprint,
        state,
        asdict(source) | {"weight": None},
        config.append_eos,
        asdict(tokenize.cut),
        tokenize.skip_broken,
    )
    dataset = rows.dataset.map(
        tokenize,
        with_indices=True,
        batched=True,
        batch_size=STORED_BATCH,
        remove_columns=rows.columns,
        features=_features(weighted=tokenize.cut.weighted, fate=True),
        num_proc=processes if processes > 1 else None,
        new_fingerprint=name,
        desc=f"tokenizing {source.path}",
    )
    kept = _count(dataset, counts)
    if counts.broken:
        logger.warning("%s of %s documents were skipped: %s", counts.broken, counts.documents, counts)
    if not len(kept):
        raise ValueError(_nothing_left(source, counts, config))
    if len(kept) < len(dataset):
        dataset = dataset.select(kept, new_fingerprint=fingerprint(name, "kept"))
    return dataset.remove_columns("fate")


def _count(dataset: datasets.Dataset, counts: Counts) -> np.ndarray:
    """Count what became of the documents; the rows that hold tokens ``[n]``."""
    table = dataset.data.select(["fate", "windows", "origin", "input_ids"]).table
    kept, start = [], 0
    for batch in table.to_batches():
        fates = batch["fate"].to_numpy(zero_copy_only=False)
        lengths = batch["input_ids"].value_lengths().to_numpy(zero_copy_only=False)
        broken = np.flatnonzero(fates == BROKEN)[:FIRST]
        counts.add(fates, lengths, batch["windows"].to_numpy(), [batch["origin"][int(i)].as_py() for i in broken])
        kept.append(np.flatnonzero(np.isin(fates, WITH_TOKENS)) + start)
        start += batch.num_rows
    return np.concatenate(kept) if kept else np.zeros(0, np.int64)


def _nothing_left(source: SourceConfig, counts: Counts, config: DataConfig) -> str:
    if not counts.documents:
        return f"{source.path!r} must hold documents, got none; leave it out or correct its path and format."
    reasons = counts.left_out()
    why = (
        f"all {counts.documents} documents are {reasons[0].split(' ', 1)[1]}"
        if len(reasons) == 1
        else ", ".join(reasons)
    )
    return (
        f"{source.path!r} must leave at least one example, got none: {why} (min_length={config.min_length}, "
        f"max_length={config.max_length}); correct the data or change these."
    )


def _mixed(parts: list[Any], config: DataConfig) -> Any:
    import datasets

    if len(parts) > 1:
        weights = np.array([source.weight for source in config.sources], dtype=np.float64)
        dataset = datasets.interleave_datasets(
            parts,
            probabilities=(weights / weights.sum()).tolist(),
            seed=config.seed,
            stopping_strategy=config.stopping,
        )
    else:
        dataset = parts[0]
    if config.streaming and config.shuffle_buffer:
        dataset = dataset.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
    return dataset


def _packed(dataset: Any, config: DataConfig, packer: Packer) -> Any:
    options: dict[str, Any] = {"features": _features(weighted=config.weighted, packed=True)}
    if not config.streaming:  # in one process: which documents are packed together must not depend on num_proc
        name = fingerprint(dataset._fingerprint, asdict(packer), PACKED_BATCH)
        options |= {"new_fingerprint": name, "desc": "packing"}
    size = STREAMED_PACKED_BATCH if config.streaming else PACKED_BATCH
    return dataset.map(packer, batched=True, batch_size=size, remove_columns=dataset.column_names, **options)


def _features(*, weighted: bool, packed: bool = False, fate: bool = False) -> datasets.Features:
    from datasets import Features, List, Value

    columns: dict[str, Any] = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    if weighted:
        columns["weights"] = List(Value("float32"))
    if packed:
        columns["position_ids"] = List(Value("int32"))
    columns |= {"windows": Value("int32"), "origin": Value("string")}
    if fate:
        columns["fate"] = Value("int8")
    return Features(columns)
