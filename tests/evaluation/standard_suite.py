"""Standard tasks on small local files, read by methods that read nothing: what is around them can be tested.

torchrun --standalone --nproc-per-node 2 -m tests.evaluation.standard_suite FOLDER DATA
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beacon.evaluation.methods import Beacon, Method, Outcome

TASKS = ("arc_easy", "gsm8k")
OPTIONS = {"num_fewshot": 0}


@dataclass
class Guesser(Method):
    """Foresees and answers by chance: the same for the same tokens.

    Args:
        name: Draws other numbers than another name.
        stops_at: Number of the reading that is not finished.
    """

    name: str = "guess"
    stops_at: int | None = None
    count: int = 0

    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Any = None) -> Outcome:
        return Outcome(torch.randn(keep, model.config.vocab_size, generator=self._chance(ids)), len(ids))

    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        return torch.randint(0, model.config.vocab_size, (count,), generator=self._chance(ids)).tolist()

    def _chance(self, ids: torch.Tensor) -> torch.Generator:
        self.count += 1
        if self.count == self.stops_at:
            raise KeyboardInterrupt
        seed = zlib.crc32(f"{self.name} {ids.tolist()}".encode())
        return torch.Generator().manual_seed(seed)


def methods(names: Sequence[str] = ("guess", "other")) -> dict[str, Method]:
    return {**{name: Guesser(name) for name in names}, "beacon:4": Beacon(4)}


def write_data(folder: Path, count: int = 8) -> None:
    """Questions for both tasks; each of gsm8k is asked twice with the same words, but for the right answer."""
    arc = [
        {
            "id": f"q{number}",
            "question": f"def function_{number}",
            "choices": {"text": ["yes", "no", "value", "4"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
        }
        for number in range(count)
    ]
    gsm = [{"question": f"return {n // 2} ?", "answer": f"value\n#### {n}"} for n in range(count)]
    for path, rows in (
        ("ai2_arc/ARC-Easy/test.jsonl", arc),
        ("gsm8k/main/test.jsonl", gsm),
        ("gsm8k/main/train.jsonl", gsm),
    ):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tiny() -> tuple[Any, Any]:
    """A wrapped model and its tokenizer."""
    import beacon
    from tests.evaluation.tiny import tiny_llama, word_tokenizer

    tokenizer = word_tokenizer()
    config = beacon.BeaconConfig(window=32, ratios=(4, 8), reserve=16)
    return beacon.wrap(tiny_llama(len(tokenizer), num_hidden_layers=1), config), tokenizer


def run(folder: str | Path, data: str | Path, some: dict[str, Method] | None = None, **options: Any) -> Any:
    """Both tasks by some methods, into a folder."""
    from beacon.evaluation.running import run_suite

    given = {"harness": {"data": str(data), **OPTIONS, **options}}
    return run_suite(*tiny(), [], methods() if some is None else some, folder, options=given, standard=TASKS)


def main() -> None:
    torch.set_num_threads(1)
    run(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
