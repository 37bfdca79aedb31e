"""Train the base of the default model: a small Llama on the standard library, by the clock, resumable."""

import argparse
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data import load_corpus
from evaluate_base import evaluate
from recipe import make_model, make_optimizers, schedule
from run import Run, replace_folder
from tasks import TaskSampler

EVALUATIONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the time
TOKENS_PER_STEP = 4096


def save_snapshot(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face folder beside its place, then rename it."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    replace_folder(fresh, folder)


def train(args: argparse.Namespace) -> None:
    """Train until ``args.minutes`` are used up, over all restarts together."""
    torch.set_num_threads(args.threads)
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(args.seed)
    tokenizer, corpus, held_out = load_corpus(args.work)
    sampler = TaskSampler(corpus, tokenizer, np.random.default_rng(args.seed))
    model = make_model()
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr)
    run, evaluated = Run(args.work, "base", args.minutes), 0
    state = run.resume()
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        sampler.rng.bit_generator.state = json.loads(state["rng"])
        evaluated = state["evaluated"]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    plain = accelerator.unwrap_model(model)
    recent, last_report = [], (run.elapsed, run.tokens)
    begun = run.step
    while run.progress < 1.0 or run.step == begun:  # a restart takes one step at least
        factor, seqlen, passkey_share, copy_share = schedule(run.progress, run.step)
        for optimizer, rate in zip(optimizers, (args.muon_lr, args.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        drawn = sampler.batch(TOKENS_PER_STEP // seqlen, seqlen, passkey_share, copy_share)
        tokens, weights = (torch.from_numpy(array).to(accelerator.device) for array in drawn)
        weights = weights[:, 1:].flatten()
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
        run.step, run.tokens = run.step + 1, run.tokens + tokens.numel()
        digits = losses.detach()[weights == sampler.digit_weight]
        recent.append((loss.item(), digits.mean().item() if len(digits) else float("nan")))
        if run.step % 50 == 0:
            rate = (run.tokens - last_report[1]) / (run.elapsed - last_report[0])
            mean, digit = np.nanmean(recent, axis=0)
            run.report(loss=round(mean, 4), digit_loss=round(digit, 4), tokens_per_s=round(rate))
            recent, last_report = [], (run.elapsed, run.tokens)
        over = run.progress >= 1.0
        if evaluated < len(EVALUATIONS) and run.progress >= EVALUATIONS[evaluated] and not over:
            evaluated += 1
            run.report(**evaluate(plain, tokenizer, held_out, windows=args.windows // 8, keys=args.keys // 8))
        if over or run.due(args.save_minutes):
            run.save(
                model=plain.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                rng=json.dumps(sampler.rng.bit_generator.state),
                evaluated=evaluated,
            )
            save_snapshot(args.work / "base", plain, tokenizer)
    run.report(final=True, **evaluate(plain, tokenizer, held_out, windows=args.windows, keys=args.keys))
    shutil.copy(args.work / "base_log.jsonl", args.work / "base" / "log.jsonl")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--minutes", type=float, default=52.0, help="time to train, over all restarts together")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--windows", type=int, default=256, help="held-out windows of the last evaluation")
    parser.add_argument("--keys", type=int, default=64, help="passkeys per depth of the last evaluation")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even with a GPU at hand")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
