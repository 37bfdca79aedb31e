"""RULER: thirteen tasks made for a tokenizer and a length by the harness's generators, from local texts if need be.

Source: RULER, arXiv 2404.06654, section 3 and appendix B (parameters of the thirteen tasks).
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.harness.local_data import KINDS, split_files
from beacon.evaluation.harness.made_once import made_once
from beacon.evaluation.results.stamps import files_fingerprint, tokenizer_fingerprint

SAMPLES = 500  # of every length, unless fewer are evaluated
ESSAYS, PUNKT = "paul_graham_essays", "tokenizers/punkt_tab"
SQUAD, HOTPOT = "squad/dev-v2.0.json", "hotpotqa/hotpot_dev_distractor_v1.json"
EXAMPLE_TOKENS = 500  # in which the harness fits the solved example of variable tracking
# Haystack, keys, values, and how many needles, where that is not one.
NEEDLES: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "niah_single_1": ("repeat", "words", "numbers", {}),
    "niah_single_2": ("essay", "words", "numbers", {}),
    "niah_single_3": ("essay", "words", "uuids", {}),
    "niah_multikey_1": ("essay", "words", "numbers", {"num_needle_k": 4}),
    "niah_multikey_2": ("needle", "words", "numbers", {}),
    "niah_multikey_3": ("needle", "uuids", "uuids", {}),
    "niah_multivalue": ("essay", "words", "numbers", {"num_needle_v": 4}),
    "niah_multiquery": ("essay", "words", "numbers", {"num_needle_q": 4}),
}


class PromptsDoNotFit(ValueError, CannotRun):
    """The smallest prompt of a task may not fit a length, by this tokenizer."""


def ruler_overrides(
    task: str, tokenizer: Any, lengths: Sequence[int], limit: int | None, data: Path | None
) -> dict[str, Any]:
    """What to change in a RULER task so that it is made for this tokenizer at these lengths.

    Args:
        task: Its name.
        tokenizer: Measures the lengths.
        lengths: Tokens of a prompt and its answer, each a metric of the task.
        limit: Prompts of every length at most.
        data: Folder with local texts; None takes the harness's own sources.

    Returns:
        Fields of the configuration.

    Raises:
        FileNotFoundError: A text that the task is made from is not there.
    """
    check_sources(task, data)
    samples = SAMPLES if limit is None else min(limit, SAMPLES)

    def make(length: int) -> list[dict[str, Any]]:
        with _own_randomness(f"{task} {length}"), contextlib.redirect_stdout(io.StringIO()):
            return _generator(task, tokenizer, data)(max_seq_length=length, num_samples=samples)

    def build(**_: Any) -> dict[str, Any]:
        import datasets

        sources = None if data is None else files_fingerprint(source_files(task, data))
        known = {"task": task, "samples": samples, "sources": sources, "tokenizer": tokenizer_fingerprint(tokenizer)}
        parts = [made_once({**known, "length": length}, partial(make, length)) for length in lengths]
        return {"test": datasets.concatenate_datasets(parts)}

    def grade(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all, string_match_part

        match = string_match_part if task.startswith("ruler_qa") else string_match_all
        return {str(document["max_length"]): match(postprocess_pred(results), [document["outputs"]])}

    return {"custom_dataset": build, "process_results": grade, "metric_list": length_metrics(map(str, lengths))}


def length_metrics(names: Any) -> list[dict[str, Any]]:
    """A metric for every length, as the harness's configurations list them."""
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def check_sources(task: str, data: Path | None) -> None:
    """Find out before anything is made whether the texts of a task are there.

    Raises:
        FileNotFoundError: One is not.
    """
    if data is None:
        return
    if task in NEEDLES and NEEDLES[task][0] == "essay":
        if not split_files(data / ESSAYS, None, "train"):
            raise FileNotFoundError(
                f"{task} hides needles in essays, got no train.jsonl or train-00000-of-0000N.parquet (column text) in "
                f"{data / ESSAYS}; for example: hf download baber/{ESSAYS} --repo-type dataset --local-dir "
                f"{data / ESSAYS}"
            )
        if _punkt(data) is None:
            raise FileNotFoundError(
                f"{task} splits essays into sentences with NLTK's punkt_tab, got none in {data / 'nltk_data'} nor "
                f"where NLTK looks; for example: python -m nltk.downloader -d {data / 'nltk_data'} punkt_tab"
            )
    for name, file, source in (
        ("ruler_qa_squad", SQUAD, "the development set of SQuAD 2.0"),
        ("ruler_qa_hotpot", HOTPOT, "HotpotQA's development set with distractors"),
    ):
        if task == name and not (data / file).is_file():
            raise FileNotFoundError(
                f"{task} is made from {source}, got no {data / file}; download that file from the data set's home page "
                "and put it there."
            )


