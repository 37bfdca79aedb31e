"""Questions from Parquet files, one reading for all that a context has."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

import beacon
from beacon.evaluation.methods import Beacon, Method
from beacon.evaluation.tasks import make_task
from tests.evaluation.tiny import CODE, tiny_llama, word_tokenizer

ONE, TWO = ("The cat is called Ash. The dog is called Rex.\n", CODE[:500] + " The cat is called Ivy.")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model(tokenizer):
    return beacon.wrap(tiny_llama(vocab=len(tokenizer)), beacon.BeaconConfig(window=16, ratios=(2, 4), reserve=8))


def row(context, animal, answer, task="names", tokens=8, prefix="It is called"):
    return {
        "context": context,
        "question": f"What is the {animal} called?",
        "answer_prefix": prefix,
        "answer": answer,
        "task": task,
        "max_new_tokens": tokens,
    }


def write(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.fixture
def data(tmp_path):
    rows = [
        row(ONE, "cat", "Ash"),
        row(TWO, "cat", "Ivy"),
        row(ONE, "dog", "Rex", task="dogs"),
        row(ONE, "cat", "ash!", tokens=20),
    ]
    write(tmp_path / "4096" / "test-00000-of-00001.parquet", rows, row_group_size=2)
    return tmp_path


class Reader(Method):
    """Says after a context what it has been told to say."""

    name = "reader"

    def __init__(self, tokenizer, say):
        self.tokenizer, self.say, self.calls = tokenizer, say, []

    def read(self, *args, **kwargs):
        raise AssertionError("nothing to read here")

    continue_text = read

    def answers(self, model, context_ids, question_ids_list, max_new_tokens, end_ids=()):
        context = self.tokenizer.decode(context_ids)
        questions = [self.tokenizer.decode(question) for question in question_ids_list]
        self.calls.append((context, questions, max_new_tokens, end_ids))
        said = [self.say(context, question) for question in questions]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]


def knows(context, question):
    animal = question.split("the ")[1].split()[0]
    return " " + context.split(f"{animal} is called ")[1].split(".")[0] + ".\nAnd so on"


def test_items(data, tokenizer):
    task = make_task("ask-many", data=data)
    items = list(task.items(None, tokenizer))
    assert [(item.name, item.place) for item in items] == [
        ("names, context 1", {"task": "names"}),
        ("dogs, context 1", {"task": "dogs"}),
        ("names, context 2", {"task": "names"}),
    ]
    assert items == list(make_task("ask-many", data=str(data)).items(None, tokenizer))
    assert CODE[:20] not in str(items)
    first, same, other = (item.cluster for item in items)
    assert first == same and len({first, other, None}) == 3
    assert [item.name for item in make_task("ask-many", data=data, limit=1).items(None, tokenizer)] == [
        "names, context 1",
        "dogs, context 1",
    ]


def test_a_context_is_read_once(data, tokenizer, model):
    method = Reader(tokenizer, knows)
    task = make_task("ask-many", data=data)
    items = list(task.items(model, tokenizer))
    results = [task.run(method, model, tokenizer, item) for item in items]
    for result in results:
        seconds = result.scores["seconds_per_question"]
        assert result.scores == {"contains": 1.0, "exact": 1.0, "f1": 1.0, "seconds_per_question": seconds}
        assert seconds > 0
    contexts = [(context, len(questions)) for context, questions, _, _ in method.calls]
    assert contexts == [(ONE, 3), (TWO, 1)]
    question = "What is the cat called?\nIt is called"
    assert method.calls[0][1] == [question, question, question.replace("cat", "dog")]
    assert method.calls[1][1] == ["\n" + question]  # this context does not end its line
    assert method.calls[0][2:] == (20, (tokenizer.eos_token_id,))
    again = [task.run(method, model, tokenizer, item) for item in items[:2]]  # nothing is kept from the first time
    assert len(method.calls) == 3 and [r.output for r in again] == [r.output for r in results[:2]]


def test_answers_are_not_mixed_up_among_methods(data, tokenizer, model):
    task = make_task("ask-many", data=data)
    methods = [Reader(tokenizer, knows), Reader(tokenizer, lambda context, question: " no idea")]
    for item in task.items(model, tokenizer):
        scores = [task.run(method, model, tokenizer, item).scores["contains"] for method in methods]
        assert scores == [1.0, 0.0]
    assert [len(method.calls) for method in methods] == [2, 2]


def test_scores(data, tokenizer, model):
    task = make_task("ask-many", data=data)
    item = list(task.items(model, tokenizer))[2]
    for said, expected in [
        (" Ivy", (1.0, 1.0, 1.0)),
        (" ivy, the cat\nIvy", (1.0, 0.0, 2 / 3)),
        (" Ivyx", (0.0, 0.0, 0.0)),
        (" Ash", (0.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0)),
    ]:
        method = Reader(tokenizer, lambda context, question, said=said: said)
        scores = task.run(method, model, tokenizer, item).scores
        assert (scores["contains"], scores["exact"], scores["f1"]) == pytest.approx(expected), said


def test_every_question_has_its_own_room(tmp_path, tokenizer, model):
    rows = [row(ONE, "cat", "Ash", tokens=2), row(ONE, "dog", "Ash", tokens=None)]
    write(tmp_path / "x.parquet", rows)
    task = make_task("ask-many", data=tmp_path, max_new_tokens=9)
    method = Reader(tokenizer, lambda context, question: "0123456789")
    output = task.run(method, model, tokenizer, next(iter(task.items(model, tokenizer)))).output
    assert [len(text) for text in json.loads(output)] == [2, 9] and method.calls[0][2] == 9


@pytest.mark.parametrize("answers, expected", [("any", 1.0), ("all", 0.5)])
def test_several_answers(answers, expected, tmp_path, tokenizer, model):
    write(tmp_path / "x.parquet", [row(ONE, "cat", ["Ash", "Cinder"])])
    task = make_task("ask-many", data=tmp_path, answers=answers)
    method = Reader(tokenizer, lambda context, question: " Ash")
    scores = task.run(method, model, tokenizer, next(iter(task.items(model, tokenizer)))).scores
    assert (scores["contains"], scores["exact"], scores["f1"]) == (expected, 1.0, 1.0)


def test_columns_that_may_be_missing(tmp_path, tokenizer, model):
    rows = [{key: row(ONE, "cat", "Ash")[key] for key in ("context", "question", "answer")}]
    write(tmp_path / "pets.parquet", rows)
    task = make_task("ask-many", data=tmp_path / "pets.parquet")
    item = next(iter(task.items(model, tokenizer)))
    method = Reader(tokenizer, knows)
    assert item.place == {"task": "pets"} and task.run(method, model, tokenizer, item).scores["exact"] == 1.0
    assert method.calls[0][1] == ["What is the cat called?\n"]


def test_a_chat(data, tokenizer, model, monkeypatch):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    task = make_task("ask-many", data=data, chat_template=True)
    method = Reader(tokenizer, knows)
    assert task.run(method, model, tokenizer, next(iter(task.items(model, tokenizer)))).scores["exact"] == 1.0
    context, questions, _, _ = method.calls[0]
    assert context == "[user]" + ONE and questions[0] == "What is the cat called?[/][assistant]It is called"


def test_beacons_answer_as_after_reading_anew(data, tokenizer, model):
    task = make_task("ask-many", data=data)
    item = next(iter(task.items(model, tokenizer)))
    outputs = json.loads(task.run(Beacon(4), model, tokenizer, item).output)
    assert len(outputs) == 2 and all(isinstance(output, str) for output in outputs)
    ids = tokenizer(ONE + "What is the cat called?\nIt is called", return_tensors="pt").input_ids[0]
    with torch.no_grad():
        new = Beacon(4).continue_text(model, ids, 1)
    assert outputs[0].startswith(tokenizer.decode(new, skip_special_tokens=True))


def test_missing_files(tmp_path, tokenizer):
    for data in (None, tmp_path, tmp_path / "absent"):
        with pytest.raises(
            FileNotFoundError, match=r"context, question, answer_prefix, answer .*hf download simonjegou/"
        ):
            make_task("ask-many", data=data).items(None, tokenizer)


def test_bad_files(tmp_path, tokenizer, model):
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"x\.parquet must be a Parquet file"):
        list(make_task("ask-many", data=tmp_path).items(None, tokenizer))
    write(tmp_path / "x.parquet", [{"context": "a", "query": "b", "answer": "c"}])
    with pytest.raises(ValueError, match=r"must have the columns context, question, answer, got .*\(question missing"):
        list(make_task("ask-many", data=tmp_path).items(None, tokenizer))
    for wrong in ({"answer": ""}, {"question": None}, {"answer": []}):
        rows = [
            row(ONE, "cat", ["Ash"] if isinstance(wrong.get("answer"), list) else "Ash"),
            {**row(ONE, "cat", "Ash"), **wrong},
        ]
        write(tmp_path / "x.parquet", rows)
        task = make_task("ask-many", data=tmp_path)
        with pytest.raises(ValueError, match=rf"column {next(iter(wrong))} must hold text .*row 1 of row group 0"):
            task.run(Reader(tokenizer, knows), model, tokenizer, next(iter(task.items(model, tokenizer))))
