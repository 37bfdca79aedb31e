"""What the base is and how it is trained: the model, its optimizers, the course of the training."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from muon import Muon


def make_model() -> LlamaForCausalLM:
    """A Llama of 5.6 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": [model.model.embed_tokens.weight]}, {"params": vectors}],
        lr=adam_lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [Muon(matrices, lr=muon_lr, weight_decay=0.01), adam]


def schedule(progress: float, step: int) -> tuple[float, int, float, float]:
    """What a moment of the training asks for.

    Short sequences and many synthetic ones come first: they make induction heads form within a few
    minutes, without which so small a model never looks further back than 100 tokens.

    Args:
        progress: Share of the time that is over, 0 to 1.
        step: Number of the step, for the warm-up.

    Returns:
        Factor of the learning rates, sequence length, share of passkey and of copied sequences.
    """
    factor = min(1.0, (step + 1) / 50) * min(1.0, max(0.01, (1.0 - progress) / 0.65))
    if progress < 0.20:
        return factor, 128, 0.25, 0.50
    if progress < 0.26:
        return factor, 256, 0.25, 0.30
    if progress < 0.55:
        return factor, 512, 0.25, 0.15
    return factor, 512, 0.15, 0.05
