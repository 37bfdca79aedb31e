"""Documents from local files and named data sets, and perplexity of their ends."""

import gzip
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
import torch

import beacon
from beacon.evaluation.methods import Beacon, Stock
from beacon.evaluation.tasks import make_task
from beacon.evaluation.tasks.documents import data_set_texts, local_texts
from beacon.evaluation.tasks.haystack import Haystack
from beacon.evaluation.tasks.texts import take_texts
from beacon.evaluation.text import encode
from tests.evaluation.tiny import CODE, tiny_llama, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model(tokenizer):
    return beacon.wrap(tiny_llama(vocab=len(tokenizer)), beacon.BeaconConfig(window=16, ratios=(2, 4, 8), reserve=8))


@pytest.fixture
def data(tmp_path):
    """The three named data sets, in the columns and files that they have on the hub."""
    books = {
        "short_book_title": ["One", "Two", "Three"],
        "publication_date": [1900, 1901, 1902],
        "url": ["u1", "u2", "u3"],
        "text": ["too short", CODE, CODE[::-1]],
    }
    (tmp_path / "pg19" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(books), tmp_path / "pg19" / "data" / "test-00000-of-00001.parquet")
    other = {name: values[:1] for name, values in books.items()}
    pyarrow.parquet.write_table(pyarrow.table(other), tmp_path / "pg19" / "data" / "train-00000-of-00001.parquet")
    proofs = [{"text": "short", "meta": {}}, {"text": "\u2028proof " + CODE, "meta": {"set": [1, "x"]}}]
    (tmp_path / "proof-pile" / "test").mkdir(parents=True)
    with gzip.open(tmp_path / "proof-pile" / "test" / "proofpile_test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in proofs) + "\n\n")
    (tmp_path / "proof-pile" / ".cache").mkdir()
    (tmp_path / "proof-pile" / ".cache" / "test.jsonl").write_text('{"text": "hidden"}\n')
    (tmp_path / "codeparrot").mkdir()
    with gzip.open(tmp_path / "codeparrot" / "file-000000000054.json.gz", "wt") as file:
        for number in range(40):
            file.write(json.dumps({"repo_name": f"r/{number}", "path": "a.py", "content": CODE[:400]}) + "\n")
    return tmp_path


def test_named_data_sets(data):
    assert [text for _, text in data_set_texts("pg19", data)] == ["too short", CODE, CODE[::-1]]
    names, texts = zip(*data_set_texts("proof-pile", data), strict=True)
    assert names == ("test/proofpile_test.jsonl.gz[0]", "test/proofpile_test.jsonl.gz[1]")
    assert texts == ("short", "\u2028proof " + CODE)
    assert [text for _, text in data_set_texts("codeparrot", data)] == [CODE[:400]] * 40


@pytest.mark.parametrize(
    "name, command",
    [
        ("pg19", "hf download emozilla/pg19-test --repo-type dataset --include 'data/"),
        ("proof-pile", "hf download hoskinson-center/proof-pile .*'test/"),
        ("codeparrot", "hf download codeparrot/codeparrot-clean-valid"),
    ],
)
def test_missing_data_sets(name, command, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{name} needs files in .*{name}, found no Parquet.*{command}"):
        next(data_set_texts(name, tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"could not read .* from the hub .*{command}.*data='data'"):
        next(data_set_texts(name, None))  # tests are offline


def test_local_texts(data, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "b.md").write_text("# b")
    (tmp_path / "own" / "a.txt").write_text("a\r\n")
    (tmp_path / "own" / "empty.txt").touch()
    (tmp_path / "own" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "own" / "c.jsonl").write_text('{"content": "c"}\n')
    assert list(local_texts(tmp_path / "own")) == [("a.txt", "a\n"), ("b.md", "# b"), ("c.jsonl[0]", "c")]
    assert list(local_texts(tmp_path / "own" / "a.txt")) == [("a.txt", "a\n")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", '{"body": "x"}', r"x\.jsonl\[0\] must have text in a column text or content, got the columns body"),
        ("x.jsonl", '{"text": 3}', "must have text in a column"),
        ("x.jsonl", '{"text": "a"}\n{"text":', r"x\.jsonl\[1\] must be a JSON object"),
        ("x.jsonl", "[1]", "must be a JSON object on a line of its own, got a list"),
        ("x.txt", " ", "must hold some text"),
        ("x.txt", b"\xff", "must be UTF-8"),
    ],
)
def test_bad_texts(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(local_texts(tmp_path))


def test_a_folder_without_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match=r"must hold text in files ending in \.txt, .*got none"):
        list(local_texts(tmp_path))


def test_stretches_follow_each_other(tmp_path, tokenizer):
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.py").write_text(CODE.upper())
    whole = encode(tokenizer, CODE.rstrip("\n") + "\n" + CODE.upper().rstrip("\n") + "\n")
    haystack = Haystack(tmp_path)
    for number in (3, 0, 1):
        assert torch.equal(haystack.stretch(tokenizer, 500, number), whole[500 * number : 500 * (number + 1)])
    many = haystack.stretch(tokenizer, 500, 1000)  # begins again
    assert len(many) == 500 and torch.equal(many, Haystack(tmp_path).stretch(tokenizer, 500, 1000))
    assert len(haystack.stretch(tokenizer, len(whole))) == len(whole)
    with pytest.raises(ValueError, match=rf"the longest possible is {len(whole)}"):
        haystack.check(tokenizer, len(whole) + 1)


def test_documents_long_enough(tokenizer):
    documents = [("a", "x" * 50), ("b", CODE), ("c", "y " * 40), ("d", CODE[5:])]
    texts = take_texts(tokenizer, lambda: documents, 300, 5, joined=False, name="some")
    assert [text.tolist() for text in texts] == [encode(tokenizer, CODE[at:])[:300].tolist() for at in (0, 5)]
    assert len(take_texts(tokenizer, lambda: documents, 300, 1, joined=False, name="some")) == 1
    longest = len(encode(tokenizer, CODE))
    with pytest.raises(ValueError, match=rf"of some, got {longest + 1}; the longest possible is {longest} "):
        take_texts(tokenizer, lambda: documents, longest + 1, 5, joined=False, name="some")
    joined = take_texts(tokenizer, lambda: [("a", "x" * 50)] * 6, 102, 5, joined=True, name="some")
    assert [text.tolist() for text in joined] == 3 * [
        2 * [*encode(tokenizer, "x" * 50).tolist(), tokenizer.eos_token_id]
    ]
    many = take_texts(tokenizer, lambda: documents, 100, 1000, joined=True, name="some")
    whole = [i for _, text in documents for i in [*encode(tokenizer, text).tolist(), tokenizer.eos_token_id]]
    assert torch.cat(many).tolist() == whole[: len(whole) // 100 * 100]
    total = sum(len(encode(tokenizer, text)) + 1 for _, text in documents)
    with pytest.raises(ValueError, match=rf"the longest possible is {total} \(all"):
        take_texts(tokenizer, lambda: documents, total + 1, 5, joined=True, name="some")


def test_a_beginning_is_that_of_the_whole_document(tokenizer):
    dense = "\U0001f9ea" * 500  # four bytes and tokens per character
    sparse = " " * 0 + "def function_1(value):\n" * 2000
    for document in (dense, sparse, CODE):
        text = take_texts(tokenizer, lambda document=document: [("a", document)], 200, 1, joined=False, name="x")[0]
        assert text.tolist() == encode(tokenizer, document)[:200].tolist()


def test_perplexity_is_that_of_a_whole_forward(tmp_path, tokenizer, model):
    (tmp_path / "code.py").write_text(CODE)
    task = make_task("perplexity", data=tmp_path / "code.py", lengths=[64, 48], targets=20, limit=1)
    items = list(task.items(model, tokenizer))
    assert [item.place for item in items] == [{"length": length, "source": "code"} for length in (64, 48)]
    for item in items:
        text = encode(tokenizer, CODE)[:64][-item.place["length"] :]
        with beacon.disabled(model), torch.no_grad():
            logits = model(text[None]).logits[0].double()
        expected = torch.nn.functional.cross_entropy(logits[-21:-1], text[-20:]).item()
        scores = task.run(Stock(), model, tokenizer, item).scores
        assert scores["nll"] == pytest.approx(expected, rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        with torch.no_grad():
            expected = model(text[None, :-1], ratios=4).logits[0].double()[-20:]
        expected = torch.nn.functional.cross_entropy(expected, text[-20:]).item()
        assert task.run(Beacon(4), model, tokenizer, item).scores["nll"] == pytest.approx(expected, rel=1e-4)


def test_targets_do_not_move_with_the_length(data, tokenizer):
    task = make_task("perplexity", sources=["pg19"], data=data, lengths=[100, 300], targets=40)
    texts = task._read(tokenizer, "pg19")
    ends = {tuple(task.ids(tokenizer, text, length)[-40:].tolist()) for text in texts for length in (100, 300)}
    assert len(texts) == 2 and len(ends) == 2


def test_all_sources(data, tokenizer, model):
    (data / "own").mkdir()
    (data / "own" / "x.txt").write_text(CODE)
    task = make_task(
        "perplexity",
        sources=["pg19", "proof-pile", "codeparrot", str(data / "own"), "python-library"],
        data=data,
        lengths=[120, 240],
        targets=30,
        limit=2,
    )
    items = list(task.items(model, tokenizer))
    counts = {"pg19": 2, "proof-pile": 1, "codeparrot": 2, "own": 2, "python-library": 2}
    assert [item.place["source"] for item in items] == [name for name, n in counts.items() for _ in range(2 * n)]
    assert items == list(task.items(model, tokenizer)) and len({item.name for item in items}) == len(items)
    assert [item.cluster for item in items[::2]] == [item.cluster for item in items[1::2]]  # of both lengths
    assert len({item.cluster for item in items} - {None}) == len(items) // 2
    named = make_task("perplexity", data=data, lengths=[120], targets=30, limit=1).items(model, tokenizer)
    assert [item.place["source"] for item in named] == ["pg19", "proof-pile", "codeparrot"]
    for item in items[::2]:
        scores = task.run(Beacon(4), model, tokenizer, item).scores
        assert scores["perplexity"] == pytest.approx(math.exp(scores["nll"]))


def test_whether_short_documents_are_joined(data, tokenizer):
    options = {"data": data, "lengths": [300], "targets": 30}
    with pytest.raises(ValueError, match=r"of codeparrot, got 300; the longest possible is .*the longest document"):
        list(make_task("perplexity", sources="codeparrot", joined=False, **options).items(None, tokenizer))
    assert list(make_task("perplexity", sources="codeparrot", **options).items(None, tokenizer))
    with pytest.raises(ValueError, match="of pg19, got 99999; the longest possible is"):
        list(make_task("perplexity", sources="pg19", data=data, lengths=99_999).items(None, tokenizer))


def test_too_many_targets(tmp_path, tokenizer, model, monkeypatch):
    from beacon.evaluation.tasks import perplexity

    (tmp_path / "code.py").write_text(CODE)
    task = make_task("perplexity", data=tmp_path, lengths=[64], targets=40)
    item = next(iter(task.items(model, tokenizer)))
    monkeypatch.setattr(perplexity, "MAX_LOGITS", 10 * model.config.vocab_size)
    with pytest.raises(ValueError, match="targets must be at most 10 for a vocabulary"):
        task.run(Stock(), model, tokenizer, item)


def test_losses_in_pieces(tmp_path, tokenizer, model, monkeypatch):
    from beacon.evaluation import perplexity

    (tmp_path / "code.py").write_text(CODE)
    task = make_task("perplexity", data=tmp_path, lengths=[64], targets=40)
    item = next(iter(task.items(model, tokenizer)))
    whole = task.run(Stock(), model, tokenizer, item).scores["nll"]
    monkeypatch.setattr(perplexity, "MAX_LOGITS", 7 * model.config.vocab_size)
    assert task.run(Stock(), model, tokenizer, item).scores["nll"] == pytest.approx(whole, rel=1e-6)
