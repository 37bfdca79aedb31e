"""A dialogue gives, turn by turn, what its method answers to a question after everything before it."""

import pytest
import torch

import beacon
from beacon.evaluation import (
    Beacon,
    BeaconPolicy,
    FineTuned,
    Method,
    RopeScaled,
    SlidingWindow,
    Stock,
    Truncated,
    TruncateLeft,
    TruncateMiddle,
)
from beacon.evaluation.failures import CannotRun
from beacon.evaluation.methods.dialogue import Reread
from beacon.evaluation.tasks import make_task
from tests.evaluation.tiny import CODE, tiny_llama
from tests.tiny_models import random_ids, tiny_model

NEW = 6
LIVE = [
    *(Stock(), Beacon(4), Beacon(0), Beacon((2, 8) * 20), SlidingWindow(16), SlidingWindow(7, 0), SlidingWindow(1, 9)),
    *(RopeScaled("linear", 4.0), RopeScaled("yarn", 2.0)),
]
ANEW = [
    *(Truncated(), TruncateLeft(), TruncateMiddle(), RopeScaled("linear"), RopeScaled("yarn")),
    *(RopeScaled("dynamic"), RopeScaled("dynamic", 4.0), BeaconPolicy("adaptive")),
]
# Text, then question and answer of each turn: lengths in tokens. One crosses windows (16), one is empty.
CUTS = [
    pytest.param([150, 7, 3, 1, 40, 5, 1], id="long text"),
    pytest.param([20, 5, 0, 9, 2, 0, 3], id="short text"),
    pytest.param([0, 2, 1, 0, 30, 4, 9], id="no text"),
    pytest.param([1, 1, 0, 1, 1, 70, 2], id="few sinks"),
]


def parts(cuts: list[int], vocab: int = 64) -> list[torch.Tensor]:
    return list(torch.randint(0, vocab, (sum(cuts),), generator=torch.Generator().manual_seed(7)).split(cuts))


def assert_answers_as_alone(method: Method, model, cuts: list[int], vocab: int = 64, **known) -> None:
    """Every turn: as the method's own answer after all before it, twice, with ends and without."""
    text, *turns = parts(cuts, vocab)
    dialogue, before = method.dialogue(model, **known), text
    dialogue.read(text)
    for question, answer in zip(turns[::2], turns[1::2]):
        if len(before) + len(question):
            (expected,) = method.answers(model, before, [question], NEW)
            assert len(expected) == NEW
            if not isinstance(dialogue, Reread):  # these two answer in the same way: `generate` reads it all at once
                assert Method.answers(method, model, before, [question], NEW) == [expected]
            assert dialogue.answer(question, NEW) == expected
            assert (
                dialogue.answer(question, NEW, [expected[2], 63])
                == method.answers(model, before, [question], NEW, [expected[2], 63])[0]
            )
            other = (question.tolist() or [5]) * 3
            assert dialogue.answer(other, NEW) == method.answers(model, before, [other], NEW)[0]
            assert dialogue.answer(question.tolist(), NEW) == expected  # it is as it was
        dialogue.read(question)
        dialogue.read(question[:0])
        dialogue.read(answer.tolist())
        before = torch.cat([before, question, answer])


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("method", LIVE + ANEW, ids=lambda method: f"{method.name}, {method}"[:60])
def test_every_turn_is_answered_as_by_itself(model, method, cuts) -> None:
    assert_answers_as_alone(method, model, cuts)


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen3", "phi3", "phi3-longrope", "granite", "olmo2"])
@pytest.mark.parametrize("method", [Stock(), Beacon(4)], ids=lambda method: method.name)
def test_every_family(name, method) -> None:
    model = beacon.wrap(tiny_model(name), beacon.BeaconConfig(window=32, ratios=(4,)))
    model.eval()
    assert_answers_as_alone(method, model, [100, 9, 20, 60, 30, 5, 5], vocab=96)


@pytest.mark.parametrize("method", LIVE, ids=lambda method: f"{method.name}, {method}"[:60])
def test_what_was_read_is_not_read_again(model, method, monkeypatch) -> None:
    text, first, second = random_ids(1, 150)[0] % 64, [1, 2, 3], [4, 5]
    dialogue = method.dialogue(model)
    dialogue.read(text)
    monkeypatch.setattr(type(method), "answers", lambda *_: pytest.fail("it began anew"))
    seen: list[int] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    for question in (first, second):
        dialogue.answer(question, 2)
        dialogue.read(question)
    handle.remove()
    assert sum(seen) < 40


@pytest.mark.parametrize("method", ANEW, ids=lambda method: f"{method.name}, {method}"[:60])
def test_others_begin_anew(model, method) -> None:
    assert isinstance(method.dialogue(model), Reread)


