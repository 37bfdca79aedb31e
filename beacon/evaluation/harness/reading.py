"""Contexts of a wrapped model, read into caches: each once, however many requests it serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from beacon.cache import BeaconCache
from beacon.evaluation.harness.contexts import Family, Tokens, families
from beacon.plan import Ratios
from beacon.policies import RatioRequest, adaptive_ratio

Question: TypeAlias = tuple[Tokens, int]  # a context, and how many tokens may come after it


@dataclass(frozen=True)
class Reading:
    """Contexts that have been read, all but the last token of each, which foresees what comes next.

    Args:
        questions: The contexts, with the tokens that may come after each.
        cache: A row for each; None where no context has more than one token.
        mask: Which columns of the cache are text, bool ``[contexts, columns]`` on the CPU.
        settings: ``ratios`` and ``expected_length``, for every further call on the cache.
    """

    questions: tuple[Question, ...]
    cache: BeaconCache | None
    mask: torch.Tensor
    settings: dict[str, Any]

    def last(self, row: int) -> int:
        """The token of a context that has not been read."""
        return self.questions[row][0][-1]


class ContextReader:
    """Reads contexts in batches that give what each would give by itself.

    Args:
        model: A wrapped model.
        ratios: As in the model's forward; None for the configured policy.
        batch_size: Contexts read together at most.
    """

    def __init__(self, model: Any, ratios: int | list[int] | None, batch_size: int) -> None:
        self.model, self.ratios, self.batch_size = model, ratios, batch_size

    @torch.no_grad()
    def read(self, questions: Iterable[Question]) -> Iterator[Reading]:
        """Read contexts.

        Args:
            questions: The contexts, none empty. One that is longer than a token is asked for once.

        Yields:
            Every question once, in an order that suits the reading.
        """
        buckets: dict[tuple[int | None, bool], list[Question]] = defaultdict(list)
        for context, room in questions:
            buckets[self._bucket(len(context) + room), len(context) > 1].append((context, room))
        for (_, has_head), bucket in buckets.items():
            longest = max(len(context) + room for context, room in bucket)
            settings = {"ratios": self.ratios, "expected_length": longest}
            if has_head:
                rooms = dict(bucket)
                for family in families(rooms):
                    yield from self._read_family(family, rooms, settings)
                continue
            bucket.sort(key=lambda question: -question[1])
            for batch in self._batches(bucket):
                yield Reading(tuple(batch), None, torch.ones(len(batch), 0, dtype=torch.bool), settings)

    def _bucket(self, length: int) -> int | None:
        """What may not differ within a call, for its one ``expected_length`` decides: the text's first ratio.

        Later ratios of the adaptive policy depend on the row alone. What a function does nobody knows.
        """
        config = self.model.beacon_config
        if self.ratios is not None or not (callable(config.ratio_policy) or config.ratio_policy == "adaptive"):
            return None
        if callable(config.ratio_policy):
            return length
        native = self.model.beacon_wrapping.native_context
        return adaptive_ratio(RatioRequest(config, native, 0, 0, length, 0, Ratios()))

    def _batches(self, of: Sequence[Any]) -> Iterator[Sequence[Any]]:
        for start in range(0, len(of), self.batch_size):
            yield of[start : start + self.batch_size]

    def _read_family(self, family: Family, rooms: dict[Tokens, int], settings: dict[str, Any]) -> Iterator[Reading]:
        shared = family.prefix
        beginning = None
        if shared:
            beginning = self.model.compress([list(family.contexts[0][:shared])], **settings)
        for batch in self._batches(family.contexts):
            ids, mask = left_padded([context[shared:-1] for context in batch])
            known = torch.cat([torch.ones(len(batch), shared, dtype=torch.bool), mask], dim=1)
            cache = None if beginning is None else beginning.select([0] * len(batch))
            if ids.shape[1]:
                device = self.model.device
                cache = self.model.compress(
                    ids.to(device), attention_mask=known.long(), past_key_values=cache, **settings
                )
            yield Reading(tuple((context, rooms[context]) for context in batch), cache, known, settings)


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that end together, and which entries are text: ids int64 and mask bool, ``[rows, longest]``, CPU."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[number, width - len(row) :] = True
    return ids, mask
