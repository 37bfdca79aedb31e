"""Tasks by name, their options, and how their items are named."""

from collections import Counter

import pytest

import beacon
from beacon.evaluation.suite import Item, Task
from beacon.evaluation.tasks import TASKS, make_task, task_options
from tests.evaluation.tiny import CODE, tiny_llama, word_tokenizer

NAMES = ["perplexity", "passkey", "needle", "multi-needle", "topics", "ask-many", "cost", "multi-turn"]
GRIDS = [name for name in NAMES if name not in ("perplexity", "ask-many")]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def text(tmp_path):
    (tmp_path / "code.py").write_text(CODE * 20)
    return tmp_path


def test_names():
    assert list(TASKS) == NAMES
    for name, cls in TASKS.items():
        assert issubclass(cls, Task) and cls.name == name and set(cls.metrics.values()) <= {True, False}


def test_unknown_task_and_option():
    with pytest.raises(ValueError, match=r"a task must be one of perplexity, passkey, .*got 'nedle'"):
        make_task("nedle")
    with pytest.raises(ValueError, match=r"options of the task needle must be among lengths, .*depths.*, got turns"):
        make_task("needle", turns=3)
    with pytest.raises(ValueError, match=r"among data, limit, .* got lengths"):
        make_task("ask-many", lengths=[100])
    assert "turns" in task_options("multi-turn") and "haystack" not in task_options("needle")


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("needle", {"lengths": []}, ValueError, "lengths must name at least one"),
        ("needle", {"lengths": [1]}, ValueError, "each of lengths must be at least 2"),
        ("needle", {"lengths": ["4k"]}, TypeError, "each of lengths must be an int"),
        ("needle", {"depths": [1.5]}, ValueError, "depths must lie between 0 and 1, got 1.5"),
        ("passkey", {"depths": ["top"]}, TypeError, "each of depths must be a number"),
        ("needle", {"limit": 0}, ValueError, "limit must be at least 1"),
        ("needle", {"seed": -1}, ValueError, "seed must be at least 0"),
        ("needle", {"wording": "verse"}, ValueError, "wording must be one of comment, prose"),
        ("multi-needle", {"needles": 1000}, ValueError, "needles must be at most"),
        ("multi-turn", {"turns": 1000}, ValueError, "turns must be at most"),
        ("topics", {"topics": 1000}, ValueError, "topics must be at most"),
        ("topics", {"topics": 3, "asked": [4]}, ValueError, "asked must be at most 3 of 3 topics, got 4"),
        ("perplexity", {"lengths": [512], "targets": 512}, ValueError, "targets must be fewer"),
        ("perplexity", {"sources": ["a/x.txt", "b/x.txt"]}, ValueError, "sources must have different names"),
        ("ask-many", {"answers": "some"}, ValueError, "answers must be one of any, all"),
        ("perplexity", {"joined": 1}, TypeError, "joined must be a bool"),
        ("needle", {"chat_template": "yes"}, TypeError, "chat_template must be a bool"),
        ("multi-needle", {"together": None}, TypeError, "together must be a bool"),
        ("cost", {"repeats": 0}, ValueError, "repeats must be at least 1"),
    ],
)
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=message):
        make_task(name, **options)


def test_one_value_stands_for_a_list():
    task = make_task("needle", lengths=300, depths=0.5)
    assert task.lengths == (300,) and task.depths == (0.5,)


@pytest.mark.parametrize("name", GRIDS)
def test_items_are_the_same_in_every_run(name, text, tokenizer):
    def items(**options) -> list[Item]:
        return list(make_task(name, lengths=[1600, 2400], samples=2, data=text, **options).items(None, tokenizer))

    first, again = items(), items()
    assert first == again
    assert max(Counter(item.name for item in first).values()) == 1
    assert items(limit=1) == [next(i for i in first if i.place["length"] == n) for n in (1600, 2400)]
    if name == "cost":
        return
    one, other, seeded = (make_task(name, lengths=[1600, 2400], data=text, seed=seed) for seed in (0, 0, 1))
    for item in first[:2] + first[-1:]:
        prompts = [str(task.prompt(tokenizer, item)) for task in (one, other, one, seeded)]
        assert prompts[0] == prompts[1] == prompts[2] != prompts[3]


@pytest.mark.parametrize("name", GRIDS)
def test_an_item_does_not_depend_on_the_others(name, text, tokenizer):
    """But for the longest length: shorter texts are the beginnings of the longest ones."""
    many = make_task(name, lengths=[2400, 1600, 1200], samples=3, data=text)
    one = make_task(name, lengths=[2400, 1600], samples=1, data=text)
    for item in one.items(None, tokenizer):
        assert item in list(many.items(None, tokenizer))
        if name != "cost":
            assert str(one.prompt(tokenizer, item)) == str(many.prompt(tokenizer, item))


@pytest.mark.parametrize("name", GRIDS)
def test_items_hold_recipes_not_texts(name, text, tokenizer):
    for item in make_task(name, lengths=[2000], data=text).items(None, tokenizer):
        assert len(str(item)) < 300 and item.place["length"] == 2000


@pytest.mark.parametrize("name", GRIDS)
def test_too_short_a_text(name, text, tokenizer):
    with pytest.raises(ValueError, match=r"must not exceed the text in .*got 100000; the longest possible is \d+"):
        list(make_task(name, lengths=[100_000], data=text).items(None, tokenizer))
    with pytest.raises(FileNotFoundError, match="no such file or folder of text"):
        list(make_task(name, data=text / "absent").items(None, tokenizer))


def test_every_task_runs_on_a_model(text, tokenizer):
    config = beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8)
    model = beacon.wrap(tiny_llama(vocab=len(tokenizer)), config)
    from beacon.evaluation.methods import Beacon, Stock

    for name in GRIDS:
        task = make_task(
            name, lengths=[600], samples=1, data=text, **({"topics": 3, "asked": 2} if name == "topics" else {})
        )
        item = next(iter(task.items(model, tokenizer)))
        for method in (Beacon(4), Stock()):
            result = task.run(method, model, tokenizer, item)
            assert set(result.scores) <= set(task.metrics) and next(iter(task.metrics)) in result.scores


def test_mistakes_in_options_name_the_task() -> None:
    with pytest.raises(ValueError, match=r"^perplexity: targets must be fewer than the tokens of every length"):
        make_task("perplexity", lengths=[512], targets=512)
    with pytest.raises(TypeError, match=r"^needle: each of depths must be a number"):
        make_task("needle", depths=["half"])


@pytest.mark.parametrize("lengths, targets", [([512, 4096], 256), ([1024], 512), ([4096, 8192], 512)])
def test_perplexity_has_targets_at_every_length(lengths, targets) -> None:
    assert make_task("perplexity", lengths=lengths)._targets == targets


def test_a_limit_keeps_the_first_turns(text, tokenizer) -> None:
    task = make_task("multi-turn", lengths=[500], samples=2, turns=3, limit=5, data=text)
    assert [(i.content["sample"], i.place["turn"]) for i in task.items(None, tokenizer)] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (1, 2),
    ]


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in ("cost", "passkey")])
def test_a_chat_template_that_is_not_there_is_told_at_once(name, text, tokenizer) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        make_task(name, lengths=[600], data=text, chat_template=True).items(None, tokenizer)
