import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon.training.data.packing import plan_packs
from tests.training.tiny_data import CHAT, MARKED, build, words, write_jsonl


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@given(lengths=st.lists(st.integers(1, 50), max_size=60), room=st.integers(0, 30))
def test_packs_hold_every_document_once(lengths, room):
    capacity = max(lengths, default=1) + room
    packs = plan_packs(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert packs == sorted(sorted(pack) for pack in packs)
    totals = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(0 < total <= capacity for total in totals)
    # No pack could be emptied into the others' room: two that fit into one would have been one.
    assert sum(total * 2 <= capacity for total in totals) <= 1


def test_the_fullest_pack_that_has_room_is_taken():
    assert plan_packs([2, 6, 3, 5, 4], 10) == [[0, 2, 3], [1, 4]]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_start_again_at_0(tmp_path, streaming):
    lengths = [12, 4, 9, 16, 3]
    rows = [{"text": words(length - 1)} for length in lengths]
    rows[1] = {"input_ids": [7, 8, 9, 10], "w": [1, 2, 3, 4]}
    source = {"path": write_jsonl(tmp_path / "a.jsonl", [{"w": None, **row} for row in rows]), "weights_column": "w"}
    dataset, report = build(source, max_length=16, packing=True, streaming=streaming, shuffle_buffer=0)
    examples = list(dataset)
    assert [example["origin"] for example in examples] == ["a.jsonl:1 + 1 more", "a.jsonl:3 + 1 more", "a.jsonl:4"]
    starts = [[i for i, position in enumerate(e["position_ids"]) if position == 0] for e in examples]
    assert starts == [[0, 12], [0, 9], [0]]
    assert examples[0]["position_ids"] == [*range(12), *range(4)]
    assert examples[0]["input_ids"][12:] == [7, 8, 9, 10]
    assert examples[0]["weights"] == [1.0] * 12 + [1, 2, 3, 4]
    for example, begins in zip(examples, starts):
        wanted = [-100 if i in begins else token for i, token in enumerate(example["input_ids"])]
        assert example["labels"] == wanted
    # Windows of 8 by steps of 4 do not cross documents.
    assert [example["windows"] for example in examples] == [2 + 0, 1 + 0, 3]
    assert report.total.documents == 5 and report.examples == (None if streaming else 3)


def test_uncounted_labels_stay_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT}])
    [packed] = build(path, template=MARKED, packing=True)[0]
    [single, _] = build(path, template=MARKED)[0]
    assert packed["labels"] == single["labels"] * 2 and packed["labels"][0] == -100


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on
def test_packing_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": words(3 + i % 7)} for i in range(50)])
    alone, _ = build(path, max_length=16, packing=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    together, _ = build(path, max_length=16, packing=True, num_proc=2)
    assert list(alone) == list(together)
