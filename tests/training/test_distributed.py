"""Two gloo processes on the CPU, and runs that are killed: all give what one process that went through gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from beacon.training.checkpoints import last_checkpoint
from tests.readers import close
from tests.training.runs import ROOT, adapter, arguments, documents, launch, losses, make_trainer, run

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("MULTI_CPU", {}),
    "ddp, checkpointed": ("MULTI_CPU", {"gradient_checkpointing": True}),
    "fsdp2": ("FSDP", {"fsdp": True}),
    "fsdp2, checkpointed": ("FSDP", {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}),
}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def slow(*values: Any) -> Any:
    """A case beyond the default run: every start of two processes takes ten seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """One process that accumulates what two processes read; losses, adapter, held-out losses."""
    own = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    args = arguments(tmp_path_factory.mktemp("alone"), gradient_accumulation_steps=4, **own)
    trainer = make_trainer({"args": args, "validation": 5})
    trainer.train()
    trainer.save_model()
    history = trainer.state.log_history
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return losses(history), adapter(Path(args["output_dir"])), held_out


@pytest.mark.parametrize("name", [slow(name) if name in ("ddp, checkpointed", "fsdp2") else name for name in ENGINES])
def test_two_processes_give_what_one_gives(name: str, alone: Any, tmp_path: Path) -> None:
    """Loss curve, held-out loss and adapter.

    Texts of one process are too short for beacons, or fill more chunks of the loss, while the other's do not; steps are
    evaluated and saved; one process has a held-out text more than the other.
    """
    engine, own = ENGINES[name]
    own = {**own, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    own |= {"per_device_eval_batch_size": 1}
    spec = {"args": arguments(tmp_path, gradient_accumulation_steps=2, **own), "chunk": 16, "validation": 5}
    curve, weights = launch(spec, 2)
    history = json.loads((tmp_path / "history.json").read_text())
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert held_out == pytest.approx(alone[2], rel=1e-5) and len(held_out) == 2
    assert (tmp_path / "engine.txt").read_text() == engine
    assert curve == pytest.approx(alone[0], rel=1e-5)
    assert weights.keys() == alone[1].keys()
    for key, weight in alone[1].items():
        close(weights[key], weight, 1e-5, key)


def test_two_processes_read_a_stream_of_several_files_as_one_does(tmp_path: Path) -> None:
    """Over the stream's end, too, where files of unequal length would leave one process waiting for the other."""
    rows = documents(7)
    for name, part in (("a", rows[:1]), ("b", rows[1:5]), ("c", rows[5:])):
        lines = [json.dumps({"input_ids": row["input_ids"]}) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    own = {"stream": str(tmp_path / "*.jsonl")}
    curve, weights = launch({"args": arguments(tmp_path / "two", gradient_accumulation_steps=1), **own}, 2)
    one = run({"args": arguments(tmp_path / "one", gradient_accumulation_steps=2), **own})
    assert curve == pytest.approx(one[0], rel=1e-5) and len(curve) == 4  # the fourth step spans the stream's end
    for key, weight in one[1].items():
        close(weights[key], weight, 1e-5, key)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_what_one_process_gives(stage: int, alone: Any, tmp_path: Path) -> None:
    """Texts without beacons and other numbers of chunks included: both engines go by the order of calls."""
    pytest.importorskip("deepspeed")
    config = str(ROOT / "examples" / "recipes" / "launch" / f"deepspeed-zero{stage}.json")
    own = {"deepspeed": config, "save_strategy": "steps", "save_steps": 2}
    curve, weights = launch({"args": arguments(tmp_path, gradient_accumulation_steps=2, **own), "chunk": 16}, 2)
    assert curve == pytest.approx(alone[0], rel=1e-5)
    for key, weight in alone[1].items():
        close(weights[key], weight, 1e-5, key)


@pytest.mark.parametrize("objective", [slow({"distillation": 0.5}), slow({"reconstruction": 0.5})])
def test_additional_losses_go_through_fsdp2(objective: dict[str, float], tmp_path: Path) -> None:
    """The stock model teaches from sharded weights, and both processes do so as often."""
    curve, weights = launch(
        {"args": arguments(tmp_path / "two", gradient_accumulation_steps=1, fsdp=True), "objective": objective}, 2
    )
    one = run({"args": arguments(tmp_path / "one", gradient_accumulation_steps=2), "objective": objective})
    assert curve == pytest.approx(one[0], rel=1e-5)
    for key, weight in one[1].items():
        close(weights[key], weight, 1e-5, key)


@pytest.mark.parametrize(
    "processes, own, killed_before",
    [(1, {}, 4), slow(2, {}, 5), slow(2, {"fsdp": True}, 6)],
    ids=["one", "ddp", "fsdp2"],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    processes: int, own: dict[str, Any], killed_before: int, tmp_path: Path
) -> None:
    spec = {"args": arguments(tmp_path / "killed", **SAVING, **own)}
    launch({**spec, "kill_before_step": killed_before}, processes, expect=-9 if processes == 1 else 1)
    assert last_checkpoint(tmp_path / "killed") == tmp_path / "killed" / f"checkpoint-{(killed_before - 1) // 2 * 2}"
    curve, weights = launch({**spec, "resume": True}, processes)
    through = {"args": arguments(tmp_path / "whole", **SAVING, **own)}
    whole = run(through) if processes == 1 else launch(through, processes)
    assert curve == whole[0]
    for key, weight in whole[1].items():
        assert torch.equal(weights[key], weight), key


def test_another_number_of_processes_cannot_resume(tmp_path: Path) -> None:
    run({"args": arguments(tmp_path, **SAVING)})
    with pytest.raises(AssertionError, match=r"was written with processes 1 \(now 2\); go on with the same settings"):
        launch({"args": arguments(tmp_path, **SAVING), "resume": True}, 2)
