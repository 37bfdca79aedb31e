"""What a method answered to the harness's requests: a line of JSON for each, written at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from beacon.evaluation.results.records import append_line, read_lines

ALIKE = 0.75  # of the shorter text: contexts that begin alike for so long (questions about one book) are read together


class KeptAnswers:
    """Answers in files of which this process writes one (:class:`beacon.evaluation.harness.keeping.AnswerStore`).

    Args:
        own: The file that this process writes.
        files: All that are read, its own included; damaged lines are left out, and logged.
        rank: Number of this process.
        count: Of how many that share the work.

    Attributes:
        progress: Called with the share of the answers expected that was kept, 0 .. 1.
    """

    def __init__(self, own: Path, files: Iterable[Path] = (), rank: int = 0, count: int = 1) -> None:
        self.own, self.rank, self.count = own, rank, count
        self.progress: Callable[[float], None] | None = None
        self._kept = self._expected = 0
        self._known: dict[str, Any] = {}
        for file in files:
            self._known |= dict(read_lines(file, _parse))

    def find(self, request: str) -> Any | None:
        """The answer to a request, if there is one."""
        return self._known.get(request)

    def keep(self, request: str, answer: Any, about: Mapping[str, Any]) -> None:
        """Write an answer down at once."""
        append_line(self.own, json.dumps({"request": request, **about, "answer": answer}))
        self._known[request] = answer
        self._kept += 1
        if self.progress is not None and self._expected:
            self.progress(min(1.0, self._kept / self._expected))

    def expect(self, count: int) -> None:
        """So many answers will be kept now."""
        self._kept, self._expected = 0, count

    def share(self, contexts: Sequence[str]) -> list[bool]:
        """Which of a task's contexts this process answers: the same in every process, whatever is answered already."""
        if self.count == 1:
            return [True] * len(contexts)
        owners = shared_out(contexts, self.count)
        return [owners[context] == self.rank for context in contexts]


def shared_out(contexts: Iterable[str], count: int) -> dict[str, int]:
    """Which of ``count`` processes answers each context: as much text for each as can be, what begins alike together.

    Args:
        contexts: Of a task; their order does not count.
        count: Processes.
    """
    order = sorted(set(contexts))
    most = -(-len(order) // count)  # of one group, so that all have something to do
    groups: list[list[str]] = []
    for context in order:
        last = groups[-1] if groups else []
        alike = bool(last) and _begin_alike(last[-1], context)
        if alike and len(last) < most:
            last.append(context)
        else:
            groups.append([context])
    loads = [0] * count
    owners: dict[str, int] = {}
    for group in sorted(groups, key=lambda group: -sum(map(len, group))):
        owner = loads.index(min(loads))
        loads[owner] += sum(map(len, group))
        owners |= dict.fromkeys(group, owner)
    return owners


def _begin_alike(one: str, other: str) -> bool:
    count = math.ceil(ALIKE * min(len(one), len(other)))
    return one[:count] == other[:count]


def _parse(line: bytes) -> tuple[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values.get("request"), str) or values.get("answer") is None:
        raise ValueError("no answer to a request")
    return values["request"], values["answer"]
