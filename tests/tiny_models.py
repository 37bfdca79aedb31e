"""Random models of every supported family, small enough to build in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 96
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [2.0, 3.0, 5.0],
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}
# Name of the case: name of the family's classes, and what its configuration adds to `BASE`.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": ROPE["llama3"], "eos_token_id": [2, 3], "num_hidden_layers": 3}),
    "llama-linear": ("Llama", {"rope_parameters": ROPE["linear"], "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("Llama", {"rope_parameters": ROPE["yarn"], "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-sliding": ("Mistral", {"sliding_window": 128}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"num_key_value_heads": 4}),
    "phi3-longrope": (
        "Phi3",
        {
            "rope_parameters": {**ROPE["longrope"], "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 128,
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "olmo2": ("Olmo2", {}),
}


def tiny_config(name: str = "llama3", **changes: Any) -> Any:
    """The configuration of one case."""
    family, own = TINY[name]
    return getattr(transformers, f"{family}Config")(**{**BASE, **own, **changes})


def tiny_model(name: str = "llama3", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A stock model with random weights, norms and biases included, large enough for attention to be uneven."""
    config = tiny_config(name, **changes)
    model = getattr(transformers, f"{TINY[name][0]}ForCausalLM")(config).eval()
    return randomize(model, seed=seed).to(dtype)


def randomize(model: Any, *, seed: int = 0, only: str = "") -> Any:
    """Draw the parameters anew (those whose name contains ``only``)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
    return model


def random_ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Token ids that are no special tokens."""
    return torch.randint(4, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


def fingerprint(model: Any) -> dict[str, Any]:
    """All that wrapping and unwrapping must leave as it was: names, values, classes, flags, modes."""
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two fingerprints are equal, tensors bit for bit."""
    assert list(before["values"]) == list(after["values"])
    for name, tensor in before["values"].items():
        assert torch.equal(tensor, after["values"][name]), name
    assert before["parameters"] == after["parameters"]
    assert before["modules"] == after["modules"]
    assert before["attributes"] == after["attributes"]
    assert before["config"] == after["config"]
