"""Reads texts with kvpress. A script for an interpreter of its own; it imports nothing of this project.

PYTHON -I worker.py '{"weights": FOLDER, "dtype": "bfloat16", "device": "cuda:0", "threads": null}'

It answers every line of JSON on stdin by one on stdout. The first, unasked, is ``{"ready": VERSIONS}``. A request has
``press`` (kvpress's class), ``fraction`` (what is removed), ``tokenizer`` (a folder, or null), ``context`` (token ids,
pressed) and ``questions`` (lists of token ids, each read after the context and kept whole); and either ``count`` and
``ends`` (decode so many tokens at most, up to the first of these ids), which gives ``answers``, or ``logits`` (a file
for those of all the questions' tokens). The answer has ``entries`` and ``bytes`` (held of the context in every layer,
and in all), or ``cannot`` and why.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from typing import Any


def main(spec: dict[str, Any]) -> None:
    """Load the model, then serve requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def reply(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(spec["weights"], dtype=dtype, attn_implementation="sdpa")
    model = model.to(spec["device"]).eval()
    reply({"ready": {"torch": torch.__version__, "transformers": transformers.__version__}})
    for line in sys.stdin:
        try:
            with torch.inference_mode():
                answer = serve(model, json.loads(line))
        except torch.OutOfMemoryError as err:
            answer = {"cannot": f"out of memory: {' '.join(str(err).split())[:200]}"}
        except Exception as err:  # of kvpress's: a text too short for it, a model that it does not know
            answer = {"cannot": f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"}
        reply(answer)


def serve(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for."""
    import torch

    cache = pressed(model, request)
    length = len(request["context"])
    found: dict[str, Any] = {
        "entries": max((layer.keys.shape[2] for layer in cache.layers), default=0),
        "bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
    }
    if "logits" in request:
        from safetensors.torch import save_file

        parts = [
            step(model, fork(cache), question, length, keep=len(question)).cpu() for question in request["questions"]
        ]
        save_file({"logits": torch.cat(parts).contiguous()}, request["logits"])
        return found
    ends, count = set(request["ends"]), request["count"]
    return {**found, "answers": [decode(model, fork(cache), q, length, count, ends) for q in request["questions"]]}


def pressed(model: Any, request: dict[str, Any]) -> Any:
    """The cache of the context, pressed as kvpress's own pipeline does."""
    import torch
    from transformers import DynamicCache

    kvpress: Any = importlib.import_module("kvpress")
    for module in model.modules():
        if hasattr(module, "masked_key_indices"):  # kvzip's, of the text before
            module.masked_key_indices = None
    if request["tokenizer"] is not None:
        model.config._name_or_path = request["tokenizer"]  # where kvzip looks for it
    cache = DynamicCache()
    if request["context"]:
        press = getattr(kvpress, request["press"])(compression_ratio=request["fraction"])
        ids = torch.tensor([request["context"]], device=model.device)
        with press(model):
            model.model(input_ids=ids, past_key_values=cache)
    return cache


def fork(cache: Any) -> Any:
    """A cache of its own for each question; nothing is written in place."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def step(model: Any, cache: Any, ids: list[int], start: int, keep: int) -> Any:
    """Read tokens that stand at ``start`` of the text; logits of the last ``keep``."""
    import torch

    given = torch.tensor([ids], device=model.device)
    at = torch.arange(start, start + len(ids), device=model.device)[None]
    return model(given, past_key_values=cache, position_ids=at, use_cache=True, logits_to_keep=keep).logits[0]


def decode(model: Any, cache: Any, question: list[int], start: int, count: int, ends: set[int]) -> list[int]:
    """The likeliest tokens after a question."""
    answer: list[int] = []
    ids = question
    while len(answer) < count:
        token = int(step(model, cache, ids, start, keep=1)[-1].argmax())
        if token in ends:
            break
        answer.append(token)
        start, ids = start + len(ids), [token]
    return answer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