@pytest.mark.parametrize("method", [*LIVE, TruncateLeft()], ids=lambda method: f"{method.name}, {method}"[:60])
def test_nothing_to_read_is_refused(model, method) -> None:
    dialogue = method.dialogue(model)
    dialogue.read([])
    with pytest.raises(ValueError, match="context or question must have a token, got none in both"):
        dialogue.answer([], NEW)
    assert dialogue.answer([3, 4], 0) == []


@pytest.mark.parametrize("method", LIVE, ids=lambda method: f"{method.name}, {method}"[:60])
def test_no_gradients_are_kept(model, ids, method) -> None:
    seen = []
    dialogue = method.dialogue(model)
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    dialogue.read(ids)
    dialogue.answer([1, 2], 2)
    handle.remove()
    assert len(seen) >= 3 and not any(seen)


# -- ratios -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["adaptive", "fixed", "step-random", "instance-random", "sequence"])
def test_a_policy_goes_by_the_expected_length(ids, policy) -> None:
    """By the configured policy and by one that is named; their ratios are those of a text of that length."""
    config = beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8, ratio_policy="fixed")
    own = beacon.wrap(tiny_llama(), config.replace(ratio_policy=policy))
    other = beacon.wrap(tiny_llama(), config)
    ratios = BeaconPolicy(policy)._ratios(other, 190)
    made = [
        Beacon().dialogue(own, 190),
        BeaconPolicy(policy).dialogue(other, 190),
        Beacon(ratios).dialogue(other),
    ]
    answers = []
    for dialogue in made:
        for piece in ids.split([100, 30, 20]):
            dialogue.read(piece)
            answers.append(dialogue.answer([1, 2, 3], NEW))
    assert answers[:3] == answers[3:6] == answers[6:]
    assert not isinstance(made[1], Reread)
    if policy == "adaptive":  # else a short beginning is read in more detail than the rest allows
        short = Beacon().dialogue(own)
        short.read(ids[:20])
        long = Beacon().dialogue(own, 190)
        long.read(ids[:20])
        assert [list(d._cache.states[0].ratios) for d in (short, long)] == [[2], [ratios[0]]] != [[2], [2]]


def test_a_dialogue_longer_than_expected(ids) -> None:
    config = beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8, ratio_policy="fixed")
    model = beacon.wrap(tiny_llama(), config)
    dialogue = BeaconPolicy("adaptive").dialogue(model, 90)
    dialogue.read(ids[:80])
    with pytest.raises(ValueError, match="ratios must name every window"):
        dialogue.read(ids[80:])
    configured = Beacon().dialogue(model, 90)
    configured.read(ids)
    assert len(configured.answer([1], NEW)) == NEW


def test_retrieval_begins_anew_for_every_question(model, ids) -> None:
    pytest.importorskip("bm25s")
    method = BeaconPolicy("retrieval")
    dialogue = method.dialogue(model, 200)
    dialogue.read(ids)
    for question in (ids[30:38], ids[90:98]):
        assert [dialogue.answer(question, NEW)] == method.answers(model, ids, [question], NEW)


# -- another model ----------------------------------------------------------------------------------------------------


def test_a_fine_tuned_model_has_its_own(model, ids, tmp_path) -> None:
    other = tiny_llama(initializer_range=0.2)
    (whole,) = Stock().answers(other, ids, [[1, 2]], 12)
    at = next(number for number in range(2, 12) if whole[number] not in whole[:number])
    other.generation_config.eos_token_id = [62, whole[at]]
    other.save_pretrained(tmp_path / "other")
    method = FineTuned(tmp_path / "other")
    dialogue = method.dialogue(model)
    dialogue.read(ids)
    assert dialogue.answer([1, 2], 12) == whole
    assert dialogue.answer([1, 2], 12, [63]) == whole[:at]
    assert_answers_as_alone(method, model, [100, 9, 20, 60])
    with pytest.raises(CannotRun, match="nowhere cannot be loaded"):
        FineTuned(tmp_path / "nowhere").dialogue(model)


def test_what_is_loaded_is_loaded_before_time_is_measured(tokenizer, tmp_path, monkeypatch) -> None:
    model = beacon.wrap(tiny_llama(len(tokenizer)), beacon.BeaconConfig(window=16, ratios=(2, 4), reserve=8))
    (tmp_path / "code.py").write_text(CODE)
    events = []

    class Loading(Stock):
        def load(self, model) -> None:
            events.append("load")

        def dialogue(self, model, expected_length=None):
            events.append("dialogue")
            return super().dialogue(model, expected_length)

    monkeypatch.setattr("beacon.evaluation.tasks.multi_turn.now", lambda model: events.append("now") or 0.0)
    task = make_task("multi-turn", lengths=[500], turns=1, samples=1, data=tmp_path)
    list(task.run_series(Loading(), model, tokenizer, list(task.items(model, tokenizer))))
    assert events == ["load", "dialogue", "now", "now"]
