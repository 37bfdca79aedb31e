import itertools
import json
import pickle
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from torch.utils.data import DataLoader

from beacon.training.collator import BeaconCollator
from beacon.training.data import DataConfig, build_dataset
from tests.training.tiny_data import build, origins, tokenizer, words, write_jsonl

# From Python 3.12 on, of the workers of data loaders.
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def corpus(tmp_path) -> str:
    """Four files of twelve documents."""
    (tmp_path / "corpus").mkdir()
    for file in range(4):
        write_jsonl(tmp_path / "corpus" / f"{file}.jsonl", [{"text": words(2 + i)} for i in range(12)])
    return str(tmp_path / "corpus")


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


@pytest.mark.parametrize("packing", [False, True])
def test_results_lie_in_files_and_are_found_again(tmp_path, corpus, packing, caplog):
    single = write_jsonl(tmp_path / "single.jsonl", [{"text": words(5)}, "{", {"text": ""}])
    first, report = build([corpus, single], packing=packing, max_length=16)
    assert first.cache_files and all(Path(file["filename"]).is_file() for file in first.cache_files)
    before = files(tmp_path / "cache")

    used = tokenizer()
    used("leaves its settings in the tokenizer", truncation=True, max_length=2, padding="max_length")
    config = DataConfig(sources=[corpus, single], packing=packing, max_length=16)
    again, same = build_dataset(config, used, window=8, stride=4)
    assert files(tmp_path / "cache") == before
    assert list(again) == list(first) and same == report
    assert same.sources[1].broken == 1  # counted though nothing was computed
    assert "hash" not in caplog.text


@pytest.mark.parametrize(
    "change", [{"window": 4}, {"append_eos": False}, {"max_length": 5}, {"too_long": "split"}, {"template": "x"}]
)
def test_what_decides_the_examples_decides_the_files(tmp_path, corpus, change):
    build(corpus)
    before = files(tmp_path / "cache")
    build(corpus, **change)
    assert len(files(tmp_path / "cache")) == len(before) + 1


def test_what_does_not_decide_them_does_not(tmp_path, corpus):
    build(corpus)
    before = files(tmp_path / "cache")
    build({"path": corpus, "weight": 3}, seed=5, num_proc=2)
    assert files(tmp_path / "cache") == before


def test_stride_and_window_must_fit(corpus):
    with pytest.raises(ValueError, match="stride must be from 1 to window, got stride=8 and window=4"):
        build(corpus, window=4, stride=8)


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_mixed_by_weight(tmp_path, streaming):
    big = write_jsonl(tmp_path / "big.jsonl", [{"text": words(3)}] * 300)
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": words(3)}] * 10)
    sources = [{"path": big, "weight": 3}, {"path": small, "weight": 1}]

    def mix(**settings) -> list[str]:
        return origins(build(sources, streaming=streaming, shuffle_buffer=0, **settings)[0])

    everything, shortest = mix(), mix(stopping="first_exhausted")
    assert set(everything) == {f"big.jsonl:{i + 1}" for i in range(300)} | {f"small.jsonl:{i + 1}" for i in range(10)}
    share = sum(name.startswith("small") for name in everything) / len(everything)
    assert 0.18 < share < 0.32
    assert len(shortest) < 100 and len(set(shortest)) == len(shortest)
    assert mix() == everything != mix(seed=1)


