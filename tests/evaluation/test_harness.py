"""The wrapped model in the evaluation harness: nothing cut, read once, scored in pieces, batched without a trace."""

import functools
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import beacon
from beacon.evaluation import native_context
from beacon.evaluation.harness import answers, scoring
from beacon.evaluation.harness.contexts import SHARE_FROM, Family, common_prefix, families
from beacon.evaluation.harness.language_model import beacon_lm, require_harness
from tests.evaluation.tiny import tiny_llama

pytest.importorskip("lm_eval")

WORDS = [f"w{number}" for number in range(92)]
VOCAB = len(WORDS) + 4
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"


def words(count, seed=0):
    """A text of ``count`` tokens."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


LONG = words(2000)


@pytest.fixture
def tokenizer():
    """A word is a token, so that every token shows in the text that is decoded."""
    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*special, *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


INTERLEAVED = {"placement": "interleave", "attention": "full-coverage", "attend_beacons": True}


@pytest.fixture
def model(request):
    settings = getattr(request, "param", {})
    config = beacon.BeaconConfig(window=16, ratios=(2, 4, 8, 16), reserve=8, ratio_policy="adaptive")
    model = beacon.wrap(tiny_llama(VOCAB), config.replace(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beacon" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make(model, tokenizer, **settings):
    return beacon_lm()(model, tokenizer=tokenizer, **settings)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def loglikelihoods(lm, *pairs):
    return lm.loglikelihood(requests(*pairs), disable_tqdm=True)


def generate(lm, *texts, **settings):
    given = {"max_gen_toks": 8, "until": [], **settings}
    return lm.generate_until(requests(*((text, dict(given)) for text in texts)), disable_tqdm=True)


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids


def reference_score(model, context, continuation, **settings):
    """From the logits of one forward over the whole text."""
    whole = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(whole[:, :-1], expected_length=whole.shape[1], **settings).logits[0, len(context) - 1 :]
    wanted = torch.tensor(continuation)
    scores = logits.double().log_softmax(dim=-1)
    return scores[torch.arange(len(wanted)), wanted].sum().item(), bool((logits.argmax(-1) == wanted).all())


def watch(monkeypatch, model, name):
    """Record the token counts of a method's calls."""
    seen = []
    inner = getattr(model, name)

    @functools.wraps(inner)
    def watched(input_ids, *args, **kwargs):
        rows = input_ids if isinstance(input_ids, torch.Tensor) else torch.tensor(input_ids)
        seen.append(tuple(rows.shape))
        return inner(input_ids, *args, **kwargs)

    monkeypatch.setattr(model, name, watched)
    return seen


# -- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [None, 4, 0], ids=["adaptive", "ratio 4", "ratio 0"])
@pytest.mark.parametrize("length", [1, 10, 40, 500])
def test_scores_are_those_of_one_forward(model, tokenizer, length, ratios) -> None:
    lm = make(model, tokenizer, ratios=ratios)
    context, continuation = words(length), " w7 w3 w1"
    ((score, greedy),) = loglikelihoods(lm, (context, continuation))
    head, tail = lm._encode_pair(context, continuation)
    expected, expected_greedy = reference_score(model, head, tail, ratios=ratios)
    assert score == pytest.approx(expected, abs=1e-4)
    assert greedy == expected_greedy


def test_greedy_continuations_are_told_from_others(model, tokenizer) -> None:
    lm = make(model, tokenizer, ratios=4)
    context = ids_of(tokenizer, words(300))[0].tolist()
    cache = model.compress(torch.tensor([context[:-1]]), ratios=4)
    greedy = model.generate(
        torch.tensor([context[-1:]]), past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=None
    )[0, 1:].tolist()
    other = [*greedy[:2], (greedy[2] + 1) % VOCAB]
    scored = lm._loglikelihood_tokens([(None, context, greedy), (None, context, other)], disable_tqdm=True)
    assert [flag for _, flag in scored] == [True, False]
    assert scored[0][0] > scored[1][0]


def test_short_texts_score_as_in_the_harness_own_model(model, tokenizer) -> None:
    from lm_eval.models.huggingface import HFLM

    texts = [("w1 w2", " w3"), ("w5 ", "w1 w7"), ("", "w4"), ("w8", " w9 w8 w7")]
    own = HFLM(tiny_llama(VOCAB), tokenizer=tokenizer)
    expected = own.loglikelihood(requests(*texts), disable_tqdm=True)
    scored = loglikelihoods(make(model, tokenizer, batch_size=4), *texts)
    assert [score for score, _ in scored] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [flag for _, flag in scored] == [flag for _, flag in expected]
    documents = requests(("w1 w2",), (words(10),), ("",))
    assert make(model, tokenizer).loglikelihood_rolling(documents, disable_tqdm=True) == pytest.approx(
        own.loglikelihood_rolling(documents, disable_tqdm=True), abs=1e-4
    )
    assert generate(make(model, tokenizer), "w1 w2", max_gen_toks=4) == generate(own, "w1 w2", max_gen_toks=4)


