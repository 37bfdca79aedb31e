import logging

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon.training.data.examples import Cutter, full_windows
from beacon.training.data.rows import Document
from tests.training.tiny_data import CHAT, FORGETFUL, MARKED, PLAIN, build, origins, tokenizer, words, write_jsonl


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(tmp_path):
    """Builds from rows of JSON."""

    def from_rows(rows, *, streaming=False, template=None, settings=None, **source):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        settings = {"streaming": streaming, "shuffle_buffer": 0 if streaming else 1000, **(settings or {})}
        dataset, report = build({"path": path, **source}, template=template, **settings)
        return list(dataset), report

    return from_rows


def test_plain_text_counts_everywhere_and_ends_with_eos(rows):
    eos = tokenizer().eos_token_id
    ids = tokenizer()(words(9))["input_ids"]
    [example], _ = rows([{"text": words(9)}])
    assert example == {"input_ids": [*ids, eos], "labels": [*ids, eos], "windows": 1, "origin": "rows.jsonl:1"}
    [example], _ = rows([{"text": words(9)}], settings={"append_eos": False})
    assert example["input_ids"] == ids


def test_an_eos_to_append_must_exist(tmp_path):
    from beacon.training.data import DataConfig, build_dataset

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": words(9)}])
    without = tokenizer()
    without.eos_token = None
    with pytest.raises(ValueError, match=r"must have an eos_token to append.* set append_eos to False"):
        build_dataset(DataConfig(sources=path), without, window=8, stride=4)
    build_dataset(DataConfig(sources=path, append_eos=False), without, window=8, stride=4)


@given(length=st.integers(0, 80), window=st.integers(1, 20), stride=st.integers(1, 20))
def test_windows_are_those_that_fit(length, window, stride):
    assert full_windows(length, window, stride) == len(range(window, length + 1, stride))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "too_long, lengths, report",
    [
        ("truncate", [5, 12], "1 truncated"),
        ("split", [5, 12, 12, 3], "1 split"),
        ("skip", [5], "1 longer than max_length"),
    ],
)
def test_long_documents(rows, streaming, too_long, lengths, report):
    texts = [{"text": words(n - 1)} for n in (5, 27, 2)]
    settings = {"max_length": 12, "min_length": 3, "too_long": too_long}
    examples, found = rows(texts, streaming=streaming, settings=settings)
    assert [len(example["input_ids"]) for example in examples] == lengths
    counts = found.sources[0]
    assert report in str(counts) and counts.too_short == 1 and "1 shorter than min_length" in str(found)
    assert (counts.documents, counts.tokens, counts.examples) == (3, sum(lengths), len(lengths))
    assert counts.windows.total() == len(lengths)
    assert counts.without_window == sum(length < 8 for length in lengths)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_long_document_is_an_error_if_wanted(rows, streaming):
    with pytest.raises(ValueError, match=r"at most 12 tokens \(max_length\), got 27 in rows.jsonl:2; raise max_length"):
        rows(
            [{"text": words(4)}, {"text": words(26)}],
            streaming=streaming,
            settings={"max_length": 12, "too_long": "error"},
        )


@given(length=st.integers(1, 60), max_length=st.integers(2, 20), min_length=st.integers(1, 2))
def test_pieces_are_the_document(length, max_length, min_length):
    cutter = Cutter(max_length, min_length, "split", False, 4, 2)
    columns, ids = cutter.empty(), list(range(length))
    cutter.add(columns, Document("here", ids, ids))
    joined = [token for piece in columns["input_ids"] for token in piece]
    rest = length % max_length
    dropped = rest if rest < max(min_length, 2) else 0  # one token alone teaches nothing
    assert joined == ids[: length - dropped]
    assert all(len(piece) <= max_length for piece in columns["input_ids"])


def test_blank_documents_are_too_short(rows):
    examples, report = rows([{"text": " \n\n "}, {"text": ""}, {"text": words(3)}], settings={"min_length": 1})
    assert len(examples) == 1 and report.total.too_short == 2


def test_nothing_left_says_why(rows):
    with pytest.raises(ValueError, match=r"got none: all 12 documents are shorter than min_length .min_length=50"):
        rows([{"text": words(5)}] * 12, settings={"min_length": 50})
    with pytest.raises(ValueError, match=r"1 shorter than min_length, 1 broken \(rows.jsonl:2: Expecting"):
        rows([{"text": ""}, "{"])


