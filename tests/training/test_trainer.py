"""The trainer in this process: what it computes, numbers, reports, stops at and writes."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import beacon
from beacon.training import BeaconTrainer, EvaluationConfig, LongContextEvaluation, RatioConfig
from beacon.training.arguments import adapted
from beacon.training.batches import document_lengths
from beacon.training.checkpoints import last_checkpoint, written_whole
from tests.readers import close, fixed, wrapped
from tests.tiny_models import random_ids, tiny_model
from tests.training.runs import arguments, documents, make_trainer, run


def spec(output: Path, **changes: Any) -> dict[str, Any]:
    own = {name: changes.pop(name) for name in ("trainer", "beacon", "objective", "dataset") if name in changes}
    return {"args": arguments(output, **changes), **own}


def test_four_accumulated_batches_are_one_batch_of_four(tmp_path: Path) -> None:
    """Documents of different lengths: the mean is over all labels of a step, not over batches' means."""
    fixed_ratios = {"ratios": RatioConfig(policy="fixed", choices=(2,))}
    whole = run(
        spec(tmp_path / "1x4", per_device_train_batch_size=4, gradient_accumulation_steps=1, trainer=fixed_ratios)
    )
    parts = run(
        spec(tmp_path / "4x1", per_device_train_batch_size=1, gradient_accumulation_steps=4, trainer=fixed_ratios)
    )
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for name, weight in whole[1].items():
        close(parts[1][name], weight, 1e-6, name)


def test_the_loss_is_the_models_own(tmp_path: Path) -> None:
    trainer = make_trainer(spec(tmp_path, max_steps=1, gradient_accumulation_steps=1))
    seen: list[dict[str, Any]] = []
    forward = trainer.model.forward
    trainer.model.forward = lambda **inputs: seen.append(inputs) or forward(**inputs)
    trainer.train()
    model = wrapped(fixed(8, 2, sink=1), "llama2")
    call = {name: seen[0][name] for name in ("input_ids", "attention_mask", "labels", "ratios")}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(model(**call).loss.item(), rel=1e-6)


@pytest.mark.parametrize("segment", [1, 2])
def test_window_by_window_gives_the_same_run(tmp_path: Path, segment: int) -> None:
    whole = run(spec(tmp_path / "whole"))
    parts = run(spec(tmp_path / "parts", beacon={"segment": segment}))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for name, weight in whole[1].items():
        close(parts[1][name], weight, 1e-5, name)


def test_checkpointed_layers_give_the_same_run(tmp_path: Path) -> None:
    plain = run(spec(tmp_path / "plain"))
    checkpointed = run(spec(tmp_path / "checkpointed", gradient_checkpointing=True))
    assert checkpointed[0] == pytest.approx(plain[0], rel=1e-6)
    for name, weight in plain[1].items():
        close(checkpointed[1][name], weight, 1e-6, name)


def test_only_beacons_are_trained_and_have_optimizer_state(tmp_path: Path) -> None:
    trainer = make_trainer(spec(tmp_path))
    stock = tiny_model("llama2").state_dict()
    trainer.train()
    changed = {name for name, tensor in trainer.model.state_dict().items() if name not in stock}
    assert all("beacon_" in name for name in changed)
    for name, tensor in trainer.model.state_dict().items():
        assert name in changed or torch.equal(tensor, stock[name]), name
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for name, p in trainer.model.named_parameters() if "beacon_" in name}


def test_master_weights_are_float32_over_a_frozen_bfloat16_base(tmp_path: Path) -> None:
    model = wrapped(fixed(8, 2), "llama2", dtype=torch.bfloat16)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()
    with pytest.raises(ValueError, match="need mixed precision"):
        BeaconTrainer(model, TrainingArguments(**arguments(tmp_path)), train_dataset=documents())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    args = TrainingArguments(**arguments(tmp_path, bf16=True, learning_rate=1e-4, max_steps=8, save_strategy="steps"))
    trainer = BeaconTrainer(model, args, train_dataset=documents(), saved_dtype=torch.bfloat16)
    trainer.train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    moved = [
        (p - before[n]).abs() / before[n].abs().clamp(min=1e-3) for n, p in model.named_parameters() if n in before
    ]
    small = torch.cat([m.flatten() for m in moved if m.any()])
    assert ((small > 0) & (small < 2**-9)).float().mean() > 0.2  # steps that bfloat16 weights would have rounded away
    state = trainer.optimizer.state[next(p for p in model.parameters() if p.requires_grad)]
    assert state["exp_avg"].dtype == torch.float32
    trainer.save_model()
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "beacon_model.safetensors").values()} == {torch.bfloat16}
    checkpoint = load_file(last_checkpoint(tmp_path) / "beacon_model.safetensors")
    assert {t.dtype for t in checkpoint.values()} == {torch.float32}


