"""The first lesson for beacons, layer by layer: stand in for the raw tokens that they replace.

The stock model reads a text with up to 512 tokens of raw context and shows, in every layer, what goes into its
attention and what comes out of it. The wrapped model reads the same text in windows, every layer's raw tokens given
as the stock model had them, and its attention, over memory and one window, has to give the same output. So each
layer's beacons learn from every query that would have looked at the tokens they stand for, and no gradient passes
through raw tokens: a step costs about half of one that reads, and teaches all layers at once.
"""

from functools import partial

import torch
from torch import Tensor, nn

import beacon
from beacon.attention import load_path
from beacon.modules import BeaconPass
from beacon.plan import build_plan
from beacon.reading import run_pass
from scales import NATIVE_CONTEXT

STEP = 384  # from one stretch that the stock model reads to the next


class Stock:
    """What the stock model's layers take in and what their attention gives, with at most its native context.

    Args:
        model: A wrapped Llama.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.hidden: dict[int, Tensor] = {}
        self.attended: dict[int, Tensor] = {}

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Read texts in overlapping stretches, so that every token has at least 128 before it where there are as many.

        Args:
            ids: Token ids ``[rows, T]``, T at most 512 or 512 and a multiple of 384.

        Returns:
            Final hidden states ``[rows, T, hidden]``; ``hidden`` and ``attended`` hold the layers', likewise.
        """
        rows, length = ids.shape
        handles = []
        for number, layer in enumerate(self.model.model.layers):
            taken = partial(self._keep, self.hidden, number)
            given = partial(self._keep, self.attended, number)
            handles.append(layer.register_forward_pre_hook(lambda _, args, keep=taken: keep(args[0])))
            handles.append(layer.self_attn.register_forward_hook(lambda _, args, out, keep=given: keep(out[0])))
        try:
            stretches = ids if length <= NATIVE_CONTEXT else ids.unfold(1, NATIVE_CONTEXT, STEP).flatten(0, 1)
            with beacon.disabled(self.model):
                final = self.model.model(input_ids=stretches, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        for kept in (self.hidden, self.attended):
            for number, values in kept.items():
                kept[number] = self._whole(values, rows, length)
        return self._whole(final, rows, length)

    @staticmethod
    def _keep(kept: dict[int, Tensor], number: int, values: Tensor) -> None:
        kept[number] = values

    @staticmethod
    def _whole(values: Tensor, rows: int, length: int) -> Tensor:
        """The first stretch, then what every other adds."""
        if length <= NATIVE_CONTEXT:
            return values
        stretches = values.unflatten(0, (rows, -1))
        return torch.cat([stretches[:, 0], stretches[:, 1:, -STEP:].flatten(1, 2)], dim=1)


def open_pass(model: nn.Module, ids: Tensor, ratios: int | list[int]) -> BeaconPass:
    """A pass over all windows of texts ``[rows, T]`` that end there."""
    cache = model.beacon_cache(None, len(ids))
    _, trip = model._plan(cache, ids, None, ratios, None, None, None, True, False)
    steps = [[step for step, _ in row] for row in trip.steps]
    plan = build_plan(model.beacon_config, cache.states, steps, [row[-1][1] for row in trip.steps])
    return BeaconPass(plan, [], model.beacon_rotary(), load_path("sdpa"), True)


def read_whole(model: nn.Module, ids: Tensor, ratios: int | list[int]) -> Tensor:
    """Final hidden states ``[rows, T, hidden]`` of texts that are read in windows, with gradients to all beacons."""
    return run_pass(model, ids.flatten(), open_pass(model, ids, ratios)).unflatten(0, ids.shape)


def matching_errors(model: nn.Module, stock: Stock, ids: Tensor, ratios: int | list[int], weights: Tensor) -> Tensor:
    """How far the attention of every layer is from the stock model's.

    Args:
        model: A wrapped Llama.
        stock: What the stock model had for ``ids`` (`Stock.read`).
        ids: Token ids ``[rows, T]``.
        ratios: Of the windows.
        weights: Of the tokens' errors ``[rows, T]``; zero for the first window, which sees no memory.

    Returns:
        Squared error relative to the squared output, float32 ``[layers]``.
    """
    body = model.model
    beacon_pass = open_pass(model, ids, ratios)
    count = beacon_pass.raw_tokens
    weights = weights.flatten()
    hidden = body.beacon_embed_tokens(ids.new_zeros(1)).expand(len(beacon_pass.plan.beacon), -1)
    errors = []
    for number, layer in enumerate(body.layers):
        raw = layer.input_layernorm(stock.hidden[number].flatten(0, 1))
        own = layer.input_layernorm(hidden)
        last = number == len(body.layers) - 1
        if last:
            out = layer.self_attn.read(raw, beacon_pass.for_last_layer(own))
        else:
            out = layer.self_attn.read(torch.cat([raw, own]), beacon_pass)
        wanted = stock.attended[number].flatten(0, 1).float()
        error = (out[:count].float() - wanted).square().sum(-1)
        errors.append((error * weights).sum() / (wanted.square().sum(-1) * weights).sum())
        if not last:
            hidden = hidden + out[count:]
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return torch.stack(errors)
