"""Reports: means with intervals, tables, figures, the page in a browser, two folders compared."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from beacon.evaluation.report import compare, estimate, paired, summarise, write_report
from beacon.evaluation.report.looks import look, number
from beacon.evaluation.report.statistics import holm, normal
from beacon.evaluation.report.summary import Summary, TaskSummary
from beacon.evaluation.report.tables import Cell, Table, conditions, every_place, markdown, matrix, problems, standard
from beacon.evaluation.results import Record, Results, TaskHead
from beacon.evaluation.running import run_suite
from tests.evaluation.browser import find_browser, look_at
from tests.evaluation.fake_suite import FakeMethod, FakeNeedle, fake_model, methods, tasks

matplotlib = pytest.importorskip("matplotlib")

PNG = b"\x89PNG"
MEASURED = {"metrics": {"acc": {"value": 0.5, "stderr": 0.01}, "gone|": {"value": 1.0, "stderr": None}}, "documents": 9}
REFUSED = {"metrics": {}, "documents": 0, "status": "cannot-run", "reason": "the tokenizer <knows> few words"}
SUITE = {**MEASURED, "tasks": 1, "members": ["arc_easy"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results of fakes, with what the harness measured beside them."""
    path = tmp_path_factory.mktemp("results")
    run_suite(fake_model(), None, tasks(), methods(), path, options={"needle": {"depths": [0.0, 0.5, 1.0]}})
    entries = {"tasks": {"arc_easy": MEASURED, "niah": REFUSED}, "suites": {"arc": SUITE}}
    Results(path).add_harness("beacon", {"harness": "0.4", **entries})
    Results(path).add_harness("stock", {"harness": "0.4", "tasks": {"arc_easy": MEASURED}, "suites": {}})
    return path


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in write_report(folder)}


