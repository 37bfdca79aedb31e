"""Examples of different lengths as one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from beacon.loss import IGNORED

UNKNOWN = "unknown"

Example = dict[str, torch.Tensor]


class BeaconCollator:
    """Data collator for examples of :func:`beacon.training.data.build_dataset` and of other libraries.

    An example needs ``input_ids`` alone, as a list, an array or a tensor. ``labels`` default to them, except where a
    ``completion_mask`` or ``assistant_masks`` is 0. Tokens whose ``attention_mask`` is 0 are padding already and are
    dropped. ``position_ids`` that start again at 0, or ``seq_lengths``, mean that several documents are packed into the
    example. Other columns are left out.

    Args:
        padding: The model's tokenizer or the id to pad with. Padding is never seen nor counted, so any id will do.
    """

    def __init__(self, padding: Any) -> None:
        ids = (
            [padding] if isinstance(padding, int) else [_id(padding, name) for name in ("pad_token_id", "eos_token_id")]
        )
        self.pad_token_id = next((value for value in ids if value is not None), 0)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Args:
            examples: At least one.

        Returns:
            ``input_ids`` and ``labels`` int64 ``[batch, longest]``, padded on the right, with ``attention_mask``. Where
            an example is packed, all are laid one after the other: ``[1, total]``, with ``position_ids`` that start
            again at 0 with every document, whose first label becomes -100, and without an ``attention_mask``.
            ``weights`` float32 of the same shape if an example has them: 1 for the others, 0 at padding. ``lengths``:
            tokens of each document, a list of int; ``origins``: where each example is from, a list of str (both are
            for :class:`beacon.training.BeaconTrainer`, which takes them out).

        Raises:
            ValueError: There are no examples, or one does not fit together.
        """
        if not examples:
            raise ValueError("a batch must have at least one example, got none; raise the batch size.")
        rows = [_read(example) for example in examples]
        packed = any("position_ids" in row for row in rows)
        weighted = any("weights" in row for row in rows)
        for row in rows:
            if weighted:
                row.setdefault("weights", torch.ones(len(row["input_ids"])))
            if packed:
                row.setdefault("position_ids", torch.arange(len(row["input_ids"])))
                row["labels"] = row["labels"].masked_fill(row["position_ids"] == 0, IGNORED)
            else:
                row["attention_mask"] = torch.ones_like(row["input_ids"])
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch: dict[str, Any] = {}
        for name in rows[0]:
            columns = [row[name] for row in rows]
            if packed:
                batch[name] = torch.cat(columns)[None]
            else:
                batch[name] = pad_sequence(columns, batch_first=True, padding_value=fill.get(name, 0))
        batch["lengths"] = [length for row in rows for length in _lengths(row)]
        batch["origins"] = [str(example.get("origin", UNKNOWN)) for example in examples]
        return batch


def _read(example: Mapping[str, Any]) -> Example:
    """The tensors of an example, all as long as its ``input_ids``."""
    if example.get("input_ids") is None:
        raise ValueError(_wrong(example, "must have input_ids", ", ".join(map(str, example)) or "no columns"))
    ids = _tensor(example, "input_ids", torch.int64)
    if not len(ids):
        raise ValueError(_wrong(example, "must have at least one token", "none"))
    row = {"input_ids": ids, "labels": ids}

    def read(name: str, dtype: torch.dtype = torch.int64) -> torch.Tensor | None:
        if example.get(name) is None:
            return None
        values = _tensor(example, name, dtype)
        if len(values) != len(ids):
            raise ValueError(_wrong(example, f"must have as many {name} as input_ids ({len(ids)})", str(len(values))))
        return values

    if (labels := read("labels")) is not None:
        row["labels"] = labels
    else:
        for name in ("completion_mask", "assistant_masks"):
            if (counted := read(name)) is not None:
                row["labels"] = row["labels"].masked_fill(counted == 0, IGNORED)
    if (weights := read("weights", torch.float32)) is not None:
        row["weights"] = weights
    if (positions := read("position_ids")) is not None:
        row["position_ids"] = positions
    elif (lengths := example.get("seq_lengths")) is not None:
        row["position_ids"] = torch.cat([torch.arange(int(length)) for length in lengths])
        if len(row["position_ids"]) != len(ids):
            found = f"{len(row['position_ids'])} for {len(ids)} tokens"
            raise ValueError(_wrong(example, "must have seq_lengths that add up to its tokens", found))
    if (seen := read("attention_mask")) is not None and not bool(seen.all()):
        row = {name: values[seen != 0] for name, values in row.items()}
        if not len(row["input_ids"]):
            raise ValueError(_wrong(example, "must have at least one token that is no padding", "only padding"))
    _check_positions(example, row.get("position_ids"))
    return row


def _lengths(row: Example) -> list[int]:
    """Tokens of every document of an example."""
    if "position_ids" not in row:
        return [len(row["input_ids"])]
    starts = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), len(row["input_ids"])]
    return [end - start for start, end in pairwise(starts)]


def _check_positions(example: Mapping[str, Any], positions: torch.Tensor | None) -> None:
    """Positions of each document are 0, 1, 2, ...: others mean something that would be taken for packing."""
    if positions is None:
        return
    follows = (positions[1:] == positions[:-1] + 1) | (positions[1:] == 0)
    if positions[0] != 0 or not bool(follows.all()):
        found = f"{positions[:8].tolist()}, ..."
        raise ValueError(_wrong(example, "must have position_ids that count up from 0 in each document", found))


def _tensor(example: Mapping[str, Any], name: str, dtype: torch.dtype) -> torch.Tensor:
    values = example[name]
    try:
        tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))  # its own memory
    except (TypeError, ValueError) as err:  # ragged, or no numbers
        raise ValueError(_wrong(example, f"must have numbers as {name}", f"{values!r:.60}")) from err
    if tensor.dim() != 1:
        raise ValueError(_wrong(example, f"must have {name} of one dimension", f"the shape {tuple(tensor.shape)}"))
    if dtype == torch.int64 and tensor.is_floating_point() and len(tensor):
        raise ValueError(_wrong(example, f"must have whole numbers as {name}", str(tensor.dtype)))
    return tensor.to(dtype)


def _wrong(example: Mapping[str, Any], wanted: str, came: str) -> str:
    return f"the example {example.get('origin', UNKNOWN)!r} {wanted}, got {came}; correct the data set."


def _id(tokenizer: Any, name: str) -> int | None:
    value: int | None = getattr(tokenizer, name, None)
    return value
