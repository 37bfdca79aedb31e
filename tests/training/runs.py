"""Small training runs: a tiny random model on random documents, in this process or as what torchrun starts.

    torchrun --nproc-per-node 2 -m tests.training.runs SPEC.json

The specification holds `TrainingArguments` fields, the trainer's own and the step at which the process kills itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (12, 45, 30, 5, 60, 17, 8, 33, 40, 21, 52, 9)


def documents(count: int = 12) -> list[dict[str, Any]]:
    """Random documents of different lengths, some shorter than a window."""
    from tests.tiny_models import random_ids

    rows = [random_ids(1, LENGTHS[i % len(LENGTHS)], seed=i)[0].tolist() for i in range(count)]
    return [{"input_ids": ids, "labels": list(ids), "origin": f"document {i}"} for i, ids in enumerate(rows)]


def arguments(output: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a short run on the CPU."""
    own = {
        "output_dir": str(output),
        "use_cpu": True,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
    }
    from beacon.training.recipe import spelled

    return spelled({**own, **changes})


def make_trainer(spec: dict[str, Any]) -> Any:
    """A trainer as the specification says."""
    from transformers import TrainingArguments

    import beacon.loss
    from beacon.training import BeaconTrainer, ObjectiveConfig, RatioConfig
    from beacon.training.run import read_whole
    from tests.readers import fixed, wrapped

    if "chunk" in spec:
        beacon.loss.CHUNK = spec["chunk"]
    if "deepspeed" in spec["args"]:
        import deepspeed

        deepspeed.init_distributed("gloo")
    args = TrainingArguments(**spec["args"])
    if args.fsdp:  # accelerate shards on GPUs only, so it has to take these processes for some
        from accelerate import DistributedType, PartialState

        PartialState().distributed_type = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    with read_whole(args):
        model = wrapped(fixed(8, 2, sink=1, **spec.get("beacon", {})), spec.get("model", "llama2"))
    trainer = {"ratios": RatioConfig(choices=(2, 4, 8)), **spec.get("trainer", {})}
    if "objective" in spec:
        trainer["objective"] = ObjectiveConfig(**spec["objective"])
    if "validation" in spec:
        trainer["eval_dataset"] = documents(spec["validation"])
    dataset = _stream(spec["stream"]) if "stream" in spec else spec.get("dataset") or documents()
    if spec["args"].get("train_sampling_strategy") == "group_by_length":
        from datasets import Dataset

        dataset = Dataset.from_list([{**row, "windows": len(row["input_ids"]) // 8} for row in dataset])
    return BeaconTrainer(model, args, train_dataset=dataset, **trainer)


def _stream(path: str) -> Any:
    """Tokens in JSON lines, streamed."""
    from transformers import AutoTokenizer

    import beacon
    from beacon.training import DataConfig, build_dataset

    tokenizer = AutoTokenizer.from_pretrained(beacon.default_model())
    return build_dataset(DataConfig(sources=(path,), streaming=True), tokenizer, window=8, stride=8)[0]


def run(spec: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train here; losses by step and the adapter's weights."""
    trainer = make_trainer(spec)
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    trainer.save_model()
    return losses(trainer.state.log_history), adapter(Path(spec["args"]["output_dir"]))


def launch(spec: dict[str, Any], processes: int, *, expect: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in as many new processes, in a folder with its specification and history."""
    output = Path(spec["args"]["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    path = output / "spec.json"
    path.write_text(json.dumps(spec))
    command = ["-m", "tests.training.runs", str(path)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == expect, done.stderr[-4000:]
    if expect:
        return [], {}
    return losses(json.loads((output / "history.json").read_text())), adapter(output)


def losses(history: list[dict[str, Any]]) -> list[float]:
    """The loss of every report."""
    return [entry["loss"] for entry in history if "loss" in entry]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The weights a run has left."""
    return load_file(folder / "beacon_model.safetensors")


def main() -> None:
    """Train as the specification file says."""
    from beacon.training.run import leave_group

    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    trainer = make_trainer(spec)
    if "kill_before_step" in spec:
        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step + 1 == spec["kill_before_step"]:
                    os.kill(os.getpid(), signal.SIGKILL)

        trainer.add_callback(Kill())
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(spec["args"]["output_dir"])
        (output / "history.json").write_text(json.dumps(trainer.state.log_history))
        (output / "engine.txt").write_text(trainer.accelerator.distributed_type.value)
    leave_group()


if __name__ == "__main__":
    main()
