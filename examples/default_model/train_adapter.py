"""Train the beacon adapter of the default model on texts of at most 1,024 tokens, by the clock, resumable."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import beacon
from beacon.evaluation import SlidingWindow, measure_perplexity
from beacon.weights import beacon_parameters
from course import CONFIG, LESSON, PHASES, WINDOW, Batch, draw_batch, draw_lesson, taught_spans
from data import Corpus, load_corpus
from lookups import Lookups, lookup_heads
from muon import Muon
from run import Run
from tasks import FAR_COPY_WEIGHT, NUM_DIGITS, TaskSampler

SOFTENING = 0.1  # of the copied query projections
EVALUATIONS = (0.25, 0.5, 0.75)  # of the time; the last evaluation comes in any case


@torch.no_grad()
def soften(model: torch.nn.Module) -> None:
    """Let fresh beacons look at everything before they learn where to look.

    They inherit heads that look at the token before with a saturated softmax, which passes no gradient on: so they
    learned nothing of what stands more than three tokens before them.
    """
    for name, parameter in beacon_parameters(model).items():
        if "beacon_q_proj" in name:
            parameter.mul_(SOFTENING)


def losses_by_kind(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Mean loss of passkey digits and repeated chunks, and divergence from the stock model, as far as there are any.

    The stock model's own uncertainty, much larger than what a memory can gain, drops out of the divergence's gradient.
    """
    logits = model(input_ids=batch.ids, ratios=batch.ratios, use_cache=False).logits[:, :-1]
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(
        weights
    )
    parts = {"copy": losses[weights == FAR_COPY_WEIGHT], "digit": losses[weights > FAR_COPY_WEIGHT]}
    rows = (weights != FAR_COPY_WEIGHT).all(dim=1)
    if rows.any():
        spans = taught_spans(batch.ids.shape[1])
        parts["divergence"] = torch.cat([_divergence(model, logits, batch, rows, *span) for span in spans])
    return {kind: part.mean() for kind, part in parts.items() if part.numel()}


def _divergence(
    model: torch.nn.Module, logits: torch.Tensor, batch: Batch, rows: torch.Tensor, begin: int, end: int, first: int
) -> torch.Tensor:
    """Kullback-Leibler divergence from the stock model, which reads ``[begin, end)``, at plain text after ``first``."""
    with torch.no_grad(), beacon.disabled(model):
        stock = model(input_ids=batch.ids[rows, begin:end], use_cache=False).logits[:, first - begin : -1]
        stock = stock.float().log_softmax(-1)
    ours = logits[rows, first : end - 1].float().log_softmax(-1)
    plain = batch.weights[rows, first + 1 : end] == 1.0
    return (stock.exp() * (stock - ours)).sum(-1)[plain]


@torch.no_grad()
def evaluate(model: torch.nn.Module, held_out: Corpus, tokenizer: PreTrainedTokenizerFast, rows: int) -> dict:
    """Passkey recall (per digit, exact) and loss of the last 1,024 of 4,096 tokens, on held-out code."""
    result: dict[str, Any] = {}
    sampler = TaskSampler(held_out, tokenizer, np.random.default_rng(99))
    for seqlen, ratio in ((1024, 8), (4096, 8), (4096, 32)):
        drawn = [sampler.passkey(seqlen, (n + 0.5) / rows * (1 - 1.5 * WINDOW / seqlen))[0] for n in range(rows)]
        right = []
        for ids in torch.from_numpy(np.stack(drawn)).split(8):
            logits = model(ids[:, :-1], ratios=ratio, logits_to_keep=NUM_DIGITS, use_cache=False).logits
            right.append(logits.argmax(-1) == ids[:, -NUM_DIGITS:])
        found = torch.cat(right).float()
        recall = [round(found.mean().item(), 3), round(found.amin(dim=1).mean().item(), 3)]
        result[f"passkey, {seqlen} tokens, ratio {ratio}"] = recall
    texts = [torch.from_numpy(sampler.code(4097)) for _ in range(rows)]
    for ratio in (8, 16, 32):
        losses = [model(ids[None], labels=_last(ids), ratios=ratio).loss.item() for ids in texts]
        result[f"loss, 4096 tokens, ratio {ratio}"] = round(float(np.mean(losses)), 4)
    sliding = measure_perplexity(model, texts, 4097, 1024, SlidingWindow(WINDOW, 4))
    return result | {"loss, 4096 tokens, sliding window 128 + 4": round(sliding.loss, 4)}


def _last(ids: torch.Tensor) -> torch.Tensor:
    labels = ids[None].clone()
    labels[:, :-1024] = -100
    return labels


