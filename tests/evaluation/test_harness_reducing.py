"""What is kept of the harness's results."""

import pytest

pytest.importorskip("lm_eval")

from beacon.evaluation.harness.keeping import document_name
from beacon.evaluation.harness.reducing import document_scores, reduced, suite_mean
from beacon.evaluation.harness.tasks import task_manager


def sample(document: str, scores: dict, kind: str = "none", doc: dict | None = None) -> dict:
    return {"filter": kind, "metrics": list(scores), "doc": {"id": document, **(doc or {})}, **scores}


def name_of(document: str, **doc: object) -> str:
    return document_name({"id": document, **doc})


def metric(value: float) -> dict:
    return {"value": value, "stderr": None}


def test_scores_are_told_by_document_where_the_metric_is_their_mean() -> None:
    samples = [
        sample("a", {"acc": 1, "f1": 0.5, "pair": (1, 2)}),
        sample("b", {"acc": 0, "f1": 0.25, "pair": (1, 2)}),
        sample("b", {"acc": 1, "f1": 0.75, "pair": (1, 2)}),
    ]
    metrics = {"acc": metric(2 / 3), "f1": metric(0.9), "pair": metric(1.5)}  # f1 is something else than a mean
    first, second = name_of("a"), name_of("b")
    assert document_scores(samples, metrics) == {"acc": {first: 1.0, second: 0.0, f"{second}-2": 1.0}}


def test_filters_are_part_of_a_metric() -> None:
    samples = [sample("a", {"exact": 1}, "strict"), sample("a", {"exact": 0}, "loose")]
    metrics = {"exact,strict": metric(1.0), "exact,loose": metric(0.0)}
    assert document_scores(samples, metrics) == {
        "exact,strict": {name_of("a"): 1.0},
        "exact,loose": {name_of("a"): 0.0},
    }


def test_documents_of_longbench_e_are_told_by_their_words() -> None:
    name, words = "longbench_qasper_e", (10, 3999, 4000, 7999, 8000, None)
    scores = (0.0, 1.0, 0.5, 0.5, 0.25, 1.0)
    samples = [
        sample(chr(97 + at), {"score": score}, doc={"length": length})
        for at, (score, length) in enumerate(zip(scores, words, strict=True))
    ]
    results = {
        "results": {name: {"score,none": sum(scores) / 6, "score_stderr,none": 0.1}},
        "samples": {name: samples},
        "n-samples": {name: {"effective": 6}},
        "n-shot": {},
        "versions": {},
    }
    report = reduced(results, {"": [name]}, task_manager())
    found = report["tasks"][name]["metrics"]
    assert list(found) == ["score", "score, 0-4k", "score, 4-8k", "score, 8k+"]
    assert [round(found[part]["value"], 6) for part in found] == [round(sum(scores) / 6, 6), 0.5, 0.5, 0.25]
    assert found["score, 0-4k"]["stderr"] == pytest.approx(0.5) and found["score, 8k+"]["stderr"] is None
    assert [found[part].get("documents") for part in found] == [None, 2, 2, 1]
    assert {part: len(some) for part, some in report["scores"][name].items()} == dict(
        zip(found, (6, 2, 2, 1), strict=True)
    )


def test_questions_about_one_context_are_told_by_their_names() -> None:
    samples = [sample(chr(97 + at), {"acc": 1}, doc={"context": text}) for at, text in enumerate("xxy")]
    first, second, third = document_scores(samples, {"acc": metric(1.0)})["acc"]
    assert first.partition(".")[0] == second.partition(".")[0] != third.partition(".")[0]
    assert [first, second, third] == [name_of(letter, context=text) for letter, text in zip("abc", "xxy")]
    assert len({name.partition(".")[2] for name in (first, second, third)}) == 3


@pytest.mark.parametrize("weighted, expected", [(True, 0.1), (False, 0.5)])
def test_parts_of_a_suite_weigh_by_their_own_documents(weighted: bool, expected: float) -> None:
    """Ten documents each, of which one and nine are short; a third task has none that is."""
    short = [{"value": value, "stderr": 0.1, "documents": count} for value, count in ((1.0, 1), (0.0, 9))]
    tasks = [{"documents": 10, "metrics": {"acc": metric(0.5), "acc, short": part}} for part in short]
    found = suite_mean([*tasks, {"documents": 10, "metrics": {"acc": metric(0.2), "f1": metric(1.0)}}], weighted)
    assert set(found["metrics"]) == {"acc", "acc, short"} and found["metrics"]["acc"]["value"] == pytest.approx(0.4)
    assert found["metrics"]["acc, short"]["value"] == pytest.approx(expected)
    assert found["metrics"]["acc, short"]["documents"] == 10
