"""Train the base of the default model: a small Llama on the standard library, by the clock, resumable."""

import argparse
import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import load_corpus
from evaluate_base import evaluate
from muon import Muon
from tasks import TaskSampler

logger = logging.getLogger("train_base")
EVALUATIONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the time
TOKENS_PER_STEP = 4096


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

    Short sequences and many synthetic ones come first: they make induction heads form within the
    first minutes, without which so small a model never looks further back than 100 tokens.

    Args:
        progress: share of the time that is over, 0 to 1.
        step: number of the step, for the warm-up.

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


def write_folder(folder: Path, write) -> None:
    """Fill a folder beside its place, then rename, so that readers never see half of one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def save(work: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, state: dict) -> None:
    """Write the checkpoint (for resuming) and the snapshot (a Hugging Face folder)."""
    checkpoint = work / "base_checkpoint.pt"
    torch.save(state | {"model": model.state_dict()}, checkpoint.with_suffix(".new"))
    os.replace(checkpoint.with_suffix(".new"), checkpoint)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(work / "base", write)


def train(args: argparse.Namespace) -> None:
    """Train until `args.minutes` are used up, over all runs together."""
    torch.set_num_threads(args.threads)
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(args.seed)
    tokenizer, corpus, held_out = load_corpus(args.work)
    sampler = TaskSampler(corpus, tokenizer, np.random.default_rng(args.seed))
    model = make_model()
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr)
    step, seen, elapsed, evaluated = 0, 0, 0.0, 0
    checkpoint = args.work / "base_checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        sampler.rng.bit_generator.state = state["rng"]
        step, seen, elapsed, evaluated = (state[k] for k in ("step", "seen", "elapsed", "evaluated"))
        logger.info("resumed at step %d, %.1f minutes", step, elapsed / 60)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    plain = accelerator.unwrap_model(model)
    log = (args.work / "base_log.jsonl").open("a")

    def report(record: dict) -> None:
        record = {"step": step, "tokens": seen, "minutes": round(elapsed / 60, 2)} | record
        logger.info("%s", json.dumps(record))
        log.write(json.dumps(record) + "\n")
        log.flush()

    began, before = time.monotonic(), elapsed
    last_save, recent, last_report = elapsed, [], (elapsed, seen)
    while elapsed < args.minutes * 60:
        factor, seqlen, passkey_share, copy_share = schedule(elapsed / (args.minutes * 60), step)
        for optimizer, rate in zip(optimizers, (args.muon_lr, args.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        tokens, weights = sampler.batch(TOKENS_PER_STEP // seqlen, seqlen, passkey_share, copy_share)
        tokens = torch.from_numpy(tokens).to(accelerator.device)
        weights = torch.from_numpy(weights)[:, 1:].flatten().to(accelerator.device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weights).sum() / weights.sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        digits = losses.detach()[weights == sampler.digit_weight]
        recent.append((loss.item(), digits.mean().item() if len(digits) else float("nan")))
        step, seen, elapsed = step + 1, seen + tokens.numel(), before + time.monotonic() - began
        if step % 50 == 0:
            rate = (seen - last_report[1]) / (elapsed - last_report[0])
            loss_mean, digit_loss = np.nanmean(recent, axis=0)
            report({"loss": round(loss_mean, 4), "digit_loss": round(digit_loss, 4), "tokens_per_s": round(rate)})
            recent, last_report = [], (elapsed, seen)
        over = elapsed >= args.minutes * 60
        if evaluated < len(EVALUATIONS) and elapsed >= EVALUATIONS[evaluated] * args.minutes * 60 and not over:
            evaluated += 1
            report(evaluate(plain, tokenizer, held_out, windows=32, keys=8))
            elapsed = before + time.monotonic() - began
            last_report = (elapsed, seen)
        if over or elapsed - last_save > args.save_minutes * 60:
            last_save = elapsed
            state = {"step": step, "seen": seen, "elapsed": elapsed, "evaluated": evaluated}
            state |= {"rng": sampler.rng.bit_generator.state, "optimizers": [o.state_dict() for o in optimizers]}
            save(args.work, plain, tokenizer, state)
    report({"final": True} | evaluate(plain, tokenizer, held_out, windows=256, keys=64))
    shutil.copy(args.work / "base_log.jsonl", args.work / "base" / "log.jsonl")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--minutes", type=float, default=65.0, help="time to train, over all runs together")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even with a GPU at hand")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
