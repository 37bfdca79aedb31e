"""A training run that can stop anywhere: steps over restarts, a JSON-lines log, checkpoints written whole."""

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
    """Counts steps, tokens and minutes of a training over all its restarts and keeps its log and checkpoint.

    Args:
        work: Folder of build products.
        name: Prefix of the run's files.
        steps: Steps of the whole training.
    """

    def __init__(self, work: Path, name: str, steps: int) -> None:
        self.work, self.name, self.steps = work, name, steps
        self.step, self.tokens, self._before, self._began = 0, 0, 0.0, time.monotonic()
        self.checkpoint = work / f"{name}_checkpoint.pt"
        self._log = (work / f"{name}_log.jsonl").open("a")
        self._saved, self._recent, self._reported = 0.0, {}, (0.0, 0)

    @property
    def elapsed(self) -> float:
        """Seconds of all restarts."""
        return self._before + time.monotonic() - self._began

    @property
    def progress(self) -> float:
        """Share of the steps that are done, 0 to 1."""
        return min(1.0, self.step / self.steps)

    @property
    def over(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def note(self, **values: float) -> None:
        """Keep losses for the next `report_recent`."""
        for name, value in values.items():
            self._recent.setdefault(name, []).append(value)

    def report_recent(self) -> None:
        """Log the means of what was noted since the last time, and the speed."""
        means = {name: round(sum(values) / len(values), 4) for name, values in sorted(self._recent.items())}
        seconds, tokens = self._reported
        rate = (self.tokens - tokens) / max(self.elapsed - seconds, 1e-9)
        self._recent, self._reported = {}, (self.elapsed, self.tokens)
        self.report(**means, tokens_per_s=round(rate))

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
        self._saved, self._reported = self._before, (self._before, self.tokens)
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
