"""Questions for beacons: each is read with a memory put together from single strides, a cheap end to end.

The beacons of all strides of a few texts are computed side by side (`strides.py`). Each text's own, at drawn ratios and
among those of other texts, are then the memory of questions for the text's needles, a few tokens each. So a step asks
five times as many questions as reading whole texts does in two thirds of the time, and a memory of a thousand entries
costs little.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from prompts import draw_mixture
from scales import STRIDE
from sequences import Sequences
from strides import EVERY, LayerEntries, rotate_heads

COUNT, LENGTH = 4, 40  # questions of a text, tokens of each with the code before it
NEEDLES = 3  # of a text, at most
MOST = 1000  # entries of memory


@dataclass(frozen=True)
class Questions:
    """Texts with needles, and questions for them.

    Args:
        texts: Token ids ``[rows, T]``, T a multiple of the stride.
        weights: Loss weights of the texts' tokens as `Sequences` gives them: 0 in a needle's answer.
        asked: Token ids of code, a question and its answer ``[rows, COUNT, LENGTH]``.
        answers: Which of these are an answer, bool ``[rows, COUNT, LENGTH]``.
        holds: Whether a stride of a text holds (part of) a needle, bool ``[rows, strides]``.
    """

    texts: Tensor
    weights: Tensor
    asked: Tensor
    answers: Tensor
    holds: np.ndarray

    def to(self, device: torch.device) -> "Questions":
        """The same batch on another device."""
        tensors = (part.to(device) for part in (self.texts, self.weights, self.asked, self.answers))
        return Questions(*tensors, self.holds)


def draw_questions(sequences: Sequences, rows: int, seqlen: int, borders: float) -> Questions:
    """Draw texts with one to three needles of any kind; each needle is asked for after other code, some twice.

    Args:
        sequences: Draws code and places needles.
        rows: Texts.
        seqlen: Tokens of each, a multiple of the stride.
        borders: Share of needles across the border of two strides.
    """
    rng, drawn = sequences.rng, []
    holds = np.zeros((rows, seqlen // STRIDE), bool)
    for row in range(rows):
        lines = [sequences.encode(needle) for needle in draw_mixture(rng, int(rng.integers(1, NEEDLES + 1)))]
        body = seqlen - sum(len(line) for line, _ in lines)
        code = sequences.code(body + COUNT * LENGTH)
        text, marks = sequences.place(code[:body], lines, borders)
        weights = np.ones(seqlen, np.float32)
        for (line, answer), mark in zip(lines, marks, strict=True):
            holds[row, (mark - len(line)) // STRIDE : (mark - 1) // STRIDE + 1] = True
            weights[mark - answer : mark] = 0.0
        asked, answers = code[body:].reshape(COUNT, LENGTH).copy(), np.zeros((COUNT, LENGTH), bool)
        for number in range(COUNT):
            line, answer = lines[number % len(lines)]
            asked[number, -len(line) :] = line
            answers[number, -answer:] = True
        drawn.append((text, weights, asked, answers))
    return Questions(*(torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)), holds)


def draw_memory(rng: np.random.Generator, holds: np.ndarray, ratios: tuple[int, ...], every: int = EVERY) -> Tensor:
    """Choose the memory of every text: all of its own strides in order, others without needles among them.

    Those fill it with up to `MOST` entries at any ratio, as far longer texts would.

    Args:
        rng: Source of randomness.
        holds: As in `Questions`.
        ratios: What a stride's ratio is drawn from, multiples of ``every``; for all alike in half of the cases.
        every: Raw tokens from one beacon of a stride to the next.

    Returns:
        Places of the entries among the beacons of all strides, int64 ``[rows, entries]``.
    """
    rows, strides = holds.shape
    beacons = STRIDE // every
    alike = int(rng.choice(ratios)) if rng.random() < 0.5 else None
    free = np.flatnonzero(~holds)
    size = int(rng.integers(MOST)) if len(free) and rng.random() < 0.7 else 0
    strange = int(size / np.mean([STRIDE / ratio for ratio in ratios if alike in (None, ratio)]))
    chosen: list[int | None] = [None] * strides  # None: the text's own next stride
    for stride in free[rng.integers(len(free), size=strange)] if strange else ():
        chosen.insert(int(rng.integers(len(chosen) + 1)), int(stride))
    places: list[np.ndarray] = []
    own, entries = iter(range(strides)), 0
    for stride in chosen:
        ratio = int(rng.choice(ratios)) if alike is None else alike
        if stride is None:
            step = ratio // every
            first = (np.arange(rows) * strides + next(own)) * beacons + step - 1
            places.append(first[:, None] + np.arange(0, beacons, step))
        elif entries + STRIDE // ratio <= MOST - strides * beacons:
            places.append(np.tile(_some_of(rng, stride, ratio, every), (rows, 1)))
        else:
            continue
        entries += STRIDE // ratio
    return torch.from_numpy(np.concatenate(places, axis=1))


def draw_strangers(
    rng: np.random.Generator, holds: np.ndarray, ratios: tuple[int, ...], most: int, every: int = EVERY
) -> Tensor:
    """Choose what stands in memory before a text that is read: entries of other texts, as of a far longer text's past.

    Args:
        rng: Source of randomness.
        holds: As in `Questions`; strides with needles are left out.
        ratios: As in `draw_memory`; for all alike in most cases.
        most: Entries, at most; how many is drawn.
        every: As in `draw_memory`.

    Returns:
        Places of the entries among the beacons of all strides, int64 ``[entries]``.
    """
    free = np.flatnonzero(~holds)
    size = int(rng.integers(most)) if most > 0 and len(free) and rng.random() < 0.7 else 0
    alike = int(rng.choice(ratios)) if rng.random() < 0.7 else None
    places: list[np.ndarray] = []
    while sum(map(len, places)) < size:
        ratio = int(rng.choice(ratios)) if alike is None else alike
        places.append(_some_of(rng, int(rng.choice(free)), ratio, every))
    return torch.from_numpy(np.concatenate([np.zeros(0, int), *places])[:size])


def _some_of(rng: np.random.Generator, stride: int, ratio: int, every: int) -> np.ndarray:
    """Places of as many of a stride's beacons as a ratio leaves, and not always the same: strides are few."""
    step = ratio // every
    return stride * (STRIDE // every) + int(rng.integers(step)) + np.arange(0, STRIDE // every, step)


def gather_memory(layers: list[LayerEntries], places: Tensor, strides: int, sink: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer: a text's sinks, then the chosen beacons, not rotated.

    Args:
        layers: Entries of all strides of some texts.
        places: Which of the beacons ``[rows, entries]``; rows take their sinks from the texts in turn.
        strides: Strides of a text.
        sink: Raw tokens at a text's beginning that are kept.

    Returns:
        Two of ``[rows, sink + entries, heads, head_dim]`` per layer.
    """
    memory = []
    for layer in layers:
        sinks = (part[::strides][: len(places), :sink] for part in (layer.raw_keys, layer.raw_values))
        own = (part.flatten(0, 1)[places] for part in (layer.keys, layer.values))
        keys, values = (torch.cat([first, part], dim=1) for first, part in zip(sinks, own, strict=True))
        memory.append((keys, values))
    return memory


def answer_loss(model: nn.Module, questions: Questions, layers: list[LayerEntries], places: Tensor, gap: int) -> Tensor:
    """Mean cross-entropy of the answers' tokens.

    Args:
        model: A wrapped Llama.
        questions: What is asked.
        layers: Entries of the texts' strides.
        places: Which of the beacons are in memory, as `draw_memory` chooses them.
        gap: Positions between the memory and what is asked.
    """
    memory = gather_memory(layers, places, questions.holds.shape[1], model.beacon_config.sink)
    hidden = _read(model, questions.asked, memory, gap)[:, :, :-1]
    answers = questions.answers[:, :, 1:]
    logits = model.beacon_head(hidden[answers]).float()
    return functional.cross_entropy(logits, questions.asked[:, :, 1:][answers])


def _read(model: nn.Module, asked: Tensor, memory: list[tuple[Tensor, Tensor]], gap: int) -> Tensor:
    """Final hidden states ``[rows, COUNT, LENGTH, hidden]`` of questions ``gap`` positions behind a memory."""
    _, count, length = asked.shape
    heads, width = model.config.num_attention_heads, model.config.head_dim
    size, device = memory[0][0].shape[1], asked.device
    rotary = model.beacon_rotary()
    memory_table = rotary.table(torch.arange(size, device=device), torch.float32)
    table = rotary.table(size + gap + torch.arange(length, device=device).repeat(count), torch.float32)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = torch.cat([causal.new_ones(count * length, size), torch.block_diag(*[causal] * count).bool()], dim=1)
    hidden = model.model.embed_tokens(asked.flatten(1))
    for layer, (memory_k, memory_v) in zip(model.model.layers, memory, strict=True):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (project(x).unflatten(-1, (heads, width)) for project in projections)
        keys = torch.cat([rotate_heads(memory_k, memory_table), rotate_heads(k, table)], dim=1)
        out = functional.scaled_dot_product_attention(
            rotate_heads(q, table).transpose(1, 2),
            keys.transpose(1, 2),
            torch.cat([memory_v, v], dim=1).transpose(1, 2),
            attn_mask=mask,
        )
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.model.norm(hidden).unflatten(1, (count, length))