def test_batches_are_numbered_as_one_process_would(tmp_path: Path) -> None:
    """Every accumulated batch of every process draws its own ratios, the same however they are spread."""
    numbers: list[tuple[int, int]] = []

    def ratios(draw: Any) -> int:
        numbers.append((draw.number, draw.windows))
        return 2

    trainer = make_trainer(spec(tmp_path, trainer={"ratios": ratios}))
    trainer.train()
    assert [number for number, _ in numbers] == list(range(8))
    assert max(windows for _, windows in numbers) <= 60 // 8


def test_progress_goes_from_0_to_1_for_a_curriculum(tmp_path: Path) -> None:
    seen: list[float] = []
    run(spec(tmp_path, trainer={"ratios": lambda draw: seen.append(draw.progress) or 2}, gradient_accumulation_steps=1))
    assert seen == [0, 0.25, 0.5, 0.75]


def test_reports_hold_speed_utilisation_and_memory(tmp_path: Path) -> None:
    trainer = make_trainer(spec(tmp_path, trainer={"peak_tflops": 1e-3}))
    trainer.train()
    report = trainer.state.log_history[1]
    assert report["tokens_per_second"] > 0 and report["peak_memory_gb"] > 0.1 and report["grad_norm"] > 0
    assert 0 < report["mfu"] <= report["hfu"] and report["hfu"] == pytest.approx(report["tflops_per_second"] / 1e-3)
    read = sum(entry["tokens"] for entry in trainer.state.log_history[3:4])
    assert read == sum(len(row["input_ids"]) for row in [documents()[i] for i in _order(trainer)][:8])


def _order(trainer: Any) -> list[int]:
    origins = [row["origin"] for row in documents()]
    return [origins.index(o) for batch in trainer.get_train_dataloader() for o in batch["origins"]]


def test_without_a_known_peak_no_utilisation_is_claimed(tmp_path: Path) -> None:
    trainer = make_trainer(spec(tmp_path, max_steps=1))
    trainer.train()
    assert "hfu" not in trainer.state.log_history[0] and "tflops_per_second" in trainer.state.log_history[0]


def test_a_loss_that_is_no_number_stops_and_names_the_batch(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.model.layers[0].self_attn.beacon_k_proj.weight.data.fill_(torch.nan)

    long = [row for row in documents(24) if len(row["input_ids"]) > 20]
    trainer = make_trainer(spec(tmp_path, save_strategy="steps", save_steps=2, dataset=long))
    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"got nan in step 4 \(batch of document \d+\); the last good check"):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".", "checkpoint"))] == ["checkpoint-2"]


