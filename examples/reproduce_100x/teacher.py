"""What beacons learn from: the stock model with raw text before its eyes, and the wrapped model reading in windows."""

import torch
from torch import Tensor, nn

import beacon
from beacon.attention import load_path
from beacon.modules import BeaconPass
from beacon.plan import build_plan
from beacon.reading import run_pass
from scales import NATIVE_CONTEXT

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
