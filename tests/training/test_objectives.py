"""Additional losses: what they are, against plain formulas."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import beacon
from beacon.training import RatioConfig, objectives
from beacon.training.objectives import ObjectiveConfig, add_reconstruction, divergence, taught_columns
from tests.readers import close, fixed, wrapped
from tests.tiny_models import random_ids
from tests.training.runs import arguments, documents, make_trainer, run


def batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    ids = random_ids(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_sum_of_kl_with_its_gradient(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 4)
    student, teacher = torch.randn(2, 11, 7).unbind()
    student.requires_grad_()
    counted = torch.rand(11)
    p, q = ((x / temperature).double().softmax(-1) for x in (teacher, student))
    plain = ((p * (p / q).log()).sum(-1) * counted).sum() * temperature**2
    ours = divergence(student, teacher, counted, temperature)
    close(ours.double(), plain, 1e-5)
    close(*(torch.autograd.grad(x, student)[0] for x in (ours, plain)), 1e-5)
    assert divergence(teacher, teacher, counted).abs() < 1e-6


def test_the_stock_model_teaches_what_lies_in_its_context() -> None:
    append, interleave = fixed(8, 2), fixed(8, 2, placement="interleave")
    assert taught_columns(append, 20, 50).tolist() == list(range(8, 20))
    assert taught_columns(append, 20, 15).tolist() == list(range(8, 15))
    assert taught_columns(interleave, 20, 15).tolist() == list(range(15))
    for width in (1, 5, 8):
        assert len(taught_columns(append, 20, width)) == 1  # processes of a sharded model call it equally often


def test_distillation_adds_the_divergence_from_the_stock_model(tmp_path: Path) -> None:
    lengths = (45, 5, 30)
    inputs = batch(lengths)
    trainer = make_trainer({"args": arguments(tmp_path), "objective": {"distillation": 0.7}})
    trainer.model.train()
    items = torch.tensor(60.0)
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
    model = wrapped(fixed(8, 2, sink=1), "llama2").train()
    ratios = trainer.ratios(beacon.training.Draw(0, 5, 0.0, model.beacon_config))
    out = model(**inputs, ratios=ratios, num_items_in_batch=items, logits_to_keep=45, use_cache=False)
    with beacon.disabled(model), torch.no_grad():
        stock = model(inputs["input_ids"], inputs["attention_mask"]).logits
    counted = F.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    kl = F.kl_div(out.logits.log_softmax(-1), stock.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    close(loss, out.loss + 0.7 * (kl * counted)[:, 8:].sum() / items, 1e-5)
    loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
    trainer.model.eval()
    with torch.no_grad():  # evaluation reports the plain loss
        close(
            trainer.compute_loss(trainer.model, inputs),
            model.eval()(**inputs, ratios=ratios, use_cache=False).loss,
            1e-5,
        )


@pytest.mark.parametrize("stride", [8, 4])
def test_reconstruction_adds_a_window_its_repetition_and_a_weight(stride: int) -> None:
    config = beacon.BeaconConfig(window=8, stride=stride, ratios=(2,))
    lengths = (20, 5, 8)
    inputs = batch(lengths)
    out = add_reconstruction(inputs, list(lengths), config, 2, 0.3, random.Random(0))
    again = min(stride, 7)
    assert out["input_ids"].shape == (5, 20) and torch.equal(out["input_ids"][:3], inputs["input_ids"])
    for row, source in ((3, 0), (4, 2)):
        ids, labels = out["input_ids"][row], out["labels"][row]
        text = inputs["input_ids"][source].tolist()
        window = ids[:8].tolist()
        starts = [at for at in range(0, lengths[source] - 7, stride) if text[at : at + 8] == window]
        assert starts and ids[8] == 2 and ids[9 : 9 + again].tolist() == window[:again]
        assert (labels[:9] == -100).all() and labels[9 : 9 + again].tolist() == window[:again]
        assert int(out["attention_mask"][row].sum()) == 9 + again and (labels[9 + again :] == -100).all()
    assert (out["weights"][:3] == 1).all()
    assert torch.allclose(out["weights"][3:, : 9 + again], torch.tensor(0.3))


def test_only_beacons_can_tell_the_repeated_tokens() -> None:
    """No raw token of the window is visible where it has to be repeated, however stride and window lie."""
    for stride in (8, 4):
        model = wrapped(beacon.BeaconConfig(window=8, stride=stride, ratios=(2,), ratio_policy="fixed"), "llama2")
        inputs = batch((8,))
        out = add_reconstruction(inputs, [8], model.beacon_config, 2, 1.0, random.Random(0))
        row = out["input_ids"][1:]
        cache = model.compress(row[:, : int(out["attention_mask"][1].sum())])
        kept_raw = row.shape[1] - stride
        assert cache.stats()[0]["beacons"] >= stride // 2 and cache.stats()[0]["raw"] <= kept_raw


def test_texts_without_a_full_window_add_nothing() -> None:
    inputs = batch((5, 7))
    assert add_reconstruction(inputs, [5, 7], fixed(8, 2), 2, 0.3, random.Random(0)) is inputs


def test_reconstruction_is_off_the_count_of_labels(tmp_path: Path) -> None:
    """The mean over the text's labels stays what it was; the repeated labels come on top, each times the weight."""
    inputs = batch((30, 12))
    losses = []
    for weight in (0.0, 1e-9, 0.5, 1.0):
        trainer = make_trainer({"args": arguments(tmp_path), "objective": {"reconstruction": weight}})
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(40.0)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] - losses[0] == pytest.approx(2 * (losses[2] - losses[0]), rel=1e-3)


