"""Perplexity of the last tokens of documents after more and more of the text before them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from beacon.config import check_whole
from beacon.evaluation.methods import Method
from beacon.evaluation.perplexity import negative_log_likelihoods
from beacon.evaluation.suite import Item, Result, Task
from beacon.evaluation.tasks.documents import DATA_SETS, data_set_texts, local_texts
from beacon.evaluation.tasks.options import as_tuple, check_flag, check_lengths
from beacon.evaluation.tasks.prompts import opening
from beacon.evaluation.tasks.texts import take_texts
from beacon.evaluation.text import library_documents

LIBRARY = "python-library"
MOST_TARGETS = 512  # unless more are asked for
MAX_LOGITS = 2**30  # that a method returns for the targets of a document


@dataclass(kw_only=True, eq=False)
class PerplexityTask(Task):
    """Perplexity of documents by length and source.

    The targets are the same at every length: the last of the first ``max(lengths)`` tokens of each document. Only the
    beginning of what is read moves. Documents count alike, so that the perplexity of a source is the geometric mean of
    theirs.

    Args:
        sources: ``pg19``, ``proof-pile``, ``codeparrot``, ``python-library`` (the sources of the running interpreter's
            standard library), or a file or folder of text; one or several. None: the named data sets in ``data``, or
            ``data`` itself as a file or folder of text; the library without it.
        data: Folder that holds a folder for each named data set; without it they come from the hub.
        lengths: Tokens that are read and foreseen.
        targets: How many of the last ones count; None: 512, or half of the shortest length where that is less.
        limit: Texts of each source at most.
        joined: Whether all documents are read one after the other and cut into texts, instead of the beginnings of
            those that are long enough. None: for ``codeparrot``, the library, and text of one's own.
    """

    sources: Sequence[str] | str | None = None
    data: str | Path | None = None
    lengths: Sequence[int] = (4096, 16384, 32768)
    targets: int | None = None
    limit: int = 8
    joined: bool | None = None

    name = "perplexity"
    metrics = MappingProxyType({"perplexity": False, "nll": False})

    def __post_init__(self) -> None:
        self.lengths = check_lengths(self.lengths)
        self._targets = min(MOST_TARGETS, min(self.lengths) // 2) if self.targets is None else self.targets
        check_whole("targets", self._targets, 1)
        check_whole("limit", self.limit, 1)
        if self.joined is not None:
            check_flag("joined", self.joined)
        if self._targets >= min(self.lengths):
            raise ValueError(
                f"targets must be fewer than the tokens of every length, got {self._targets} and "
                f"{min(self.lengths)}; take fewer targets or longer texts."
            )
        given = self.sources
        if given is None:
            given = _sources(self.data)
        named = {_name(str(source)): str(source) for source in as_tuple("sources", given)}
        if len(named) != len(as_tuple("sources", given)):
            raise ValueError(f"sources must have different names, got {given}; name each once.")
        self._sources = named
        self._texts: dict[str, list[torch.Tensor]] = {}
        self._tokenizer: Any = None

    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        for name in self._sources:
            for number in range(len(self._read(tokenizer, name))):
                for length in self.lengths:
                    place = {"length": length, "source": name}
                    text = f"{name}, document {number}"
                    yield Item(f"{text}, length {length}", place, {"document": number}, cluster=text)

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        most = MAX_LOGITS // model.config.vocab_size
        if self._targets > most:
            raise ValueError(
                f"targets must be at most {most} for a vocabulary of {model.config.vocab_size}, got {self._targets}; "
                "their logits are held at once."
            )
        text = self._read(tokenizer, item.place["source"])[item.content["document"]]
        ids = self.ids(tokenizer, text, item.place["length"]).to(model.device)
        loss = negative_log_likelihoods(model, ids, self._targets, method).double().mean().item()
        return Result({"perplexity": math.exp(loss) if loss < 700 else math.inf, "nll": loss})

    def ids(self, tokenizer: Any, text: torch.Tensor, length: int) -> torch.Tensor:
        """What is read of a document at a length: the tokens that open any text, then the end of the document."""
        before = torch.tensor(opening(tokenizer), dtype=torch.int64)
        return torch.cat([before, text[len(text) - (length - len(before)) :].long()])

    def _read(self, tokenizer: Any, name: str) -> list[torch.Tensor]:
        """The documents of a source, ``max(lengths)`` tokens of each, kept as int32 for the next item."""
        if tokenizer is not self._tokenizer:
            self._tokenizer, self._texts = tokenizer, {}
        if name not in self._texts:
            self._texts[name] = self._load(tokenizer, name)
        return self._texts[name]

    def _load(self, tokenizer: Any, name: str) -> list[torch.Tensor]:
        source, joined = self._sources[name], self.joined
        if joined is None:
            joined = source not in DATA_SETS or DATA_SETS[source].joined
        return take_texts(
            tokenizer, partial(self._documents, source), max(self.lengths), self.limit, joined=joined, name=name
        )

    def _documents(self, source: str) -> Iterable[tuple[str, str]]:
        if source in DATA_SETS:
            return data_set_texts(source, None if self.data is None else Path(self.data))
        return library_documents() if source == LIBRARY else local_texts(Path(source))


def _sources(data: str | Path | None) -> Sequence[str]:
    if data is None:
        return [LIBRARY]
    return [name for name in DATA_SETS if (Path(data) / name).is_dir()] or [str(data)]


def _name(source: str) -> str:
    """How a source is called in places: data sets by their names, files and folders by theirs."""
    return source if source in DATA_SETS or source == LIBRARY else Path(source).resolve().stem