def test_tokens_are_taken_as_they_are(rows):
    examples, _ = rows([{"input_ids": [5, 6, 7], "text": "ignored"}, {"input_ids": [5, 6], "labels": [-100, 6]}])
    assert [example["input_ids"] for example in examples] == [[5, 6, 7], [5, 6]]
    assert [example["labels"] for example in examples] == [[5, 6, 7], [-100, 6]]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights(rows, streaming):
    given_rows = [
        {"text": words(3), "w": 0.5},
        {"input_ids": [5, 6, 7], "w": [0, 1, 2.5]},
        {"messages": CHAT, "w": [9, 9, 0.25, 9, 0.75]},
        {"text": words(2), "w": None},
        {"text": words(2), "w": 0},
    ]
    examples, report = rows(given_rows, streaming=streaming, template=MARKED, weights_column="w")
    assert [example["weights"] for example in examples[:2]] == [[0.5] * 4, [0, 1, 2.5]]
    chat = examples[2]
    seen = [(label, weight) for label, weight in zip(chat["labels"], chat["weights"]) if label != -100]
    two, three = (len(tokenizer()(text)["input_ids"]) for text in ("two<|endoftext|>", "three of them<|endoftext|>"))
    assert [weight for _, weight in seen] == [0.25] * two + [0.75] * three
    assert examples[3]["weights"] == [1.0] * 3
    assert len(examples) == 4 and report.total.uncounted == 1  # weights of 0 alone teach nothing


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": 3}, "column 'text' must hold a string, got int 3 .in rows.jsonl:2"),
        ({"text": None}, "column 'text' must hold a text, messages or tokens, got null .in rows.jsonl:2"),
        ({"body": "a"}, "rows.jsonl:2 of .* must have one of 'input_ids', 'text', 'messages', got 'body'"),
        ({}, "must have one of 'input_ids', 'text', 'messages', got nothing"),
        ({"messages": "a"}, "column 'messages' must hold a list of messages, got str 'a'"),
        ({"messages": [{"from": "user", "value": "a"}]}, "a message must have a role and a content, got from, value"),
        ({"messages": [{"role": "user", "content": None}]}, "must have a content, got only the role 'user'"),
        ({"input_ids": [1.5, 2]}, r"column 'input_ids' must hold a list of ints, got list \[1.5, 2\]"),
        ({"input_ids": [1, 2], "labels": [1]}, "one label for each of the 2 tokens, got 1"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_something_else_are_errors(rows, row, message, streaming):
    with pytest.raises(ValueError, match=message):
        rows([{"text": words(3)}, row], streaming=streaming, template=MARKED)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": [1, 2], "w": [1.0]}, "column 'w' must hold one number for each of the 2 tokens, got 1"),
        ({"messages": CHAT, "w": [1.0]}, "one number for each of the 5 messages, got 1"),
        ({"text": "a", "w": [1.0]}, "one number for the whole text, whose tokens are not known beforehand"),
        ({"text": "a", "w": "much"}, "finite numbers of at least 0, got 'much'"),
        ({"text": "a", "w": -1}, "finite numbers of at least 0, got -1"),
        ({"text": "a"}, "must hold weights or null, got only the columns 'text'"),
    ],
)
def test_weights_that_do_not_fit_are_errors(rows, row, message):
    with pytest.raises(ValueError, match=message):
        rows([row], template=MARKED, weights_column="w")


def counted(example) -> str:
    return tokenizer().decode([label for label in example["labels"] if label != -100])


@pytest.mark.parametrize("template, end", [(MARKED, "<|endoftext|>"), (PLAIN, "<|endoftext|>\n")])
def test_only_the_assistant_counts_in_a_chat(rows, template, end):
    [example], _ = rows([{"messages": CHAT}], template=template)
    assert counted(example) == f"two{end}three of them{end}"
    text = "".join(f"<{m['role']}>\n{m['content']}<|endoftext|>\n" for m in CHAT)
    assert tokenizer().decode(example["input_ids"]) == text


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_a_chat_without_the_assistant_teaches_nothing(rows, template):
    examples, report = rows([{"messages": CHAT[:2]}, {"messages": CHAT[:3]}], template=template)
    assert len(examples) == 1 and report.total.uncounted == 1
    assert "1 without a token that the loss counts" in str(report)


def test_chats_in_tables(tmp_path):
    """As lists of messages, and as the columns of lists of older data sets."""
    for name, column in (("new", [CHAT]), ("old", [{key: [m[key] for m in CHAT] for key in ("role", "content")}])):
        datasets.Dataset.from_dict({"chat": column}).to_parquet(tmp_path / f"{name}.parquet")
        dataset, _ = build({"path": str(tmp_path / f"{name}.parquet"), "messages_column": "chat"}, template=PLAIN)
        assert counted(dataset[0]) == "two<|endoftext|>\nthree of them<|endoftext|>\n"


def test_text_goes_before_messages(rows):
    [example], _ = rows([{"text": words(3), "messages": CHAT}], template=MARKED)
    assert len(example["input_ids"]) == 4
    [example], _ = rows([{"text": None, "messages": CHAT}], template=MARKED)
    assert counted(example).startswith("two")


def test_templates_must_exist_and_be_consistent(rows):
    with pytest.raises(ValueError, match=r"tokenizer must have a chat template.* set tokenizer\.chat_template"):
        rows([{"messages": CHAT}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1 .*must be prefix-consistent, got one that renders 3 of 5"):
        rows([{"messages": CHAT}], template=FORGETFUL)
    broken = "{{ raise_exception('system first') }}"
    with pytest.raises(ValueError, match=r"must hold a chat, in rows.jsonl:1 of .*: system first"):
        rows([{"messages": CHAT}], template=broken)
    once = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    with pytest.raises(ValueError, match=r"must mark each of 2 messages of the assistant .* got 1 marked"):
        rows([{"messages": CHAT}], template=once)


def test_the_report_is_logged_by_source(tmp_path, caplog):
    caplog.set_level(logging.INFO, "beacon")
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": words(20)}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"text": words(3)}] * 4)
    dataset, report = build([one, two], stopping="first_exhausted")
    assert report.lines() == [record.message for record in caplog.records if record.name.startswith("beacon")]
    assert report.lines()[0] == (
        f"{one}: 1 documents, 1 kept; 1 examples of 21 tokens, 0 without a full window, at most 4 windows"
    )
    assert report.lines()[-1] == f"data set: {len(dataset)} examples"
    assert (report.total.documents, report.total.tokens, report.examples) == (5, 37, len(dataset))
    assert set(origins(dataset)) <= {"one.jsonl:1", *(f"two.jsonl:{i}" for i in range(1, 5))}