def test_no_text_is_cut(model, tokenizer, monkeypatch) -> None:
    lm = make(model, tokenizer, ratios=8)
    tokens = ids_of(tokenizer, LONG).shape[1]
    assert tokens > 20 * native_context(model)
    read = watch(monkeypatch, model, "compress")
    loglikelihoods(lm, (LONG, " w5"))
    generate(lm, LONG)
    assert [columns for _, columns in read] == [tokens - 1, tokens - 1]
    assert lm.max_length > 10**9


def test_a_limit_that_is_asked_for_keeps_the_end(model, tokenizer) -> None:
    lm = make(model, tokenizer, ratios=4, max_length=50)
    head, tail = lm._encode_pair(LONG, " w5")
    expected, _ = reference_score(model, head[-(51 - len(tail)) :], tail, ratios=4)
    assert loglikelihoods(lm, (LONG, " w5"))[0][0] == pytest.approx(expected, abs=1e-4)
    end = tokenizer.decode(ids_of(tokenizer, LONG)[0, -(50 - 8) :])
    assert generate(lm, LONG) == generate(make(model, tokenizer, ratios=4), end)
    with pytest.raises(ValueError, match="leave room for a context, got 50 for 60 tokens"):
        generate(lm, LONG, max_gen_toks=60)


def test_logits_come_in_pieces(model, tokenizer, monkeypatch) -> None:
    document = words(600, seed=1)
    pairs = [(words(100), " " + words(150, seed=2)), (words(12), " w5")]
    lm = make(model, tokenizer, batch_size=2)
    whole = loglikelihoods(lm, *pairs), lm.loglikelihood_rolling(requests((document,)), disable_tqdm=True)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    monkeypatch.setattr(scoring, "MAX_LOGITS", 40 * VOCAB)
    pieces = loglikelihoods(lm, *pairs), lm.loglikelihood_rolling(requests((document,)), disable_tqdm=True)
    assert max(sizes) <= 40 * VOCAB < ids_of(tokenizer, document).numel() * VOCAB
    assert [score for score, _ in pieces[0]] == pytest.approx([score for score, _ in whole[0]], abs=1e-3)
    assert pieces[1] == pytest.approx(whole[1], abs=1e-3)


def test_documents_are_read_once_from_beginning_to_end(model, tokenizer) -> None:
    lm = make(model, tokenizer, ratios=4)
    (total,) = lm.loglikelihood_rolling(requests((words(1000),)), disable_tqdm=True)
    tokens = ids_of(tokenizer, words(1000))[0].tolist()
    expected, _ = reference_score(model, [tokenizer.bos_token_id], tokens, ratios=4)
    assert total == pytest.approx(expected, rel=1e-5)


# -- contexts read once ----------------------------------------------------------------------------------------------


def test_choices_share_their_context(model, tokenizer, monkeypatch) -> None:
    context, choices = words(700), [" w5", " w6", " w3 w1 w4", " w1"]
    pairs = [(context, choice) for choice in choices]
    apart = [loglikelihoods(make(model, tokenizer, ratios=4), pair)[0] for pair in pairs]
    read = watch(monkeypatch, model, "compress")
    together = loglikelihoods(make(model, tokenizer, ratios=4), *pairs)
    assert read == [(1, ids_of(tokenizer, context).shape[1] - 1)]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in apart], abs=1e-4)


def test_letters_after_one_question_take_one_row(model, tokenizer, monkeypatch) -> None:
    lm = make(model, tokenizer, ratios=4)
    read = watch(monkeypatch, model, "forward")
    loglikelihoods(lm, *((words(200), letter) for letter in (" w1", " w2", " w3", " w4")))
    assert read == [(1, 1)]


