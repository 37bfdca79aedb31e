"""The process that kvpress runs in: one for a model, whatever presses it serves, alive over all items."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.kvpress.weights import stock_folder
from beacon.identity import home_of

WORKER = Path(__file__).with_name("worker.py")
LINES = 4  # of what a worker said last
PATIENCE = 10.0  # seconds that a worker has to end by itself


class Worker:
    """A model in a process of its own.

    Args:
        model: A wrapped model, whose stock weights the process reads with.
        python: The interpreter, which has kvpress.
        script: What it runs.

    Raises:
        CannotRun: The process does not come up, and what it said last.
    """

    def __init__(self, model: Any, python: Path, script: Path = WORKER) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="beacon-kvpress-"))
        self._tokenizers: dict[int, Path] = {}
        self._errors = (self.folder / "stderr").open("w+b")
        self._process: subprocess.Popen[str] | None = None
        self._end = weakref.finalize(self, _clean, self.folder, self._errors)
        try:
            weight = model.get_input_embeddings().weight
            device = home_of(model.get_input_embeddings())
            spec = {
                "weights": str(stock_folder(model, self.folder / "weights")),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "device": str(device),
                "threads": torch.get_num_threads() if device.type == "cpu" else None,
            }
            self._start([str(python), "-I", str(script), json.dumps(spec)])
            self.versions: dict[str, str] = self._answer()["ready"]
        except BaseException:
            self.close()
            raise
        shutil.rmtree(self.folder / "weights", ignore_errors=True)  # it has them

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Let it serve a request.

        Raises:
            CannotRun: It cannot, or it has ended, and what it said last.
        """
        assert self._process is not None and self._process.stdin is not None
        try:
            with contextlib.suppress(OSError):  # it has ended; what it said last is told below
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            answer = self._answer()
        except BaseException:  # an interrupt leaves an answer on its way
            self.close()
            raise
        if "cannot" in answer:
            raise CannotRun(f"kvpress: {answer['cannot']}")
        return answer

    def tokenizer_folder(self, tokenizer: Any) -> Path:
        """Where the process finds a tokenizer."""
        if isinstance(tokenizer, str | Path):
            return Path(tokenizer)
        folder = self._tokenizers.get(id(tokenizer))
        if folder is None:
            folder = self._tokenizers[id(tokenizer)] = self.folder / f"tokenizer-{len(self._tokenizers)}"
            tokenizer.save_pretrained(folder)
        return folder

    @property
    def runs(self) -> bool:
        """Whether it can still be asked."""
        return self._end.alive

    def close(self) -> None:
        """End the process and remove its files."""
        self._end()

    def _start(self, command: list[str]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as err:
            raise CannotRun(f"{command[0]} cannot be run: {err}") from err
        self._end.detach()
        self._end = weakref.finalize(self, _clean, self.folder, self._errors, self._process)

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        said = [line.strip() for line in (self.folder / "stderr").read_text(errors="replace").splitlines()]
        last = " | ".join([line for line in said if line][-LINES:])
        raise CannotRun(f"kvpress's process ended with {code}: {last or 'it said nothing'}")


def _clean(folder: Path, errors: Any, process: subprocess.Popen[str] | None = None) -> None:
    """End a process: it stops when its stdin is closed, or is killed."""
    if process is not None:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    errors.close()
    shutil.rmtree(folder, ignore_errors=True)


_running: weakref.WeakKeyDictionary[Any, dict[str, Worker | CannotRun]] = weakref.WeakKeyDictionary()


def worker_of(model: Any, python: Path) -> Worker:
    """The process that reads for a model, started where there is none; one that ended is started anew.

    Raises:
        CannotRun: It does not come up; the next call is told the same without another try.
    """
    workers = _running.setdefault(model, {})
    known = workers.get(str(python))
    if isinstance(known, CannotRun):
        raise CannotRun(*known.args)
    if known is None or not known.runs:
        try:
            known = workers[str(python)] = Worker(model, python)
        except CannotRun as err:
            workers[str(python)] = CannotRun(*err.args)
            raise
    return known


def end_workers(model: Any) -> None:
    """End a model's processes; they start anew when they are asked again."""
    for worker in _running.pop(model, {}).values():
        if isinstance(worker, Worker):
            worker.close()
