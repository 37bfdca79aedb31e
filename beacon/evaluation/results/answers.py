"""What a method answered to the harness's requests: a line of JSON for each, written at once."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from beacon.evaluation.results.records import append_line, read_lines


class KeptAnswers:
    """Answers in files of which this process writes one (:class:`beacon.evaluation.harness.keeping.AnswerStore`).

    Args:
        own: The file that this process writes.
        files: All that are read, its own included; damaged lines are left out, and logged.
        rank: Number of this process.
        count: Of how many; requests about one context belong to one.
        progress: Called with the share of the answers expected that was kept, 0 .. 1.
    """

    def __init__(
        self,
        own: Path,
        files: Iterable[Path] = (),
        rank: int = 0,
        count: int = 1,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.own, self.rank, self.count, self.progress = own, rank, count, progress
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

    def is_mine(self, context: str) -> bool:
        """Whether this process answers requests about a context."""
        return zlib.crc32(context.encode()) % self.count == self.rank


def _parse(line: bytes) -> tuple[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values.get("request"), str) or values.get("answer") is None:
        raise ValueError("no answer to a request")
    return values["request"], values["answer"]
