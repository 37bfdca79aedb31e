"""Run the tasks of one model within a time budget, and write every cell down as it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.attempts import Unavailable, said
from benchmarks.inference.contenders import CONDENSED, CUDNN, FULL, KVPRESS, LOOP, PUBLISHED, STATIC, contender
from benchmarks.inference.decode import OUT_OF_MEMORY, decode, too_large
from benchmarks.inference.floor import products_seconds
from benchmarks.inference.kvpress_process import kvpress_rows
from benchmarks.inference.parts import parts
from benchmarks.inference.prefill import prefill, prefill_rows
from benchmarks.inference.readers import Contender
from benchmarks.inference.setting import Setting, Text
from benchmarks.inference.tasks import DECODE, PREFILL, PREFILL_PARTS, Task, expected_seconds
from benchmarks.measure import Spread, alive, release
from benchmarks.results import OURS, Results, Row

PRODUCTS = "products"  # the impl of the matrix products alone
SAME = {LOOP: OURS, PUBLISHED: OURS, CUDNN: FULL}  # who computes the function of whom
ALIKE = {"float32": 1e-3, "bfloat16": 0.15}  # largest difference of their logits
PROFILED_TOKENS = 16  # decoded, at most
LOST = "the GPU computes nothing in this process any more"


@dataclass
class Run:
    """One model's tasks.

    Args:
        base: The stock model.
        setting: Where it runs.
        results: Where rows go.
        deadline: When the time is up, by the monotonic clock.
        say: Called with a line per task.
        kvpress_python: Interpreter of the environment with kvpress.
        problems: What is wrong with ours.
    """

    base: Any
    setting: Setting
    results: Results
    deadline: float
    say: Callable[[str], None]
    kvpress_python: str | None = None
    problems: list[str] = field(default_factory=list)
    _floors: dict[Text, float] = field(default_factory=dict)
    _logits: dict[tuple[Text, str], torch.Tensor] = field(default_factory=dict)

    def run(self, tasks: Iterable[Task]) -> None:
        """Run them in order; what does not fit into the time left is skipped, what breaks gets a row."""
        for task in tasks:
            begin = time.monotonic()
            if self.setting.on_gpu:
                release(self.setting.device)  # of the task before, whose frames are gone by now
            rows = self._task(task)
            last = next((row for row in rows if row.status != "ok"), rows[-1])
            self.say(f"{self._label(task)}: {last.status}, {time.monotonic() - begin:.1f} s {last.reason}".rstrip())
            self.problems += [f"{self._label(task)} failed: {row.reason}" for row in rows if _broken(task, row)]
            if last.status == "failed" and not alive(self.setting.device):
                self.problems.append(LOST)
                return

    def _task(self, task: Task) -> list[Row]:
        """Run a task; returns the rows it wrote."""
        why = too_large(task.impl, self.setting, task.text)
        if why:
            return self._none(task, "failed", why)
        if expected_seconds(task, self.setting) > self.deadline - time.monotonic():
            return self._none(task, "skipped", "time budget")
        written: list[Row] = []
        try:
            with torch.no_grad():
                for rows in self._rows(task):
                    self.results.append(rows)
                    written += rows
        except torch.OutOfMemoryError as err:
            return self._none(task, "failed", f"{OUT_OF_MEMORY}: {' '.join(str(err).split())[:200]}")
        except Unavailable as err:
            return self._none(task, "unavailable", str(err))
        except Exception as err:  # one task must not end the others
            return self._none(task, "failed", said(err))
        return written

    def _rows(self, task: Task) -> Iterator[list[Row]]:
        if task.impl == KVPRESS:
            yield kvpress_rows(self.setting, task.text, self.kvpress_python, self.deadline - time.monotonic())
            return
        with contender(task.impl, self.base, self.setting) as ready:
            if task.kind == DECODE:
                yield from decode(ready, task.impl, self.setting, task.text, task.batches, self.deadline)
            elif task.kind == PREFILL:
                yield from self._prefill(ready, task)
            else:
                yield self._parts(ready, task)

    def _prefill(self, ready: Contender, task: Task) -> Iterator[list[Row]]:
        name, text = task.impl, task.text
        rows, reading, taken = prefill(ready, name, self.setting, text, self.deadline)
        yield rows
        self._logits[text, name] = reading.logits.float().cpu()
        del reading
        further: dict[str, Spread | float] = {}
        reference = self._logits.get((text, SAME.get(name, "")))
        if reference is not None:
            apart = float((self._logits[text, name] - reference).norm() / reference.norm())
            further["difference"] = apart
            if not apart <= ALIKE[self.setting.precision]:
                self.problems.append(f"{self._label(task)} differs from {SAME[name]} by {apart:.2g}")
        if name == OURS and text not in self._floors:
            if self.setting.on_gpu:
                release(self.setting.device)
            self._floors[text] = products_seconds(ready.model, self.setting, text)
            yield prefill_rows(PRODUCTS, self.setting, text, {"floor_s": self._floors[text]})
        if name in CONDENSED and text in self._floors:
            floor = self._floors[text]
            further["matmul_floor_x"] = Spread(taken.p20 / floor, taken.p50 / floor, taken.p80 / floor)
        yield prefill_rows(name, self.setting, text, further)

    def _parts(self, ready: Contender, task: Task) -> list[Row]:
        """Shares of the wall time, of a prefill or of a decoding step."""
        setting, text = self.setting, task.text
        if task.kind == PREFILL_PARTS:
            ids, steps = setting.ids(text.length), 1
            ready.read(ids, text.ratio)
            wall, found = parts(lambda: ready.read(ids, text.ratio), setting.device)
        else:
            steps = min(PROFILED_TOKENS, setting.new_tokens)
            reading = ready.read(setting.ids(text.length + setting.scale.window // 2), text.ratio)
            more = ready.decoder(ready.ways[0], ready.repeated(reading, 1))
            more(steps)
            wall, found = parts(lambda: more(steps), setting.device)
        metrics = {"ms": 1e3 * wall / steps, **{f"share_{group}": taken / wall for group, taken in found.items()}}
        case, shape = setting.case(task.kind, text), setting.shape(text)
        return [
            Row(case, task.impl, shape, setting.precision, metric, Spread(value, value, value))
            for metric, value in metrics.items()
        ]

    def _label(self, task: Task) -> str:
        return f"{self.setting.case(task.kind, task.text)} {task.impl}"

    def _none(self, task: Task, status: str, reason: str) -> list[Row]:
        """Write down that there is nothing, for every batch of a task."""
        rows = [
            Row(
                self.setting.case(task.kind, task.text, batch),
                task.impl,
                self.setting.shape(task.text, batch or 1),
                self.setting.precision,
                status=status,
                reason=reason,
            )
            for batch in task.batches or (None,)
        ]
        self.results.append(rows)
        return rows


def _broken(task: Task, row: Row) -> bool:
    """Whether ours failed; that many rows do not fit is a result, and a profiler that fails no failure of ours."""
    if row.status != "failed" or task.impl not in (OURS, STATIC, LOOP):
        return False
    return task.kind == PREFILL or (task.kind == DECODE and not row.reason.startswith(OUT_OF_MEMORY))