def test_weights_of_labels_reach_the_loss(tmp_path: Path) -> None:
    rows = documents(8)
    for row in rows:
        row["weights"] = [1.0 + 0.1 * (i % 7) for i in range(len(row["input_ids"]))]
    doubled = [{**row, "weights": [2 * w for w in row["weights"]]} for row in rows]
    plain = run({"args": arguments(tmp_path / "plain"), "dataset": documents(8)})
    weighted = run({"args": arguments(tmp_path / "weighted"), "dataset": rows})
    twice = run({"args": arguments(tmp_path / "twice"), "dataset": doubled})
    assert twice[0] == pytest.approx(weighted[0], rel=1e-5)  # a mean over weights
    assert weighted[0] != pytest.approx(plain[0], rel=1e-4)


@pytest.mark.parametrize("objective", [{"distillation": 1.0}, {"reconstruction": 1.0}])
def test_each_lowers_what_it_is_about(objective: dict[str, float], tmp_path: Path) -> None:
    two = RatioConfig(policy="fixed", choices=(2,))
    settings = arguments(tmp_path, max_steps=60, learning_rate=5e-3, gradient_accumulation_steps=1, logging_steps=60)
    long = [row for row in documents(24) if len(row["input_ids"]) >= 17][:4]
    trainer = make_trainer({"args": settings, "objective": objective, "dataset": long, "trainer": {"ratios": two}})
    inputs = trainer.data_collator([{k: long[0][k] for k in ("input_ids", "labels")}])

    def extra() -> float:
        trainer.model.train()
        totals, trainer._number = [], 0  # the same ratios and the same window
        for config in (ObjectiveConfig(**objective), ObjectiveConfig()):
            trainer.objective = config
            totals.append(
                trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(1.0)).item()
            )
        trainer.objective = ObjectiveConfig(**objective)
        return totals[0] - totals[1]

    before = extra()
    trainer.train()
    assert extra() < before


def test_packed_documents_are_refused_where_rows_are_needed(tmp_path: Path) -> None:
    trainer = make_trainer({"args": arguments(tmp_path), "objective": {"distillation": 1.0}})
    ids = random_ids(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    trainer.model.train()
    with pytest.raises(NotImplementedError, match=r"data\.packing: false"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids, "position_ids": positions})


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"distillation": -1}, ValueError),
        ({"distillation": "much"}, TypeError),
        ({"temperature": 0}, ValueError),
        ({"reconstruction": True}, TypeError),
    ],
)
def test_bad_settings(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="objective: "):
        ObjectiveConfig(**fields)
