"""Train the beacon adapter of the default model on texts of at most 1,024 tokens, by the clock, resumable."""

import argparse
import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import beacon
from beacon.wrapping import beacon_parameters
from data import Corpus, load_corpus
from matching import Matching
from muon import Muon
from run import Run
from tasks import FAR_COPY_WEIGHT, NUM_DIGITS, TaskSampler

WINDOW = 128
RATIOS = {128: (2, 4, 8, 8, 16, 32, 64, 128), 64: (2, 4, 8, 8, 16, 32, 64)}
EASY = (1, 1, 2, 4)
MATCH_WEIGHT = 5.0
CONFIG = beacon.BeaconConfig(window=WINDOW, ratios=(0, 2, 4, 8, 16, 32, 64, 128), reserve=64)
CONFIGS = {
    128: CONFIG,
    64: CONFIG.replace(stride=64, ratios=(0, 2, 4, 8, 16, 32, 64)),
}


def use_stride(model: torch.nn.Module, stride: int) -> None:
    """Let the wrapped model read with another stride from the next call on."""
    model.beacon_wrapping = dataclasses.replace(model.beacon_wrapping, config=CONFIGS[stride])


def draw_ratios(rng: np.random.Generator, choice: tuple[int, ...], stride: int, windows: int) -> list[int]:
    """One ratio per window out of a choice: one for all of them, or a new draw for each.

    Low ratios in every window fill the memory up to the positions that long texts reach later; one sequence in ten
    has ratio 1 in its first 512 tokens for the same reason.
    """
    kind = rng.random()
    if kind < 0.4:
        return [int(rng.choice(choice))] * windows
    ratios = [int(rng.choice(choice)) for _ in range(windows)]
    if kind < 0.5:
        first = min(512 // stride, windows)
        ratios[:first] = [1] * first
    return ratios


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a stretch of the training draws: shares of passkey and of far-copy rows, digit weight, ratios."""

    until: float
    passkey: float
    copy: float
    digit_weight: float
    easy: bool


# Copying through beacons is learned first, at low ratios, where a loss at every token asks for it.
PHASES = (Phase(0.45, 0.3, 0.6, 10.0, True), Phase(0.75, 0.5, 0.2, 10.0, False), Phase(1.1, 0.3, 0.05, 10.0, False))


def draw_batch(sampler: TaskSampler, tokens: int, phase: Phase) -> tuple[torch.Tensor, torch.Tensor, int, list[int]]:
    """Rows of equal length, at most 8 windows long and with a part of a window at the end.

    Returns:
        Token ids and loss weights ``[rows, seqlen]``, the stride, and the ratio of every full window.
    """
    sampler.digit_weight = phase.digit_weight
    stride = int(sampler.rng.choice(list(CONFIGS)))
    seqlen = int(sampler.rng.integers(2, 4 if phase.easy else 8)) * WINDOW + int(sampler.rng.integers(16, WINDOW))
    rows = []
    for kind in sampler.rng.random(max(1, tokens // seqlen)):
        if kind < phase.passkey:
            rows.append(sampler.passkey(seqlen))
        elif kind < phase.passkey + phase.copy:
            rows.append(sampler.far_copy(seqlen))
        else:
            rows.append((sampler.code(seqlen), np.ones(seqlen, np.float32)))
    ids, weights = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    windows = (seqlen - WINDOW) // stride + 1
    ratios = draw_ratios(sampler.rng, EASY if phase.easy else RATIOS[stride], stride, windows)
    return ids, weights, stride, ratios


def weighted_loss(
    model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor, ratios: list[int]
) -> tuple[torch.Tensor, list[float]]:
    """Next-token loss with a weight per target, over the weights' sum.

    Returns:
        The loss, and for the log the mean over plain tokens, far copies and passkey digits.
    """
    logits = model(input_ids=ids, ratios=ratios, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    kinds = (weights == 1.0, weights == FAR_COPY_WEIGHT, weights > FAR_COPY_WEIGHT)
    parts = [losses.detach()[kind].mean().item() for kind in kinds]
    return (losses * weights).sum() / weights.sum(), parts


@torch.no_grad()
def evaluate(model: torch.nn.Module, held_out: Corpus, tokenizer: PreTrainedTokenizerFast, rows: int = 8) -> dict:
    """Passkey recall (per digit, exact) and loss of the last 1,024 of 4,096 tokens, on held-out code, by stride."""
    result: dict[str, dict] = {}
    for stride in CONFIGS:
        use_stride(model, stride)
        sampler = TaskSampler(held_out, tokenizer, np.random.default_rng(99))
        for seqlen, ratio in ((1000, 8), (4096, 8), (4096, 32)):
            ids = torch.from_numpy(np.stack([sampler.passkey(seqlen, (n + 0.5) / rows)[0] for n in range(rows)]))
            logits = model(ids[:, :-1], ratios=ratio, logits_to_keep=NUM_DIGITS, use_cache=False).logits
            right = logits.argmax(-1) == ids[:, -NUM_DIGITS:]
            recall = [round(right.float().mean().item(), 3), round(right.all(dim=1).float().mean().item(), 3)]
            result[f"passkey, {seqlen} tokens, stride {stride}, ratio {ratio}"] = recall
        ids = torch.from_numpy(np.stack([sampler.code(4096) for _ in range(rows)]))
        labels = ids.clone()
        labels[:, :-1024] = -100
        for ratio in (8, 32):
            loss = model(ids, labels=labels, ratios=ratio).loss.item()
            result[f"loss, 4096 tokens, stride {stride}, ratio {ratio}"] = round(loss, 4)
    return result


def make_optimizers(parameters: list[torch.nn.Parameter], args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all beacon parameters, or Muon for the projections where ``--muon-lr`` is given."""
    matrices = [p for p in parameters if args.muon_lr and p.shape[0] > 1]
    rest = [p for p in parameters if not args.muon_lr or p.shape[0] == 1]
    adam = torch.optim.AdamW([{"params": rest, "top_lr": args.lr}], lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if not matrices:
        return [adam]
    muon = Muon(matrices, lr=args.muon_lr)
    for group in muon.param_groups:
        group["top_lr"] = args.muon_lr
    return [muon, adam]


def train(args: argparse.Namespace) -> None:
    """Train until ``args.minutes`` are used up, over all restarts together."""
    torch.set_num_threads(args.threads)
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(args.seed)
    tokenizer, corpus, held_out = load_corpus(args.work)
    sampler = TaskSampler(corpus, tokenizer, np.random.default_rng(args.seed + 1))
    base = AutoModelForCausalLM.from_pretrained(args.work / "base", dtype=torch.float32)
    model = beacon.wrap(base, CONFIG)
    parameters = list(beacon_parameters(model).values())
    optimizers = make_optimizers(parameters, args)
    matching = Matching(model)
    run = Run(args.work, "adapter", args.minutes)
    state = run.resume()
    if state is not None:
        model.load_state_dict(state["beacons"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        sampler.rng.bit_generator.state = json.loads(state["rng"])
    model, *optimizers = accelerator.prepare(model, *optimizers)
    recent: list[list[float]] = []
    while run.progress < 1.0:
        factor = min(1.0, (run.step + 1) / 30) * max(0.02, 1.0 - run.progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * factor
        phase = next(phase for phase in PHASES if run.progress < phase.until)
        ids, weights, stride, ratios = draw_batch(sampler, args.tokens, phase)
        use_stride(model, stride)
        matching.active = True
        loss, parts = weighted_loss(model, ids.to(accelerator.device), weights.to(accelerator.device), ratios)
        match = matching.loss()
        accelerator.backward(loss if match is None else loss + MATCH_WEIGHT * match)
        accelerator.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step, run.tokens = run.step + 1, run.tokens + ids.numel()
        recent.append([*parts, np.nan if match is None else match.item()])
        if run.step % 20 == 0:
            means = [round(float(mean), 4) for mean in np.nanmean(recent, axis=0)]
            losses = dict(zip(("loss", "copy_loss", "digit_loss", "match_loss"), means, strict=True))
            run.report(**losses, tokens_per_s=round(run.tokens / run.elapsed))
            recent = []
        if run.step % args.evaluate_steps == 0:
            run.report(**evaluate(model, held_out, tokenizer))
        stop = run.elapsed > args.stop_after * 60
        if run.due(3.0) or run.progress >= 1.0 or stop:
            beacons = {name: p.detach().clone() for name, p in beacon_parameters(model).items()}
            run.save(
                beacons=beacons,
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                rng=json.dumps(sampler.rng.bit_generator.state),
            )
            use_stride(model, WINDOW)
            beacon.save_adapter(model, args.work / "adapter")
        if stop:
            return
    matching.active = False
    run.report(final=True, **evaluate(model, held_out, tokenizer, rows=16))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default_model"))
    parser.add_argument("--minutes", type=float, default=29.0, help="time to train, over all restarts together")
    parser.add_argument("--tokens", type=int, default=4096, help="raw tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02, help="train the projections with Muon at this rate")
    parser.add_argument("--stop-after", type=float, default=1e9, help="minutes after which this restart saves and ends")
    parser.add_argument("--evaluate-steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even with a GPU at hand")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
