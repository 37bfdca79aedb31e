"""Padding is never condensed and never visible: every row of a padded batch equals that row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import beacon
from beacon import segments
from tests.readers import close, configs, fixed, pad, wrapped
from tests.tiny_models import random_ids


def place(rows: list[torch.Tensor], masks: torch.Tensor) -> torch.Tensor:
    """Put every row's tokens where its mask says text, and misleading ids in the padding."""
    ids = random_ids(*masks.shape, seed=9)
    for number, row in enumerate(rows):
        ids[number, masks[number].bool()] = row
    return ids


@st.composite
def masks(draw: Any, columns: int, rows: int, every_row: bool) -> torch.Tensor:
    """Text anywhere: padding on the left, on the right, in between, or (later calls) everywhere in a row."""
    out = torch.zeros(rows, columns, dtype=torch.long)
    for row in range(rows):
        kind = draw(st.sampled_from(["left", "right", "inside"]))
        count = draw(st.integers(1 if every_row or row == 0 else 0, columns))
        if kind == "inside":
            where = draw(st.permutations(range(columns)))[:count]
        else:
            where = range(columns - count, columns) if kind == "left" else range(count)
        out[row, list(where)] = 1
    return out


@given(configs(), st.data())
@settings(max_examples=40)
def test_any_padding_equals_each_row_alone(config: Any, data: Any) -> None:
    """Prefill and continuation, with logits, states and the loss of both calls.

    In float64, but the stock attention counts padding columns and has its angles in float32: hence 1e-6.
    """
    model = wrapped(config, dtype=torch.float64)
    rows = data.draw(st.integers(2, 3))
    first = data.draw(masks(data.draw(st.integers(3, 30)), rows, True))
    second = data.draw(masks(data.draw(st.integers(1, 20)), rows, False))
    texts = [random_ids(1, 50, seed=row)[0] for row in range(rows)]
    counts = first.sum(dim=1).tolist()
    both = torch.cat([first, second], dim=1)
    ids = place([text[: int(n)] for text, n in zip(texts, both.sum(dim=1), strict=True)], both)
    width = first.shape[1]
    with torch.no_grad():
        begun = model(ids[:, :width], first, labels=ids[:, :width], use_cache=True, logits_to_keep=width)
        cache = begun.past_key_values
        more = model(ids[:, width:], both, past_key_values=cache, labels=ids[:, width:], logits_to_keep=second.shape[1])
    losses = torch.zeros(2, dtype=torch.float64)
    for row, text in enumerate(texts):
        head, tail = text[None, : counts[row]], text[None, counts[row] : counts[row] + int(second[row].sum())]
        with torch.no_grad():
            alone = model(head, labels=head, use_cache=True, logits_to_keep=head.shape[1], num_items_in_batch=1)
            close(begun.logits[row, first[row].bool()], alone.logits[0], 1e-6, f"prefill, row {row}")
            losses[0] += alone.loss
            after = alone.past_key_values
            if tail.shape[1]:
                mask = torch.ones(1, counts[row] + tail.shape[1])
                alone = model(tail, mask, past_key_values=after, labels=tail, logits_to_keep=99, num_items_in_batch=1)
                close(more.logits[row, second[row].bool()], alone.logits[0], 1e-6, f"continuation, row {row}")
                losses[1] += alone.loss
        ours, theirs = cache.stats()[row], after.stats()[0]
        assert {**ours, "attention_path": 0, "bytes": 0} == {**theirs, "attention_path": 0, "bytes": 0}
    counted = sum(counts) - rows
    assert abs(begun.loss * counted - losses[0]) < 1e-5 and abs(more.loss * second.sum() - losses[1]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_compress_and_decode_padded(side: str) -> None:
    """In float32: right padding in compress, then token by token with masks over all columns."""
    model = wrapped(fixed(8, 2, sink=1), "llama3")
    texts = [random_ids(1, n, seed=n)[0] for n in (37, 9, 20)]
    ids, mask = pad(texts, side)
    cache, news = model.compress(ids, mask), random_ids(3, 10, seed=5)
    alone = [model.compress(text[None]) for text in texts]
    with torch.no_grad():
        for step in range(10):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            logits = model(news[:, step : step + 1], mask, past_key_values=cache).logits
            for row in range(3):
                own = model(news[row : row + 1, step : step + 1], past_key_values=alone[row]).logits
                close(logits[row], own[0], 2e-5, f"row {row}, token {step}")


def test_a_padded_text_may_come_whole_or_only_new() -> None:
    model = wrapped(fixed(8, 2))
    texts = [random_ids(1, n, seed=n)[0] for n in (30, 13)]
    ids, mask = pad(texts)
    cache = model.compress(ids[:, :25], mask[:, :25])
    whole = model(ids, mask, past_key_values=cache.fork()).logits
    new = model(ids[:, 25:], mask, past_key_values=cache.fork()).logits
    assert torch.equal(whole, new) and new.shape[1] == 5
    noisy = ids.clone()
    noisy[1, 3] = 50  # padding: no token of the text
    assert torch.equal(model(noisy, mask, past_key_values=cache.fork()).logits, new)


def test_left_padded_short_batch_then_condensed_equals_each_row() -> None:
    """The first calls are the stock model's; what it cached is taken over, padding left out."""
    model = wrapped(fixed(16, 4))
    texts = [random_ids(1, n, seed=n)[0] for n in (12, 7)]
    ids, mask = pad(texts)
    cache = model.compress(ids, mask)
    assert cache.stats()[0]["attention_path"].startswith("stock")
    news = random_ids(2, 30, seed=3)
    mask = torch.cat([mask, torch.ones(2, 30, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = model(news, mask, past_key_values=cache).logits
        for row, text in enumerate(texts):
            own = model(torch.cat([text, news[row]])[None]).logits
            close(logits[row], own[0, len(text) :], 2e-5, f"row {row}")


def test_rows_draw_ratios_of_their_own() -> None:
    """The random policies know the row by its place in the batch it was first read in."""
    config = beacon.BeaconConfig(window=8, ratios=(1, 2, 4, 8), ratio_policy="step-random", seed=3)
    model, ids = wrapped(config), random_ids(1, 64).expand(2, -1)
    cache = model.compress(ids)
    first, second = (state.ratios for state in cache.states)
    assert first != second
    again = model.compress(ids[:, :30])
    mask = torch.ones(2, 64)
    assert [state.ratios for state in model.compress(ids[:, 30:], mask, again).states] == [first, second]


@pytest.mark.parametrize("segment", [1, None])
def test_documents_of_any_lengths_share_passes(segment: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "CPU_PASS_TOKENS", 64)
    config = fixed(16, 4)
    model = wrapped(config.replace(segment=segment), dtype=torch.float64)
    documents = [random_ids(1, length, seed=length)[0] for length in (90, 3, 200, 33)]
    seen: list[int] = []
    cache = model.compress(
        [documents[0], documents[1].tolist(), *documents[2:]], progress=lambda done, _: seen.append(done)
    )
    assert seen[-1] == 326 and len(seen) == (13 if segment else 6)
    question = random_ids(4, 7, seed=1)
    together = model(question, past_key_values=cache.fork(), use_cache=False).logits
    for row, document in enumerate(documents):
        alone = model.compress(document[None])
        own, theirs = cache.select([row]).stats()[0], alone.stats()[0]
        assert {**own, "attention_path": ""} == {**theirs, "attention_path": ""}
        close(model(question[row : row + 1], past_key_values=alone).logits[0], together[row], 1e-10)


def test_several_questions_share_one_compressed_document() -> None:
    model = wrapped(fixed(16, 4))
    cache = model.compress([random_ids(1, 100)[0]])
    asked = cache.select([0, 0, 0])
    places = [
        [k.data_ptr() for store in asked.stores for k in (store.memory_k[row], store.open_v[row])] for row in range(3)
    ]
    assert places[0] == places[1] == places[2]
    questions = random_ids(3, 5, seed=1)
    answers = model.generate(questions, past_key_values=cache.fork(), max_new_tokens=4, do_sample=False)
    for row in range(3):
        alone = model.generate(
            questions[row : row + 1], past_key_values=cache.fork(), max_new_tokens=4, do_sample=False
        )
        assert answers[row].tolist() == alone[0].tolist()
    assert cache.stats() == model.compress([random_ids(1, 100)[0]]).stats()


@pytest.mark.parametrize(
    "documents, error, words",
    [
        ([], ValueError, "got an empty list"),
        ([[1, 2], []], ValueError, "got none in document 1"),
        ([[1, 2], "text"], TypeError, "got str 'text' as document 1"),
        ([[1.5]], TypeError, "as document 0"),
        ([torch.ones(2, 2, dtype=torch.long)], TypeError, "as document 0"),
        ([[1, 2], [3, 1000]], ValueError, "token ids must lie in"),
    ],
)
def test_documents_that_are_none(documents: list[Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        wrapped(fixed()).compress(documents)


def test_documents_are_padded_here() -> None:
    with pytest.raises(ValueError, match="got an attention_mask too"):
        wrapped(fixed()).compress([[1, 2]], attention_mask=torch.ones(1, 2))
