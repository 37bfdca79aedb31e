"""A sliding window: the same weights under transformers' Mistral, whose cache forgets what no token sees any more.

Every token sees the last ``window`` ones, itself included, so it keeps what our open window holds at most, and no
memory. It costs what it costs and computes another function.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.inference.full import FullDynamic
from benchmarks.inference.readers import Reading

PIECE_TOKENS = 2048  # a piece's mask has as many rows, and a window's keys more columns


class SlidingWindow(FullDynamic):
    """Reads in pieces with SDPA and the mask that transformers makes.

    Args:
        model: A Mistral from :func:`sharing`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, PIECE_TOKENS)

    def read(self, ids: torch.Tensor, ratio: int) -> Reading:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for piece in ids.split(self.piece, dim=1):
            logits = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return Reading.of(cache, ids, logits[:, -1])

    def repeated(self, reading: Reading, rows: int) -> Reading:
        cache = copy.deepcopy(reading.cache)
        cache.batch_repeat_interleave(rows)
        return Reading(cache, reading.ids.repeat(rows, 1), reading.logits)


def sharing(base: Any, window: int) -> Any:
    """A Mistral of a window with the weights of a stock Llama, which it shares."""
    from transformers import AutoModelForCausalLM, MistralConfig

    own = base.config
    config = MistralConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=own.num_attention_heads,
        num_key_value_heads=own.num_key_value_heads,
        head_dim=own.hidden_size // own.num_attention_heads,
        max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=own.rms_norm_eps,
        rope_parameters=own.rope_parameters,
        sliding_window=window,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=base.dtype, attn_implementation="sdpa")
    model.load_state_dict(base.state_dict(), assign=True)
    model.model.rotary_emb = base.model.rotary_emb  # its frequencies are in no state dict
    return model.requires_grad_(False).eval()