def test_a_full_device_names_settings_to_change(tmp_path: Path) -> None:
    trainer = make_trainer(spec(tmp_path))

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.forward = forward
    with pytest.raises(MemoryError, match=r"out of memory in step 1 with documents of \[\d+\] tokens.*max_length"):
        trainer.train()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(spec(tmp_path, save_strategy="steps", save_steps=1))
    save = torch.save

    def full(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-3" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-3 could not be written.*No space left.*last complete one is .*-2"):
        trainer.train()
    monkeypatch.undo()
    assert last_checkpoint(tmp_path).name == "checkpoint-2" and not (tmp_path / "checkpoint-3").exists()
    again = run({**spec(tmp_path, save_strategy="steps", save_steps=1), "resume": True})
    whole = run(spec(tmp_path / "whole"))
    for name, weight in whole[1].items():
        assert torch.equal(again[1][name], weight), name


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_ends_as_one_that_went_through(tmp_path: Path, step: int) -> None:
    """Bit for bit: weights, optimizer, schedule, data order (in the middle of an epoch), ratios."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": step, "gradient_accumulation_steps": 3}
    whole = run(spec(tmp_path / "whole", **settings))
    stopped(spec(tmp_path / "cut", **settings), before_step=6)
    again = run({**spec(tmp_path / "cut", **settings), "resume": True})
    assert again[0] == whole[0]
    for name, weight in whole[1].items():
        assert torch.equal(again[1][name], weight), name


def test_a_folder_with_another_runs_checkpoints_is_not_written_to(tmp_path: Path) -> None:
    run(spec(tmp_path, save_strategy="steps", save_steps=2))
    with pytest.raises(FileExistsError, match=r"holds checkpoints of an earlier run \(up to checkpoint-4\).*--resume"):
        run(spec(tmp_path))


def test_resuming_with_other_batches_is_refused(tmp_path: Path) -> None:
    run(spec(tmp_path, save_strategy="steps", save_steps=2))
    other = {**spec(tmp_path, gradient_accumulation_steps=4), "resume": True}
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps 2 \(now 4\)"):
        run(other)
    with pytest.raises(FileNotFoundError, match="is no complete checkpoint"):
        run({**spec(tmp_path), "resume": str(tmp_path / "checkpoint-99")})


def test_resuming_where_there_is_nothing_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run({**spec(tmp_path), "resume": True})
    assert "training begins anew" in caplog.text


def test_old_checkpoints_are_removed_and_the_best_stays(tmp_path: Path) -> None:
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "learning_rate": 1.0,
    }
    trainer = make_trainer(spec(tmp_path, trainer={"eval_dataset": documents(4)}, **settings))
    trainer.train()
    best = min((entry for entry in trainer.state.log_history if "eval_loss" in entry), key=lambda e: e["eval_loss"])
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert len(kept) == 2 and f"checkpoint-{best['step']}" in kept
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)


def test_a_checkpoint_holds_beacons_and_no_base(tmp_path: Path) -> None:
    run(spec(tmp_path, save_strategy="steps", save_steps=4))
    from safetensors.torch import load_file

    names = load_file(tmp_path / "checkpoint-4" / "beacon_model.safetensors")
    assert all("beacon_" in name for name in names)
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    model = beacon.load_adapter(tiny_model("llama2"), tmp_path / "checkpoint-4")
    assert model.beacon_config == fixed(8, 2, sink=1)


def test_long_context_evaluation_is_recorded_and_drawn(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = beacon.default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")
    config = EvaluationConfig(lengths=(256,), texts=1, targets=32, passkey_lengths=(256,), passkey_depths=(0.5,))
    rows = [{"input_ids": list(range(10, 150))}] * 4
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=1e-5)
    evaluation = LongContextEvaluation(config, tokenizer)
    trainer = BeaconTrainer(model, TrainingArguments(**args), train_dataset=rows, evaluation=evaluation)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_perplexity_256" in entry]
    assert [entry["step"] for entry in history] == [1, 2] and "eval_passkey_256" in history[0]
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "perplexity.png").exists() and (tmp_path / "passkey.png").exists()


def test_training_a_model_that_is_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes a wrapped model, got LlamaForCausalLM; call beacon\.wrap"):
        BeaconTrainer(tiny_model("llama2"), TrainingArguments(**arguments(tmp_path)))


def test_reentrant_checkpointing_and_bad_ratios_are_refused(tmp_path: Path) -> None:
    model = wrapped(fixed(8, 2), "llama2")
    args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        BeaconTrainer(model, TrainingArguments(**args), train_dataset=documents())
    with pytest.raises(ValueError, match="stride=8 and ratio=3"):
        BeaconTrainer(model, TrainingArguments(**arguments(tmp_path)), ratios=RatioConfig(choices=(3,)))


def test_lengths_of_documents() -> None:
    ids = random_ids(2, 7)
    assert document_lengths({"input_ids": ids}) == [7, 7]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    assert document_lengths({"input_ids": ids, "attention_mask": mask}) == [3, 6]
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2]])
    assert document_lengths({"input_ids": ids[:1], "position_ids": positions}) == [3, 1, 3]


def test_liger_kernels_leave_the_head_and_rotations_to_us(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"rms_norm": False}))
    chosen = adapted(args, wrapped(fixed(8, 2), "llama2"), None).liger_kernel_config
    assert chosen == {"rms_norm": False, "rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert args.liger_kernel_config == {"rms_norm": False}


def stopped(spec: dict[str, Any], before_step: int, resume: Path | None = None) -> None:
    """Train until a step begins, and break off."""
    trainer = make_trainer(spec)

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == before_step:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)


def test_documents_of_like_length_resume_in_a_later_epoch(tmp_path: Path) -> None:
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 3}
    settings |= {"train_sampling_strategy": "group_by_length", "length_column_name": "windows"}
    whole = run(spec(tmp_path / "whole", **settings))
    torch.rand(7)  # another global random state
    stopped(spec(tmp_path / "cut", **settings), before_step=8)
    torch.rand(5)
    again = run({**spec(tmp_path / "cut", **settings), "resume": True})
    assert again[0] == whole[0]
    for name, weight in whole[1].items():
        assert torch.equal(again[1][name], weight), name


def test_a_stream_resumes_after_it_has_begun_anew(tmp_path: Path) -> None:
    lines = [json.dumps({"input_ids": row["input_ids"]}) for row in documents(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    stream = {"stream": str(tmp_path / "a.jsonl")}
    whole = run({**spec(tmp_path / "whole", **settings), **stream})
    stopped({**spec(tmp_path / "cut", **settings), **stream}, before_step=6)
    again = run({**spec(tmp_path / "cut", **settings), **stream, "resume": True})
    assert again[0] == whole[0] and max(whole[0]) < 8  # a step that spans the end counts as any other


def test_going_on_from_an_earlier_checkpoint_sets_its_successors_aside(tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    run(spec(tmp_path, **settings))
    stopped(spec(tmp_path, **settings, save_total_limit=2), 6, resume=tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert {p.name for p in tmp_path.glob("*checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
        "abandoned-checkpoint-4",
        "abandoned-checkpoint-6",
        "abandoned-checkpoint-8",
    }


def test_a_longer_run_goes_on_at_its_own_learning_rate(tmp_path: Path) -> None:
    run(spec(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    trainer = make_trainer(spec(tmp_path, max_steps=8, save_strategy="steps", save_steps=2))
    trainer.train(resume_from_checkpoint=True)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[4:] == pytest.approx([1e-2 * left / 8 for left in (4, 3, 2, 1)])


def test_tokens_are_counted_over_a_resume(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = make_trainer(spec(tmp_path / "whole", **settings))
    whole.train()
    stopped(spec(tmp_path / "cut", **settings), before_step=5)
    again = make_trainer(spec(tmp_path / "cut", **settings))
    again.train(resume_from_checkpoint=True)
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen > 0


def test_the_held_out_loss_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    rows = documents(5)
    found = []
    for size in (1, 2, 5):
        trainer = make_trainer(spec(tmp_path, per_device_eval_batch_size=size, trainer={"eval_dataset": rows}))
        found.append(trainer.evaluate())
    assert found[0]["eval_labels"] == sum(len(row["input_ids"]) - 1 for row in rows)
    assert [one["eval_loss"] for one in found] == pytest.approx([found[0]["eval_loss"]] * 3, rel=1e-5)


def test_evaluation_before_training_computes_in_mixed_precision(tmp_path: Path) -> None:
    model = wrapped(fixed(8, 2), "llama2", dtype=torch.bfloat16)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()
    args = TrainingArguments(**arguments(tmp_path, bf16=True))
    metrics = BeaconTrainer(model, args, train_dataset=documents(), eval_dataset={"a": documents(3)}).evaluate()
    assert metrics["eval_a_loss"] > 0


@pytest.mark.parametrize(
    "changes",
    [{"label_smoothing_factor": 0.1}, {"torch_compile": True}, {"trainer": {"compute_loss_func": print}}],
)
def test_settings_that_would_be_ignored_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        make_trainer(spec(tmp_path, **changes))


def test_a_process_whose_files_are_elsewhere_stops_the_saving(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"rng_state_1\.pth is not there: all processes must see"),
        written_whole(tmp_path, 1, {}, writes=True, wait=lambda: None, parts=["rng_state_1.pth"]) as staging,
    ):
        (staging / "checkpoint-1").mkdir()
    assert last_checkpoint(tmp_path) is None
