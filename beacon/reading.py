"""Read new text into a cache: plan it, run it through the model pass by pass, keep what stays."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from beacon.attention import choose_path, load_path, load_rotation
from beacon.cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.identity import home_of
from beacon.memory import Growing, MemoryFormat
from beacon.modules import BeaconPass, Pass, Rotary
from beacon.plan import Plan, RowState, Span, WindowStep, build_plan, schedule, upload
from beacon.policies import RatioRequest, choose_ratio, overfull
from beacon.segments import ALL, share_out, shares_passes, windows_per_pass
from beacon.text import NewText

logger = logging.getLogger(__name__)


@dataclass
class Itinerary:
    """What a call is going to read, decided before anything is computed or changed.

    Args:
        text: The new tokens.
        steps: Window steps per row, each with the row's state after it.
        ratios: Explicit ratios in force.
        span: keep_first and keep_from in force.
        expected_length: Expected length in force.
    """

    text: NewText
    steps: list[list[tuple[WindowStep, RowState]]]
    ratios: int | tuple[int, ...] | None
    span: Span
    expected_length: int | None

    @property
    def condenses(self) -> bool:
        """Whether any beacon is read."""
        return any(step.beacon_hi for row in self.steps for step, _ in row)


class HiddenStates:
    """Final hidden states of some of a call's packed text tokens.

    Args:
        values: ``[m, hidden]``.
        places: Place in the packed text of each, int64 on the CPU.
    """

    def __init__(self, values: torch.Tensor, places: torch.Tensor) -> None:
        order = places.argsort()
        in_order = torch.equal(order, torch.arange(len(order)))
        self.values = values if in_order else values[order.to(values.device)]
        self.places = places if in_order else places[order]

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """States of the tokens at ``places`` (which must be held): ``[len(places), hidden]``."""
        if torch.equal(places, self.places):
            return self.values
        return self.values[torch.searchsorted(self.places, places).to(self.values.device)]


def plan_call(
    cache: BeaconCache,
    text: NewText,
    *,
    ratios: int | tuple[int, ...] | None,
    span: Span,
    expected_length: int | None,
    native_context: int,
    text_ends: bool,
) -> Itinerary:
    """Cut the new text of every row into windows and choose their ratios.

    Raises:
        ValueError: ``ratios`` names fewer windows than the text fills.
    """
    steps = []
    for row, (state, count) in enumerate(zip(cache.states, text.counts, strict=True)):
        known = state.tokens + count
        length = known if expected_length is None else max(expected_length, known)
        choose = ratio_chooser(cache, row, length, ratios, native_context)
        steps.append(schedule(cache.config, state, count, choose, row=row, span=span, text_ends=text_ends))
    return Itinerary(text, steps, ratios, span, expected_length)


def ratio_chooser(
    cache: BeaconCache, row: int, length: int, ratios: int | tuple[int, ...] | None, native_context: int
) -> Callable[[RowState], int]:
    """What gives a row's next window its ratio.

    Args:
        cache: Whose policy counts.
        row: The row.
        length: Tokens of its text that are known by now, or expected.
        ratios: Explicit ratios in force.
        native_context: Longest position the base model serves.
    """

    def choose(at: RowState) -> int:
        window = len(at.ratios)
        if isinstance(ratios, int):
            return ratios
        if ratios is not None:
            if window >= len(ratios):
                raise ValueError(
                    f"ratios must name every window of the text, got {len(ratios)} and row {row} needs one for "
                    f"window {window}; pass a longer list or an int (what is generated counts too)."
                )
            return ratios[window]
        request = RatioRequest(cache.config, native_context, at.row, window, length, at.memory, at.ratios)
        ratio = choose_ratio(request)
        _warn_if_overfull(cache, request, ratio)
        return ratio

    return choose


def _warn_if_overfull(cache: BeaconCache, request: RatioRequest, ratio: int) -> None:
    config = request.config
    if config.ratio_policy != "adaptive" or cache.warned or not overfull(request, ratio):
        return
    cache.warned = True
    entries = config.step // ratio if ratio else config.step
    need = request.memory + entries + config.window
    warnings.warn(
        f"even the largest ratio {max(config.ratios)} does not keep {request.length} tokens within the native context: "
        f"memory {request.memory} + {entries} new entries + window {config.window} = {need} > "
        f"{request.native_context}; quality may suffer. Add a larger ratio, or say how long the text becomes "
        "(expected_length, or reserve), so that earlier windows get larger ones.",
        stacklevel=6,
    )


def checkpoints(model: Any) -> bool:
    """Whether decoder layers run under gradient checkpointing just now."""
    return model.training and any(layer.gradient_checkpointing for layer in model.model.layers)


def check_checkpointing(model: Any, segment: int | None, trip: Itinerary, keep: bool) -> None:
    """Refuse reentrant gradient checkpointing where gradients would have to flow from a later pass or call.

    It computes a layer's new memory without a graph.

    Raises:
        NotImplementedError: They would be lost.
    """
    if not (torch.is_grad_enabled() and checkpoints(model)):
        return
    windows = max(len(steps) for steps in trip.steps)
    options = getattr(model.model.layers[0]._gradient_checkpointing_func, "keywords", {})
    if options.get("use_reentrant", True) and (keep or (segment is not None and windows > segment)):
        raise NotImplementedError(
            "training through memory over several passes or calls needs checkpointing with use_reentrant=False, got "
            "use_reentrant=True; pass {'use_reentrant': False}, or leave out segment and use_cache."
        )


def read(
    model: Any,
    rotary: Rotary,
    cache: BeaconCache,
    trip: Itinerary,
    wanted: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
    one_pass: bool = False,
) -> tuple[HiddenStates, BeaconCache]:
    """Read a planned call through the model's decoder stack.

    Args:
        model: The wrapped model.
        rotary: Its rotary embedding.
        cache: What has been read; left as it is.
        trip: The planned call.
        wanted: Which text tokens' final hidden states somebody reads, bool ``[n]`` over the packed text, CPU.
        progress: Called with (tokens read, tokens in all) after every pass.
        one_pass: All windows at once, whatever they take: processes that share a model must make as many passes.

    A pass that runs out of memory is read again with half as many windows (the results are those of one pass), unless
    gradients are recorded.

    Returns:
        Final hidden states of the passes in which somebody reads any, and the cache afterwards.

    Raises:
        torch.OutOfMemoryError: A single window is too much.
    """
    text, config = trip.text, cache.config
    packed = text.pack(text.ids)
    # Ids of a long text may stay on the host: those of each pass are copied ahead of it.
    device = packed.device if packed.device.type != "cpu" else home_of(model.model.embed_tokens)
    counts = text.counts
    first = torch.tensor([0, *counts]).cumsum(0).tolist()
    after = cache.fork()
    memory = MemoryFormat() if torch.is_grad_enabled() else MemoryFormat(config.memory_dtype, config.offload_memory)
    after.stores = cache.condensed_stores(rotary)
    if memory.packs:
        after.stores = [store.packed(memory) for store in after.stores]
    after.stock, after.stock_positions = None, []
    states = list(cache.states)
    rows = range(len(states))
    begun = [state.tokens for state in states]
    left = [len(steps) for steps in trip.steps]
    most, each = ALL, ALL if one_pass else config.segment or ALL
    if not one_pass and config.segment is None:
        most = windows_per_pass(model, device, config.window, len(packed))
    commits = any(step.committed for steps in trip.steps for step, _ in steps)
    growing = _growing(trip, states, len(model.model.layers)) if commits and not torch.is_grad_enabled() else None
    hidden: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    done = 0
    while any(left):
        taken = share_out([min(count, each) for count in left], most)
        steps = [row[len(row) - count :][:now] for row, count, now in zip(trip.steps, left, taken, strict=True)]
        ends = [steps[row][-1][1] if steps[row] else states[row] for row in rows]
        plan = build_plan(config, states, [[step for step, _ in row_steps] for row_steps in steps], ends)
        parts = [
            slice(first[row] + states[row].tokens - begun[row], first[row] + ends[row].tokens - begun[row])
            for row in rows
        ]
        at = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        outputs = bool(wanted[at].any())
        path = after.attention_path = _path(model, config, plan, device)
        attend, rotation = load_path(path), load_rotation(path)
        beacon_pass = BeaconPass(plan, after.stores, rotary, attend, outputs, rotation, memory, growing)
        try:
            ids = torch.cat([packed[part] for part in parts])
            out = run_pass(model, ids if ids.device == device else upload([ids], device)[0], beacon_pass)
        except torch.OutOfMemoryError:
            together = one_pass or shares_passes(model)  # the other processes did not run out
            if sum(taken) == 1 or together or torch.is_grad_enabled():  # gradients hold what earlier passes took
                raise
            most = sum(taken) // 2
            logger.warning("out of memory reading %d windows at once; going on with %d a pass", sum(taken), most)
            continue
        after.stores = [beacon_pass.kept[layer] for layer in range(len(beacon_pass.kept))]
        states = ends
        left = [count - now for count, now in zip(left, taken, strict=True)]
        done += len(at)
        if outputs:
            hidden.append(out)
            places.append(at)
        if progress is not None:
            progress(done, len(packed))
    after.states = states
    return HiddenStates(torch.cat(hidden), torch.cat(places)), after


def _growing(trip: Itinerary, states: list[RowState], layers: int) -> list[tuple[list[Growing], list[Growing]]]:
    """A place for the memory that every row has after the call, by layer."""
    sizes = [steps[-1][1].memory if steps else state.memory for steps, state in zip(trip.steps, states, strict=True)]
    return [([Growing(size) for size in sizes], [Growing(size) for size in sizes]) for _ in range(layers)]


def _path(model: Any, config: BeaconConfig, plan: Plan, device: torch.device) -> str:
    """The attention path that computes a plan here."""
    dtype = model.model.embed_tokens.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    head_dim = model.model.layers[0].self_attn.head_dim
    return choose_path(config.attention_path, plan, device=device, dtype=dtype, head_dim=head_dim)


def run_pass(model: Any, ids: torch.Tensor, beacon_pass: BeaconPass) -> torch.Tensor:
    """Raw tokens ``ids`` and a plan's beacons through the decoder stack: ``[n_raw, hidden]`` (none if nobody reads)."""
    body = model.model
    raw = body.embed_tokens(ids)
    beacon = body.beacon_embed_tokens(ids.new_zeros(1)).to(raw).expand(len(beacon_pass.plan.beacon), -1)
    return run_layers(model, torch.cat([raw, beacon]), beacon_pass)


def run_layers(model: Any, embeds: torch.Tensor, beacon_pass: Pass) -> torch.Tensor:
    """One pass through the decoder stack.

    Args:
        model: The wrapped model.
        embeds: Embeddings of raw tokens, then of beacons, ``[n, hidden]``.
        beacon_pass: What the layers do.

    Returns:
        Final hidden states of the raw tokens ``[n_raw, hidden]``, none where nobody reads them.
    """
    out = model.model(
        inputs_embeds=embeds[None],
        attention_mask=embeds.new_zeros(1, 1, 1, 1),  # 4-D: Hugging Face hands it on and builds no mask of its own
        position_ids=torch.zeros(1, 1, dtype=torch.int64, device=embeds.device),  # longrope switches factors by these
        use_cache=False,
        beacon_pass=beacon_pass,
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden
