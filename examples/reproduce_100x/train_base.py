"""Train the base: a small Llama on packages' sources within 512 tokens, resumable at any point."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import load_corpus
from evaluate_base import evaluate_base
from muon import Muon
from progress import Run, replace_folder
from scales import NATIVE_CONTEXT, Scale, make_base, mixed_precision
from sequences import ANSWER_WEIGHT, Sequences

logger = logging.getLogger(__name__)
MUON_RATE, ADAM_RATE = 0.02, 3e-3
EVALUATIONS = 8  # over the training, beside the last one
SAVE_MINUTES = 3.0


def schedule(progress: float, step: int) -> tuple[float, int, float, float]:
    """What a moment of the training asks for.

    A small model learns to look back only once it has induction heads, and these need to know the token before each
    token first: so plain code comes first, then short sequences of chunks that repeat, then longer ones. With the
    repeated chunks from the very beginning none had formed after 350 steps.

    Args:
        progress: Share of the steps that are done, 0 to 1.
        step: Number of the step, for the warm-up.

    Returns:
        Factor of the learning rates, sequence length, share of needle and of copied sequences.
    """
    factor = min(1.0, (step + 1) / 50) * min(1.0, max(0.01, (1.0 - progress) / 0.65))
    if progress < 0.12:
        return factor, 256, 0.10, 0.10
    if progress < 0.19:
        return factor, 128, 0.25, 0.50
    if progress < 0.25:
        return factor, 256, 0.30, 0.30
    if progress < 0.55:
        return factor, NATIVE_CONTEXT, 0.25, 0.10
    return factor, NATIVE_CONTEXT, 0.15, 0.05


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=MUON_RATE, weight_decay=0.01), adam]


def train_base(work: Path, scale: Scale, *, seed: int = 0, cpu: bool = False) -> Path:
    """Train until all steps are done; a base that is already there is left as it is.

    Args:
        work: Folder of build products; goes on from its checkpoint.
        scale: Sizes.
        seed: Of the weights and of what is drawn.
        cpu: Stay on the CPU even with a GPU at hand.

    Returns:
        The folder of the base, in Hugging Face's format.
    """
    tokenizer, corpus, held_out = load_corpus(work)
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision(cpu))
    set_seed(seed)
    sequences = Sequences(corpus, tokenizer, np.random.default_rng(seed))
    model = make_base(scale, len(tokenizer))
    optimizers = make_optimizers(model)
    run = Run(work, "base", scale.base_steps)
    state = run.resume()
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        sequences.rng.bit_generator.state = json.loads(state["rng"])
    if run.over and (work / "base").exists():
        return work / "base"
    model, *optimizers = accelerator.prepare(model, *optimizers)
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    while not run.over:
        factor, seqlen, needle_share, copy_share = schedule(run.progress, run.step)
        for optimizer, rate in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        drawn = sequences.batch(scale.base_tokens // seqlen, seqlen, needle_share, copy_share)
        tokens, weights = (torch.from_numpy(array).to(accelerator.device) for array in drawn)
        weights = weights[:, 1:].flatten()
        with accelerator.autocast():
            logits = plain(input_ids=tokens, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(plain.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step, run.tokens = run.step + 1, run.tokens + tokens.numel()
        run.note(loss=loss.item())
        answers = losses.detach()[weights == ANSWER_WEIGHT]
        if len(answers):
            run.note(answers=answers.mean().item())
        if run.step % 50 == 0:
            run.report_recent()
        if run.step * (EVALUATIONS + 1) // scale.base_steps > (run.step - 1) * (EVALUATIONS + 1) // scale.base_steps:
            few = max(16 * scale.rows if run.over else 2 * scale.rows, 2)
            run.report(final=run.over, **evaluate_base(plain, tokenizer, held_out, few, max(few // 4, 2)))
        if run.over or run.due(SAVE_MINUTES):
            run.save(
                model=plain.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                rng=json.dumps(sequences.rng.bit_generator.state),
            )
            _save_snapshot(work / "base", plain, tokenizer)
    return work / "base"


def _save_snapshot(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face folder beside its place, then rename it."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    replace_folder(fresh, folder)
