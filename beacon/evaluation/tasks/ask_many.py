"""Questions about long contexts from Parquet files: each context is read once, however many questions it has."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from beacon.config import check_choice, check_whole
from beacon.evaluation.methods import Method
from beacon.evaluation.suite import Item, Result, Task
from beacon.evaluation.tasks.documents import files_below
from beacon.evaluation.tasks.judging import contains, exact, f1
from beacon.evaluation.tasks.measuring import now
from beacon.evaluation.tasks.options import check_flag
from beacon.evaluation.tasks.prompts import Frame, ask, frame, plain_question
from beacon.evaluation.text import encode

Place: TypeAlias = tuple[str, int, int]  # file, row group, row in it

NEEDED = ("context", "question", "answer")
OPTIONAL = ("answer_prefix", "task", "max_new_tokens")
HOW = (
    "write your own with the columns context, question, answer_prefix, answer (task, max_new_tokens if you like), or "
    "take a data set of kvpress, for example: hf download simonjegou/ruler --repo-type dataset --include '4096/*' "
    "--local-dir {folder}"
)


@dataclass(kw_only=True, eq=False)
class AskManyTask(Task):
    """Questions with known answers, in the columns that kvpress's data sets have.

    A row has ``context``, ``question`` and ``answer`` (a string or a list of strings), and may have ``answer_prefix``
    (how the answer begins; not judged), ``task`` and ``max_new_tokens``. Rows with one context are asked after one
    reading of it, where the method can. An item is what one task asks about one context, its scores the means over the
    questions, ``seconds_per_question`` the time of reading and of all answers by the number of questions.

    Args:
        data: A Parquet file, or a folder with such files at any depth.
        limit: Contexts of each task at most.
        answers: Where a row has several answers: ``any`` of them is right, or ``all`` are wanted (``contains`` is then
            the share that is there, the other scores those of the best).
        max_new_tokens: Tokens of an answer at most, where a row does not say.
        chat_template: Ask in the tokenizer's chat format.
    """

    data: str | Path | None = None
    limit: int | None = None
    answers: str = "any"
    max_new_tokens: int = 64
    chat_template: bool = False

    name = "ask-many"
    metrics = MappingProxyType({"contains": True, "exact": True, "f1": True, "seconds_per_question": False})

    def __post_init__(self) -> None:
        check_choice("answers", self.answers, ("any", "all"))
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_flag("chat_template", self.chat_template)
        if self.limit is not None:
            check_whole("limit", self.limit, 1)
        self._rows = RowReader()
        self._kept: list[Kept] = []

    def items(self, model: Any, tokenizer: Any) -> Iterable[Item]:
        if self.chat_template:
            frame(tokenizer, True)  # refuses one that cannot be used
        files = parquet_files(None if self.data is None else Path(self.data))
        contexts: dict[str, dict[str, list[Place]]] = {}  # hash of the context, task, rows
        for file in files:
            for place, context, task in index_rows(file):
                contexts.setdefault(context, {}).setdefault(task, []).append(place)
        return self._items(contexts)

    def _items(self, contexts: dict[str, dict[str, list[Place]]]) -> Iterator[Item]:
        seen: Counter[str] = Counter()
        for context, tasks in contexts.items():
            seen.update(list(tasks))
            taken = {task: rows for task, rows in tasks.items() if self.limit is None or seen[task] <= self.limit}
            asked = [place for rows in taken.values() for place in rows]
            for task, rows in taken.items():
                content = {"context": context, "rows": rows, "asked": asked}
                yield Item(f"{task}, context {seen[task]}", {"task": task}, content, cluster=f"context {context[:16]}")

    def run(self, method: Method, model: Any, tokenizer: Any, item: Item) -> Result:
        outputs, seconds = self._outputs(method, model, tokenizer, item)
        scores = [self._score(output, self._rows.read(at)) for output, at in zip(outputs, item.content["rows"])]
        means = {metric: statistics.mean(score[metric] for score in scores) for metric in scores[0]}
        return Result({**means, "seconds_per_question": seconds}, json.dumps(outputs, ensure_ascii=False))

    def _score(self, output: str, row: Row) -> dict[str, float]:
        found = [contains(output, answer) for answer in row.answers]
        return {
            "contains": sum(found) / len(found) if self.answers == "all" else float(any(found)),
            "exact": float(any(exact(output, answer) for answer in row.answers)),
            "f1": max(f1(output, answer) for answer in row.answers),
        }

    def _outputs(self, method: Method, model: Any, tokenizer: Any, item: Item) -> tuple[list[str], float]:
        """What a method answers to an item's questions, and the seconds of one.

        All questions about the context are answered; those of other tasks are kept for their items, which come next.
        """
        context, rows, asked = (item.content[key] for key in ("context", "rows", "asked"))
        self._kept = [kept for kept in self._kept if kept.context == context]
        for kept in self._kept:
            if kept.method is method and kept.model is model and all(at in kept.outputs for at in rows):
                # Once: the model may have changed when they are asked again.
                return [kept.outputs.pop(at) for at in rows], kept.seconds
        method.load(model)
        start = now(model)
        written = self._ask(method, model, tokenizer, [self._rows.read(at) for at in asked])
        outputs, seconds = dict(zip(asked, written, strict=True)), (now(model) - start) / len(asked)
        own = [outputs.pop(at) for at in rows]
        self._kept = [kept for kept in self._kept if kept.method is not method or kept.model is not model]
        if outputs:
            self._kept.append(Kept(method, model, context, outputs, seconds))
        return own, seconds

    def _ask(self, method: Method, model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
        around = frame(tokenizer, self.chat_template)
        text = torch.tensor([*around.before, *encode(tokenizer, rows[0].context).tolist()], dtype=torch.int64)
        questions = [asked_ids(tokenizer, around, row) for row in rows]
        rooms = [self.max_new_tokens if row.max_new_tokens is None else row.max_new_tokens for row in rows]
        return ask(method, model, tokenizer, text, questions, rooms)


@dataclass
class Kept:
    """Answers of a method to questions about one context, and the seconds that each took, reading included."""

    method: Method
    model: Any
    context: str
    outputs: dict[Place, str]
    seconds: float


@dataclass(frozen=True)
class Row:
    """A question about a context, and what is right."""

    context: str
    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    max_new_tokens: int | None = None


class RowReader:
    """Reads rows; the row group that was read last stays in memory."""

    def __init__(self) -> None:
        self._at: tuple[str, int] | None = None
        self._group: Any = None

    def read(self, place: Place) -> Row:
        """The row at a place.

        Raises:
            ValueError: It holds something else than it must; names file and row.
        """
        import pyarrow.parquet  # type: ignore[import-untyped]

        file, group, number = place
        if self._at != (file, group):
            with pyarrow.parquet.ParquetFile(file) as table:
                names = [name for name in (*NEEDED, *OPTIONAL) if name in table.schema_arrow.names]
                self._group = table.read_row_group(group, columns=names)
            self._at = (file, group)
        row = {name: self._group.column(name)[number].as_py() for name in self._group.column_names}
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        for name, values in (("context", [row["context"]]), ("question", [row["question"]]), ("answer", answers)):
            if not values or not all(isinstance(value, str) and value.strip() for value in values):
                raise ValueError(
                    f"column {name} must hold text that is not empty, got {row[name]!r} in row {number} of row group "
                    f"{group} of {file}; correct or drop the row."
                )
        room = row.get("max_new_tokens")
        prefix = row.get("answer_prefix") or ""
        return Row(row["context"], row["question"], tuple(answers), prefix, None if room is None else int(room))


def parquet_files(data: Path | None) -> list[Path]:
    """The Parquet files of the task.

    Raises:
        FileNotFoundError: There are none; says how to get some.
    """
    if data is None:
        raise FileNotFoundError(
            f"ask-many needs data, a Parquet file or a folder of such; {HOW.format(folder='data/ruler')}."
        )
    if data.is_file():
        return [data]
    files = files_below(data, (".parquet",)) if data.is_dir() else []
    if not files:
        raise FileNotFoundError(f"ask-many found no Parquet files in {data}; {HOW.format(folder=data)}.")
    return files


def index_rows(file: Path) -> Iterator[tuple[Place, str, str]]:
    """Place, hash of the context, and task of every row; tasks without a name are called as the file is.

    Raises:
        ValueError: The file is none of Parquet, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as err:
        raise ValueError(f"{file} must be a Parquet file, got another one ({err}); convert it.") from err
    with table:
        names = table.schema_arrow.names
        missing = [name for name in NEEDED if name not in names]
        if missing:
            raise ValueError(
                f"{file} must have the columns {', '.join(NEEDED)}, got {', '.join(names)}; rename them "
                f"({', '.join(missing)} missing)."
            )
        for group in range(table.num_row_groups):
            columns = table.read_row_group(group, columns=[name for name in ("context", "task") if name in names])
            for number in range(columns.num_rows):
                context = str(columns["context"][number].as_py())
                task = columns["task"][number].as_py() if "task" in names else None
                yield (str(file), group, number), hashlib.sha256(context.encode()).hexdigest(), task or file.stem


def asked_ids(tokenizer: Any, around: Frame, row: Row) -> torch.Tensor:
    """Token ids of a question, after a context that need not end its line, up to the answer."""
    apart = "" if row.context[-1].isspace() or row.question[0].isspace() else "\n"
    if around.chat:
        return encode(tokenizer, f"{apart}{row.question}{around.after}{row.answer_prefix}")
    return plain_question(tokenizer, f"{apart}{row.question}\n{row.answer_prefix}", row.answers[0])
