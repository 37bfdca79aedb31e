"""Bases in their dtypes, quantised, with LoRA layers: what trains, what is saved, what goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import beacon
from beacon.training import BeaconTrainer, ModelConfig
from beacon.training.models import load_model, load_tokenizer, saved_dtype
from beacon.training.objectives import stock_logits
from tests.readers import close
from tests.training.runs import arguments

CONFIG = beacon.BeaconConfig(window=32, ratios=(2, 4), projections=("k", "v"))
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}


def train(model: Any, output: Path, **changes: Any) -> Any:
    rows = [{"input_ids": [(7 * i + j) % 4000 for j in range(90)]} for i in range(4)]
    args = TrainingArguments(**arguments(output, max_steps=2, save_strategy="steps", save_steps=1, **changes))
    trainer = BeaconTrainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return trainer


def test_dtypes() -> None:
    model = load_model(ModelConfig(name="default"), CONFIG)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)} and model.training
    assert saved_dtype(ModelConfig(name="default"), model) == torch.bfloat16
    assert saved_dtype(ModelConfig(name="default", saved_dtype="float32"), model) == torch.float32
    low = load_model(ModelConfig(name="default", dtype="auto", beacon_dtype="bfloat16"), CONFIG)
    assert {p.dtype for p in low.parameters() if p.requires_grad} == {torch.bfloat16}
    assert load_tokenizer(ModelConfig(name="default")).pad_token_id is not None


def test_a_run_begins_with_an_adapters_weights() -> None:
    folder = beacon.default_model()
    shipped = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")
    own = shipped.beacon_config.replace(ratios=(2, 4))  # its weights, read otherwise
    model = load_model(ModelConfig(name="default", adapter="default", dtype="float32"), own)
    assert model.beacon_config == own
    for (name, ours), (_, theirs) in zip(model.named_parameters(), shipped.named_parameters(), strict=True):
        assert torch.equal(ours, theirs.float()), name
    with pytest.raises(ValueError, match="check projections"):
        load_model(ModelConfig(name="default", adapter="default"), CONFIG)


def test_lora_layers_train_beside_the_beacons_and_are_saved_and_loaded(tmp_path: Path) -> None:
    settings = ModelConfig(name="default", dtype="float32", lora=LORA)
    model = load_model(settings, CONFIG)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {("lora_" in name, "beacon_" in name) for name in trained} == {(True, False), (False, True)}
    trainer = train(model, tmp_path)
    assert {"adapter_model.safetensors", "beacon_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    ids = torch.arange(100)[None]
    logits = model.eval()(ids).logits
    stock = beacon.load_adapter(
        AutoModelForCausalLM.from_pretrained(beacon.default_model(), dtype=torch.float32), tmp_path
    )
    assert (stock.eval()(ids).logits - logits).abs().max() > 1e-4
    stock.load_adapter(tmp_path)
    close(stock.eval()(ids).logits, logits, 1e-5)

    again = load_model(settings, CONFIG)
    args = TrainingArguments(**arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3))
    resumed = BeaconTrainer(again, args, train_dataset=trainer.train_dataset)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert resumed.state.global_step == 3


def test_the_stock_model_teaches_without_lora_layers() -> None:
    model = load_model(ModelConfig(name="default", dtype="float32", lora=LORA), CONFIG)
    inputs = {"input_ids": torch.arange(90)[None], "attention_mask": torch.ones(1, 90)}
    columns = torch.arange(32, 90)
    before = stock_logits(model, inputs, columns)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(stock_logits(model, inputs, columns), before)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()} and model.training
    assert (model(inputs["input_ids"]).logits[:, columns] - before).abs().max() > 1e-2


def test_resuming_without_the_lora_layers_of_a_checkpoint(tmp_path: Path) -> None:
    trainer = train(load_model(ModelConfig(name="default", dtype="float32"), CONFIG), tmp_path)
    with_lora = load_model(ModelConfig(name="default", dtype="float32", lora=LORA), CONFIG)
    args = TrainingArguments(**arguments(tmp_path, max_steps=3))
    with pytest.raises(FileNotFoundError, match=r"was written without model\.lora"):
        BeaconTrainer(with_lora, args, train_dataset=trainer.train_dataset).train(resume_from_checkpoint=True)


def test_bad_lora_settings() -> None:
    with pytest.raises(TypeError, match=r"fields of peft\.LoraConfig"):
        load_model(ModelConfig(name="default", lora={"rank": 4}), CONFIG)
    with pytest.raises(TypeError, match=r"fields of peft\.LoraConfig"):
        ModelConfig(name="default", lora=4)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "quantization, package", [("4bit", "bitsandbytes"), ("8bit", "bitsandbytes"), ("int8", "torchao")]
)
def test_a_quantised_base_trains_and_goes_on(quantization: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    settings = ModelConfig(name="default", quantization=quantization)
    model = load_model(settings, CONFIG)
    trainer = train(model, tmp_path, bf16=True)
    assert all("beacon_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not getattr(model, "_hf_peft_config_loaded", False)
    args = TrainingArguments(**arguments(tmp_path, max_steps=3, bf16=True))
    again = BeaconTrainer(load_model(settings, CONFIG), args, train_dataset=trainer.train_dataset)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