def source_files(task: str, data: Path) -> list[Path]:
    """The local texts that a task is made from, as far as they are there."""
    if task in NEEDLES:
        return split_files(data / ESSAYS, None, "train") if NEEDLES[task][0] == "essay" else []
    file = {"ruler_qa_squad": SQUAD, "ruler_qa_hotpot": HOTPOT}.get(task)
    return [] if file is None else [data / file]


def _generator(task: str, tokenizer: Any, data: Path | None) -> Callable[..., list[dict[str, Any]]]:
    """The harness's generator of a task, with all but length and number of prompts filled in."""
    if task in NEEDLES:
        return _needles(task, tokenizer, data)
    if task == "ruler_vt":
        return partial(_variable_tracking, tokenizer)
    if task == "ruler_cwe":
        return partial(_common_words, tokenizer)
    if task == "ruler_fwe":
        from lm_eval.tasks.ruler.fwe_utils import sys_kwext

        return partial(sys_kwext, tokenizer=tokenizer)
    return partial(_questions, task, tokenizer, data)


def _needles(task: str, tokenizer: Any, data: Path | None) -> Callable[..., list[dict[str, Any]]]:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    haystack, keys, values, counts = NEEDLES[task]
    text = _essays(data) if haystack == "essay" and data is not None else get_haystack(type_haystack=haystack)
    return partial(
        generate_samples,
        text,
        TOKENIZER=tokenizer,
        template=TEMPLATE,
        type_haystack=haystack,
        type_needle_k=keys,
        type_needle_v=values,
        **counts,
    )


def _essays(data: Path) -> list[str]:
    """Words of the local essays."""
    import datasets

    files = split_files(data / ESSAYS, None, "train")
    loaded = datasets.load_dataset(KINDS[files[0].suffix], data_files=[str(file) for file in files], split="train")
    return re.sub(r"\s+", " ", " ".join(loaded["text"])).split(" ")


def _punkt(data: Path | None) -> Path | None:
    """Where NLTK's sentence splitter is: a folder for NLTK's search path."""
    import nltk

    own = [str(data / "nltk_data")] if data is not None else []
    try:
        return Path(nltk.data.find(PUNKT, paths=[*own, *nltk.data.path])).parents[1]
    except LookupError:
        return None


@contextlib.contextmanager
def punkt_found(tasks: Sequence[str], data: Path | None) -> Iterator[None]:
    """Let NLTK find its sentence splitter in the local folder while RULER's tasks are made.

    The harness tries to download it as soon as it loads one of them, also where nothing will be split: these find an
    empty folder.

    Args:
        tasks: Names of the tasks.
        data: Folder with local texts.
    """
    import nltk

    needed = any(task in NEEDLES and NEEDLES[task][0] == "essay" for task in tasks)

    with tempfile.TemporaryDirectory() as empty:
        folder = _punkt(data)
        if folder is None and not needed:
            (Path(empty) / PUNKT).mkdir(parents=True)
            folder = Path(empty)
        before = list(nltk.data.path)
        if folder is not None:
            nltk.data.path.insert(0, str(folder))
        try:
            yield
        finally:
            nltk.data.path[:] = before


