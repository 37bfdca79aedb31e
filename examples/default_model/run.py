"""A training run by the clock: time accounting over restarts, a JSON-lines log, atomic checkpoints."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Put a finished folder in the place of another, so that readers never see half of one."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


class Run:
    """Counts the minutes of a training over all its restarts and keeps its log and checkpoint.

    Args:
        work: Folder of build products.
        name: Prefix of the run's files.
        minutes: Time to train, over all restarts together.
    """

    def __init__(self, work: Path, name: str, minutes: float) -> None:
        self.work, self.name, self.minutes = work, name, minutes
        self.step, self.tokens, self._before, self._began = 0, 0, 0.0, time.monotonic()
        self.checkpoint = work / f"{name}_checkpoint.pt"
        self._log = (work / f"{name}_log.jsonl").open("a")
        self._saved = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of all restarts."""
        return self._before + time.monotonic() - self._began

    @property
    def progress(self) -> float:
        """Share of the time that is over, 0 to 1."""
        return min(1.0, self.elapsed / (self.minutes * 60))

    def report(self, **record: Any) -> None:
        """Log a record with step, tokens and minutes."""
        record = {"step": self.step, "tokens": self.tokens, "minutes": round(self.elapsed / 60, 2)} | record
        logger.info("%s", json.dumps(record))
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def resume(self) -> dict[str, Any] | None:
        """What the last restart saved, or None."""
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.step, self.tokens, self._before = state["step"], state["tokens"], state["elapsed"]
        self._saved = self._before
        logger.info("resumed at step %d, %.1f minutes", self.step, self._before / 60)
        return state

    def due(self, minutes: float) -> bool:
        """Whether ``minutes`` have passed since the last checkpoint."""
        return self.elapsed - self._saved > minutes * 60

    def save(self, **state: Any) -> None:
        """Write the checkpoint whole, then rename it."""
        self._saved = self.elapsed
        fresh = self.checkpoint.with_suffix(".new")
        torch.save({"step": self.step, "tokens": self.tokens, "elapsed": self.elapsed, **state}, fresh)
        os.replace(fresh, self.checkpoint)
