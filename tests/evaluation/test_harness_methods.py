"""Baselines in the evaluation harness: scored by what they read, answered by what they answer."""

import copy
from types import SimpleNamespace

import pytest
import torch

import beacon
from beacon.evaluation import Beacon, Method, Outcome, RopeScaled, Stock, TruncateMiddle, make_method
from beacon.evaluation.failures import CannotRun
from beacon.evaluation.harness import evaluate_tasks, methods
from beacon.evaluation.harness.language_model import beacon_lm
from beacon.evaluation.harness.tasks import task_manager
from tests.evaluation.test_harness_tasks import long_text, write, write_arc
from tests.evaluation.tiny import NATIVE, tiny_llama, word_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher:UserWarning")

NAMES = ["stock", "truncate-middle", "truncate-left", "sliding-window:16", "pi", "dynamic-ntk", "yarn:4"]


@pytest.fixture(scope="module")
def manager():
    return task_manager()


@pytest.fixture(autouse=True)
def _one_list_of_tasks_and_no_hub(monkeypatch, manager, tmp_path_factory):
    import datasets

    monkeypatch.setattr("beacon.evaluation.harness.running.task_manager", lambda: manager)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    config = beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8)
    return beacon.wrap(tiny_llama(320, num_hidden_layers=2), config)


def make(model, tokenizer, method):
    return beacon_lm()(model, tokenizer=copy.deepcopy(tokenizer), method=method)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


class Spy(Method):
    """Reads as another method and tells what it was given."""

    name = "spy"

    def __init__(self, method: Method) -> None:
        self.method, self.read_so_far, self.closed = method, [], 0

    def read(self, model, ids, keep, progress=None) -> Outcome:
        self.read_so_far.append((len(ids), keep))
        return self.method.read(model, ids, keep)

    def continue_text(self, model, ids, count):
        return self.method.continue_text(model, ids, count)

    def close(self, model):
        self.closed += 1


# -- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_what_is_read(model, tokenizer, name) -> None:
    lm, method = make(model, tokenizer, name), make_method(name, model)
    for context in (long_text(60), "def"):
        ((score, greedy),) = lm.loglikelihood(requests((context, " return value")), disable_tqdm=True)
        head, tail = lm._encode_pair(context, " return value")
        ids = torch.tensor([*head, *tail])
        scores = method.read(model, ids[:-1], len(tail)).logits.double().log_softmax(-1)
        assert score == pytest.approx(scores[torch.arange(len(tail)), ids[-len(tail) :]].sum().item(), abs=1e-4)
        assert greedy == bool((scores.argmax(-1) == ids[-len(tail) :]).all())


def test_greedy_continuations_are_told_from_others(model, tokenizer) -> None:
    lm = make(model, tokenizer, "truncate-left")
    context = tokenizer(long_text(60)).input_ids
    greedy = likeliest(model, context)
    other = [*greedy[:-1], (greedy[-1] + 1) % 320]
    scored = lm._loglikelihood_tokens([(None, context, greedy), (None, context, other), (None, context, [])], True)
    assert [flag for _, flag in scored] == [True, False, True] and scored[2][0] == 0.0


def test_the_baseline_stock_reads_everything(model, tokenizer) -> None:
    """As in tasks of our own; ``stock=True`` is the harness's way, which cuts."""
    baseline, cut = make(model, tokenizer, "stock"), beacon_lm()(model, tokenizer=copy.deepcopy(tokenizer), stock=True)
    context = long_text(60)
    ids = tokenizer(context).input_ids
    assert len(ids) > NATIVE and baseline.max_length > NATIVE == cut.max_length
    pair, asked = requests((context, " return value")), requests((context, {"until": [], "max_gen_toks": 8}))
    assert baseline.loglikelihood(pair, disable_tqdm=True) != cut.loglikelihood(pair, disable_tqdm=True)
    (tokens,) = Stock().answers(model, [], [ids], 8, baseline.ends)
    (end,) = Stock().answers(model, [], [ids[-(NATIVE - 8) :]], 8, baseline.ends)
    assert baseline.generate_until(asked, disable_tqdm=True) == [tokenizer.decode(tokens)]
    assert cut.generate_until(asked, disable_tqdm=True) == [tokenizer.decode(end)] != [tokenizer.decode(tokens)]


def likeliest(model, context) -> list[int]:
    """What the stock model finds likeliest token by token after the last tokens that fit."""
    answer: list[int] = []
    for _ in range(3):
        text = torch.tensor([*context, *answer])[-NATIVE:]
        answer.append(int(Stock().read(model, text, 1).logits.argmax()))
    return answer


def test_what_reads_the_same_is_read_once(model, tokenizer) -> None:
    spy = Spy(Stock())
    lm = make(model, tokenizer, spy)
    asked = [(None, [5, 6, 7], [number]) for number in range(8)] + [(None, [], [9]), (None, [5], [6, 7])]
    scored = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert spy.read_so_far == [(3, 1), (1, 1), (2, 2)] and len(scored) == 10
    assert sum(torch.tensor([score for score, _ in scored[:8]]).exp()) < 1


