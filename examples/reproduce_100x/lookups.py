"""The first lesson for beacons: hold, head by head, what the base looks tokens up by.

The frozen base finds a token again with a few heads that attend to what followed the same context earlier (induction
heads); memory needs these heads alone. A beacon has one key and one value for each of them. So they share the tokens
before a beacon out among themselves: every head keeps key and value of the raw token at its own distance, a little
louder than the base would, as fewer heads answer. Where the window holds a needle, half of the heads keep the first
token of its answer and half the last; of an answer that is cut by the border of two strides, those of its part in the
stride. Put in by hand, such entries give the base what it needs (`benchmarks/LOG.md`).

The lesson regresses beacons onto these entries directly: raw keys and values are the stock model's, beacons read single
strides, and nothing else is computed. No gradient passes through raw tokens, and every head has an error of its own.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

import beacon
from scales import NATIVE_CONTEXT, STRIDE
from sequences import ANSWER_WEIGHT, COPY_WEIGHT, Sequences
from strides import LayerEntries

SHARE = 0.5  # mean attention to the right token that makes a head one to look tokens up with
DISTANCES = 2  # tokens before a beacon that its heads share out
GAINS = {"near values": 1.5, "needle keys": 1.25, "needle values": 2.75}  # of what is kept; all others have 1
OTHERS = 0.05  # weight of the heads that look nothing up


@torch.no_grad()
def lookup_heads(model: nn.Module, held: Sequences, rows: int = 32) -> list[tuple[int, int]]:
    """(layer, head) of the heads by which the base finds the answer of a passkey again.

    Args:
        model: A wrapped model.
        held: Draws the texts.
        rows: How many.
    """
    drawn = [held.passkey(NATIVE_CONTEXT, (n + 0.5) / rows / 2) for n in range(rows)]
    answer = drawn[0][1]
    ids = torch.from_numpy(np.stack([ids for ids, length in drawn if length == answer]))
    right = (ids[:, : -answer - 1].unfold(1, answer, 1) == ids[:, None, -answer:]).all(-1).float().argmax(1)
    config = model.config
    implementation, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with beacon.disabled(model):
            maps = model(ids.to(model.device), output_attentions=True, use_cache=False).attentions
    finally:
        config._attn_implementation = implementation
    queries = torch.arange(NATIVE_CONTEXT - answer - 1, NATIVE_CONTEXT - 1)
    keys = right[:, None] + torch.arange(answer)
    every = torch.arange(len(ids))[:, None]
    shares = torch.stack([weights.cpu()[every, :, queries, keys].mean((0, 1)) for weights in maps])
    return [(int(layer), int(head)) for layer, head in (shares >= SHARE).nonzero()]


@torch.no_grad()
def answer_ends(weights: Tensor) -> tuple[Tensor, Tensor]:
    """First and last tokens of the answers in sequences of `Sequences.needles`, two bools ``[rows, T / S, S]``.

    An answer that is cut by the border of two strides counts as one in each of them.

    Args:
        weights: Loss weights ``[rows, T]``, of which an answer's tokens have 0 in a needle and `ANSWER_WEIGHT` in a
            question. Rows of repeated chunks, which have `COPY_WEIGHT`, hold no answers.
    """
    answer = (weights == 0.0) | (weights == ANSWER_WEIGHT)
    answer = (answer & (weights != COPY_WEIGHT).all(-1, keepdim=True)).unflatten(-1, (-1, STRIDE))
    before = nn.functional.pad(answer[..., :-1], (1, 0))
    after = nn.functional.pad(answer[..., 1:], (0, 1))
    return answer & ~before, answer & ~after


class Lookups:
    """What the heads of beacons should hold, and how far they are from it.

    Args:
        model: A wrapped Llama.
        heads: Its heads that look tokens up (`lookup_heads`).
    """

    def __init__(self, model: nn.Module, heads: list[tuple[int, int]]) -> None:
        shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
        self.model = model
        self.looks_up = torch.zeros(shape, dtype=torch.bool)
        self.distance = torch.ones(shape, dtype=torch.long)
        self.last = torch.zeros(shape, dtype=torch.bool)
        for number, (layer, head) in enumerate(heads):
            self.looks_up[layer, head] = True
            self.distance[layer, head] = 1 + number % DISTANCES
            self.last[layer, head] = number % 2 == 1

    def errors(self, layers: Iterable[LayerEntries], weights: Tensor, ends: Tensor) -> dict[str, Tensor]:
        """Relative squared errors of keys and values, for lookups by distance, for needles and for all other heads.

        Args:
            layers: What `read_strides` gives.
            weights: Loss weights of the texts as `Sequences` gives them ``[rows, T]``.
            ends: Raw tokens of a stride before each beacon.
        """
        first, last = (part.flatten(0, 1) for part in answer_ends(weights))
        needle_first, needle_last = _latest_needle(first, last, ends)
        totals: dict[str, Tensor] = {}
        for number, layer in enumerate(layers):
            looks_up, distance, keeps_last = (
                part[number].to(ends.device) for part in (self.looks_up, self.distance, self.last)
            )
            near = (ends[:, None] - distance).expand(len(first), -1, -1)  # [strides, beacons, heads]
            needle = torch.where(keeps_last, needle_last[..., None], needle_first[..., None])
            holds = looks_up & (needle >= 0)
            parts = {"near": (near, ~holds & looks_up), "needle": (needle, holds), "other": (near, ~looks_up)}
            for kind, (at, chosen) in parts.items():
                for name, ours, raw in (
                    ("keys", layer.keys, layer.raw_keys),
                    ("values", layer.values, layer.raw_values),
                ):
                    error = _errors(ours, GAINS.get(f"{kind} {name}", 1.0) * _at(raw, at), chosen & (at >= 0))
                    totals[f"{kind} {name}"] = totals.get(f"{kind} {name}", 0.0) + error
        return {name: error / size for name, (error, size) in totals.items() if size > 0}


def _at(raw: Tensor, places: Tensor) -> Tensor:
    """Raw tokens' entries ``[strides, STRIDE, heads, head_dim]`` at places ``[strides, beacons, heads]``."""
    return raw.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, -1, raw.shape[-1]))


def _errors(ours: Tensor, wanted: Tensor, chosen: Tensor) -> Tensor:
    """Sums of squared errors and of squares where ``chosen``, two numbers."""
    squares = [(x.float().square().sum(-1) * chosen).sum() for x in (ours - wanted, wanted)]
    return torch.stack(squares)


def _latest_needle(first: Tensor, last: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the answer's first and last token of the latest needle before each beacon, -1 where there is none.

    Args:
        first: Where answers begin, bool ``[windows, STRIDE]``.
        last: Where they end.
        ends: Raw tokens before each beacon ``[beacons]``.
    """
    places = torch.arange(first.shape[1], device=first.device)
    latest_last = torch.where(last, places, -1).cummax(1).values
    latest_first = torch.where(first, places, -1).cummax(1).values
    begun = torch.where(last, latest_first, -1).cummax(1).values  # the first token of the latest finished answer
    return begun[:, ends - 1], torch.where(begun >= 0, latest_last, -1)[:, ends - 1]