def note(recent: dict[str, list[float]], parts: dict[str, torch.Tensor], ratios: list[int]) -> None:
    """Keep losses for the log, and those of one ratio in all windows under its name as well."""
    for kind, part in parts.items():
        recent.setdefault(kind, []).append(part.item())
        if kind in ("digit", "divergence") and len(set(ratios)) == 1:
            recent.setdefault(f"{kind} at {ratios[0]}", []).append(part.item())


def make_optimizers(parameters: list[torch.nn.Parameter], args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW for the embedding."""
    muon = Muon([p for p in parameters if p.shape[0] > 1], lr=args.muon_lr)
    adam = torch.optim.AdamW(
        [p for p in parameters if p.shape[0] == 1], lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [muon, adam]


def train(args: argparse.Namespace) -> None:
    """Train until ``args.minutes`` are used up, over all restarts together."""
    torch.set_num_threads(args.threads)
    accelerator = Accelerator(cpu=args.cpu, mixed_precision="bf16" if args.bf16 else "no")
    set_seed(args.seed)
    tokenizer, corpus, held_out = load_corpus(args.work)
    sampler = TaskSampler(corpus, tokenizer, np.random.default_rng(args.seed + 1))
    base = AutoModelForCausalLM.from_pretrained(args.work / "base", dtype=torch.float32)
    model = beacon.wrap(base, CONFIG)
    parameters = list(beacon_parameters(model).values())
    optimizers = make_optimizers(parameters, args)
    run, evaluated = Run(args.work, "adapter", args.minutes), 0
    state = run.resume()
    if state is None:
        soften(model)
        heads = lookup_heads(model, sampler)
        run.report(lookups={str(place): distance for place, distance in heads.items()})
    else:
        model.load_state_dict(state["beacons"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        sampler.rng.bit_generator.state = json.loads(state["rng"])
        heads, evaluated = state["heads"], state["evaluated"]
    lookups = Lookups(model, heads, WINDOW)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    recent: dict[str, list[float]] = {}
    begun = run.step
    while run.progress < 1.0 or run.step == begun:  # a restart takes one step at least
        factor = min(1.0, (run.step + 1) / 30) * min(1.0, max(0.02, 1.4 * (1.0 - run.progress)))
        for optimizer, rate in zip(optimizers, (args.muon_lr, args.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        if run.progress < LESSON:
            ids = draw_lesson(sampler, args.tokens).to(accelerator.device)
            with accelerator.autocast():
                errors = lookups.errors(ids)
            loss = torch.stack(list(errors.values())).mean()
            note(recent, errors | {"lesson": loss}, [])
            run.tokens += ids.numel()
        else:
            phase = next(phase for phase in PHASES if run.progress < phase.until or phase is PHASES[-1])
            batch = draw_batch(sampler, args.tokens, phase).to(accelerator.device)
            with accelerator.autocast():
                parts = losses_by_kind(model, batch)
            loss = sum(phase.text_weight * part if kind == "divergence" else part for kind, part in parts.items())
            note(recent, parts, batch.ratios)
            run.tokens += batch.ids.numel()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        if run.step % 20 == 0:
            means = {kind: round(float(np.mean(values)), 4) for kind, values in sorted(recent.items())}
            run.report(**means, tokens_per_s=round(run.tokens / run.elapsed))
            recent = {}
        if evaluated < len(EVALUATIONS) and run.progress >= EVALUATIONS[evaluated]:
            evaluated += 1
            if args.rows >= 4:
                run.report(**evaluate(model, held_out, tokenizer, args.rows // 4))
        stop = run.elapsed > args.stop_after * 60
        if run.due(3.0) or run.progress >= 1.0 or stop:
            beacons = {name: p.detach().clone() for name, p in beacon_parameters(model).items()}
            run.save(
                beacons=beacons,
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                rng=json.dumps(sampler.rng.bit_generator.state),
                heads=heads,
                evaluated=evaluated,
            )
            beacon.save_adapter(model, args.work / "adapter")
        if stop:
            return
    run.report(final=True, **evaluate(model, held_out, tokenizer, args.rows))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--minutes", type=float, default=98.0, help="time to train, over all restarts together")
    parser.add_argument("--tokens", type=int, default=4096, help="raw tokens per step")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="of the projections")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="of the embedding")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (processors with AVX512-BF16, GPUs)")
    parser.add_argument("--stop-after", type=float, default=1e9, help="minutes after which this restart saves and ends")
    parser.add_argument("--rows", type=int, default=32, help="texts of each kind evaluated last; a quarter before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even with a GPU at hand")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
