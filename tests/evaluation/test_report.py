"""Reports: tables, figures, the page in a browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from beacon.evaluation.report import summarise, write_report
from beacon.evaluation.report.looks import look, number
from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.report.tables import Cell, Table, conditions, every_place, markdown, matrix, problems, standard
from beacon.evaluation.results import Record, Results, TaskHead
from tests.evaluation.browser import find_browser, look_at
from tests.evaluation.fake_results import fake_results, made
from tests.evaluation.fake_suite import methods

matplotlib = pytest.importorskip("matplotlib")

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fake_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in write_report(folder)}


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, words",
    [(0, "0.000"), (1234.5, "1,234"), (12.345, "12.35"), (0.00012, "0.00012"), (2.5e7, "2.50e+07"), (math.inf, "∞")],
)
def test_numbers(value, words):
    assert number(value) == words


def test_metrics_have_labels_with_units():
    assert look("cache_bytes", [3e6]).label == "cache (MB)" and look("cache_bytes", [3e6]).write(3e6) == "3.00"
    assert look("first_token_seconds", [1.0]).label == "first token (s)"
    assert look("decode_tokens_per_second", [1.0]).label == "decode tokens/s"
    assert look("found", [0.0, 1.0]).write(0.333) == "33.3%"
    assert look("perplexity", [0.5]).write(0.5) == "0.500"
    assert look("f1", []).label == "f1"


def test_matrix_of_methods_by_length(folder):
    perplexity, needle, cost = summarise(Results(folder)).tasks
    table = matrix(needle, "accuracy")
    assert table.title == "accuracy (%) by tokens of text (higher is better)"
    assert table.head == ("method", "1,024", "4,096", "16,384", "all")
    assert [row[0].text for row in table.rows] == list(methods())
    assert table.rows[0][3].text == "cannot run" and "(12 of 18)" in table.rows[0][4].text
    assert re.fullmatch(r"\d+\.\d%", table.rows[2][4].text)  # of two texts
    written = matrix(perplexity, "perplexity").rows[2][4].text
    assert re.fullmatch(r"\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]", written)
    assert matrix(cost, "cache_bytes").head == ("method", "1,024", "4,096", "16,384")  # a mean of costs says nothing
    assert matrix(perplexity, "perplexity").rows[2][1].value == pytest.approx(
        math.exp(matrix(perplexity, "nll").rows[2][1].value)
    )
    lost = problems(needle)
    assert lost is not None
    wanted = ["stock", "length 16,384", "cannot run", "6", "16384 tokens exceed the 4096 that stock can read"]
    assert [cell.text for cell in lost.rows[0]] == wanted and len(lost.rows) == 1
    assert len(every_place(needle).rows) == 4 * 9 * 2


def test_items_that_have_not_run_are_told(tmp_path):
    place = {"length": 4}
    results = made(tmp_path, {"beacon": [("a", place, 1.0)], "stock": [("b", place, 0.0), ("a", place, 1.0)]})
    task = summarise(results).tasks[0]
    assert matrix(task, "accuracy").rows[0][-1].text == "100.0% (1 of 2)"
    assert matrix(task, "accuracy").title.endswith("accuracy (%), length 4 (higher is better)")
    lost = problems(task)
    assert lost is not None and lost.rows[0][2].text == "not run"


def test_items_without_a_metric_are_not_lost():
    """As later turns of a dialogue have no time of the first one."""
    places = [{"length": 4}] * 3
    scores = [{"first_turn_seconds": 2.0}, {"turn_seconds": 1.0}]
    records = [Record(item=str(at), place=places[at], status="ok", scores=some) for at, some in enumerate(scores)]
    records.append(Record(item="2", place=places[2], status="failed", reason="why"))
    metrics = {"first_turn_seconds": False, "turn_seconds": False}
    task = TaskSummary(
        TaskHead("talk", metrics, tuple((str(at), place) for at, place in enumerate(places))), {"m": records}
    )
    shown = [matrix(task, metric).rows[0][-1].text for metric in metrics]
    assert shown == ["2.00 (1 of 2)", "1.00 (1 of 2)"]


def test_words_part_a_task_or_name_columns(tmp_path):
    rows = [(f"{s} {n}", {"length": n, "source": s}, 0.5) for s in ("books", "code") for n in (8, 16)]
    summary = summarise(made(tmp_path / "a", {"beacon": rows}))
    assert [part.name for part in summary.parts] == ["needle, books", "needle, code"]
    assert matrix(summary.parts[0], "accuracy").head == ("method", "8", "16", "all")
    rows = [(s, {"task": s}, 0.5) for s in ("vt", "qa")]
    summary = summarise(made(tmp_path / "b", {"beacon": rows}))
    assert [part.name for part in summary.parts] == ["needle"]
    assert matrix(summary.parts[0], "accuracy").head == ("method", "vt", "qa", "all")
    assert {file.name for file in write_report(tmp_path / "b")} >= {"needle.png"}
    assert {file.name for file in write_report(tmp_path / "a")} >= {"needle%2C%20books.png", "needle%2C%20code.png"}


def test_conditions_are_those_of_all_starts(tmp_path):
    summary = summarise(made(tmp_path, {"beacon": [("a", {"length": 4}, 1.0)]}))
    start = json.loads(json.dumps(summary.run["starts"][0]))
    start["versions"]["torch"], start["machine"]["gpu"], start["machine"]["gpus"] = "3", "H200", 8
    table = conditions(Summary({**summary.run, "starts": [*summary.run["starts"] * 2, start]}, [], {}))
    rows = {row[0].text: row[1].text for row in table.rows}
    assert rows["machine"] == "some, 1 threads, 1 processes; 8 × H200, 1 threads, 1 processes"
    assert rows["versions"] == "torch 2; torch 3" and rows["commit"] == "000000000000 with changes"
    assert table.note.startswith("Starts differ in machine and versions")
    assert conditions(summary).note == ""


def test_markdown_escapes(folder):
    table = Table("t", ("a|b", "c"), ((Cell("x\ny"), Cell("|")),), "note")
    assert markdown(table) == "### t\n\n| a\\|b | c |\n| --- | ---: |\n| x y | \\| |\n\nnote\n"
    found = standard(summarise(Results(folder)))
    assert [table.title for table in found] == ["Suites (means over their tasks)", "Tasks", "What did not run"]
    assert [cell.text for cell in found[1].rows[0]] == ["arc_easy", "acc", "9", "0.500 ± 0.010", "0.500 ± 0.010"]


# -- files -------------------------------------------------------------------------------------------------------------


def test_report_files(written, folder):
    figures = {"perplexity.png", "needle.png", "needle-map.png", "cost.png"}
    assert set(written) == {"report.html", "report.md", "summary.json", *figures}
    assert all(written[name].read_bytes().startswith(PNG) for name in figures)
    text = written["report.md"].read_text()
    assert "![needle-map](figures/needle-map.png)" in text and "| beacon:8 |" in text and "cannot run" in text
    assert "options of needle | depths 0.0 0.5 1.0" in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (folder / name).is_file()
    numbers = json.loads(written["summary.json"].read_text(), parse_constant=lambda name: pytest.fail(name))
    groups = numbers["tasks"]["needle"]["groups"]
    assert len(groups) == 4 + 4 * 9 and groups[2]["method"] == "beacon" and groups[2]["metrics"]["accuracy"]["n"] == 18
    assert numbers["harness"]["beacon"]["suites"]["arc"]["documents"] == 9


def test_old_figures_are_removed(folder, written):
    (folder / "figures" / "old.png").write_bytes(PNG)
    write_report(folder)
    assert not (folder / "figures" / "old.png").exists()


def test_a_folder_where_nothing_ran_has_a_report(tmp_path):
    results = made(tmp_path, {"beacon": [("a", {"length": 4}, None)]})
    assert len(write_report(results.path)) == 3
    assert "too long" in (tmp_path / "report.html").read_text()


def test_infinite_perplexity_has_a_report(tmp_path):
    rows = [(f"{n} {s}", {"length": n}, math.inf if n == 16 else 9.0) for n in (8, 16) for s in range(2)]
    results = made(tmp_path, {"stock": rows, "beacon": rows[:2]}, {"perplexity": False})
    assert len(write_report(results.path)) == 4
    assert "∞" in (tmp_path / "report.md").read_text()


def test_page_stands_alone(written):
    text = written["report.html"].read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text) and "http" not in text and "@import" not in text
    assert "the tokenizer &lt;knows&gt; few words" in text


LOOK = """() => {
  const sorted = [];
  for (const table of document.querySelectorAll("table")) {
    table.closest("details")?.setAttribute("open", "");
    const rows = () => [...table.tBodies[0].rows].map(row => [...row.cells].map(
      cell => "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent));
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      for (const way of ["ascending", "descending"]) {
        head.querySelector("button").click();
        const values = rows().map(row => Number.isNaN(row[column]) ? "NaN" : row[column]);
        sorted.push({column, way, told: head.getAttribute("aria-sort"), values,
          marked: table.querySelectorAll("[aria-sort]").length});
      }
    });
  }
  return {
    figures: [...document.images].map(image => [image.naturalWidth, image.naturalHeight, image.clientWidth]),
    sorted, wide: document.documentElement.scrollWidth, window: innerWidth,
    asked: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    links: [...document.links].every(link => document.querySelector(link.hash)),
  };
}"""

browser = find_browser()
needs_browser = pytest.mark.skipif(browser is None, reason="no Chromium or Chrome here (Debian: apt install chromium)")


@needs_browser
@pytest.mark.parametrize("size", ["1200,900", "500,800"])  # narrower windows than 500 Chromium does not open
def test_page_in_a_browser(written, tmp_path, size):
    found = look_at(browser, written["report.html"], LOOK, tmp_path, f"--window-size={size}")
    assert found["wrong"] == [] and found["console"] == []
    seen = found["seen"]
    assert seen["asked"] == [] and seen["links"]
    assert len(seen["figures"]) == 4
    assert all(width > 0 and height > 0 and shown > 300 for width, height, shown in seen["figures"])
    assert seen["wide"] <= seen["window"]  # wide tables and figures scroll by themselves
    assert len(seen["sorted"]) > 100
    for one in seen["sorted"]:
        assert one["told"] == one["way"] and one["marked"] == 1
        numbers = [value for value in one["values"] if isinstance(value, (int, float))]
        assert numbers == sorted(numbers, reverse=one["way"] == "descending")
        if "NaN" in one["values"] and numbers:
            assert set(one["values"][one["values"].index("NaN") :]) == {"NaN"}  # last, whichever way


@needs_browser
def test_the_browser_tells_of_mistakes(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<html><head></head><body><img src="missing.png"><script>oops()</script></body></html>')
    found = look_at(browser, page, "() => 3", tmp_path)
    assert found["seen"] == 3 and found["console"]
    assert any("oops" in message for message in found["wrong"])
    assert any("missing.png" in message for message in found["wrong"])
