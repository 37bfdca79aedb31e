"""Passkeys, needles, topics, dialogues: what is asked, and what becomes of right and wrong answers."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

import beacon
from beacon.evaluation.methods import Beacon, Dialogue, Method, SlidingWindow, Stock, TruncateLeft
from beacon.evaluation.report.statistics import ENOUGH
from beacon.evaluation.tasks import make_task
from beacon.evaluation.tasks.haystack import Haystack, _across
from beacon.evaluation.tasks.hiding import NAMES
from beacon.evaluation.tasks.needle import new_tokens
from beacon.evaluation.tasks.prompts import ask, frame, opening, openings
from beacon.evaluation.tasks.topics import TOPICS
from beacon.evaluation.text import encode
from tests.evaluation.tiny import CODE, tiny_llama

CHAT = (
    "<|endoftext|>{% for m in messages %}[{{ m.role }}] {{ m.content }}[/{{ m.role }}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ORDER = {"first": 0, "second": 1, "third": 2, "fourth": 3}
HIDING = ["passkey", "needle", "multi-needle", "topics", "multi-turn"]
TIME = "first_turn_seconds"


class Knowing(Method):
    """Looks up how the line goes on that a question begins, or says something else."""

    def __init__(self, tokenizer, wrong=lambda answer: answer):
        self.tokenizer, self.wrong, self.name = tokenizer, wrong, "knowing"
        self.asked = []

    def read(self, *args, **kwargs):
        raise AssertionError("nothing to read here")

    continue_text = read

    def answers(self, model, context_ids, question_ids_list, max_new_tokens, end_ids=()):
        self.asked.append((len(context_ids), len(question_ids_list)))
        return [self._answer(torch.cat([context_ids, question]))[:max_new_tokens] for question in question_ids_list]

    def _answer(self, ids):
        text = self.tokenizer.decode(ids)
        before, _, line = text.rpartition("\n")
        ordinal = re.search(r"the (\w+) topic (?:was|that|in)", text[-200:], re.I)
        name = re.findall(r"secret number of (\w+)\?", text[-200:])
        if ordinal:
            answer = re.findall(r"talk about (.*) now\.", before)[ORDER[ordinal[1]]]
        elif name:
            answer = re.search(rf"secret number of {name[-1]} is (\d+)", before)[1]
        else:
            found = before.index(line) + len(line)
            answer = before[found:].partition("\n")[0].strip()
        return self.tokenizer(self.wrong(answer) + "\n", add_special_tokens=False)["input_ids"]


class Deaf(Knowing):
    def _answer(self, ids):
        return []


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(beacon.default_model())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "code.py").write_text(CODE * 5)
    return folder


@pytest.fixture(scope="module")
def model(tokenizer):
    return beacon.wrap(tiny_llama(vocab=len(tokenizer)), beacon.BeaconConfig(window=16, ratios=(2, 4), reserve=8))


def measured(task, method, model, tokenizer):
    results = [task.run(method, model, tokenizer, item) for item in task.items(model, tokenizer)]
    return {metric: [result.scores[metric] for result in results] for metric in results[0].scores if metric != TIME}


@pytest.mark.parametrize("wording", ["comment", "prose"])
@pytest.mark.parametrize("name", HIDING)
def test_who_knows_finds_all_and_who_is_deaf_nothing(name, wording, text, tokenizer, model):
    options = {"lengths": [500, 900], "samples": 2, "data": text}
    if name != "passkey":
        options["wording"] = wording
    task = make_task(name, **options)
    right = measured(task, Knowing(tokenizer), model, tokenizer)
    wrong = measured(task, Deaf(tokenizer), model, tokenizer)
    assert set(right) == set(wrong) == {metric for metric in task.metrics if not metric.endswith("seconds")}
    assert all(set(scores) == {1.0} for scores in right.values())
    assert all(set(scores) == {0.0} for scores in wrong.values())


@pytest.mark.parametrize("name", ["needle", "multi-needle", "multi-turn"])
def test_nearly_right_is_wrong(name, text, tokenizer, model):
    task = make_task(name, lengths=[500], samples=1, data=text)
    for wrong in (lambda a: a + "1", lambda a: a[:-1], lambda a: a[:2] + " " + a[2:], lambda a: a[::-1] + "0"):
        assert set(measured(task, Knowing(tokenizer, wrong), model, tokenizer)["found"]) == {0.0}
    assert set(measured(task, Knowing(tokenizer, lambda a: f" ({a})."), model, tokenizer)["found"]) == {1.0}


def test_passkeys_count_digits_too(text, tokenizer, model):
    task = make_task("passkey", lengths=[500], samples=1, depths=[0.5], data=text)
    scores = measured(task, Knowing(tokenizer, lambda a: a[:3] + "xx"), model, tokenizer)
    assert scores == {"found": [0.0], "digits": [0.6]}
    scores = measured(task, Knowing(tokenizer, lambda a: a + "7"), model, tokenizer)
    assert scores == {"found": [0.0], "digits": [1.0]}
    prompt, asked = task.prompt(tokenizer, next(iter(task.items(model, tokenizer))))
    assert tokenizer.decode(prompt.ids[-asked:]) == "\n# the pass key is "


def test_share_of_needles_that_are_found(text, tokenizer, model):
    task = make_task("multi-needle", lengths=[700], samples=1, needles=4, data=text)
    method = Knowing(tokenizer)
    item = next(iter(task.items(model, tokenizer)))
    prompt = task.prompt(tokenizer, item)
    method.wrong = lambda answer: answer if answer in prompt.answers[:3] else "00000"
    result = task.run(method, model, tokenizer, item)
    assert result.scores == {"found": 0.75, "all_found": 0.0}
    assert [line.strip() for line in json.loads(result.output)] == [*prompt.answers[:3], "00000"]
    assert method.asked == [(len(prompt.text), 4)]  # one reading for all questions


def test_needles_asked_for_together(text, tokenizer, model):
    task = make_task("multi-needle", lengths=[700], samples=1, needles=3, together=True, data=text)
    item = next(iter(task.items(model, tokenizer)))
    prompt = task.prompt(tokenizer, item)
    asked = tokenizer.decode(prompt.questions[0])
    assert len(prompt.questions) == 1 and sum(name in asked for name in NAMES) == 3

    class Two(Deaf):
        def _answer(self, ids):
            return self.tokenizer(" and ".join(prompt.answers[:2]), add_special_tokens=False)["input_ids"]

    result = task.run(Two(tokenizer), model, tokenizer, item)
    assert result.scores == {"found": pytest.approx(2 / 3), "all_found": 0.0}


@pytest.mark.parametrize("name", ["needle", "multi-needle", "topics", "multi-turn"])
@pytest.mark.parametrize("chat", [False, True])
def test_length_is_that_of_the_prompt(name, chat, text, tokenizer, monkeypatch):
    if chat:
        monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    for wording in ("comment", "prose"):
        task = make_task(name, lengths=[700], samples=1, data=text, wording=wording, chat_template=chat)
        for item in task.items(None, tokenizer):
            prompt = task.prompt(tokenizer, item)
            prompt = prompt[0] if name == "topics" else prompt
            whole = len(prompt.text) + max(map(len, prompt.questions))
            assert whole <= 700 if name != "multi-turn" else whole >= 700 - 20
            if name == "needle":
                assert whole == 700


def test_needles_stand_where_they_are_asked_to_be(text, tokenizer):
    task = make_task("needle", lengths=[1500], depths=[0, 0.3, 0.7, 1], samples=1, data=text, wording="comment")
    for item in task.items(None, tokenizer):
        prompt = task.prompt(tokenizer, item)
        told = tokenizer.decode(prompt.text)
        lines = told.split("\n")
        line = next(line for line in lines if line.startswith("# the number of "))
        assert line.endswith(prompt.answers[0]) and told.count(line) == 1
        assert told.index(line) / len(told) == pytest.approx(item.place["depth"], abs=0.05)
        assert "\n".join(other for other in lines if other is not line)[:1000] in CODE * 5


def test_a_text_without_lines(tmp_path, tokenizer):
    path = tmp_path / "long.txt"
    path.write_text("word after word " * 2000)
    task = make_task("multi-needle", lengths=[900], needles=4, samples=1, data=path)
    item = next(iter(task.items(None, tokenizer)))
    prompt = task.prompt(tokenizer, item)
    told = tokenizer.decode(prompt.text)
    places = [told.index(f" is {answer}.\n") for answer in sorted(prompt.answers, key=lambda a: told.index(a))]
    assert [int(4 * place / len(told)) for place in places] == [0, 1, 2, 3]
    assert len(prompt.text) + max(map(len, prompt.questions)) == 900


def test_topics_are_in_order_and_the_first_named_counts(text, tokenizer, model):
    task = make_task("topics", lengths=[1200], topics=6, asked=[1, 3], samples=1, data=text, wording="prose")
    for item in task.items(None, tokenizer):
        prompt, topics = task.prompt(tokenizer, item)
        told = tokenizer.decode(prompt.text)
        assert re.findall(r"talk about (.*) now\.", told) == topics and set(topics) <= set(TOPICS)
        assert prompt.answers == (topics[item.place["asked"] - 1],)
        shares = [told.index(f"about {topic}") / len(told) for topic in topics]
        assert all(abs(share - at / 6) < 0.12 for at, share in enumerate(shares))

        class Listing(Deaf):
            def __init__(self, said):
                super().__init__(tokenizer)
                self.said = said

            def _answer(self, ids):
                return tokenizer(self.said, add_special_tokens=False)["input_ids"]

        right, other = prompt.answers[0], next(t for t in topics if t != prompt.answers[0])
        found = [
            task.run(Listing(said), model, tokenizer, item).scores["found"]
            for said in (right, other, f"{other}, {right}")
        ]
        assert found == [1.0, 0.0, 0.0]


def test_numbered_sections_among_sources(text, tokenizer):
    task = make_task("topics", lengths=[800], topics=4, asked=2, samples=1, data=text, wording="comment")
    prompt, topics = task.prompt(tokenizer, next(iter(task.items(None, tokenizer))))
    told = tokenizer.decode(prompt.text)
    assert [f"{n}: {topic}" for n, topic in enumerate(topics, 1)] == re.findall(r"# section (.*)", told)
    assert tokenizer.decode(prompt.questions[0]) == "\n# section 2:" and len(set(topics)) == 4


def test_a_dialogue_grows(text, tokenizer, model):
    task = make_task("multi-turn", lengths=[700], turns=3, samples=1, data=text, wording="comment")
    items = list(task.items(model, tokenizer))
    prompts = [task.prompt(tokenizer, item) for item in items]
    dialogues = [tokenizer.decode(prompt.questions[0]) for prompt in prompts]
    assert [item.place["turn"] for item in items] == [1, 2, 3]
    assert all(torch.equal(prompt.text, prompts[0].text) for prompt in prompts)
    for before, after, prompt in zip(dialogues, dialogues[1:], prompts):
        assert after.startswith(before + prompt.answers[0] + "\n# the number of ")
    result = task.run(Knowing(tokenizer), model, tokenizer, items[2])
    assert set(result.scores) == {"found"} and prompts[2].answers[0] in result.output  # the text is read in between
    turns = [result.scores for result in task.run_series(Knowing(tokenizer), model, tokenizer, items)]
    assert [set(scores) for scores in turns] == [{"found", TIME}, *[{"found", "turn_seconds"}] * 2]


def test_chats(text, tokenizer, model, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    around = frame(tokenizer, True)
    assert tokenizer.decode(around.before) == "<|endoftext|>[user] "
    assert openings(tokenizer) == [(), around.before]
    assert (around.after, around.between) == ("[/user]\n[assistant] ", "[/assistant]\n[user] ")
    for name in ("needle", "topics", "multi-turn"):
        task = make_task(name, lengths=[800], samples=1, data=text, wording="prose", chat_template=True)
        assert set(measured(task, Knowing(tokenizer), model, tokenizer)["found"]) == {1.0}
    dialogue = tokenizer.decode(task.prompt(tokenizer, list(task.items(None, tokenizer))[1]).questions[0])
    assert re.fullmatch(
        r"\n\nWhat is .* alone\.\[/user\]\n\[assistant\] \d{5}\[/assistant\]\n\[user\] "
        r"\n\nWhat is .* alone\.\[/user\]\n\[assistant\] ",
        dialogue,
    )


def test_chats_that_cannot_be(text, tokenizer, monkeypatch):
    task = make_task("needle", lengths=[500], data=text, chat_template=True)
    item = next(iter(make_task("needle", lengths=[500], data=text).items(None, tokenizer)))
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        task.items(None, tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        task.prompt(tokenizer, item)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ValueError, match="must render what is said once and unchanged"):
        task.items(None, tokenizer)
    with pytest.raises(ValueError, match="must render what is said once and unchanged"):
        task.prompt(tokenizer, item)
    assert openings(tokenizer) == [()]
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('only one turn') }}")
    assert openings(tokenizer) == [()]


def test_tokens_that_open_a_text(text, tokenizer):
    class Opening:
        """Puts a beginning of sequence before every text and an end after it."""

        def __init__(self):
            self.eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True, **kwargs):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

        def decode(self, ids, **kwargs):
            return tokenizer.decode(ids, **kwargs)

    assert opening(tokenizer) == () and opening(Opening()) == (1,)
    for name in ("passkey", "needle"):
        task = make_task(name, lengths=[500], data=text)
        prompt = task.prompt(Opening(), next(iter(task.items(None, Opening()))))
        ids = prompt[0].ids if name == "passkey" else torch.cat([prompt.text, *prompt.questions])
        assert ids[0] == 1 and len(ids) == 500 and 1 not in ids[1:]


def test_every_sample_has_another_stretch(tmp_path, tokenizer):
    whole = encode(tokenizer, CODE.rstrip("\n") + "\n")
    (tmp_path / "code.py").write_text(CODE)
    total = len(whole)
    for length in (total - 40, total // 2 - 20, total // 2, total // 3 + 1, total - 1):
        haystack = Haystack(tmp_path)
        count = min(total - length + 1, 60)
        stretches = [tuple(haystack.stretch(tokenizer, length, number).tolist()) for number in range(count)]
        starts = [next(s for s in range(total) if tuple(whole[s : s + length].tolist()) == one) for one in stretches]
        assert len(set(starts)) == count, length
        assert starts[: total // length] == [number * length for number in range(total // length)]
        if count > total // length:
            assert starts[total // length] == total - length  # as far from the others as it can be
        assert haystack.stretch(tokenizer, length, count - 1).tolist() == list(stretches[-1])  # at any time
    assert sorted(_across(100, 30, number) for number in range(3, 71)) == [s for s in range(71) if s % 30]
    found = [_across(1000, 700, number) for number in range(1, 6)]
    assert found[0] == 300 and min(abs(a - b) for a in found for b in found if a != b) > 30
    with pytest.raises(ValueError, match=rf"got {total}; the longest possible is {total - 1} with 2 stretches"):
        Haystack(tmp_path).stretch(tokenizer, total, 1)


def test_shorter_texts_are_the_beginnings_of_the_longest(tmp_path, tokenizer, model):
    (tmp_path / "code.py").write_text(CODE)
    haystack = Haystack(tmp_path, longest=300)
    for number in (0, 2, 9):
        whole = haystack.stretch(tokenizer, 300, number)
        assert torch.equal(haystack.stretch(tokenizer, 90, number), whole[:90])
        assert torch.equal(whole, Haystack(tmp_path).stretch(tokenizer, 300, number))


def test_stretches_that_overlap_count_as_one_text(tmp_path, tokenizer, model):
    (tmp_path / "code.py").write_text(CODE)
    total = len(encode(tokenizer, CODE.rstrip("\n") + "\n"))
    for parts in (1, 2, 3):
        length = total // parts - 20
        task = make_task("needle", lengths=[length, 200], samples=2, data=tmp_path)
        clusters = {item.place["length"]: set() for item in task.items(model, tokenizer)}
        for item in task.items(model, tokenizer):
            clusters[item.place["length"]].add(item.cluster)
        assert clusters[length] == clusters[200] == {f"text {number}" for number in range(parts)}


def test_samples_that_the_text_does_not_hold_are_refused_at_once(tmp_path, tokenizer, model):
    (tmp_path / "code.py").write_text(CODE)
    total = len(encode(tokenizer, CODE.rstrip("\n") + "\n"))
    options = {"lengths": [total], "data": tmp_path}
    with pytest.raises(ValueError, match=rf"is {total - 14} with 15 stretches, each of which begins elsewhere"):
        make_task("passkey", samples=3, **options).items(model, tokenizer)
    options["lengths"] = [total - 4]
    assert len(list(make_task("passkey", samples=3, limit=5, **options).items(model, tokenizer))) == 5
    with pytest.raises(ValueError, match="with 6 stretches"):
        make_task("passkey", samples=3, limit=6, **options).items(model, tokenizer)
    options["lengths"] = [total - 2]
    assert len(list(make_task("multi-turn", samples=3, turns=5, **options).items(model, tokenizer))) == 15


def test_every_depth_has_another_stretch(text, tokenizer, model):
    task = make_task("needle", lengths=[110, 140], depths=[0.1, 0.5, 0.9], samples=2, data=text)
    items, last = list(task.items(model, tokenizer)), -1
    for at, item in enumerate(items):
        number = at % 6
        assert (item.cluster, item.content["stretch"], item.series) == (f"text {number}", number, None)
        told = tokenizer.decode(task.prompt(tokenizer, item).text)
        names = [int(found) for found in re.findall(r"function_(\d+)\(", told)]
        if number:
            assert names[-1] > last and names[0] >= last, names  # further on in the text, not where others are
        last = names[-1]
    few = make_task("needle", lengths=[110], depths=[0.1, 0.5, 0.9], samples=2, limit=2, data=text)
    assert list(few.items(model, tokenizer)) == [items[0], items[2]]  # the same ones, however many there are


@pytest.mark.parametrize("name", HIDING)
def test_there_are_enough_texts_to_tell_anything(name, text, tokenizer, model):
    items = list(make_task(name, lengths=[500, 700], data=text).items(model, tokenizer))
    for length in (500, 700):
        clusters = {item.cluster for item in items if item.place["length"] == length}
        assert len(clusters) >= ENOUGH and clusters == {item.cluster for item in items}


def test_a_limit_spreads_over_depths(text, tokenizer, model):
    depths = [0.1, 0.3, 0.5, 0.7, 0.9]

    def places(limit):
        task = make_task("needle", lengths=[500, 700], depths=depths, samples=2, limit=limit, data=text)
        items = [item for item in task.items(model, tokenizer) if item.place["length"] == 700]
        return [(item.content["sample"], item.place["depth"]) for item in items]

    assert places(2) == [(0, 0.1), (0, 0.9)] and places(3) == [(0, 0.1), (0, 0.5), (0, 0.9)]
    assert places(1) == [(0, 0.1)] and places(4) == [(0, 0.1), (0, 0.3), (0, 0.7), (0, 0.9)]
    assert places(7) == [*((0, depth) for depth in depths), (1, 0.1), (1, 0.9)]
    assert places(10) == places(99) == places(None) == [(sample, depth) for sample in range(2) for depth in depths]


def test_no_room(text, tokenizer):
    task = make_task("multi-needle", lengths=[60], data=text, needles=8)
    with pytest.raises(ValueError, match="lengths must leave room for text, got 60 with"):
        task.prompt(tokenizer, next(iter(task.items(None, tokenizer))))


def test_answers_are_counted(text, tokenizer, model):
    class Silent(Deaf):
        def answers(self, *args, **kwargs):
            return []

    task = make_task("needle", lengths=[500], data=text)
    with pytest.raises(RuntimeError, match="must answer each of 1 questions, got 0"):
        task.run(Silent(tokenizer), model, tokenizer, next(iter(task.items(model, tokenizer))))


def test_the_standard_library_is_the_usual_text(tokenizer):
    task = make_task("needle", lengths=[2000], samples=2, depths=0.5)
    first, second = (tokenizer.decode(task.prompt(tokenizer, item).text) for item in task.items(None, tokenizer))
    assert first != second and "\n# the number of " in first and "import" in first


# -- dialogues --------------------------------------------------------------------------------------------------------


class Listening(Knowing):
    """Notes what is read and asked."""

    def dialogue(self, model, expected_length=None):
        method = self

        class Noting(Dialogue):
            def __init__(self):
                method.begun.append((expected_length, []))
                self.heard = torch.zeros(0, dtype=torch.int64)

            def read(self, ids):
                method.begun[-1][1].append(("read", len(ids)))
                self.heard = torch.cat([self.heard, ids])

            def answer(self, question_ids, max_new_tokens, end_ids=()):
                method.begun[-1][1].append(("asked", len(question_ids)))
                method.whole.append(torch.cat([self.heard, question_ids]))
                return method._answer(method.whole[-1])[:max_new_tokens]

        return Noting()

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.begun, self.whole = [], []


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [1, 2], [0, 2], [2], [0, 1, 2, 3, 4, 5], [2, 0], [1, 4], [1, 1]])
def test_a_dialogue_is_read_once_and_asked_as_turns_are_alone(chosen, chat, text, tokenizer, model, monkeypatch):
    if chat:
        monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    task = make_task("multi-turn", lengths=[400, 500], turns=3, samples=1, data=text, chat_template=chat)
    items = [list(task.items(model, tokenizer))[at] for at in chosen]
    method = Listening(tokenizer)
    results = list(task.run_series(method, model, tokenizer, items))
    assert [result.scores["found"] for result in results] == [1.0] * len(items)
    for item, whole in zip(items, method.whole, strict=True):
        prompt = task.prompt(tokenizer, item)
        assert torch.equal(whole, torch.cat([prompt.text, *prompt.questions]))
    again = {(0, 1, 2, 3, 4, 5): 2, (2, 0): 2, (1, 4): 2}.get(tuple(chosen), 1)  # other texts, and turns back
    assert len(method.begun) == again
    for expected_length, done in method.begun:
        read = sum(count for what, count in done if what == "read")
        assert read + max(count for what, count in done if what == "asked") + 1 <= expected_length < 1.5 * read


def test_turns_in_a_live_dialogue_are_answered_as_alone(text, tokenizer, model):
    task = make_task("multi-turn", lengths=[300], turns=4, samples=2, data=text)
    items = list(task.items(model, tokenizer))
    assert [item.series for item in items] == ["length 300, sample 0"] * 4 + ["length 300, sample 1"] * 4
    assert [item.cluster for item in items] == ["text 0"] * 4 + ["text 1"] * 4
    for method in (Beacon(4), Stock(), SlidingWindow(20), TruncateLeft(tokenizer)):
        alone = [task.run(method, model, tokenizer, item).output for item in items]
        assert [result.output for result in task.run_series(method, model, tokenizer, items)] == alone
        for item, output in list(zip(items, alone))[:3]:
            prompt = task.prompt(tokenizer, item)
            assert ask(
                method, model, tokenizer, prompt.text, prompt.questions, new_tokens(tokenizer, prompt.answers, False)
            ) == [output]


def test_later_turns_read_little(text, tokenizer, model):
    task = make_task("multi-turn", lengths=[900], turns=3, samples=1, data=text)
    seen: list[int] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    read = []
    for _ in task.run_series(Stock(), model, tokenizer, list(task.items(model, tokenizer))):
        read.append(sum(seen))
        seen.clear()
    handle.remove()
    assert read[0] > 850 and all(count < 100 for count in read[1:]), read
