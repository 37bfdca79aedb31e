"""From the arguments of a call to the new text tokens of every row: padding stripped, known prefixes removed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beacon.cache import BeaconCache
from beacon.config import check_ratio

logger = logging.getLogger(__name__)

SHARED = 16  # tokens: the header of a chat turn is shorter than this, what two versions of one text share is longer


@dataclass(frozen=True)
class NewText:
    """The new columns of a call and the text tokens in them.

    Args:
        ids: Token ids of the new columns, ``[rows, columns]``.
        mask: Which of them are text (bool, CPU), or None if all are.
        skipped: Columns at the start of ``input_ids`` that the cache had read already.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    skipped: int

    @property
    def counts(self) -> list[int]:
        """Text tokens per row."""
        rows, columns = self.ids.shape
        return [columns] * rows if self.mask is None else [int(n) for n in self.mask.sum(dim=1)]

    def pack(self, columns: torch.Tensor) -> torch.Tensor:
        """The text entries of ``[rows, columns, ...]``, row after row."""
        flat = columns.flatten(0, 1)
        return flat if self.mask is None else flat[self.index.to(flat.device)]

    @property
    def index(self) -> torch.Tensor:
        """Place of every text token in the flattened columns, int64 on the CPU."""
        if self.mask is None:
            return torch.arange(self.ids.numel())
        return self.mask.flatten().nonzero()[:, 0]


def pad_documents(documents: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Documents of any lengths as rows, padded on the left as ``generate`` wants it.

    Args:
        documents: Token ids of each, a list of ints or an integer tensor ``[n]``.
        device: Where the rows go.

    Returns:
        Token ids ``[documents, longest]`` and the mask of what is text (CPU), None where nothing is padded.

    Raises:
        TypeError: A document that holds no token ids.
        ValueError: No documents, or an empty one.
    """
    if not documents:
        raise ValueError("a list of documents must hold at least one, got an empty list; pass token ids of some text.")
    rows = []
    for number, document in enumerate(documents):
        row = document if isinstance(document, torch.Tensor) else _as_tensor(document)
        if row is None or row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise TypeError(
                f"a document must be a list of token ids or an integer tensor [n], got {_what(document)} as document "
                f"{number}; pass tokenizer(texts).input_ids."
            )
        if not len(row):
            raise ValueError(f"every document needs at least one token, got none in document {number}; leave it out.")
        rows.append(row.to(device, torch.int64))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    return ids, None if bool(mask.all()) else mask.long()


def _as_tensor(document: Any) -> torch.Tensor | None:
    try:
        return torch.tensor(document) if len(document) else torch.tensor([], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        return None


def check_ids(input_ids: Any) -> torch.Tensor:
    """Return ``input_ids`` if it is a non-empty integer tensor ``[rows, columns]``.

    Raises:
        TypeError: Not an integer tensor.
        ValueError: Wrong number of dimensions or empty.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(
            f"input_ids must be an integer tensor [batch, seqlen], got {_what(input_ids)}; "
            "pass tokenizer(text, return_tensors='pt').input_ids."
        )
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids must have shape [batch, seqlen], got {tuple(input_ids.shape)}; "
            "add a batch dimension with [None]."
        )
    if input_ids.numel() == 0:
        raise ValueError(
            f"input_ids must hold at least one token, got shape {tuple(input_ids.shape)}; "
            "pass some text (with a cache: what is new)."
        )
    return input_ids if input_ids.dtype in (torch.int32, torch.int64) else input_ids.long()


def check_place(input_ids: torch.Tensor, embedding: Any, host: bool = False) -> torch.Tensor:
    """Return ``input_ids`` if the model's embedding can read them where they are.

    Args:
        input_ids: Token ids.
        embedding: The model's.
        host: They may be on the CPU, whence they are copied.

    Raises:
        ValueError: They are on another device, and no hook moves them.
    """
    weight = embedding.weight
    moved = hasattr(embedding, "_hf_hook") or weight.is_meta or hasattr(weight, "full_tensor")
    if not moved and input_ids.device != weight.device and not (host and input_ids.device.type == "cpu"):
        raise ValueError(
            f"input_ids must be where the model is, {weight.device}, got them on {input_ids.device}; pass "
            "input_ids.to(model.device)."
        )
    return input_ids


