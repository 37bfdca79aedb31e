"""Each method answers what a plain ``generate`` of what it claims to read gives, shared readings change nothing."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import beacon
from beacon.evaluation import (
    METHODS,
    Beacon,
    BeaconPolicy,
    FineTuned,
    KVPress,
    Method,
    RopeScaled,
    SlidingWindow,
    Stock,
    Truncated,
    TruncateLeft,
    TruncateMiddle,
    check_method,
    make_method,
    measure_perplexity,
    method_form,
)
from beacon.evaluation.failures import CannotRun
from tests.evaluation.test_rope_scaling import ROPE
from tests.evaluation.test_sliding_window import by_definition
from tests.evaluation.tiny import NATIVE, tiny_llama
from tests.tiny_models import random_ids, tiny_model

NEW = 6
POLICIES = ("fixed", "step-random", "instance-random", "sequence", "adaptive")


@pytest.fixture
def questions():
    return list(torch.randint(0, 64, (21,), generator=torch.Generator().manual_seed(5)).split([7, 1, 13]))


def generated(stock, ids, count=NEW, **settings) -> list[int]:
    """By Hugging Face, nothing ends it."""
    stock.generation_config.eos_token_id = None
    out = stock.generate(ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=count, **settings)
    return out[0, len(ids) :].tolist()


def assert_shared_as_alone(method, model, context, questions, **settings) -> None:
    together = method.answers(model, context, questions, NEW, **settings)
    assert together == [method.answers(model, context, [q], NEW, **settings)[0] for q in questions]


def calls(monkeypatch, owner, name) -> list[int]:
    """Tokens of every call of a method."""
    seen, inner = [], getattr(owner, name)

    def counted(ids, *args, **kwargs):
        seen.append(ids.shape[-1])
        return inner(ids, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return seen


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 40, 150])
def test_stock_reads_everything(model, ids, questions, length) -> None:
    expected = [generated(tiny_llama(), torch.cat([ids[:length], q])) for q in questions]
    assert Stock().answers(model, ids[:length], questions, NEW) == expected
    assert_shared_as_alone(Stock(), model, ids[:length], questions)


@pytest.mark.parametrize("name", ["mistral-sliding", "phi3", "granite", "qwen3", "olmo2"])
def test_stock_reads_a_context_once_in_every_family(name) -> None:
    config = beacon.BeaconConfig(window=32, ratios=(4,))
    ids, asked = random_ids(1, 300)[0], list(random_ids(2, 9, seed=1))
    model = beacon.wrap(tiny_model(name), config)
    expected = [generated(tiny_model(name), torch.cat([ids, q])) for q in asked]
    assert Stock().answers(model, ids, asked, NEW) == expected


@pytest.mark.parametrize("length", [30, 150])
def test_truncation_keeps_what_it_says(model, ids, questions, length) -> None:
    limit = NATIVE - NEW
    texts = [torch.cat([ids[:length], q]) for q in questions]
    left = [text[-limit:] for text in texts]
    middle = [text if len(text) <= limit else torch.cat([text[: limit // 2], text[-(limit // 2) :]]) for text in texts]
    for method, read in ((TruncateLeft(), left), (Truncated(), left), (TruncateMiddle(), middle)):
        expected = [generated(tiny_llama(), text) for text in read]
        assert method.answers(model, ids[:length], questions, NEW) == expected
        assert_shared_as_alone(method, model, ids[:length], questions)
        assert method.continue_text(model, texts[0], NEW) == expected[0]


def test_truncation_reads_targets_where_they_are(model, ids) -> None:
    whole, half = Stock().read(model, ids[-NATIVE:], 20), NATIVE // 2
    assert torch.equal(TruncateLeft().read(model, ids, 20).logits, whole.logits)
    both = Stock().read(model, torch.cat([ids[:half], ids[-half:]]), 20)
    outcome = TruncateMiddle().read(model, ids, 20)
    assert torch.equal(outcome.logits, both.logits) and outcome.entries == NATIVE
    assert torch.equal(TruncateMiddle().read(model, ids[:40], 40).logits, Stock().read(model, ids[:40], 40).logits)
    assert measure_perplexity(model, [ids], 150, 30, TruncateMiddle()).entries == NATIVE


def test_truncation_keeps_what_opens_a_text(ids) -> None:
    class Opening:
        """Puts two tokens before a text, and six before what a user says."""

        chat_template = "{{ messages }}"

        def __call__(self, text, add_special_tokens=True, **kwargs):
            return {"input_ids": [0, 61, *map(ord, text)] if add_special_tokens else [*map(ord, text)]}

        def apply_chat_template(self, talk, **kwargs):
            return "\x00=+-*/" + "|".join(turn["content"] for turn in talk) + "|"

    body = ids.clamp(min=1)  # 0 is the beginning of sequence
    model = beacon.wrap(tiny_llama(eos_token_id=63), beacon.BeaconConfig(window=16, ratios=(2, 4), reserve=8))
    known, alone = TruncateLeft(Opening()), TruncateLeft()
    assert known == alone
    for method, before in (
        (alone, [0]),
        (alone, []),
        (known, [0]),
        (known, [0, 61]),
        (known, [0, *map(ord, "=+-*/")]),
    ):
        text = torch.cat([torch.tensor(before, dtype=torch.int64), body])
        fits = torch.cat([text[: len(before)], text[-(NATIVE - NEW - len(before)) :]])
        assert method.answers(model, text[:-3], [text[-3:]], NEW) == Stock().answers(model, [], [fits], NEW)
        assert method.continue_text(model, text, NEW) == Stock().continue_text(model, fits, NEW)
        fits = torch.cat([text[: len(before)], text[-(NATIVE - len(before)) :]])
        outcome = method.read(model, text, 20)
        assert outcome.entries == NATIVE and torch.equal(outcome.logits, Stock().read(model, fits, 20).logits)
        targets = method.read(model, text, NATIVE - 1).logits  # they go before what opens the text
        fits = torch.cat([text[: min(len(before), 1)], text[-(NATIVE - min(len(before), 1)) :]])
        assert torch.equal(targets, Stock().read(model, fits, NATIVE - 1).logits)
    loss = measure_perplexity(model, [torch.cat([torch.tensor([0]), body])], 151, 20, alone).loss
    fits = torch.cat([torch.tensor([0]), body[-NATIVE:]])
    assert loss == pytest.approx(measure_perplexity(model, [fits], NATIVE + 1, 20, Stock()).loss)


def test_an_opening_that_fills_the_context_is_cut_too(model) -> None:
    class Wordy:
        def __call__(self, text, add_special_tokens=True, **kwargs):
            return {"input_ids": [7] * 100 * add_special_tokens + [*map(ord, text)]}

    text = torch.cat([torch.full((100,), 7), torch.arange(60)])
    fits = torch.cat([text[: NATIVE // 2], text[-(NATIVE // 2) :]])
    assert torch.equal(TruncateLeft(Wordy()).read(model, text, 5).logits, Stock().read(model, fits, 5).logits)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_scaled_rope_answers_as_a_model_configured_so(model, ids, questions, kind, factor) -> None:
    expected = []
    for question in questions:
        text = torch.cat([ids, question])
        used = factor or (1.0 if kind == "dynamic" else (len(text) + NEW) / NATIVE)
        expected.append(generated(tiny_llama(rope_parameters={**ROPE[kind], "factor": used}), text))
    assert RopeScaled(kind, factor).answers(model, ids, questions, NEW) == expected
    assert_shared_as_alone(RopeScaled(kind, factor), model, ids, questions)


@pytest.mark.parametrize("length", [0, 3, 4, 150])
def test_sliding_window_answers_by_its_definition(model, ids, questions, length) -> None:
    expected = []
    for question in questions:
        text, answer = torch.cat([ids[:length], question]), []
        for _ in range(3):
            answer.append(int(model.beacon_head(by_definition(model, text, 16, 4)[-1:]).argmax()))
            text = torch.cat([text, torch.tensor(answer[-1:])])
        expected.append(answer)
    assert SlidingWindow(16).answers(model, ids[:length], questions, 3) == expected
    assert_shared_as_alone(SlidingWindow(16), model, ids[:length], questions)


@pytest.mark.parametrize("length", [0, 40, 150])
@pytest.mark.parametrize("ratios", [None, 4, (2, 8) * 20])
def test_beacons_answer_as_generate(model, ids, questions, length, ratios, monkeypatch) -> None:
    model.generation_config.eos_token_id = None
    given = list(ratios) if isinstance(ratios, tuple) else ratios
    longest = length + 13 + NEW  # by which the policy goes
    expected = []
    for question in questions:
        text = torch.cat([ids[:length], question])
        out = model.generate(
            text[None],
            attention_mask=torch.ones_like(text)[None],
            max_new_tokens=NEW,
            ratios=given,
            expected_length=longest,
        )
        expected.append(out[0, len(text) :].tolist())
    read = calls(monkeypatch, model, "compress")
    assert Beacon(ratios).answers(model, ids[:length], questions, NEW) == expected
    assert read == ([length] if length else [])
    if ratios is not None:
        assert_shared_as_alone(Beacon(ratios), model, ids[:length], questions)


@pytest.mark.parametrize("placement", [{}, {"placement": "interleave", "attention": "full-coverage"}])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_reads_as_a_model_configured_so(ids, questions, policy, placement) -> None:
    config = beacon.BeaconConfig(window=16, ratios=(4, 2, 8), reserve=8, ratio_policy="fixed")
    if placement:
        config = config.replace(**placement, attend_beacons=True)
    model = beacon.wrap(tiny_llama(), config)
    other = beacon.wrap(tiny_llama(), config.replace(ratio_policy=policy))
    method = BeaconPolicy(policy)
    assert method.answers(model, ids, questions, NEW) == Beacon().answers(other, ids, questions, NEW)
    assert torch.equal(method.read(model, ids, 9).logits, Beacon().read(other, ids, 9).logits)
    assert method.continue_text(model, ids, 3) == Beacon().continue_text(other, ids, 3)
    assert method.held_bytes(model, 150) == Beacon().held_bytes(other, 150)
    assert method.answers(model, [], [ids[:3]], 2) == Beacon().answers(other, [], [ids[:3]], 2)  # below one window
    assert Beacon() == make_method(f"beacon:{policy}", other)
    assert make_method(f"beacon:{policy}", model) == (Beacon() if policy == "fixed" else method)


def test_retrieval_points_at_each_question(model, ids, questions, monkeypatch) -> None:
    pytest.importorskip("bm25s")
    method, expected = make_method("beacon:retrieval", model), []
    for start in (30, 90):
        question = ids[start : start + 8]
        ratios = beacon.retrieval_ratios(ids, question, model.beacon_config, expected_length=150 + 8 + NEW)
        expected += Beacon(tuple(ratios)).answers(model, ids, [question], NEW)
    assert method.answers(model, ids, [ids[30:38], ids[90:98]], NEW) == expected
    assert method.held_bytes(model, 150) == model.compress(ids[None], ratios=[2] * 3 + [8] * 7).stats()[0]["bytes"]
    with pytest.raises(CannotRun, match="and this asks none"):
        method.read(model, ids, 5)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(CannotRun, match="bm25s, which is not installed"):
        method.answers(model, ids, questions, NEW)


# -- another model ---------------------------------------------------------------------------------------------------


def test_a_fine_tuned_model_reads_by_itself(model, ids, questions, tmp_path, monkeypatch) -> None:
    torch.manual_seed(1)
    other = tiny_llama(max_position_embeddings=512)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "long")
    loads = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    method = make_method(f"fine-tuned:{tmp_path / 'long'}", model)
    assert method.name == "fine-tuned long" and loads == []
    expected = [generated(other, torch.cat([ids, q])) for q in questions]
    assert method.answers(model, ids, questions, NEW) == expected
    torch.testing.assert_close(method.read(model, ids, 5).logits, Stock().read(other, ids, 5).logits)
    assert method.continue_text(model, ids, 3) == Stock().continue_text(other, ids, 3)
    assert method.held_bytes(model, 150) == Stock().held_bytes(other, 150)
    assert len(loads) == 1
    method.close(model)
    assert method.answers(model, ids, questions[:1], NEW) == expected[:1] and len(loads) == 2


def test_a_fine_tuned_model_ends_as_it_learned_to(model, ids, questions, tmp_path) -> None:
    other, question = tiny_llama(), questions[:1]
    (whole,) = Stock().answers(other, ids, question, 12)
    at = next(number for number in range(2, 12) if whole[number] not in whole[:number])
    other.generation_config.eos_token_id = [62, whole[at]]
    other.save_pretrained(tmp_path / "turn")
    method = FineTuned(tmp_path / "turn")
    assert method.answers(model, ids, question, 12, [63]) == [whole[:at]]
    assert method.answers(model, ids, question, 12, [63, whole[1]]) == [whole[: whole.index(whole[1])]]
    assert method.answers(model, ids, question, 12) == [whole]  # nothing is to end it


def test_a_fine_tuned_model_that_does_not_fit(model, ids, tmp_path) -> None:
    with pytest.raises(CannotRun, match="nowhere cannot be loaded"):
        FineTuned(tmp_path / "nowhere").read(model, ids, 5)
    tiny_llama(vocab=48).save_pretrained(tmp_path)
    with pytest.raises(CannotRun, match="must know the 64 tokens of the wrapped model, got 48"):
        FineTuned(tmp_path).answers(model, ids, [ids[:3]], NEW)


# -- what all of them share ------------------------------------------------------------------------------------------


EVERY = [
    *(Stock(), Beacon(4), BeaconPolicy("sequence"), SlidingWindow(16), Truncated(), TruncateLeft(), TruncateMiddle()),
    *(RopeScaled("linear"), RopeScaled("dynamic"), RopeScaled("yarn", 2.0)),
]


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
def test_answers_end(model, ids, method) -> None:
    question = ids[20:30]
    whole = method.answers(model, ids, [question], 8)[0]
    assert len(whole) == 8
    for end in (whole[0], whole[4]):
        assert (
            method.answers(model, ids, [question], 8, [end, 63])[0]
            == whole[: min(whole.index(t) for t in {end, 63} & {*whole})]
        )
    assert method.answers(model, ids, [question], 0) == [[]] and method.answers(model, ids, [], 8) == []


PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": [1, 2], "suppress_tokens": [3]}


def test_no_method_obeys_the_settings_of_the_checkpoint(ids, tmp_path) -> None:
    model = beacon.wrap(tiny_llama(), beacon.BeaconConfig(window=64, ratios=(2, 4), reserve=8))
    text, count = ids[:30], 30
    expected = generated(tiny_llama(), text, count)
    for name, value in PENALTIES.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    obeyed = model.generate(text[None], max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert obeyed[0, len(text) :].tolist() != expected  # the settings would show
    tiny_llama().save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    same = [Stock(), Beacon(), Beacon(0), TruncateLeft(), TruncateMiddle(), Truncated(), SlidingWindow(NATIVE - 4)]
    same += [*(RopeScaled(kind) for kind in ROPE), FineTuned(tmp_path)]  # as long as all of it fits
    for method in same:
        assert method.continue_text(model, text, count) == expected, method.name
        assert method.answers(model, text[:-3], [text[-3:]], count) == [expected], method.name
    assert model.generation_config is own and own.repetition_penalty == 1.3


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
def test_a_question_may_be_empty_and_ids_plain(model, ids, method) -> None:
    text, last = ids[:-1], ids[-1:]
    expected = method.answers(model, text, [last], NEW)
    assert method.answers(model, ids, [[]], NEW) == expected
    assert method.answers(model, text.tolist(), [last.tolist()], NEW) == expected
    assert method.answers(model, [], [ids], NEW) == expected
    with pytest.raises(ValueError, match="context or question must have a token"):
        method.answers(model, [], [[]], NEW)


def test_a_method_without_answers_of_its_own(model, ids) -> None:
    class Echo(Method):
        name = "echo"

        def read(self, model, ids, keep, progress=None):
            raise NotImplementedError

        def continue_text(self, model, ids, count):
            return ids[-count:].tolist()

    assert Echo().answers(model, [1, 2], [[3, 4], [5]], 3, [3]) == [[2], [1, 2, 5]]
    assert Echo().held_bytes(model, 100) is None
    Echo().close(model)


# -- what is held ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "mistral-sliding", "qwen3", "phi3"])
@pytest.mark.parametrize("length", [1, 100, 127, 128, 200])
def test_bytes_of_full_attention(name, length) -> None:
    model = beacon.wrap(tiny_model(name, dtype=torch.bfloat16), beacon.BeaconConfig(window=32, ratios=(4,)))
    with torch.no_grad(), beacon.disabled(model):
        layers = model(random_ids(1, length), use_cache=True).past_key_values.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert Stock().held_bytes(model, length) == held
    if name in ("qwen3", "phi3"):
        assert RopeScaled("yarn").held_bytes(model, length) == held
        assert TruncateMiddle().held_bytes(model, 300) == Stock().held_bytes(model, 256)


@pytest.mark.parametrize("settings", [{}, {"memory_dtype": "int8"}, {"sink": 2, "stride": 8}, {"ratios": (0, 4)}])
@pytest.mark.parametrize("ratios", [None, 0, 4])
def test_bytes_of_beacons(settings, ratios) -> None:
    config = beacon.BeaconConfig(**{"window": 16, "ratios": (2, 4, 8), "reserve": 8, **settings})
    model, ids = beacon.wrap(tiny_llama(max_position_embeddings=128), config), torch.arange(200)[None] % 64
    for length in (0, 5, 16, 90, 150, 200):
        real = model.compress(ids[:, :length], ratios=ratios, expected_length=length).stats()[0] if length else None
        assert Beacon(ratios).held_bytes(model, length) == (real["bytes"] if real else 0)


def test_bytes_of_interleaved_beacons(ids) -> None:
    model = beacon.wrap(tiny_llama(), beacon.BeaconConfig.iclr2025(window=16, ratios=(2, 8), sink=1))
    for length in (7, 30, 150):
        assert Beacon(8).held_bytes(model, length) == model.compress(ids[None, :length], ratios=8).stats()[0]["bytes"]


@pytest.mark.parametrize("length", [10, 20, 150])
def test_bytes_of_a_sliding_window(model, ids, length) -> None:
    reader = SlidingWindow(16)._reader(model, ids)
    reader.read(ids[:length])
    assert SlidingWindow(16).held_bytes(model, length) == sum(store.nbytes(0) for store in reader._stores)


# -- what cannot run -------------------------------------------------------------------------------------------------


def test_lengths_that_a_method_cannot_read(model, ids) -> None:
    for method in (TruncateLeft(), TruncateMiddle(), Truncated()):
        with pytest.raises(CannotRun, match="63 tokens leaves no room to read in a native context of 64"):
            method.answers(model, ids, [ids[:3]], 63)
    with pytest.raises(CannotRun, match="65 targets are more than a native context of 64 tokens"):
        TruncateLeft().read(model, ids, 65)
    with pytest.raises(CannotRun, match="33 targets are more than half of a native context of 64 tokens"):
        TruncateMiddle().read(model, ids, 33)
    scaled = tiny_llama(rope_parameters={**ROPE["linear"], "factor": 4.0})
    with pytest.raises(CannotRun, match="rope type must be 'default' to be rescaled, got 'linear'"):
        RopeScaled("yarn").answers(beacon.wrap(scaled, model.beacon_config), ids, [ids[:3]], NEW)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("stock", {}, Stock()),
        ("truncate-middle", {}, TruncateMiddle()),
        ("truncate-left", {}, TruncateLeft()),
        ("sliding-window", {}, SlidingWindow(NATIVE - 4)),
        ("sliding-window:16", {"sinks": 2}, SlidingWindow(16, 2)),
        ("pi", {}, RopeScaled("linear")),
        ("dynamic-ntk", {"factor": 2}, RopeScaled("dynamic", 2.0)),
        ("yarn:4", {}, RopeScaled("yarn", 4.0)),
        ("snapkv", {}, KVPress("snapkv", 8)),
        ("expected-attention", {"ratio": 4}, KVPress("expected-attention", 4)),
        ("streaming-llm:16", {}, KVPress("streaming-llm", 16)),
        ("kvzip:2", {"python": "python3"}, KVPress("kvzip", 2, python="python3")),
        ("beacon", {}, Beacon()),
        ("beacon:8", {}, Beacon(8)),
        ("beacon:8", {"ratio": 4}, Beacon(8)),
        ("beacon", {"ratio": 0}, Beacon(0)),
        ("beacon:adaptive", {}, Beacon()),
        ("beacon:sequence", {}, BeaconPolicy("sequence")),
        ("beacon", {"policy": "retrieval"}, BeaconPolicy("retrieval")),
    ],
)
def test_methods_by_name(model, name, options, expected) -> None:
    assert make_method(name, model, **options, tokenizer=object()) == expected
    kind = name.partition(":")[0]
    assert METHODS[kind] and method_form(kind).startswith(kind)


def test_a_path_may_have_colons(model, tmp_path, monkeypatch) -> None:
    (tmp_path / "C:" / "models" / "long").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert make_method("fine-tuned:C:/models/long", model).path == "C:/models/long"
    assert make_method("fine-tuned", model, path="owner/long").path == "owner/long"
    assert method_form("fine-tuned") == "fine-tuned:PATH" and method_form("beacon") == "beacon[:RATIO|POLICY]"


@pytest.mark.parametrize("name", ["snapvk", "stock:8", "fine-tuned", "fine-tuned:", "sliding-window:", "", "Beacon"])
def test_unknown_names_are_told_the_valid_ones(model, name) -> None:
    with pytest.raises(ValueError, match="method must be one of beacon") as failure:
        make_method(name, model, tokenizer=object())
    assert all(method_form(known) in str(failure.value) for known in METHODS) and repr(name) in str(failure.value)


@pytest.mark.parametrize(
    "name, options, error, words",
    [
        ("beacon:best", {}, ValueError, "beacon takes a ratio or one of fixed, .*, got 'best'"),
        ("beacon:7", {}, ValueError, "stride must divide by ratio, got stride=16 and ratio=7"),
        ("beacon:8", {"policy": "fixed"}, ValueError, "a ratio or a policy, got ratio=8 and policy=fixed"),
        ("sliding-window:x", {}, ValueError, "sliding-window takes a number, got 'x'"),
        ("sliding-window:0", {}, ValueError, "window must be at least 1"),
        ("yarn:0.5", {}, ValueError, "factor must be at least 1"),
        ("snapkv:0.5", {}, ValueError, "ratio must be at least 1 and finite, got 0.5"),
        ("stock", {"ratio": 8}, TypeError, "stock takes no option, got ratio; leave it out"),
        ("sliding-window", {"ratio": 8}, TypeError, "sliding-window takes window, sinks, got ratio"),
    ],
)
def test_values_that_a_method_cannot_have(model, name, options, error, words) -> None:
    with pytest.raises(error, match=words):
        make_method(name, model, **options)


def test_methods_need_a_wrapped_model() -> None:
    with pytest.raises(TypeError, match=r"wrapped model, got LlamaForCausalLM; call beacon\.wrap first"):
        make_method("stock", tiny_llama())


def test_the_page_that_explains_them_has_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8").replace("\\|", "|")
    assert [name for name in METHODS if f"`{method_form(name)}`" not in page] == []


def test_a_check_needs_no_model() -> None:
    assert check_method("snapkv:4", tokenizer=None) == ("snapkv", {"ratio": "4", "tokenizer": None})
    assert check_method("stock", tokenizer=None) == ("stock", {})


@pytest.mark.parametrize("name", ["stock", "beacon:4", "sliding-window", "truncate-left"])
def test_ids_are_of_one_text(name, model, tokenizer) -> None:
    method = make_method(name, model, tokenizer=tokenizer)
    for context, question in ((torch.ones(1, 8), [1]), ([1, 2], torch.ones(1, 2))):
        with pytest.raises(ValueError, match=r"token ids must be \[T\], one text, got \[1, \d\]; pass a row"):
            method.answers(model, context, [question], 2)