def _variable_tracking(tokenizer: Any, *, max_seq_length: int, num_samples: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.vt_utils import generate_input_output, sys_vartrack_w_noise_random

    def smallest() -> str:
        text: str = generate_input_output(5, 1, 4, is_icl=True)[0]
        return text

    _check_room("ruler_vt", tokenizer, smallest, EXAMPLE_TOKENS - 30)
    example = sys_vartrack_w_noise_random(
        tokenizer=tokenizer, num_samples=1, max_seq_length=EXAMPLE_TOKENS, incremental=5
    )[0]
    _check_room("ruler_vt", tokenizer, lambda: smallest() + example["input"], max_seq_length - 60)
    made: list[dict[str, Any]] = sys_vartrack_w_noise_random(
        tokenizer=tokenizer, num_samples=num_samples, max_seq_length=max_seq_length, icl_example=example
    )
    return made


def _common_words(tokenizer: Any, *, max_seq_length: int, num_samples: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler import cwe_utils

    cwe_utils.RNG.seed(42)  # the module's own, which would go on from the last call
    _check_room(
        "ruler_cwe", tokenizer, lambda: cwe_utils.generate_input_output(10, max_seq_length)[1], max_seq_length - 120
    )
    made: list[dict[str, Any]] = cwe_utils.sys_word_pair_random(
        num_samples=num_samples, max_seq_length=max_seq_length, tokenizer=tokenizer
    )
    return made


def _check_room(task: str, tokenizer: Any, smallest: Callable[[], str], room: int) -> None:
    """Refuse what the harness would try to fit for ever: it shortens no prompt below its smallest.

    Raises:
        PromptsDoNotFit: The smallest prompt may not fit.
    """
    tokens = max(len(tokenizer(smallest())["input_ids"]) for _ in range(8))
    if tokens * 1.1 > room:
        raise PromptsDoNotFit(
            f"{task} must fit its smallest prompt, got {tokens} tokens by this tokenizer where {room} are left; choose "
            "a longer length, or leave the task out if the tokenizer knows few words."
        )


def _questions(
    task: str, tokenizer: Any, data: Path | None, *, max_seq_length: int, num_samples: int
) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler import qa_utils

    squad = task == "ruler_qa_squad"
    if data is None:
        questions, documents = qa_utils.read_squad() if squad else qa_utils.read_hotpotqa()
    else:
        questions, documents = _squad(data / SQUAD) if squad else _hotpot(data / HOTPOT)
    made: list[dict[str, Any]] = qa_utils.generate_samples(
        tokenizer=tokenizer,
        docs=documents,
        qas=questions,
        max_seq_length=max_seq_length,
        num_samples=min(num_samples, len(questions)),
    )
    return made


def _squad(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions of SQuAD 2.0 that have an answer, and all paragraphs; questions name these by number."""
    articles = [article["paragraphs"] for article in json.loads(file.read_text(encoding="utf-8"))["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    number = {text: at for at, text in enumerate(documents)}
    questions = []
    for article in articles:
        own = [number[paragraph["context"]] for paragraph in article]
        for at, paragraph in zip(own, article, strict=True):
            questions += [
                {
                    "query": asked["question"],
                    "outputs": [answer["text"] for answer in asked["answers"]],
                    "context": [at],
                    "more_context": [other for other in own if other != at],
                }
                for asked in paragraph["qas"]
                if not asked["is_impossible"]
            ]
    return questions, documents


def _hotpot(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions of HotpotQA, and all paragraphs with their titles; questions name these by number."""
    asked = json.loads(file.read_text(encoding="utf-8"))
    texts = [["\n".join([title, "".join(sentences)]) for title, sentences in item["context"]] for item in asked]
    documents = sorted({text for own in texts for text in own})
    number = {text: at for at, text in enumerate(documents)}
    questions = [
        {"query": item["question"], "outputs": [item["answer"]], "context": [number[text] for text in own]}
        for item, own in zip(asked, texts, strict=True)
    ]
    return questions, documents


@contextlib.contextmanager
def _own_randomness(name: str) -> Iterator[None]:
    """The generators draw from the global random states: seed these by name, and put them back."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(name)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
