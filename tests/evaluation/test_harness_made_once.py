"""Documents that take long to make are made once."""

import multiprocessing
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from beacon.evaluation.harness.made_once import FOLDER, made_once

KEY = {"task": "some", "length": 8}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / FOLDER


def documents(count: int = 2) -> list[dict]:
    return [{"input": f"text {n}", "outputs": ["a", str(n)], "max_length": 8} for n in range(count)]


def test_who_asks_again_gets_the_same(cache) -> None:
    calls = []

    def make() -> list[dict]:
        calls.append(1)
        return documents()

    first, again = made_once(KEY, make), made_once(dict(reversed(KEY.items())), make)
    assert first.to_list() == again.to_list() == documents() and len(calls) == 1
    assert first.column_names == ["input", "outputs", "max_length"]
    assert made_once({**KEY, "length": 9}, lambda: documents(3)).num_rows == 3
    assert len(list(cache.glob("*.parquet"))) == 2


def test_what_failed_is_made_again(cache) -> None:
    def refuse() -> list[dict]:
        raise ValueError("does not fit")

    with pytest.raises(ValueError, match="does not fit"):
        made_once(KEY, refuse)
    assert made_once(KEY, documents).to_list() == documents()


def _work(folder: Path, number: int) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder

    def make() -> list[dict]:
        (folder / f"made by {number}").touch()
        return documents(50)

    assert made_once(KEY, make).num_rows == 50


def test_of_several_processes_one_makes_them(tmp_path) -> None:
    started = [multiprocessing.get_context("spawn").Process(target=_work, args=(tmp_path, n)) for n in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * 2
    assert len(list(tmp_path.glob("made by *"))) == 1
