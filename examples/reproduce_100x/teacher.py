"""What beacons learn from: the stock model with raw text before its eyes, and the wrapped model reading in windows."""

import dataclasses
from typing import TypeAlias

import torch
from torch import Tensor, nn

import beacon
from beacon.attention import load_path
from beacon.modules import BeaconPass, LayerStore, rotate
from beacon.plan import Ratios, RowState, Span, build_plan, schedule
from beacon.reading import run_pass
from scales import NATIVE_CONTEXT

Memory: TypeAlias = list[tuple[Tensor, Tensor]]
STEP = 384  # from one stretch that the stock model reads to the next


@torch.no_grad()
def foresee(model: nn.Module, ids: Tensor) -> Tensor:
    """Final hidden states of the stock model, which reads overlapping stretches of its native context.

    Every token has at least 128 before it where there are as many.

    Args:
        model: A wrapped model.
        ids: Token ids ``[rows, T]``, T at most 512, or 512 and a multiple of 384.

    Returns:
        ``[rows, T, hidden]``.
    """
    rows, length = ids.shape
    stretches = ids if length <= NATIVE_CONTEXT else ids.unfold(1, NATIVE_CONTEXT, STEP).flatten(0, 1)
    with beacon.disabled(model):
        hidden = model.model(input_ids=stretches, use_cache=False).last_hidden_state
    if length <= NATIVE_CONTEXT:
        return hidden
    stretched = hidden.unflatten(0, (rows, -1))
    return torch.cat([stretched[:, 0], stretched[:, 1:, -STEP:].flatten(1, 2)], dim=1)


def open_pass(model: nn.Module, ids: Tensor, ratios: int | list[int], past: Memory | None = None) -> BeaconPass:
    """A pass over all windows of texts ``[rows, T]`` that end there.

    Args:
        model: A wrapped model.
        ids: Token ids.
        ratios: One for all windows, or one for each.
        past: What stands in memory already, in all rows: keys and values of every layer, not rotated, each
            ``[entries, heads, head_dim]``, sinks first. By default nothing.
    """
    config, rows = model.beacon_config, len(ids)
    state, stores = RowState(0), []
    if past is not None:
        size = len(past[0][0])
        state = RowState(0, memory=size, sinks=config.sink, ratios=Ratios().then(max(config.ratios)))
        table = model.beacon_rotary().table(torch.arange(size, device=ids.device), torch.float32)
        for k, v in past:
            nothing = [v.new_empty(0, *v.shape[1:])] * rows
            stores.append(LayerStore([rotate(k, table).to(v)] * rows, [v] * rows, nothing, nothing))
    states = [dataclasses.replace(state, row=row) for row in range(rows)]

    def choose(at: RowState) -> int:
        return ratios if isinstance(ratios, int) else ratios[len(at.ratios) - len(state.ratios)]

    ways = [schedule(config, at, ids.shape[1], choose, row=at.row, span=Span(), text_ends=True) for at in states]
    steps = [[step for step, _ in way] for way in ways]
    plan = build_plan(config, states, steps, [way[-1][1] for way in ways])
    return BeaconPass(plan, stores, model.beacon_rotary(), load_path("sdpa"), True)


def read_whole(model: nn.Module, ids: Tensor, ratios: int | list[int], past: Memory | None = None) -> Tensor:
    """Final hidden states ``[rows, T, hidden]`` of texts that are read in windows, with gradients to all beacons.

    Args:
        model: A wrapped model.
        ids: Token ids ``[rows, T]``.
        ratios: One for all windows, or one for each.
        past: As in `open_pass`.
    """
    return run_pass(model, ids.flatten(), open_pass(model, ids, ratios, past)).unflatten(0, ids.shape)
