"""The evaluation in benchmarks/README.md is what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import evaluation_table
from benchmarks.evaluation_table import BEGIN, END, replaced


def test_the_page_says_what_the_results_say() -> None:
    assert evaluation_table.main(["--check"]) == 0


def test_a_page_that_says_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(evaluation_table.README.read_text().replace("| beacon:8 |", "| beacon:8 better |", 1))
    monkeypatch.setattr(evaluation_table, "README", page)
    assert evaluation_table.main(["--check"]) == 1
    assert "run python benchmarks/evaluation_table.py" in capsys.readouterr().err
    assert evaluation_table.main([]) == 0
    assert page.read_text() == (evaluation_table.ROOT / "benchmarks" / "README.md").read_text()


def test_the_marks_must_be_there() -> None:
    assert replaced(f"a {BEGIN} old {END} z", "new") == f"a {BEGIN}\n\nnew\n\n{END} z"
    with pytest.raises(ValueError, match="once each"):
        replaced("nothing", "new")
