import pytest
import torch

from beacon.evaluation import file_texts, is_held_out, library_texts, read_documents
from beacon.evaluation import text as module
from tests.evaluation.tiny import CODE


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of twelve files; returns the names of those held out."""
    (tmp_path / "package").mkdir()
    held = ["asyncio/base.py", "email/mime/text.py", "idlelib/run.py"]
    for i, name in enumerate([*held, *(f"package/module_{n}.py" for n in range(9))]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {i}\n{CODE[: 1300 + 40 * i]}")
    (tmp_path / "package" / "stub.py").write_text("pass\n")
    (tmp_path / "package" / "table.py").write_text("x = [" + "1, " * 1000 + "]\n")
    (tmp_path / "package" / "latin.py").write_bytes(CODE.encode() + b"\xe9")
    (tmp_path / "package" / "twin.py").write_text((tmp_path / held[0]).read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "skipped.py").write_text("# other\n" + CODE)
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return held


def test_documents(library):
    documents = read_documents()
    assert list(documents) == sorted(documents)
    assert len(documents) == 12
    assert {name.split("/")[0] for name in documents} == {"package", "asyncio", "email", "idlelib"}


def test_whole_packages_are_held_out():
    assert is_held_out("asyncio/base_events.py") and is_held_out("email/mime/text.py")
    assert not is_held_out("argparse.py") and not is_held_out("json/email.py") and not is_held_out("email.py")


def test_held_out_files_come_first(library, tokenizer):
    texts = library_texts(tokenizer, 300, 6)
    assert all(len(text.ids) == 300 for text in texts)
    assert [text.held_out for text in texts] == [True] * 3 + [False] * 3
    assert {text.name for text in texts[:3]} == set(library)


def test_short_files_are_joined(library, tokenizer):
    text = library_texts(tokenizer, 700, 1)[0]
    assert text.held_out and " + " in text.name and set(text.name.split(" + ")) <= set(library)
    assert tokenizer.eos_token_id in text.ids.tolist()


def test_same_texts_every_time(library, tokenizer):
    first, again = (library_texts(tokenizer, 500, 3) for _ in range(2))
    assert all(torch.equal(a.ids, b.ids) and a.name == b.name for a, b in zip(first, again, strict=True))


def test_too_much_asked(library, tokenizer):
    with pytest.raises(ValueError, match=r"holds \d+ texts of 1000 tokens"):
        library_texts(tokenizer, 1000, 100)


def test_file(tmp_path, tokenizer):
    path = tmp_path / "code.py"
    path.write_text(CODE)
    texts = file_texts(tokenizer, path, 200, 3)
    assert [text.name for text in texts] == ["code.py[0:]", "code.py[200:]", "code.py[400:]"]
    assert (
        tokenizer.decode(torch.cat([text.ids for text in texts]))
        == CODE[: len(tokenizer.decode(torch.cat([t.ids for t in texts])))]
    )
    whole = file_texts(tokenizer, path, 10**6, 3)
    assert len(whole) == 1 and tokenizer.decode(whole[0].ids) == CODE


def test_bad_files(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.txt"):
        file_texts(tokenizer, tmp_path / "absent.txt", 10, 1)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty file"):
        file_texts(tokenizer, tmp_path / "empty.txt", 10, 1)
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8"):
        file_texts(tokenizer, tmp_path / "bytes.bin", 10, 1)
