import numpy as np
import pytest
import torch

from beacon.training.collator import BeaconCollator


def test_examples_are_padded_on_the_right():
    batch = BeaconCollator(9)([{"input_ids": [5, 6, 7], "origin": "a:1", "windows": 0}, {"input_ids": [5, 6]}])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "lengths", "origins"}
    assert batch["lengths"] == [3, 2]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 6, 9]]
    assert batch["labels"].tolist() == [[5, 6, 7], [5, 6, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["origins"] == ["a:1", "unknown"]
    assert {value.dtype for name, value in batch.items() if name not in ("lengths", "origins")} == {torch.int64}


@pytest.mark.parametrize("pad, eos, used", [(3, 4, 3), (None, 4, 4), (None, None, 0)])
def test_the_tokenizer_says_what_pads(pad, eos, used):
    class Tokenizer:
        pad_token_id, eos_token_id = pad, eos

    assert BeaconCollator(Tokenizer()).pad_token_id == used


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_lists_arrays_and_tensors(kind):
    frozen = np.array([1, 2], dtype=np.int32)
    frozen.flags.writeable = False
    examples = [{"input_ids": kind([1, 2, 3]), "labels": kind([-100, 2, 3])}, {"input_ids": frozen}]
    batch = BeaconCollator(0)(examples)
    assert batch["labels"].tolist() == [[-100, 2, 3], [1, 2, -100]]


def test_the_batch_has_its_own_memory():
    ids = np.array([1, 2, 3])
    batch = BeaconCollator(0)([{"input_ids": ids}])
    batch["input_ids"][0, 0] = 7
    assert ids[0] == 1 and batch["labels"][0, 0] == 1


def test_weights_are_1_where_there_are_none_and_0_at_padding():
    batch = BeaconCollator(0)([{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6], "weights": [0.5, 2]}])
    assert batch["weights"].dtype == torch.float32
    assert batch["weights"].tolist() == [[1, 1, 1], [0.5, 2, 0]]


def test_packed_examples_become_one_row():
    packed = {"input_ids": [1, 2, 3, 4, 5], "position_ids": [0, 1, 2, 0, 1], "origin": "a + 1 more"}
    batch = BeaconCollator(0)([packed, {"input_ids": [6, 7], "weights": [0.5, 0.5]}])
    assert set(batch) == {"input_ids", "labels", "position_ids", "weights", "lengths", "origins"}
    assert batch["lengths"] == [3, 2, 2]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, 7]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 1, 0.5, 0.5]]
    assert batch["origins"] == ["a + 1 more", "unknown"]


def test_lengths_of_packed_documents_are_understood():
    batch = BeaconCollator(0)([{"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_masks_of_other_libraries_say_what_counts(name):
    batch = BeaconCollator(0)([{"input_ids": [1, 2, 3], name: [0, 1, 1]}])
    assert batch["labels"].tolist() == [[-100, 2, 3]]


def test_padding_that_is_there_already_is_dropped():
    examples = [
        {"input_ids": [0, 0, 1, 2], "attention_mask": [0, 0, 1, 1], "weights": [0, 0, 3, 4]},
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, 0]},
    ]
    batch = BeaconCollator(9)(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [5, 6, 7]]
    assert batch["labels"].tolist() == [[1, 2, -100], [-100, 6, 7]]
    assert batch["weights"].tolist() == [[3, 4, 0], [1, 1, 1]]
    left = {"input_ids": [0, 0, 1, 2], "attention_mask": [0, 0, 1, 1], "position_ids": [1, 1, 0, 1]}
    assert BeaconCollator(9)([left])["position_ids"].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "example, message",
    [
        ({"text": "a", "origin": "x:3"}, "the example 'x:3' must have input_ids, got text, origin"),
        ({"input_ids": []}, "must have at least one token, got none"),
        ({"input_ids": [1], "attention_mask": [0]}, "that is no padding, got only padding"),
        ({"input_ids": [[1, 2]]}, r"input_ids of one dimension, got the shape \(1, 2\)"),
        ({"input_ids": [1.5]}, "whole numbers as input_ids, got torch.float64"),
        ({"input_ids": ["a"]}, "must have numbers as input_ids"),
        ({"input_ids": [1, [2]]}, "must have numbers as input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, r"as many labels as input_ids \(2\), got 1"),
        ({"input_ids": [1, 2], "weights": [1.0]}, r"as many weights as input_ids \(2\), got 1"),
        ({"input_ids": [1, 2], "position_ids": [0]}, r"as many position_ids as input_ids \(2\), got 1"),
        ({"input_ids": [1, 2], "position_ids": [5, 6]}, r"count up from 0 in each document, got \[5, 6\]"),
        ({"input_ids": [1, 2], "position_ids": [0, 3]}, r"count up from 0 in each document, got \[0, 3\]"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 2]}, "seq_lengths that add up to its tokens, got 3 for 2 tokens"),
    ],
)
def test_examples_that_do_not_fit_are_errors(example, message):
    with pytest.raises(ValueError, match=message):
        BeaconCollator(0)([example])


def test_a_batch_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one example"):
        BeaconCollator(0)([])