def test_weights_of_one_source_give_all_of_them_weights(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": words(3), "w": 2}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"text": words(3)}])
    dataset, _ = build([{"path": one, "weights_column": "w"}, two])
    assert {e["origin"]: e["weights"] for e in dataset} == {"one.jsonl:1": [2.0] * 4, "two.jsonl:1": [1.0] * 4}


def test_a_stream_with_an_empty_source_ends(tmp_path, corpus):
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": ""}] * 3)
    assert len(set(origins(build([corpus, short], streaming=True)[0]))) == 48


def test_a_stream_reads_no_further_than_it_must(tmp_path):
    lines = [{"text": words(3)}] * 200 + ["{ the end"]
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": words(3)}] * 200)
    settings = {"streaming": True, "broken_lines": "error", "shuffle_buffer": 32}
    for sources, more in (
        (write_jsonl(tmp_path / "a.jsonl", lines), {}),
        ([write_jsonl(tmp_path / "a.jsonl", lines), other], {}),
        (write_jsonl(tmp_path / "a.jsonl", lines), {"packing": True, "max_length": 16}),
    ):
        dataset, report = build(sources, **settings, **more)
        assert report.total.documents == 0
        assert len(list(itertools.islice(dataset, 8))) == 8
        assert 0 < report.sources[0].documents < 200
        with pytest.raises(ValueError, match=r"must be a JSON object, got another in a.jsonl:201"):
            list(dataset)


def test_a_stream_does_not_hold_what_it_read(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": words(3), "padding": "x" * 20_000}] * 1000)
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # a hole of zeros, one line of a gigabyte
    dataset, _ = build(str(path), streaming=True, shuffle_buffer=4)
    tracemalloc.start()
    assert sum(1 for _ in itertools.islice(dataset, 900)) == 900
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000  # of the 18 million bytes that were read


def test_a_stream_has_one_order_for_each_seed_and_epoch(corpus):
    dataset, _ = build(corpus, streaming=True, shuffle_buffer=8)
    first = origins(dataset)
    assert origins(dataset) == first != sorted(first)
    dataset.set_epoch(1)
    second = origins(dataset)
    assert origins(dataset) == second != first and sorted(second) == sorted(first)
    again, _ = build(corpus, streaming=True, shuffle_buffer=8)
    assert origins(again) == first
    again.set_epoch(1)
    assert origins(again) == second
    assert origins(build(corpus, streaming=True, shuffle_buffer=8, seed=1)[0]) != first


def test_a_mixture_has_one_order_too(tmp_path, corpus):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": words(3)}] * 20)
    dataset, _ = build([corpus, other], streaming=True, shuffle_buffer=8)
    first = origins(dataset)
    dataset.set_epoch(1)
    second = origins(dataset)
    dataset.set_epoch(0)
    assert origins(dataset) == first != second


def loader(dataset, **options) -> DataLoader:
    return DataLoader(dataset, batch_size=4, collate_fn=BeaconCollator(tokenizer()), **options)


def delivered(batches) -> list[str]:
    return [origin for batch in batches for origin in batch["origins"]]


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_data_loaders_deliver_everything_once(corpus, workers, packing):
    dataset, _ = build(corpus, streaming=True, shuffle_buffer=8, packing=packing, max_length=16)
    tokens = sum(len(example["input_ids"]) for example in dataset)
    batches = list(loader(dataset, num_workers=workers))
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) <= tokens
    read = sum(batch["input_ids"].numel() if packing else int(batch["attention_mask"].sum()) for batch in batches)
    assert read == tokens
    assert delivered(batches) == delivered(loader(dataset, num_workers=workers))
    if not packing:
        assert len(set(delivered(batches))) == len(delivered(batches)) == 48


@FORKS
def test_workers_that_stay_get_the_epoch(corpus):
    dataset, _ = build(corpus, streaming=True, shuffle_buffer=8)
    batches = loader(dataset, num_workers=1, persistent_workers=True)
    first = delivered(batches)
    dataset.set_epoch(1)
    assert sorted(delivered(batches)) == sorted(first) != delivered(batches) != first


def test_rows_of_workers_are_told_apart(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"text": [words(3)] * 2}).to_parquet(tmp_path / "a.parquet")
    dataset, _ = build(str(tmp_path / "a.parquet"), streaming=True, shuffle_buffer=0)
    assert origins(dataset) == [f"{tmp_path}/a.parquet[{row}]" for row in range(2)]
    monkeypatch.setattr("beacon.training.data.tokenizing.get_worker_info", lambda: SimpleNamespace(id=3))
    assert origins(dataset) == [f"{tmp_path}/a.parquet[{row} of worker 3]" for row in range(2)]


@pytest.mark.parametrize("processes", [2, 8])
def test_processes_share_a_stream(corpus, processes):
    """Fewer files than processes: all read the same order and take turns; else each has its own files."""
    dataset, _ = build(corpus, streaming=True, shuffle_buffer=8)
    parts = []
    for index in range(processes):
        batches = prepare_data_loader(
            loader(dataset), num_processes=processes, process_index=index, dispatch_batches=False, put_on_device=False
        )
        batches.set_epoch(1)
        assert isinstance(batches.dataset, IterableDatasetShard) == (processes > 4)
        parts.append(delivered(batches))
    assert len({len(part) for part in parts}) == 1
    assert len(set(itertools.chain(*parts))) == 48
    if processes > 4:
        dataset.set_epoch(1)
        order = origins(dataset)
        for index, part in enumerate(parts):
            assert part[:4] == order[4 * index : 4 * index + 4]


def test_a_stored_data_set_feeds_a_loader(corpus):
    dataset, _ = build(corpus)
    batch = next(iter(loader(dataset)))
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == batch["attention_mask"].shape
    assert dataset["windows"][:] == [0 if i + 3 < 8 else (i + 3 - 8) // 4 + 1 for i in range(12)] * 4


def test_streams_can_be_sent_to_other_processes(corpus):
    dataset, report = build(corpus, streaming=True, shuffle_buffer=8)
    assert origins(pickle.loads(pickle.dumps(dataset))) == origins(dataset)
    assert json.dumps(str(report))
