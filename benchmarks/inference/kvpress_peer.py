"""Time kvpress on a Llama of given sizes. A script for an environment of its own: kvpress needs transformers < 5.3.

It imports nothing of this project. Its argument is JSON, and so is the last line that it prints:

PYTHON benchmarks/inference/kvpress_peer.py '{"scale": {"hidden": 64, ...}, "length": 512, "ratio": 16, ...}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PRESS = "SnapKVPress"


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Read the text ``repeats`` times under a press, decode after it, and say what that took."""
    import kvpress
    import torch
    import transformers

    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    model = _model(spec["scale"], spec["length"] + spec["new_tokens"] + 64, device, dtype)
    press = getattr(kvpress, PRESS)(compression_ratio=1 - 1 / spec["ratio"])
    ids = torch.randint(3, model.config.vocab_size, (1, spec["length"]), device=device)
    found: dict[str, Any] = {"press": PRESS, "kvpress": _version("kvpress"), "transformers": transformers.__version__}
    found["torch"] = torch.__version__
    try:
        with torch.no_grad():
            found |= _times(model, press, ids, spec)
    except torch.OutOfMemoryError as err:
        found["failed"] = f"out of memory: {' '.join(str(err).split())[:200]}"
    return found


def _times(model: Any, press: Any, ids: Any, spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache

    on_gpu = ids.device.type == "cuda"

    def read(count: int) -> tuple[Any, Any]:
        cache = DynamicCache()
        with press(model):
            logits = model(ids[:, :count], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return cache, logits[:, -1:].argmax(-1)

    def timed(call: Any) -> float:
        _settle(ids.device)
        begin = time.perf_counter()
        call()
        _settle(ids.device)
        return time.perf_counter() - begin

    first = timed(lambda: read(min(spec["length"], spec["warm_tokens"])))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ids.device)
    kept: list[tuple[Any, Any]] = []
    seconds = []
    for _ in range(spec["repeats"]):
        kept.clear()
        seconds.append(timed(lambda: kept.append(read(spec["length"]))))
    peak = torch.cuda.max_memory_allocated(ids.device) / 2**20 if on_gpu else None
    cache, token = kept[0]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 2**20
    position = torch.full_like(token, spec["length"])

    def decode(count: int) -> None:
        for _ in range(count):
            out = model(token, past_key_values=cache, position_ids=position, use_cache=True, logits_to_keep=1)
            token.copy_(out.logits[:, -1:].argmax(-1))
            position.add_(1)

    decode(4)
    took = timed(lambda: decode(spec["new_tokens"]))
    return {
        "seconds": seconds,
        "first_s": first,
        "cache_mb": held,
        "peak_mb": peak,
        "tokens_per_s": spec["new_tokens"] / took,
    }


def _model(scale: dict[str, int], positions: int, device: Any, dtype: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=scale["vocab"],
        hidden_size=scale["hidden"],
        intermediate_size=scale["intermediate"],
        num_hidden_layers=scale["layers"],
        num_attention_heads=scale["heads"],
        num_key_value_heads=scale["kv_heads"],
        max_position_embeddings=positions,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path = [path for path in sys.path if Path(path).resolve() != here]  # its modules would hide others' names
    sys.stdout.write("\n" + json.dumps(main(json.loads(sys.argv[1]))) + "\n")
