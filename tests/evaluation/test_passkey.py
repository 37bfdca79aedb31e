import pytest
import torch

import beacon
from beacon.evaluation import (
    Beacon,
    PasskeyScore,
    SlidingWindow,
    Stock,
    Truncated,
    ask_passkey,
    build_passkey,
    passkey_line,
    recall,
)
from beacon.evaluation.text import encode
from tests.evaluation.tiny import CODE, tiny_llama


@pytest.fixture(scope="module")
def filler(tokenizer):
    return encode(tokenizer, CODE)


def test_line_format():
    assert passkey_line("48213") == "# the pass key is 48213\n"


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("length", [60, 201, 400])
def test_prompt(tokenizer, filler, length, depth):
    prompt = build_passkey(tokenizer, filler, length, depth, seed=7)
    text = tokenizer.decode(prompt.ids)
    assert len(prompt.ids) == length
    assert text.count(f"\n# the pass key is {prompt.digits}\n") == 1
    assert text.endswith("\n# the pass key is ")
    assert tokenizer.decode(prompt.answer) == prompt.digits and len(prompt.answer) == len(prompt.digits) == 5
    assert abs(prompt.start / length - depth) < 40 / length
    body = text.replace(f"\n# the pass key is {prompt.digits}", "").removesuffix("\n# the pass key is ")
    assert CODE.startswith(body)


def test_prompt_is_what_the_tokenizer_makes_of_its_text(tokenizer, filler):
    prompt = build_passkey(tokenizer, filler, 300, 0.4, seed=1)
    assert encode(tokenizer, tokenizer.decode(prompt.ids)).tolist() == prompt.ids.tolist()


def test_same_seed_same_prompt(tokenizer, filler):
    first, again, other = (build_passkey(tokenizer, filler, 200, 0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and first.digits == again.digits
    assert first.digits != other.digits


def test_tokenizer_that_joins_the_space_to_the_first_digit(filler):
    class Joining:
        """Encodes words with the space before them, as GPT-2 does."""

        words = ("\n#", " the", " pass", " key", " is", " 48213", " ", "x")

        def __call__(self, text, add_special_tokens):
            text = text[: text.index("is ") + 3] + ("48213" if text[-1].isdigit() else "")
            ids = []
            while text:
                word = next(word for word in self.words if text.startswith(word))
                ids.append(self.words.index(word))
                text = text.removeprefix(word)
            return {"input_ids": ids}

        def decode(self, ids):
            return "".join(self.words[i] for i in ids)

    tokenizer = Joining()
    prompt = build_passkey(tokenizer, [7] * 100, 50, 0.5, seed=0)
    assert tokenizer.decode(prompt.ids[-5:].tolist()) == "\n# the pass key is"
    assert tokenizer.decode(prompt.answer) == " 48213"


def test_bad_input(tokenizer, filler):
    with pytest.raises(ValueError, match="depth must lie between 0 and 1, got 2"):
        build_passkey(tokenizer, filler, 100, 2, seed=0)
    with pytest.raises(ValueError, match="leave room for text"):
        build_passkey(tokenizer, filler, 10, 0.5, seed=0)
    with pytest.raises(ValueError, match="give more text"):
        build_passkey(tokenizer, filler[:50], 100, 0.5, seed=0)


def test_scores():
    right = PasskeyScore("m", 100, 0.5, "48213", "48213")
    partly = PasskeyScore("m", 100, 0.5, "48213", "4821")
    wrong = PasskeyScore("m", 100, 0.5, "48213", "return")
    assert [score.digits_right for score in (right, partly, wrong)] == [5, 4, 0]
    assert [score.exact for score in (right, partly, wrong)] == [True, False, False]
    total = recall([right, partly, wrong])
    assert (total.per_digit, total.prompts) == (pytest.approx(9 / 15), 3)
    assert total.exact == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least one score"):
        recall([])


@pytest.mark.parametrize("method", [Beacon(), Beacon(2), Stock(), Truncated(), SlidingWindow(16)])
def test_every_method_answers_greedily(tokenizer, filler, method):
    config = beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8)
    model = beacon.wrap(tiny_llama(vocab=len(tokenizer)), config)
    prompt = build_passkey(tokenizer, filler, 60, 0.5, seed=0)
    score = ask_passkey(model, tokenizer, prompt, method)
    assert (score.method, score.length, score.depth, score.digits) == (method.name, 60, 0.5, prompt.digits)
    if isinstance(method, Truncated):
        return  # it reads fewer tokens here than below: room is kept for the answer
    text, first = prompt.ids, []
    for _ in range(5):
        first.append(int(method.read(model, text, 1).logits.argmax()))
        text = torch.cat([text, torch.tensor(first[-1:])])
    if method != Beacon():  # whose ratio depends on the length that is announced
        assert score.answer == tokenizer.decode(first).strip()
