"""Train the beacon adapter on texts of at most 16 windows, resumable at any point."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import beacon
from beacon.weights import beacon_parameters
from corpus import load_corpus
from course import BORDERS, Batch, Phase, draw_batch, muon_rate, phase_at
from evaluate_adapter import evaluate_adapter
from lookups import OTHERS, Lookups, lookup_heads
from muon import Muon
from progress import Run
from questions import MOST, Questions, answer_loss, draw_memory, draw_questions, draw_strangers, gather_memory
from scales import CONFIG, NATIVE_CONTEXT, STRIDE, WINDOW, Scale, mixed_precision
from sequences import ANSWER_WEIGHT, Sequences
from strides import EVERY, LayerEntries, memory_entries, read_strides
from teacher import Memory, foresee, read_whole

ADAM_RATE, FULL_ADAM = 3e-3, 0.02  # of AdamW, and the rate of Muon from which on it is that
SOFTENING = 0.1  # of the copied query projections
HOLD = 4.0  # weight of what heads keep of plain text where questions, which would spoil it, are asked
# Of the parts of the loss, by the kind of the phase; all others have 1.
LEARNED = {"other keys": OTHERS, "other values": OTHERS}
HELD = {"near keys": HOLD, "near values": HOLD, "other keys": HOLD * OTHERS, "other values": HOLD * OTHERS}
WEIGHTS = {"lesson": LEARNED, "questions": HELD | {"divergence": 3.0}, "reading": HELD | {"divergence": 10.0}}
EVALUATIONS = 4  # over the training, beside the last one
SAVE_MINUTES = 3.0


@torch.no_grad()
def soften(model: torch.nn.Module) -> None:
    """Let fresh beacons look at everything before they learn where to look.

    They inherit heads that look at the token before with a saturated softmax, which passes no gradient on: so they
    learned nothing of what stands more than three tokens before them.
    """
    for name, parameter in beacon_parameters(model).items():
        if "beacon_q_proj" in name:
            parameter.mul_(SOFTENING)


def lesson(lookups: Lookups, batch: Batch, ends: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """Errors of what beacons hold, in any stride of a text and at any place in memory (`Lookups.errors`)."""
    return lookups.errors(_strides(lookups.model, batch.ids, ends, rng), batch.weights, ends)


def questioned(
    lookups: Lookups, questions: Questions, ratios: tuple[int, ...], every: int, rng: np.random.Generator
) -> tuple[dict[str, Tensor], list[LayerEntries]]:
    """The same errors, and mean loss of answers to questions read with these beacons as memory; and the beacons."""
    ends = torch.arange(every, STRIDE + 1, every, device=questions.texts.device)
    layers = list(_strides(lookups.model, questions.texts, ends, rng))
    parts = lookups.errors(layers, questions.weights, ends)
    places = draw_memory(rng, questions.holds, ratios, every).to(questions.texts.device)
    parts["answers"] = answer_loss(lookups.model, questions, layers, places, int(rng.integers(STRIDE)))
    return parts, layers


def _strides(model: torch.nn.Module, ids: Tensor, ends: Tensor, rng: np.random.Generator) -> Iterator[LayerEntries]:
    memory = int(rng.integers(len(memory_entries(model.beacon_config, ids.shape[1])), NATIVE_CONTEXT))
    return read_strides(model, ids, ends, memory)


def reading(model: torch.nn.Module, batch: Batch, past: Memory | None, rng: np.random.Generator) -> dict[str, Tensor]:
    """Mean loss of answers, and divergence from the stock model at every other plain token, read behind ``past``.

    The logits of all of them would be a third of a step. The stock model's own uncertainty, much larger than what a
    memory can gain, drops out of the divergence's gradient.
    """
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    parts = {}
    hidden = read_whole(model, batch.ids, batch.ratios, past)[:, :-1]
    chosen = weights == ANSWER_WEIGHT
    if chosen.any():
        parts["answers read"] = functional.cross_entropy(model.beacon_head(hidden[chosen]).float(), targets[chosen])
    plain = weights == 1.0
    plain[:, : WINDOW - 1] = False
    plain[:, int(rng.integers(2)) :: 2] = False
    if plain.any():
        with torch.no_grad():
            wanted = model.beacon_head(foresee(model, batch.ids)[:, :-1][plain]).float().log_softmax(-1)
        ours = model.beacon_head(hidden[plain]).float().log_softmax(-1)
        parts["divergence"] = functional.kl_div(ours, wanted, log_target=True, reduction="sum") / len(ours)
    return parts


def losses(
    lookups: Lookups,
    sequences: Sequences,
    phase: Phase,
    tokens: int,
    device: torch.device,
    spacings: tuple[int, ...] | None = None,
) -> tuple[dict[str, Tensor], list[int], int]:
    """Draw what a step of a phase is about and compute its losses.

    Returns:
        The losses by kind, the ratios at which the windows of texts were read, and the number of raw tokens.
    """
    rng = sequences.rng
    every = EVERY if spacings is None else int(rng.choice(spacings))
    if phase.kind == "lesson":
        batch = draw_batch(sequences, tokens, phase).to(device)
        first = int(rng.choice((every // 2, every))) if spacings is None else every
        ends = torch.arange(first, STRIDE + 1, every, device=device)
        return lesson(lookups, batch, ends, rng), [], batch.ids.numel()
    questions = draw_questions(sequences, max(1, tokens // NATIVE_CONTEXT), NATIVE_CONTEXT, BORDERS).to(device)
    batch = draw_batch(sequences, int(tokens * phase.reads), phase).to(device)
    ratios = (every,) if spacings else tuple(ratio for ratio in phase.ratios if ratio >= EVERY)
    parts, layers = questioned(lookups, questions, ratios, every, rng)
    left = MOST - sum(STRIDE // ratio for ratio in batch.ratios)
    strangers = draw_strangers(rng, questions.holds, ratios, left, every).to(device)
    past = None
    if len(strangers):
        memory = gather_memory(layers, strangers[None], questions.holds.shape[1], lookups.model.beacon_config.sink)
        past = [(keys[0], values[0]) for keys, values in memory]
    parts |= reading(lookups.model, batch, past, rng)
    return parts, batch.ratios, questions.texts.numel() + batch.ids.numel()


def make_optimizers(parameters: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW for the embedding."""
    muon = Muon([p for p in parameters if p.shape[0] > 1])
    adam = torch.optim.AdamW(
        [p for p in parameters if p.shape[0] == 1], lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [muon, adam]


def train_adapter(
    work: Path,
    scale: Scale,
    *,
    config: beacon.BeaconConfig = CONFIG,
    name: str = "adapter",
    only_ratio: int | None = None,
    spacings: tuple[int, ...] | None = None,
    seed: int = 0,
    cpu: bool = False,
    rows: int = 16,
) -> Path:
    """Train until all steps are done; an adapter that is already there is left as it is.

    Args:
        work: Folder of build products; holds the base, and the checkpoint to go on from.
        scale: Sizes.
        config: How the model is wrapped.
        name: Of the adapter's folder, its log and its checkpoint.
        only_ratio: Train at this ratio alone.
        spacings: Of the beacons of single strides, in raw tokens, drawn from these for each step, as beacons stand at
            these ratios. By default always `EVERY`: of those the beacons of all larger ratios are some, but only where
            a beacon sees all tokens of its stride before it.
        seed: Of what is drawn.
        cpu: Stay on the CPU even with a GPU at hand.
        rows: Texts of each kind evaluated last (a quarter before); 0 evaluates nothing.

    Returns:
        The folder of the adapter.
    """
    tokenizer, corpus, held_out = load_corpus(work)
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision(cpu))
    set_seed(seed)
    sequences = Sequences(corpus, tokenizer, np.random.default_rng(seed + 1))
    model = beacon.wrap(AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32), config)
    model.to(accelerator.device)
    parameters = list(beacon_parameters(model).values())
    optimizers = make_optimizers(parameters)
    lookups = Lookups(model, lookup_heads(model, Sequences(corpus, tokenizer, np.random.default_rng(seed + 2))))
    run = Run(work, name, scale.adapter_steps)
    state = run.resume()
    if state is None:
        soften(model)
    else:
        model.load_state_dict(state["beacons"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        sequences.rng.bit_generator.state = json.loads(state["rng"])
    if run.over and (work / name).exists():
        return work / name
    while not run.over:
        phase, muon = phase_at(run.progress), muon_rate(run.progress) * min(1.0, (run.step + 1) / 30)
        if only_ratio is not None:
            phase = dataclasses.replace(phase, ratios=(only_ratio,))
        for optimizer, rate in zip(optimizers, (muon, ADAM_RATE * min(1.0, muon / FULL_ADAM)), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        with accelerator.autocast():
            parts, ratios, tokens = losses(
                lookups, sequences, phase, scale.adapter_tokens, accelerator.device, spacings
            )
        weights = WEIGHTS[phase.kind]
        loss = torch.stack([weights.get(kind, 1.0) * part.float() for kind, part in parts.items()]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step, run.tokens = run.step + 1, run.tokens + tokens
        _note(run, parts, ratios)
        if run.step % 20 == 0:
            run.report_recent()
        share = (EVALUATIONS + 1) / scale.adapter_steps
        if rows and int(run.step * share) > int((run.step - 1) * share):
            few = rows if run.over else max(rows // 4, 1)
            run.report(final=run.over, **evaluate_adapter(model, held_out, tokenizer, scale.longest, few))
        if run.over or run.due(SAVE_MINUTES):
            run.save(
                beacons={key: p.detach().clone() for key, p in beacon_parameters(model).items()},
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                rng=json.dumps(sequences.rng.bit_generator.state),
            )
            beacon.save_adapter(model, work / name)
    return work / name


def _note(run: Run, parts: dict[str, Tensor], ratios: list[int]) -> None:
    """Keep losses for the log, and those of one ratio in all windows under its name as well."""
    for kind, part in parts.items():
        run.note(**{kind: part.item()})
        if len(set(ratios)) == 1 and kind in ("answers read", "divergence"):
            run.note(**{f"{kind} at {ratios[0]}": part.item()})