def new_text(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: BeaconCache, vocab: int) -> NewText:
    """Find what is new in a call.

    A mask over all columns so far says that ``input_ids`` are new. Else they are the whole text if they begin with all
    that was read, and new if they share less than `SHARED` tokens with its beginning (and less than half of it).

    Args:
        input_ids: The whole text (its beginning is what the cache has read) or only what is new.
        attention_mask: 1 for text, 0 for padding; over all columns so far or over ``input_ids``; None: no padding. Of
            columns read before, padding stays padding. A decoded token on a GPU is text, whatever the mask says.
        cache: What has been read, with as many rows.
        vocab: Number of token ids the model knows.

    Raises:
        ValueError: Mask of another shape, or that hides text read before; nothing new; a text that departs from the
            one read or is padded in another way; a row without text; token ids out of range.
    """
    columns = input_ids.shape[1]
    past = cache.columns.count
    mask = check_mask(attention_mask, input_ids, past)
    wide = mask is not None and mask.shape[1] == past + columns
    skipped = 0 if past == 0 or columns == 1 or wide else _known_prefix(input_ids, mask, cache)
    if mask is not None and past and columns > 1 and (wide or skipped):
        _check_known(mask[:, :past], cache)
    ids = input_ids[:, skipped:]
    if mask is not None:
        synchronises = mask.device.type != "cpu"
        mask = None if columns == 1 and past and synchronises else mask[:, -ids.shape[1] :].bool().cpu()
        mask = None if mask is None or bool(mask.all()) else mask
    text = NewText(ids, mask, skipped)
    for row, (count, state) in enumerate(zip(text.counts, cache.states, strict=True)):
        if count + state.tokens == 0:
            raise ValueError(f"every row needs at least one text token, got only padding in row {row}; drop that row.")
    if sum(text.counts) == 0:
        raise ValueError("at least one row needs new text, got only padding; pass what is new.")
    check_vocabulary(text.pack(ids), vocab, waits=ids.shape[1] > 1 or past == 0)
    return text


def check_vocabulary(ids: torch.Tensor, vocab: int, *, waits: bool = False) -> None:
    """Refuse token ids that the model does not know.

    Args:
        ids: Token ids.
        vocab: How many it knows.
        waits: Look on a GPU too, which costs a synchronisation: a decoded token must not.

    Raises:
        ValueError: One lies outside.
    """
    if not waits and ids.device.type != "cpu":
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"token ids must lie in [0, {vocab}), got {low if low < 0 else high}; use this model's own tokenizer."
        )


def all_text(mask: Any, input_ids: torch.Tensor, past: int) -> bool:
    """Whether the one new column is text in every row; on a GPU the mask is not asked (as in :func:`new_text`)."""
    mask = check_mask(mask, input_ids, past)
    return mask is None or mask.device.type != "cpu" or bool(mask[:, -1].all())


def check_mask(mask: Any, input_ids: torch.Tensor, past: int) -> torch.Tensor | None:
    """Return ``mask`` if it is None or covers the columns of ``input_ids``, or those and the ``past`` ones before.

    Raises:
        TypeError: Not a matrix.
        ValueError: Wrong shape.
    """
    rows, columns = input_ids.shape
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise TypeError(f"attention_mask must be a tensor [batch, columns], got {_what(mask)}; pass the tokenizer's.")
    if mask.shape[0] != rows or mask.shape[1] not in (columns, past + columns):
        wanted = f"{[rows, columns]}" if past == 0 else f"{[rows, columns]} or {[rows, past + columns]}"
        raise ValueError(
            f"attention_mask must have shape {wanted}, got {list(mask.shape)}; give one value per column read so far."
        )
    return mask


def _check_known(given: torch.Tensor, cache: BeaconCache) -> None:
    """Refuse a mask that takes back text which has been read."""
    _, known = cache.columns.read()
    hidden = known & ~given.bool().cpu()
    if bool(hidden.any()):
        row, column = (int(at) for at in hidden.nonzero()[0])
        raise ValueError(
            f"attention_mask must be 1 where text was read before, got 0 in row {row} at column {column} (generate "
            "also reads the padding that it puts after an early end); read that row again without the cache."
        )


