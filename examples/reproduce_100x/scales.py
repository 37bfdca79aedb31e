"""How large the model is and how long it trains: two CPU cores, a GPU, the ablations, a trial."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import beacon

NATIVE_CONTEXT, WINDOW, STRIDE = 512, 192, 128
CONFIG = beacon.BeaconConfig(window=WINDOW, stride=STRIDE, ratios=(0, 2, 4, 8, 16, 32, 64, 128), reserve=64, sink=4)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of one reproduction.

    Args:
        hidden_size: Channels of the model.
        layers: Its decoder layers.
        heads: Its attention heads.
        intermediate_size: Channels of its feed-forward networks.
        base_tokens: Tokens of one step of the base's training.
        base_steps: Its steps.
        adapter_tokens: Raw tokens of one step of the adapter's training.
        adapter_steps: Its steps.
        longest: Tokens of the longest text that is evaluated.
        cost_up_to: Tokens of the longest text whose cost is measured.
        texts: Texts for perplexity.
        keys: Passkeys of every depth and length; and texts with ten needles of every kind and length, times three.
        rows: Texts of each kind in the evaluation at the end of the adapter's training; of the base's 16 times as many.
    """

    hidden_size: int = 256
    layers: int = 6
    heads: int = 8
    intermediate_size: int = 704
    base_tokens: int = 4096
    base_steps: int = 2800
    adapter_tokens: int = 4096
    adapter_steps: int = 1800
    longest: int = 51200
    cost_up_to: int = 2**20
    texts: int = 8
    keys: int = 3
    rows: int = 16


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        hidden_size=384,
        heads=12,
        layers=8,
        intermediate_size=1024,
        base_tokens=65536,
        base_steps=4000,
        adapter_tokens=65536,
        adapter_steps=4000,
    ),
    "ablation": Scale(hidden_size=192, layers=4, heads=6, intermediate_size=512, base_steps=1600, adapter_steps=500),
    "trial": Scale(
        hidden_size=64,
        layers=2,
        heads=2,
        intermediate_size=128,
        base_steps=2,
        adapter_steps=4,
        adapter_tokens=2048,
        longest=2560,
        cost_up_to=2048,
        texts=1,
        keys=1,
        rows=1,
    ),
}


def mixed_precision(cpu: bool) -> str:
    """What accelerate calls the precision of a training's matrix products: bfloat16 where the hardware has them.

    A CPU without AVX512-BF16 or AMX emulates them, 14 times slower than float32.

    Args:
        cpu: Whether to stay on the CPU even with a GPU at hand.
    """
    if not cpu and torch.cuda.is_available():
        return "bf16"
    has = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 does not have it
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "no"


def make_base(scale: Scale, vocab_size: int) -> LlamaForCausalLM:
    """A Llama with random weights and a native context of 512 tokens."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=scale.hidden_size,
        intermediate_size=scale.intermediate_size,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        head_dim=scale.hidden_size // scale.heads,
        max_position_embeddings=NATIVE_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)