def made(folder: Path, rows: dict[str, list[tuple[str, dict[str, Any], float | None]]], metrics=None) -> Results:
    """Results with these scores: by method, items with place and score (None: cannot run)."""
    results = Results(folder)
    items = {name: place for records in rows.values() for name, place, _ in records}
    head = TaskHead("needle", metrics or {"accuracy": True}, tuple(items.items()), {name: name for name in items})
    settings = {"model": {"weights": "a"}, "config": {"window": 16}, "seed": 0, "dtype": "float32", "device": "cpu"}
    machine = {"cpu": "some", "cores": 2, "threads": 1, "gpu": None, "gpus": 0}
    start = {"utc": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2", "triton": None}, "commit": "0" * 40}
    start |= {"dirty": True, "machine": machine, "processes": 1}
    results.begin(settings, {}, start, [head], list(rows))
    for method, records in rows.items():
        for name, place, score in records:
            scores = {} if score is None else {next(iter(head.metrics)): score}
            status, reason = ("cannot-run", "too long") if score is None else ("ok", None)
            line = Record(item=name, place=place, status=status, scores=scores, reason=reason, seconds=1.0)
            results.append("needle", method, line)
    return results


# -- statistics --------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_mean_of_as_many_draws_as_they_say():
    import numpy as np

    random = np.random.default_rng(5)
    draws = random.normal(3, 2, size=(200, 40))
    found = [estimate(list(draw)) for draw in draws]
    assert all(one.low < one.value < one.high for one in found)
    inside = sum(one.low <= 3 <= one.high for one in found)
    assert 178 <= inside <= 198  # 95 % of 200 are 190, with a standard error of 3; the bootstrap is a little narrow


def test_estimates_of_few_or_no_items():
    assert math.isnan(estimate([]).value) and estimate([]).n == 0
    assert estimate([2.0]).value == 2 and estimate([2.0]).low is None
    assert estimate([1.0, math.inf]).value == math.inf and estimate([1.0, math.inf]).low is None
    assert estimate([4.0, 9.0], geometric=True).value == pytest.approx(6)
    assert estimate([1.0, 2.0, 4.0]) == estimate([1.0, 2.0, 4.0])


def test_pairs_tell_what_unpaired_items_could_not():
    import numpy as np

    before = np.random.default_rng(0).normal(0, 10, 60)
    found = paired(list(before), list(before + 1))
    assert found.p < 0.002 and found.low == pytest.approx(1) and found.high == pytest.approx(1)
    noise = np.random.default_rng(1).normal(0, 1, 60)
    assert paired(list(before), list(before + noise - noise.mean())).p > 0.5


@pytest.mark.parametrize("count, least", [(1, 1.0), (2, 0.5), (5, 0.0625)])
def test_few_pairs_are_never_sure(count, least):
    assert paired([0.0] * count, [1.0] * count).p == least


def test_many_comparisons_leave_room_for_a_clear_change():
    import numpy as np

    changes = np.random.default_rng(0).normal(1, 1, 80)
    clear = paired([0.0] * 80, list(changes)).p
    assert 0 < clear < 1e-9  # 4,000 resamples alone would say 0.0005
    assert holm([clear, *[0.5] * 1000])[0] < 0.05
    assert paired([0.0] * 20, [1.0] * 20).p == 2 / 2**20


def test_pairs_with_infinities():
    same = paired([math.inf, 1.0], [math.inf, 1.0])
    assert same.p == 1
    worse = paired([1.0] * 8, [math.inf] * 8, geometric=True)
    assert worse.p == pytest.approx(2 / 2**8) and worse.low is None and worse.after == math.inf
    with pytest.raises(ValueError, match="pairs need two numbers"):
        paired([], [])


@given(strategies.lists(strategies.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_is_no_smaller(probabilities):
    found = holm(probabilities)
    assert all(0 <= p <= q <= 1 for p, q in zip(probabilities, found, strict=True))
    assert sorted(range(len(found)), key=lambda at: (probabilities[at], at)) == sorted(
        range(len(found)), key=lambda at: (found[at], probabilities[at], at)
    )
    assert min(found) == pytest.approx(min(1, len(found) * min(probabilities)))


def test_normal():
    assert normal(0.5, 0.5 + 1.959964 * 0.1, 0.1, (9, 9)).p == pytest.approx(0.05, abs=1e-6)
    assert normal(20.0, 30.0, None, (9, 9)).p == 1  # no shares, so nothing tells how sure they are


@pytest.mark.parametrize("error", [0.0, None])
def test_shares_without_an_error_have_that_of_both_together(error):
    assert 2 / math.comb(40, 20) <= normal(1.0, 0.0, error, (20, 20)).p < 1e-9  # no less than Fisher's exact test
    assert normal(1.0, 0.0, error, (4, 4)).p == 2 / math.comb(8, 4)
    found = normal(0.9, 0.6, error, (100, 300))
    assert found.high - found.low == pytest.approx(2 * 1.959964 * math.sqrt(0.675 * 0.325 * (1 / 100 + 1 / 300)))
    assert normal(1.0, 0.0, error, (1, 1)).p == 1 and normal(1.0, 0.0, error, (3, 3)).p > 0.05
    assert normal(1.0, 1.0, error, (20, 20)).p == 1 and normal(1.0, 0.0, error, (0, 20)).p == 1


def test_items_of_one_document_are_no_more_sure_than_one():
    import numpy as np

    random, documents = np.random.default_rng(3), np.repeat(np.arange(8), 3)
    draws = [
        math.sqrt(0.95) * random.normal(size=8)[documents] + math.sqrt(0.05) * random.normal(size=24)
        for _ in range(200)
    ]
    names = [f"document {at}" for at in range(8) for _ in range(3)]
    false = sum(paired([0.0] * 24, list(draw), clusters=names).p < 0.05 for draw in draws)
    assert 0 < false < 0.15 * 200
    assert sum(paired([0.0] * 24, list(draw)).p < 0.05 for draw in draws) > 0.25 * 200  # as if independent
    found = [estimate(list(draw), clusters=names) for draw in draws]
    assert sum(one.low <= 0 <= one.high for one in found) > 0.85 * 200
    assert all(one.n == 24 for one in found)


def test_clusters_of_different_sizes():
    values, names = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    found = estimate(values, clusters=names)
    assert found.value == 2 and found.low is None  # two clusters say nothing of the others
    many = estimate([1.0, 1.0, *range(1, 6)], clusters=["a", "a", *"bcdef"])
    assert many.low < many.value < many.high
    assert paired([0.0] * 4, values, clusters=names).p == 0.5  # the sign test's, of two
    assert paired([0.0] * 20, [1.0] * 20, clusters=[at % 5 for at in range(20)]).p == 0.0625
    assert paired([1.0] * 4, [math.inf] * 4, clusters=names).p == 0.5


@pytest.mark.parametrize("count, t, p", [(6, 2.5706, 0.05), (7, 2.4469, 0.05), (8, 5.4079, 0.001), (41, 2.7045, 0.01)])
def test_few_clusters_need_as_much_as_students_t(count, t, p):
    import numpy as np

    from beacon.evaluation.report.statistics import _student

    numbers = np.random.default_rng(0).normal(size=count)
    numbers = (numbers - numbers.mean()) / numbers.std(ddof=1) * math.sqrt(count) + t
    assert _student(numbers, np.ones(count)) == pytest.approx(p, rel=1e-3)
    assert paired([0.0] * count, list(numbers)).p >= p * 0.999


@settings(max_examples=30, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.floats(-5, 5), strategies.floats(-5, 5)), min_size=1, max_size=30))
def test_comparing_the_other_way_round_gives_the_reverse(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    there, back = paired(first, second), paired(second, first)
    assert there.p == pytest.approx(back.p, abs=0.002) and (there.before, there.after) == (back.after, back.before)
    assert there.low == pytest.approx(-back.high, abs=1e-9)


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
    assert [cell.text for cell in found[1].rows[0]] == ["arc_easy", "acc", "0.500 ± 0.010", "0.500 ± 0.010"]


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


# -- comparing ---------------------------------------------------------------------------------------------------------


def series(values: list[float | None], length: int = 4) -> list[tuple[str, dict[str, Any], float | None]]:
    return [(f"length {length}, {at}", {"length": length}, value) for at, value in enumerate(values)]


def compared(tmp_path: Path, before: Any, after: Any, metrics=None, **options: Any) -> Any:
    for name, values in (("before", before), ("after", after)):
        made(tmp_path / name, {"beacon": values}, metrics)
    return compare(summarise(Results(tmp_path / "before")), summarise(Results(tmp_path / "after")), **options)


def test_the_same_is_no_change(folder):
    summary = summarise(Results(folder))
    found = compare(summary, summary)
    assert not found.regressed and not found.losses and not found.only and not found.settings
    assert (
        len(found.overall) == 4 * (3 + 2 + 3) + 2 + 2
    )  # the suite, whose task is not told again, and the task of stock
    assert all(change.moved == 0 and change.p == 1 for change in [*found.overall, *found.places])


@pytest.mark.parametrize("higher", [True, False])
def test_direction_is_the_metrics(tmp_path, higher):
    found = compared(tmp_path, series([0.2] * 20), series([0.8] * 20), {"score": higher})
    assert found.overall[0].moved == (1 if higher else -1)
    assert found.regressed is not higher


def test_few_items_or_small_changes_are_no_regression(tmp_path):
    assert not compared(tmp_path / "few", series([1.0] * 4), series([0.0] * 4)).regressed
    assert not compared(tmp_path / "small", series([1.0] * 40), series([0.995] * 40)).regressed
    assert compared(tmp_path / "low", series([1.0] * 40), series([0.995] * 40), threshold=0.001).regressed
    assert compared(tmp_path / "zero", series([0.0] * 40), series([0.1] * 40)).overall[0].moved == 1


def test_perplexities_are_compared_by_their_factor(tmp_path):
    found = compared(tmp_path, series([10.0, 20.0] * 10), series([11.0, 22.0] * 10), {"perplexity": False})
    change = found.overall[0]
    assert change.geometric and change.difference.low == pytest.approx(1.1) and found.regressed
    assert change.difference.before == pytest.approx(math.sqrt(200))


def test_items_that_are_lost_are_a_regression(tmp_path):
    found = compared(tmp_path / "lost", series([1.0] * 9), series([1.0] * 8 + [None]))
    assert found.regressed and (found.losses[0].lost, found.losses[0].reason) == (1, "too long")
    found = compared(tmp_path / "gained", series([1.0] * 8 + [None]), series([1.0] * 9))
    assert not found.regressed and found.losses[0].gained == 1
    everything = compared(tmp_path / "all", series([1.0] * 3), series([None] * 3))
    assert everything.regressed and not everything.overall


def test_places_are_told_but_do_not_count(tmp_path):
    before = [*series([1.0] * 40, 4), *series([0.0] * 40, 8)]
    after = [*series([0.0] * 40, 4), *series([1.0] * 40, 8)]
    found = compared(tmp_path, before, after)
    assert not found.regressed and [change.moved for change in found.places] == [-1, 1]
    assert [change.place for change in found.places] == [{"length": 4}, {"length": 8}]


def test_only_common_items_are_compared(tmp_path):
    found = compared(tmp_path, series([1.0] * 3), series([1.0] * 5))
    assert found.overall[0].difference.n == 3
    with pytest.raises(ValueError, match="items in common"):
        compared(tmp_path / "none", series([1.0] * 3, 4), series([1.0] * 3, 8))
    with pytest.raises(ValueError, match="share of at least 0"):
        compared(tmp_path / "bad", series([1.0]), series([1.0]), threshold=-1)


def test_a_real_change_is_found_among_fakes(folder, tmp_path):
    worse = {**methods(), "beacon": FakeMethod("beacon", 0.3)}
    del worse["beacon:8"]
    model = fake_model()
    for name, chosen in (("before", methods()), ("after", worse)):
        run_suite(model, None, [FakeNeedle(samples=10)], chosen, tmp_path / name)
    found = compare(summarise(Results(tmp_path / "before")), summarise(Results(tmp_path / "after")))
    moved = {(change.method, change.metric): change.moved for change in found.overall}
    assert moved == {
        (m, s): -(m == "beacon") for m in ("stock", "sliding-window", "beacon") for s in ("accuracy", "f1")
    }
    assert found.only == ["needle, beacon:8: in the first only"]
    assert [(loss.method, loss.lost) for loss in found.losses] == [("beacon:8", 90)]
    assert [change.metric for change in found.overall if change.decides] == ["accuracy"] * 3


def test_standard_tasks_are_compared_by_their_errors(folder, tmp_path):
    before = summarise(Results(folder))
    changed = json.loads(json.dumps(before.harness))
    changed["beacon"]["suites"]["arc"]["metrics"]["acc"]["value"] = 0.3
    after = type(before)(before.run, before.tasks, changed)
    found = compare(before, after)
    assert [(change.task, change.metric, change.moved) for change in found.overall if change.moved] == [
        ("arc", "acc", -1)
    ]
    assert found.regressed


def test_standard_tasks_that_were_all_right_and_are_all_wrong(folder):
    before = summarise(Results(folder))
    sides = []
    for value in (1.0, 0.0):
        harness = json.loads(json.dumps(before.harness))
        harness["stock"]["tasks"]["arc_easy"]["metrics"]["acc"] = {"value": value, "stderr": 0.0}
        sides.append(Summary(before.run, before.tasks, harness))
    found = compare(*sides)
    assert [(change.task, change.method) for change in found.worse] == [("arc_easy", "stock")] and found.regressed
    assert compare(*reversed(sides)).better and not compare(*reversed(sides)).regressed


def test_standard_tasks_that_vanish_are_a_regression(folder):
    before = summarise(Results(folder))

    def after(change: Any) -> Any:
        harness = json.loads(json.dumps(before.harness))
        change(harness)
        found = compare(before, Summary(before.run, before.tasks, harness))
        assert found.regressed
        return [(loss.task, loss.method, loss.lost, loss.reason) for loss in found.losses]

    failed = {"metrics": {}, "documents": 0, "status": "failed", "reason": "KeyError: oops"}
    told = after(lambda harness: harness["beacon"]["tasks"].update(arc_easy=failed))
    assert told == [("arc_easy", "beacon", 9, "KeyError: oops")]
    assert after(lambda harness: harness["stock"]["tasks"].clear()) == [
        ("arc_easy", "stock", 9, "the second folder has no such task")
    ]
    assert after(lambda harness: harness.pop("stock")) == [
        ("arc_easy", "stock", 9, "the second folder has no such method")
    ]
    told = after(lambda harness: harness["stock"]["tasks"]["arc_easy"].update(documents=4))
    assert told == [("arc_easy", "stock", 5, "the second folder has fewer documents")]


def test_what_vanishes_is_a_regression(tmp_path):
    both = {"beacon": series([1.0] * 3), "stock": series([1.0] * 3)}
    before = summarise(made(tmp_path / "before", both))
    only = compare(before, summarise(made(tmp_path / "method", {"beacon": both["beacon"]})))
    assert only.regressed and [(loss.method, loss.lost) for loss in only.losses] == [("stock", 3)]
    fewer = compare(before, summarise(made(tmp_path / "items", {name: rows[:2] for name, rows in both.items()})))
    assert fewer.regressed and [(loss.method, loss.lost) for loss in fewer.losses] == [("beacon", 1), ("stock", 1)]
    assert fewer.losses[0].reason == "not among the items of the second folder"
    (task,) = before.tasks
    other = TaskSummary(TaskHead("passkey", task.head.metrics, task.head.items), task.records)
    gone = compare(Summary(before.run, [task, other], {}), before)
    assert gone.regressed and [(loss.task, loss.lost) for loss in gone.losses] == [("passkey", 3)] * 2
    assert not compare(before, Summary(before.run, [task, other], {})).regressed
    infinite = compared(tmp_path / "inf", series([9.0] * 3), series([9.0, 9.0, math.inf]), {"perplexity": False})
    assert infinite.regressed and infinite.losses[0].reason == "perplexity inf"


COSTS = ("read_seconds", "read_tokens_per_second", "first_token_seconds", "decode_tokens_per_second", "cache_bytes")
METHODS = ("stock", "truncate-left", "sliding-window", "beacon", "beacon:8")  # those of `beacon eval`
GRID = [
    (length, sample, depth) for length in (1024, 4096) for sample in (0, 1) for depth in (0.05, 0.25, 0.5, 0.75, 0.95)
]


def usual(run: Any, needle: Any = lambda at: 1.0, perplexity: Any = lambda document: 1.0) -> Summary:
    """What `beacon eval` makes: its tasks, methods and items. Those given are of the method beacon."""
    import random

    found = []
    hidden = [
        (f"length {n}, depth {d}, sample {s}", {"length": n, "depth": d}, f"stretch, {s}, {d}") for n, s, d in GRID
    ]
    texts = [
        (f"python-library, document {at}, length {n}", {"length": n, "source": "python-library"}, f"document {at}")
        for at in range(8)
        for n in (1024, 4096)
    ]
    lengths = [(f"length {n}, sample 0", {"length": n}, "stretch 0") for n in (1024, 4096)]
    for name, metrics, items in (
        ("perplexity", {"perplexity": False, "nll": False}, texts),
        ("passkey", {"found": True, "digits": True}, hidden),
        ("needle", {"found": True}, hidden),
        ("cost", {metric: "per" in metric for metric in (*COSTS, "peak_bytes")}, lengths),
    ):
        records = {}
        for method in METHODS:
            drawn = random.Random(f"{name}, {method}")
            records[method] = []
            for at, (item, place, _) in enumerate(items):
                value = needle(at) if (name, method) == ("needle", "beacon") else 1.0
                if name == "perplexity":
                    value = 9 * (perplexity(at // 2) if method == "beacon" else 1.0) * drawn.uniform(0.8, 1.2)
                scores = {metric: math.log(value) if metric == "nll" else value for metric in metrics}
                records[method].append(Record(item=item, place=place, status="ok", scores=scores))
        clusters = {item: text for item, _, text in items}
        head = TaskHead(name, metrics, tuple((item, place) for item, place, _ in items), clusters)
        found.append(TaskSummary(head, records))
    return Summary(run, found, {})


RUN = {"settings": {}, "methods": list(METHODS), "starts": []}


@pytest.mark.parametrize("falls", [lambda at: at >= 10, lambda at: (at + at // 10) % 2 == 0])
def test_a_large_fall_is_found_in_a_table_of_the_usual_size(falls):
    """At one length, or on every text at one length of two."""
    before, after = usual(RUN), usual(RUN, needle=lambda at: float(not falls(at)))
    found = compare(before, after)
    assert len(found.overall) == 55
    decides = {(change.task, change.metric) for change in found.overall if change.decides}
    assert decides == {("perplexity", "perplexity"), ("passkey", "found"), ("needle", "found")}
    (worse,) = found.worse
    assert (worse.task, worse.method) == ("needle", "beacon") and found.regressed
    assert worse.difference.after == 0.5 and worse.difference.clusters == 10
    assert not compare(after, before).regressed and compare(after, before).better


@pytest.mark.parametrize("falls", [lambda at: at % 10 == 3, lambda at: GRID[at][2] == 0.5, lambda at: GRID[at][1] == 0])
def test_a_fall_on_some_texts_is_not_sure(falls):
    found = compare(usual(RUN), usual(RUN, needle=lambda at: float(not falls(at))))
    assert [change.difference.after < 1 for change in found.overall if change.task == "needle"].count(True) == 1
    assert not found.regressed


def few(summary: Summary, count: int, told: bool = True) -> Summary:
    """Needles on so many texts."""
    (task,) = (task for task in summary.tasks if task.name == "needle")
    head = task.head
    texts = {name: f"text {at % count}" for at, (name, _) in enumerate(head.items)} if told else {}
    return Summary(summary.run, [TaskSummary(TaskHead(head.name, head.metrics, head.items, texts), task.records)], {})


@pytest.mark.parametrize("count, decides", [(2, False), (5, False), (6, True)])
def test_fewer_than_six_texts_never_decide(count, decides):
    before, after = (few(usual(RUN, needle=lambda at, here=here: here), count) for here in (1.0, 0.0))
    found = compare(before, after)
    assert {change.decides for change in found.overall} == {decides} and not found.worse
    (fallen,) = (change for change in found.overall if change.difference.after < change.difference.before)
    assert fallen.difference.clusters == count and fallen.difference.p == 2 * 0.5**count
    (group,) = (group for group in before.tasks[0].groups() if group.method == "beacon")
    assert (group.metrics["found"].low is not None) == decides


def test_folders_that_tell_no_texts():
    """All items may then be of one text, so nothing is sure; nor where one folder alone tells."""
    before, after = (usual(RUN, needle=lambda at, here=here: here) for here in (1.0, 0.0))
    for first, second in ((False, False), (True, False), (False, True)):
        found = compare(few(before, 20, first), few(after, 20, second))
        assert {change.difference.clusters for change in found.overall} == {1}
        assert not any(change.decides for change in found.overall)
    assert {c.difference.clusters for c in compare(few(before, 20), few(after, 20)).overall} == {20}
    (group,) = (group for group in few(before, 20, False).tasks[0].groups() if group.method == "beacon")
    assert group.metrics["found"].low is None


def test_a_perplexity_that_rises_is_found_in_a_table_of_the_usual_size():
    before = usual(RUN)
    found = compare(before, usual(RUN, perplexity=lambda document: 1.3 + 0.05 * document))
    assert [(change.task, change.metric, change.method) for change in found.worse] == [
        ("perplexity", "perplexity", "beacon")
    ]
    assert [change.moved for change in found.overall if change.metric == "nll"] == [0, 0, 0, -1, 0]  # told, uncounted
    assert not compare(before, usual(RUN, perplexity=lambda document: 1.3 if document == 4 else 1.0)).regressed


def test_tasks_of_other_options_do_not_decide():
    before, after = usual(RUN), usual(RUN, needle=lambda at: 0.0)
    sides = []
    for summary, samples, ratio in ((before, 2, 4), (after, 3, 4)):
        options = {
            "needle": {"samples": samples},
            "passkey": {},
            "beacon:8": {"ratio": ratio},
            "topics": {"n": samples},
        }
        sides.append(Summary({**RUN, "options": options}, summary.tasks, {}))
    found = compare(*sides)
    assert found.options == ["needle.samples 2 (now 3)"] and not found.regressed  # no topics were measured
    assert [change.moved for change in found.overall if change.task == "needle"] == [0, 0, 0, -1, 0]
    assert {change.task for change in found.overall if change.decides} == {"perplexity", "passkey"}
    more = compare(sides[0], Summary({**RUN, "options": {"beacon:8": {"ratio": 8}}}, after.tasks, {}))
    assert more.options == ["beacon:8.ratio 4 (now 8)", "needle.samples 2 (now absent)"]


def test_standard_tasks_of_other_options_do_not_decide(folder):
    before = summarise(Results(folder))
    harness = json.loads(json.dumps(before.harness))
    harness["beacon"]["suites"]["arc"]["metrics"]["acc"]["value"] = 0.3
    found = compare(before, Summary({**before.run, "options": {"harness": {"num_fewshot": 5}}}, before.tasks, harness))
    assert "harness.num_fewshot absent (now 5)" in found.options and not found.worse