def _known_prefix(input_ids: torch.Tensor, mask: torch.Tensor | None, cache: BeaconCache) -> int:
    """How many leading columns of ``input_ids`` the cache has read: all of them or 0.

    Raises:
        ValueError: Nothing new, or the text departs from the one read, or it is padded in another way.
    """
    known, known_mask = cache.columns.read()
    ids = input_ids.to("cpu", torch.int32)
    past, columns = known.shape[1], ids.shape[1]
    width = min(past, columns)
    same = (ids[:, :width] == known[:, :width]) | ~known_mask[:, :width]
    departs = [width if bool(row.all()) else int(row.long().argmin()) for row in same]
    first = min(departs)
    hint = (
        "to read it as new text all the same, pass an attention_mask over all columns, those read before and these "
        f"({past} + {columns})"
    )
    if first == width:
        if columns > past:
            return past
        raise ValueError(
            f"input_ids must bring something new, got {columns} columns that the cache has read already (it holds "
            f"{past}); pass what follows, or fork() a cache before you read on. {hint[0].upper()}{hint[1:]}."
        )
    if first >= SHARED or (columns > past and 2 * first >= past):
        row = departs.index(first)
        raise ValueError(
            f"input_ids must begin with the text read before or hold only what is new, got row {row} that departs "
            f"from it at token {first} ({int(ids[row, first])} instead of {int(known[row, first])}); {hint}."
        )
    if mask is not None and _padded_anew(ids, mask.bool().cpu(), known, known_mask):
        raise ValueError(
            "input_ids must keep the padding of the columns read before, got the same text padded in another way; pass "
            f"only what is new, or {hint}."
        )
    if first >= 2:
        logger.info("input_ids share their first %d tokens with the text read before and are read as new text", first)
    return 0


def _padded_anew(ids: torch.Tensor, mask: torch.Tensor, known: torch.Tensor, known_mask: torch.Tensor) -> bool:
    """Whether every row's text begins with the text read before, at other columns."""
    if bool(mask.all()) and bool(known_mask.all()):
        return False
    for row, own in enumerate(mask):
        text, before = ids[row][own], known[row][known_mask[row]]
        if len(text) < len(before) or not torch.equal(text[: len(before)], before):
            return False
    return True


def check_ratios(ratios: Any, cache: BeaconCache) -> int | tuple[int, ...]:
    """Validate ratios given with a call against the stride and the windows condensed already.

    Args:
        ratios: What the caller gave. Those of the call before need no second look (every decoded token brings them).
        cache: What has been read.

    Raises:
        TypeError: Not an int or a flat sequence of ints.
        ValueError: A ratio does not divide the stride, or contradicts a window condensed already.
    """
    if isinstance(ratios, torch.Tensor):
        ratios = ratios.tolist()
    if isinstance(ratios, bool) or not isinstance(ratios, (int, list, tuple)):
        raise TypeError(f"ratios must be an int or a list with one int per window, got {_what(ratios)}.")
    ratios = ratios if isinstance(ratios, int) else tuple(ratios)
    known = cache.ratios
    if known is not None and type(ratios) is type(known) and ratios == known:
        return ratios
    for ratio in (ratios,) if isinstance(ratios, int) else ratios:
        check_ratio(ratio, cache.config.step)
    for row, state in enumerate(cache.states):
        done = state.ratios if state.open_ratio is None else (*state.ratios, state.open_ratio)
        for window, used in enumerate(done):
            given = ratios if isinstance(ratios, int) else ratios[window] if window < len(ratios) else None
            if given is None:
                raise ValueError(
                    f"ratios must name every window from the beginning of the text, got {len(ratios)} for "
                    f"{len(done)} windows read in row {row}; pass the earlier ones too."
                )
            if given != used:
                raise ValueError(
                    f"ratios must repeat those of windows read before, got {given} for window {window} of row {row}, "
                    f"which was read at ratio {used}; ratios count from the beginning of the text."
                )
    return ratios


def _what(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:120]
