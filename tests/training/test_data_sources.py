import gzip
import json
import logging

import datasets
import pytest

from beacon.evaluation.text import is_held_out
from tests.training.tiny_data import build, origins, tokenizer, words, write_jsonl


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def decoded(dataset) -> list[str]:
    return [tokenizer().decode(example["input_ids"], skip_special_tokens=True) for example in dataset]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_are_documents_paragraphs_or_lines(tmp_path, streaming):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone two\r\nthree\r\n\r\n\r\nfour five\n")
    (tmp_path / "a.md").write_text("six seven\n")
    settings = {"streaming": streaming, "shuffle_buffer": 0}
    found = {
        sample_by: build({"path": str(tmp_path), "sample_by": sample_by}, **settings)[0]
        for sample_by in ("document", "paragraph", "line")
    }
    assert decoded(found["document"]) == ["six seven\n", "one two\nthree\n\n\nfour five\n"]
    assert origins(found["document"]) == ["a.md", "b.txt"]
    assert decoded(found["paragraph"]) == ["six seven", "one two\nthree", "four five"]
    assert origins(found["paragraph"]) == ["a.md:1", "b.txt:1", "b.txt:5"]
    assert decoded(found["line"]) == ["six seven", "one two", "three", "four five"]
    assert origins(found["line"]) == ["a.md:1", "b.txt:1", "b.txt:2", "b.txt:5"]


@pytest.mark.parametrize("streaming", [False, True])
def test_jsonl_gz_and_parquet(tmp_path, streaming):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"body": "one two"}\n\n{"body": "three four", "other": [1]}\n')
    rows = datasets.Dataset.from_dict({"body": ["five six", "seven eight"], "other": [1, 2]})
    rows.to_parquet(tmp_path / "b.parquet")
    for name, texts, places in (
        ("a.jsonl.gz", ["one two", "three four"], ["a.jsonl.gz:1", "a.jsonl.gz:3"]),
        ("b.parquet", ["five six", "seven eight"], [f"{tmp_path}/b.parquet[0]", f"{tmp_path}/b.parquet[1]"]),
    ):
        source = {"path": str(tmp_path / name), "text_column": "body"}
        dataset, report = build(source, streaming=streaming, shuffle_buffer=0)
        assert decoded(dataset) == texts
        assert report.total.documents == report.total.kept == 2
        assert origins(dataset) == places
        assert set(dataset.column_names) == {"input_ids", "labels", "windows", "origin"}


@pytest.mark.parametrize("streaming", [False, True])
def test_names_with_brackets_are_no_patterns(tmp_path, streaming):
    for name, text in (("a[1].parquet", "one two"), ("a1.parquet", "three four")):
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / name)
    dataset, _ = build(str(tmp_path / "a[1].parquet"), streaming=streaming, shuffle_buffer=0)
    assert decoded(dataset) == ["one two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_load_dataset_loads_is_a_source(tmp_path, streaming):
    """A folder stands in for an id: the same call without a network."""
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", [{"text": "a b", "k": 1}] * 2)
    dataset, _ = build({"path": str(tmp_path / "hub"), "format": "hub"}, streaming=streaming, shuffle_buffer=0)
    assert decoded(dataset) == ["a b", "a b"]
    assert origins(dataset) == [f"{tmp_path}/hub[0]", f"{tmp_path}/hub[1]"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_standard_library_without_what_is_held_out(monkeypatch, streaming):
    library = {f"{folder}/m{i}.py": f"def {folder}{i}(): return {i}" for folder in ("email", "json") for i in range(5)}
    monkeypatch.setattr("beacon.training.data.sources.read_documents", lambda: library)
    trained, _ = build("python-library", streaming=streaming, shuffle_buffer=0)
    held_out, _ = build({"path": "python-library", "split": "validation"}, streaming=streaming, shuffle_buffer=0)
    assert origins(trained) == [name for name in library if not is_held_out(name)]
    assert origins(held_out) == [name for name in library if is_held_out(name)] == list(library)[:5]


def test_a_folder_holds_one_format_unless_told(tmp_path):
    tmp_path = tmp_path / "data"
    (tmp_path / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}])
    (tmp_path / "sub" / "b.txt").write_text("three four")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="one format, got jsonl, text; make them several sources"):
        build(str(tmp_path))
    assert origins(build({"path": str(tmp_path), "format": "text"})[0]) == ["b.txt"]
    with pytest.raises(FileNotFoundError, match=r"one of the suffixes .parquet, .pq, got none among 3 files"):
        build({"path": str(tmp_path), "format": "parquet"})
    with pytest.raises(ValueError, match=r"suffix of a file must be .* got .bin; set format"):
        build(str(tmp_path / "c.bin"))