@pytest.mark.parametrize("model", [{}, INTERLEAVED], ids=["append", "interleave"], indirect=True)
def test_questions_about_one_book_share_the_book(model, tokenizer, monkeypatch) -> None:
    pairs = [(f"{words(500)} {words(count, seed=count)}", " w5") for count in (2, 7, 3, 4)]
    apart = [loglikelihoods(make(model, tokenizer, ratios=4), pair)[0] for pair in pairs]
    read = watch(monkeypatch, model, "compress")
    together = loglikelihoods(make(model, tokenizer, ratios=4, batch_size=2), *pairs)
    assert read[0] == (1, 500) and sum(rows for rows, _ in read[1:]) == 4
    assert all(columns < 7 for _, columns in read[1:])
    assert [score for score, _ in together] == pytest.approx([score for score, _ in apart], abs=1e-4)
    apart = [generate(make(model, tokenizer, ratios=4), context)[0] for context, _ in pairs]
    assert generate(make(model, tokenizer, ratios=4, batch_size=3), *(context for context, _ in pairs)) == apart


def test_families_cover_every_context_once() -> None:
    book = tuple(range(100, 100 + 2 * SHARE_FROM))
    first, second, whole = (*book, 1, 2), (*book, 3), book
    lone, short = (7,) * 300, (5, 6)
    found = families([short, second, lone, first, whole, lone])
    assert found == [Family(len(book) - 1, (whole, first, second)), Family(0, (lone, short))]
    assert [common_prefix((1, 2, 3), other) for other in ((1, 2, 4), (1, 2, 3, 4), (), (2,))] == [2, 3, 0, 0]


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:even the largest ratio")  # which is as it is, read alone or not
@pytest.mark.parametrize("ratios", [None, 4], ids=["adaptive", "ratio 4"])
@pytest.mark.parametrize("model", [{}, INTERLEAVED, {"sink": 2}], ids=["append", "interleave", "sink"], indirect=True)
def test_ragged_batches_give_what_each_text_gives_alone(model, tokenizer, ratios) -> None:
    lengths = (1, 2, 20, 21, 100, 230, 630)
    pairs = [(words(length, seed=length), " w5" if length % 2 else " w3 w1 w4 w1 w5") for length in lengths]
    alone, batched = (make(model, tokenizer, ratios=ratios, batch_size=size) for size in (1, 4))
    expected = [loglikelihoods(alone, pair)[0] for pair in pairs]
    scored = loglikelihoods(batched, *pairs)
    assert [score for score, _ in scored] == pytest.approx([score for score, _ in expected], abs=1e-4)
    texts = [context for context, _ in pairs]
    assert generate(batched, *texts) == [generate(alone, text)[0] for text in texts]
    documents = [(text,) for text in [*texts, ""]]
    expected = [alone.loglikelihood_rolling(requests(text), disable_tqdm=True)[0] for text in documents]
    assert batched.loglikelihood_rolling(requests(*documents), disable_tqdm=True) == pytest.approx(expected, abs=1e-3)


def test_policies_that_look_at_the_length_are_asked_for_each(model, tokenizer) -> None:
    def policy(request):
        return 2 if request.length % 2 else 8

    model.beacon_wrapping = beacon.wrap(
        tiny_llama(VOCAB), model.beacon_config.replace(ratio_policy=policy)
    ).beacon_wrapping
    pairs = [(words(length), " w5") for length in (100, 101, 102, 103)]
    alone = [loglikelihoods(make(model, tokenizer), pair)[0][0] for pair in pairs]
    scored = loglikelihoods(make(model, tokenizer, batch_size=4), *pairs)
    assert [score for score, _ in scored] == pytest.approx(alone, abs=1e-4)


def test_drawn_answers_are_drawn_for_each_request(model, tokenizer) -> None:
    lm = make(model, tokenizer, ratios=4)
    settings = {"do_sample": True, "temperature": 3.0}
    drawn = generate(lm, *[words(130)] * 6, **settings)
    assert len(set(drawn)) > 1
    assert len(set(generate(lm, *[words(130)] * 6))) == 1


# -- where answers end -----------------------------------------------------------------------------------------------


def greedy_tokens(model, tokenizer, text, count=8):
    ids = ids_of(tokenizer, text)
    cache = model.compress(ids[:, :-1], ratios=4)
    out = model.generate(
        ids[:, -1:], past_key_values=cache, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, 1:].tolist()


def test_every_end_token_ends_an_answer(model, tokenizer, monkeypatch) -> None:
    text = words(170)
    tokens = greedy_tokens(model, tokenizer, text)
    at = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    with monkeypatch.context() as patch:  # nothing is decoded while tokens alone can end an answer
        patch.setattr(answers, "StopAtText", lambda *_: pytest.fail("it looked for a string"))
        assert generate(make(model, tokenizer, ratios=4), text) == [tokenizer.decode(tokens)]
    model.generation_config.eos_token_id = [3, tokens[at]]  # neither is the tokenizer's
    lm = make(model, tokenizer, ratios=4)
    assert lm.ends == sorted({0, tokenizer.eos_token_id, 3, tokens[at]})
    assert generate(lm, text) == [tokenizer.decode(tokens[:at])]
    stock = make(model, tokenizer, stock=True)
    assert set(stock.ends) == set(lm.ends)


