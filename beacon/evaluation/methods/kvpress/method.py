"""A press as a method beside the others."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.greedy import Ids, prompts
from beacon.evaluation.methods.held import attention_bytes
from beacon.evaluation.methods.interface import Method, Outcome, Progress
from beacon.evaluation.methods.kvpress.environment import VERSION, interpreter
from beacon.evaluation.methods.kvpress.process import Worker, end_workers, worker_of

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")  # model types that kvpress is made for


@dataclass(frozen=True)
class Press:
    """One of kvpress's methods.

    Args:
        kind: Its class there.
        frees: What it drops it also frees; else it is masked and stays.
        asks: It asks the model in words, so it needs the tokenizer.
    """

    kind: str
    frees: bool = True
    asks: bool = False


PRESSES = {
    "snapkv": Press("SnapKVPress"),
    "expected-attention": Press("ExpectedAttentionPress"),
    "streaming-llm": Press("StreamingLLMPress"),
    "kvzip": Press("KVzipPress", frees=False, asks=True),
}


@dataclass(frozen=True)
class KVPress(Method):
    """Full attention over the context, of whose keys and values one in ``ratio`` is then kept; questions stay whole.

    It runs in a process and an environment of its own: kvpress needs an older transformers than this package.

    Args:
        press: ``snapkv``, ``expected-attention``, ``streaming-llm`` or ``kvzip``.
        ratio: Raw tokens per key and value that is kept, at least 1.
        tokenizer: The model's, or its folder (``kvzip`` asks in words); None: the one beside the model.
        python: An interpreter that has kvpress; None: that of an environment which is built when it is first needed.

    Raises:
        ValueError: Unknown press, or a ratio below 1.
    """

    press: str
    ratio: float = 8
    tokenizer: Any = field(default=None, compare=False, repr=False)
    python: Path | str | None = None
    own_process = True

    def __post_init__(self) -> None:
        if self.press not in PRESSES:
            raise ValueError(f"press must be one of {', '.join(PRESSES)}, got {self.press!r}; choose one of them.")
        if not 1 <= self.ratio < float("inf"):
            raise ValueError(f"ratio must be at least 1 and finite, got {self.ratio}; pass for example 8.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """With its ratio."""
        return f"{self.press}, ratio {self.ratio:g}"

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        """As :meth:`Method.read`: all but the last ``keep`` tokens are pressed.

        Raises:
            CannotRun: There is no such environment, kvpress cannot read this text, or its process ended.
        """
        worker = self._worker(model)
        with tempfile.TemporaryDirectory(prefix="beacon-logits-") as folder:
            file = str(Path(folder) / "logits.safetensors")
            context, question = ids[: len(ids) - keep].tolist(), ids[len(ids) - keep :].tolist()
            found = worker.ask(
                {**self._request(model, worker), "context": context, "questions": [question], "logits": file}
            )
            logits = load_file(file)["logits"]
        return Outcome(logits.to(ids.device), found["entries"] + keep)

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        """As :meth:`Method.continue_text`: all but the last token is pressed.

        Raises:
            CannotRun: As :meth:`read`.
        """
        return self.answers(model, ids[:-1], [ids[-1:]], count)[0]

    def answers(
        self,
        model: Any,
        context_ids: Ids,
        question_ids_list: Sequence[Ids],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """As :meth:`Method.answers`.

        Raises:
            CannotRun: As :meth:`read`.
        """
        context, questions = prompts(model, context_ids, question_ids_list)
        worker = self._worker(model)
        request = {
            **self._request(model, worker),
            "context": context.tolist(),
            "questions": [question.tolist() for question in questions],
            "count": max_new_tokens,
            "ends": list(end_ids),
        }
        answers: list[list[int]] = worker.ask(request)["answers"]
        return answers

    def held_bytes(self, model: Any, length: int) -> int:
        kept = int(length * (1 - self._fraction)) if PRESSES[self.press].frees else length
        return attention_bytes(model, kept)

    def load(self, model: Any) -> None:
        self._worker(model)

    def close(self, model: Any) -> None:
        end_workers(model)

    @property
    def _fraction(self) -> float:
        """What is removed, as kvpress has it."""
        return 1 - 1 / self.ratio

    def _worker(self, model: Any) -> Worker:
        kind = model.config.model_type
        if kind not in FAMILIES:
            raise CannotRun(f"kvpress {VERSION} reads models of type {', '.join(FAMILIES)}, got {kind}.")
        return worker_of(model, interpreter() if self.python is None else Path(self.python))

    def _request(self, model: Any, worker: Worker) -> dict[str, Any]:
        folder = None
        if PRESSES[self.press].asks:
            given = model.config.name_or_path if self.tokenizer is None else self.tokenizer
            if not given:
                raise CannotRun(f"{self.press} asks the model in words and needs its tokenizer; pass tokenizer=...")
            folder = str(worker.tokenizer_folder(given))
        return {"press": PRESSES[self.press].kind, "fraction": self._fraction, "tokenizer": folder}