def test_a_glob_names_files_below_what_they_share(tmp_path):
    for name in ("x/1.jsonl", "y/1.jsonl"):
        (tmp_path / name).parent.mkdir()
        write_jsonl(tmp_path / name, [{"text": "one two"}])
    assert origins(build(f"{tmp_path}/**/*.jsonl")[0]) == ["x/1.jsonl:1", "y/1.jsonl:1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_lines_are_skipped_and_named(tmp_path, streaming, caplog):
    lines = [{"text": "one two"}, "{oops", "[1]", {"text": "three four"}, '{"text": "\\ud800"}', "{]", '{"a": 1} {}']
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    with open(path, "ab") as file:
        file.write(b'{"text": "\xff"}\n' + b"[" * 100_000)
    dataset, report = build(path, streaming=streaming, shuffle_buffer=0)
    assert origins(dataset) == ["a.jsonl:1", "a.jsonl:4"]
    counts = report.sources[0]
    assert (counts.documents, counts.kept, counts.broken) == (9, 2, 7)
    assert [place.split(":")[1] for place in counts.broken_first] == ["2", "3", "5"]
    warned = " ".join(record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert all(f"a.jsonl:{line}:" in warned for line in (2, 3, 5)) and "a.jsonl:6" not in warned
    assert "7 broken (a.jsonl:2: Expecting" in str(report)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_line_is_an_error_if_wanted(tmp_path, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}, "{oops"])
    with pytest.raises(
        ValueError, match=r"must be a JSON object, got another in a\.jsonl:2 .*set broken_lines to skip"
    ):
        list(build(path, streaming=streaming, broken_lines="error")[0])


@pytest.mark.parametrize("path", ["missing.jsonl", "no/such/folder", "*.parquet", "folder/file.txt"])
def test_what_is_not_there_is_no_such_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file: "):
        build(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_hub_id_is_not_found(streaming):
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' must be a file here or a data set on the hub"):
        build("nobody/nothing", streaming=streaming)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="must hold some text, got an empty file"):
        build(str(tmp_path / name))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_any_document_is_refused(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="must hold documents, got none"):
        build(str(tmp_path / "a.jsonl"), streaming=streaming)


def test_a_table_without_rows_is_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"text": []}, features=datasets.Features({"text": datasets.Value("string")}))
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must hold rows in Parquet files, got none"):
        build(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_are_no_text_are_named(tmp_path, streaming):
    (tmp_path / "a.txt").write_bytes(b"one \xff two")
    (tmp_path / "b.txt").write_bytes(b"fine\nnot \xff fine")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"some text " * 100)[:-9])
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no parquet")
    for source, message in (
        ({"path": str(tmp_path / "a.txt")}, r"a\.txt must be UTF-8 text, got other bytes"),
        ({"path": str(tmp_path / "b.txt"), "sample_by": "line"}, r"b\.txt:2 must be UTF-8 text, got other bytes"),
        ({"path": str(tmp_path / "c.txt.gz")}, r"c\.txt\.gz must be a whole gzip file, got a broken one"),
        ({"path": str(tmp_path / "d.parquet")}, r"d\.parquet' must hold rows in Parquet files, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            list(build(source, streaming=streaming)[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_named_beside_those_there(tmp_path, streaming):
    datasets.Dataset.from_dict({"body": ["one two"], "score": [1.0]}).to_parquet(tmp_path / "a.parquet")
    for source in (str(tmp_path / "a.parquet"), write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "score": 1}])):
        with pytest.raises(ValueError, match=r"'input_ids', '?text'?.* got 'body', 'score'; set text_column"):
            list(build(source, streaming=streaming)[0])
    source = {"path": str(tmp_path / "a.parquet"), "text_column": "body", "weights_column": "weight"}
    with pytest.raises(ValueError, match=r"must have the column 'weight' \(weights_column\), got 'body', 'score'"):
        build(source, streaming=streaming)


def test_split_and_name_are_for_hub_ids(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": words(3)}])
    with pytest.raises(ValueError, match=r"split must be train for .*jsonl.*, got 'test'"):
        build({"path": path, "split": "test"})
    with pytest.raises(ValueError, match="name must be left out for"):
        build({"path": path, "name": "en"})


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}])
    assert decoded(build(path)[0]) == ["one two"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "three four"}) + "\n")
    assert decoded(build(path)[0]) == ["three four"]