def test_the_checkpoint_has_no_say_in_how_tokens_are_chosen(model, tokenizer) -> None:
    text, settings = words(20), {"max_gen_toks": 24}
    ways = [{}, {"ratios": 0}, {"stock": True}, {"method": "stock"}, {"method": "truncate-left"}, {"method": "pi"}]
    expected = [generate(make(model, tokenizer, **way), text, **settings) for way in ways]
    assert all(answer == expected[1] for answer in expected[1:])  # they read the same
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.suppress_tokens = 1.3, 2, [5]
    own.do_sample, own.temperature = True, 5.0
    assert [generate(make(model, tokenizer, **way), text, **settings) for way in ways] == expected
    for way in ways[1:3]:  # what a task sets is obeyed
        assert generate(make(model, tokenizer, **way), text, repetition_penalty=1.3, **settings) != expected[1]
    assert model.generation_config is own


def test_the_chat_template_says_what_ends_a_turn(model, tokenizer) -> None:
    tokenizer.add_tokens("<|end|>", special_tokens=True)
    assert answers.end_of_turn(tokenizer) is None
    tokenizer.chat_template = TEMPLATE
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    assert answers.end_of_turn(tokenizer) == turn != tokenizer.eos_token_id
    assert turn in make(model, tokenizer).ends
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    assert answers.end_of_turn(tokenizer) is None


def test_stop_strings_end_answers(model, tokenizer, monkeypatch) -> None:
    text = words(170)
    tokens = greedy_tokens(model, tokenizer, text, 12)
    whole = tokenizer.decode(tokens)
    lm = make(model, tokenizer, ratios=4, batch_size=2)
    stop = " ".join(whole.split()[4:6])[1:-1]  # neither begins nor ends where a token does
    calls = watch(monkeypatch, model, "forward")
    assert generate(lm, text, max_gen_toks=12, until=[stop]) == [whole.split(stop)[0]]
    assert len(calls) == 6  # the context's last token and five of the answer
    assert generate(lm, text, max_gen_toks=12, until=stop) == [whole.split(stop)[0]]


def test_rows_stop_by_themselves(tokenizer) -> None:
    criterion = answers.StopAtText(tokenizer, ["w5 w1", "zzz"], begin=2)
    rows = ["w3 w5 w1", "w3 w5 w2", "w5 w1"]
    ids = [tokenizer(text).input_ids for text in rows]
    assert [bool(criterion(torch.tensor([[0, 0, *row]]), None)) for row in ids] == [True, False, True]
    prompt = torch.tensor([[*ids[2], 5]])
    assert not answers.StopAtText(tokenizer, ["w5 w1"], begin=2)(prompt, None)


def test_a_stop_string_that_is_a_special_token_ends_an_answer(model, tokenizer) -> None:
    tokens = greedy_tokens(model, tokenizer, words(170))
    at = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    name = tokenizer.convert_ids_to_tokens(tokens[at])
    tokenizer.add_tokens(name, special_tokens=True)
    answer = generate(make(model, tokenizer, ratios=4), words(170), until=[name])
    assert answer == [tokenizer.decode(tokens[:at], skip_special_tokens=True)]


def test_thoughts_are_left_out(model, tokenizer) -> None:
    lm = make(model, tokenizer, ratios=4)
    tokens = greedy_tokens(model, tokenizer, words(170))
    lm.think_end_token = tokens[2]
    last = len(tokens) - 1 - tokens[::-1].index(tokens[2])
    assert generate(lm, words(170)) == [tokenizer.decode(tokens[last + 1 :]).lstrip()]


# -- the stock model -------------------------------------------------------------------------------------------------


def test_the_stock_model_reads_what_its_native_context_holds(model, tokenizer) -> None:
    from lm_eval.models.huggingface import HFLM

    native = native_context(model)
    own = HFLM(tiny_llama(VOCAB), tokenizer=tokenizer, max_length=native)
    lm = make(model, tokenizer, stock=True)
    assert lm.max_length == native
    pairs = [(words(330), " w5"), (words(30), " w6")]
    assert loglikelihoods(lm, *pairs) == own.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert generate(lm, words(330)) == generate(own, words(330))
    documents = requests((words(330),))
    assert lm.loglikelihood_rolling(documents) == own.loglikelihood_rolling(documents)
    assert loglikelihoods(lm, *pairs) != loglikelihoods(make(model, tokenizer), *pairs)