@pytest.mark.parametrize("name", ["stock", "truncate-left", "sliding-window:16"])
def test_documents_are_read_in_pieces(model, tokenizer, name) -> None:
    method = make_method(name, model)
    spy = Spy(method)
    text = long_text(80)
    ids = torch.tensor([0, *tokenizer(text).input_ids])
    (total,) = make(model, tokenizer, spy).loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    expected = 0.0
    for at in range(1, len(ids), NATIVE // 2):
        piece = ids[at : at + NATIVE // 2]
        logits = method.read(model, ids[: at + len(piece) - 1], len(piece)).logits.double().log_softmax(-1)
        expected += logits[torch.arange(len(piece)), piece].sum().item()
    assert total == pytest.approx(expected, abs=1e-3)
    assert sum(keep for _, keep in spy.read_so_far) == len(ids) - 1
    assert max(keep for _, keep in spy.read_so_far) == NATIVE // 2
    if name != "truncate-left":
        whole = method.read(model, ids[:-1], len(ids) - 1).logits.double().log_softmax(-1)
        assert total == pytest.approx(whole[torch.arange(len(ids) - 1), ids[1:]].sum().item(), abs=1e-2)


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_method(model, tokenizer, name) -> None:
    lm, context = make(model, tokenizer, name), long_text(60)
    ids = tokenizer(context).input_ids
    tokens = make_method(name, model).answers(model, ids, [[]], 8, lm.ends)[0]
    text = tokenizer.decode(tokens)
    asked = requests(*((context, {"until": [], "max_gen_toks": 8}) for _ in range(2)))
    assert lm.generate_until(asked, disable_tqdm=True) == [text, text]
    stop = text[len(text) // 2 :][:3]
    cut = lm.generate_until(requests((context, {"until": [stop], "max_gen_toks": 8})), disable_tqdm=True)
    assert cut == [text.split(stop)[0]]


@pytest.mark.parametrize(
    "settings", [{"do_sample": True, "temperature": 1.0}, {"num_beams": 2}, {"repetition_penalty": 1.3}]
)
def test_answers_are_greedy(model, tokenizer, settings) -> None:
    lm, neutral = make(model, tokenizer, "yarn"), {"until": [], "max_gen_toks": 3, "num_beams": 1, "top_p": 1.0}
    with pytest.raises(NotImplementedError, match=f"YaRN answers greedily, got {next(iter(settings))}="):
        lm.generate_until(requests(("def", {**neutral, **settings})), disable_tqdm=True)
    assert len(lm.generate_until(requests(("def", neutral)), disable_tqdm=True)) == 1


# -- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["truncate-middle", "sliding-window:16", TruncateMiddle()])
def test_a_task_of_choices(model, tokenizer, tmp_path, method) -> None:
    write_arc(tmp_path)
    report = evaluate_tasks(model, tokenizer, "arc", data=tmp_path, method=method)
    assert report["method"] == ("truncate-middle" if isinstance(method, Method) else method)
    assert report["ratios"] is None and report["suites"]["arc"]["documents"] == 5
    assert 0 <= report["tasks"]["arc_easy"]["metrics"]["acc"]["value"] <= 1


def test_a_task_of_answers(model, tokenizer, tmp_path, monkeypatch) -> None:
    rows = [
        {
            "question": "The needle is ?",
            "context": long_text(100, number),
            "answers": ["yes"],
            "length": 400,
            "dataset": "qasper",
            "language": "en",
            "all_classes": None,
        }
        for number in range(3)
    ]
    write(tmp_path / "LongBench" / "data" / "qasper.jsonl", rows)
    seen, closed = [], []
    inner = TruncateMiddle.answers
    monkeypatch.setattr(TruncateMiddle, "close", lambda self, model: closed.append(self))
    monkeypatch.setattr(
        TruncateMiddle,
        "answers",
        lambda self, model, context, *rest: seen.append(len(context)) or inner(self, model, context, *rest),
    )
    with pytest.raises(CannotRun, match="an answer of 128 tokens leaves no room to read in a native context of 64"):
        evaluate_tasks(model, tokenizer, "longbench_qasper", data=tmp_path, limit=2, method="truncate-middle")
    wide = beacon.wrap(tiny_llama(320, max_position_embeddings=256, num_hidden_layers=1), model.beacon_config)
    report = evaluate_tasks(wide, tokenizer, "longbench_qasper", data=tmp_path, limit=2, method="truncate-middle")
    assert set(report["tasks"]["longbench_qasper"]["metrics"]) == {"score", "qa_f1_score"}
    assert len(seen) == 3 and min(seen) > 256 and len(closed) == 2


def test_beacons_by_name_are_read_as_ever(model, tokenizer, tmp_path) -> None:
    write_arc(tmp_path)
    report = evaluate_tasks(model, tokenizer, "arc_easy", data=tmp_path, method="beacon:8")
    own = evaluate_tasks(model, tokenizer, "arc_easy", data=tmp_path, ratios=8)
    assert report["tasks"] == own["tasks"] and report["ratios"] == 8
    assert make(model, tokenizer, Beacon((8, 4))).ratios == [8, 4]


def test_a_method_that_is_given_stays_open(model, tokenizer, tmp_path) -> None:
    write_arc(tmp_path)
    spy = Spy(RopeScaled("yarn"))
    evaluate_tasks(model, tokenizer, "arc_easy", data=tmp_path, limit=1, method=spy)
    assert spy.read_so_far and not spy.closed


def test_what_does_not_go_together(model, tokenizer, tmp_path) -> None:
    write_arc(tmp_path)
    for settings in ({"stock": True}, {"ratios": 8}):
        with pytest.raises(ValueError, match="method says how texts are read, got stock="):
            evaluate_tasks(model, tokenizer, "arc_easy", data=tmp_path, method="yarn", **settings)
    with pytest.raises(ValueError, match="method must be one of beacon"):
        evaluate_tasks(model, tokenizer, "arc_easy", data=tmp_path, method="yarm")
    with pytest.raises(CannotRun, match="which the harness does not tell from the text"):
        evaluate_tasks(model, tokenizer, "arc_easy", data=tmp_path, method="beacon:retrieval")
    assert methods.MAX_LOGITS >= 320
