"""Hugging Face's tensor parallelism over two gloo processes: what one process gives, beacons included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import beacon
from tests.readers import close, fixed
from tests.tiny_models import random_ids, randomize, tiny_model

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("llama2", "mistral", "qwen2", "qwen3", "phi3", "granite", "olmo2")
CONFIG = fixed(window=8, ratio=2, sink=1)


def test_two_processes_read_as_one_does(tmp_path: Path) -> None:
    """Logits, decoding, adapters loaded and saved, with heads spread over the processes."""
    for name in NAMES:
        model = tiny_model(name)
        model.save_pretrained(tmp_path / name)
        beacon.save_adapter(randomize(beacon.wrap(model, CONFIG), seed=1, only="beacon_"), tmp_path / name / "adapter")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.test_tensor_parallel", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == sorted(NAMES)
    for name in NAMES:
        first, again = (load_file(tmp_path / name / f / "beacon_model.safetensors") for f in ("adapter", "again"))
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def compare(folder: Path) -> None:
    """What each of the two processes does."""
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    alone = beacon.load_adapter(alone, folder / "adapter")
    both = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")
    both = beacon.load_adapter(both, folder / "adapter")
    ids, settings = random_ids(2, 41), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        ours, theirs = both(ids, use_cache=True), alone(ids, use_cache=True)
        close(ours.logits, theirs.logits, 1e-5, folder.name)
        close(both(ids[:, :6]).logits, alone(ids[:, :6]).logits, 1e-5, folder.name)  # the stock attention
    both.train()
    loss = both(ids, labels=ids).loss  # gradients reach each process's share
    loss.backward()
    alone.train()(ids, labels=ids).loss.backward()
    close(loss, alone(ids, labels=ids).loss, 1e-5, folder.name)
    mine, whole = (m.model.layers[0].self_attn.beacon_o_proj.weight.grad for m in (both, alone))
    close(mine.full_tensor(), whole, 1e-4, folder.name)
    both.eval()
    alone.eval()
    tokens = alone.generate(ids, **settings)
    assert torch.equal(both.generate(ids, **settings), tokens)
    assert torch.equal(both.generate(ids, past_key_values=both.static_cache(60), **settings), tokens)
    held, whole = (out.past_key_values.stores[0].memory_k[0].shape[1] for out in (ours, theirs))
    gathered = folder.name in ("phi3", "olmo2")  # projections whose output every process gets whole
    assert held == (whole if gathered else whole // 2)
    with pytest.raises(NotImplementedError, match="spread over several"):
        beacon.save_cache(ours.past_key_values, both, folder / "text.safetensors")
    fresh = beacon.wrap(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto"), CONFIG)
    copied = fresh.model.layers[0].self_attn
    if folder.name != "phi3":
        assert torch.equal(copied.beacon_k_proj.weight.full_tensor(), copied.k_proj.weight.full_tensor())
    beacon.save_adapter(both, folder / "again")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in NAMES:
        compare(Path(sys.argv[1]) / name)
        if dist.get_rank() == 0:
            print(name)
    dist.destroy_process_group()