def test_a_model_that_is_not_wrapped_is_a_stock_model(tokenizer) -> None:
    lm = make(tiny_llama(VOCAB), tokenizer, stock=True)
    assert lm.max_length == 64
    assert loglikelihoods(lm, ("w1", " w2"))


# -- how it is named and loaded --------------------------------------------------------------------------------------


def test_the_harness_knows_it_as_beacon(tmp_path, model, tokenizer) -> None:
    from lm_eval.api.registry import get_model

    from beacon.evaluation.harness import BeaconLM

    assert get_model("beacon") is BeaconLM
    assert get_model("hf") is not BeaconLM  # the harness's own are still there
    lm = get_model("beacon").create_from_arg_string("pretrained=default,ratios=8,device=cpu", {"batch_size": 2})
    assert lm.ratios == 8 and lm.batch_size == 2 and lm.model.beacon_wrapping
    assert lm.tokenizer.decode(lm.tok_encode("import os")) == "import os"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = BeaconLM(str(tmp_path), ratios=4, device="cpu", dtype="float32")
    (expected,) = loglikelihoods(make(model, tokenizer, ratios=4), (words(170), " w5"))
    assert loglikelihoods(again, (words(170), " w5"))[0] == pytest.approx(expected, abs=1e-4)


def test_answers_can_be_kept_as_the_harness_keeps_them(model, tokenizer, monkeypatch) -> None:
    from lm_eval.api.model import CacheHook, hash_args

    lm = make(model, tokenizer, ratios=4)
    lm.set_cache_hook(CacheHook(SimpleNamespace(dbdict={})))
    (score,) = loglikelihoods(lm, ("w1 w2", " w3"))
    (document,) = lm.loglikelihood_rolling(requests(("w1 w2",)), disable_tqdm=True)
    (text,) = generate(lm, "w1 w2")
    keys = [("loglikelihood", ("w1 w2", " w3")), ("loglikelihood_rolling", ("w1 w2",))]
    keys.append(("generate_until", ("w1 w2", {"max_gen_toks": 8, "until": []})))
    assert lm.cache_hook.dbdict == {hash_args(*key): of for key, of in zip(keys, (score, document, text), strict=True)}


def test_documents_are_told_batch_by_batch(model, tokenizer, monkeypatch) -> None:
    from lm_eval.api.model import CacheHook, hash_args

    lm = make(model, tokenizer, ratios=4, batch_size=2)
    lm.set_cache_hook(CacheHook(SimpleNamespace(dbdict={})))
    inner, calls = lm._loglikelihood_tokens, []

    def stopped(*args, **settings):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args, **settings)

    monkeypatch.setattr(lm, "_loglikelihood_tokens", stopped)
    with pytest.raises(KeyboardInterrupt):
        lm.loglikelihood_rolling(requests(("w1 w2",), ("w3",), ("w4",)), disable_tqdm=True)
    assert set(lm.cache_hook.dbdict) == {hash_args("loglikelihood_rolling", (text,)) for text in ("w1 w2", "w3")}


def test_its_command_is_the_harness_own(monkeypatch, capsys) -> None:
    from beacon.evaluation.harness import __main__ as command

    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--help"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0
    assert "--model_args" in capsys.readouterr().out


def test_mistakes_are_named(model, tokenizer, tmp_path) -> None:
    stock = tiny_llama(VOCAB)
    with pytest.raises(TypeError, match=r"must be wrapped, got a LlamaForCausalLM; .* stock=True"):
        make(stock, tokenizer)
    with pytest.raises(NotImplementedError, match="batch_size must be a number of contexts, got 'auto'"):
        make(model, tokenizer, batch_size="auto")
    with pytest.raises(ValueError, match="max_length must be at least 1 token, got 0"):
        make(model, tokenizer, max_length=0)
    with pytest.raises(ValueError, match="stride must divide by ratio, got stride=16 and ratio=5"):
        make(model, tokenizer, ratios=[2, 5])
    with pytest.raises(TypeError, match="ratios must be an int, a list of ints or None, got '8'"):
        make(model, tokenizer, ratios="8")
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter must name the beacons of .*stock=True"):
        make(str(tmp_path), tokenizer)
    with pytest.raises(ValueError, match="the chat template needs a tokenizer that has one, got one without"):
        make(model, tokenizer).apply_chat_template([{"role": "user", "content": "x"}])


def test_the_harness_is_asked_for_by_name(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'activation-beacon\[eval\]'"):
        require_harness()
