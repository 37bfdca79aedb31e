"""The methods that :func:`beacon.wrap` mixes into a causal LM: forward, compress, generate, save_pretrained."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from beacon.cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.families import Family, is_longrope
from beacon.loss import IGNORED, chunked_cross_entropy
from beacon.modules import Rotary
from beacon.plan import Span
from beacon.reading import HiddenStates, Itinerary, check_checkpointing, checkpoints, plan_call, read
from beacon.text import NewText, check_ids, check_mask, check_ratios, new_text

CONFIG_FILE = "beacon_config.json"
_here = threading.local()


@dataclass(frozen=True)
class Wrapping:
    """What a wrapped model remembers of being wrapped.

    Args:
        config: The beacon configuration.
        family: The family's row of the table.
        native_context: Longest position the base model serves.
        owner: Identity; caches name it. A deep copy of a model gets its own.
        trainable: Names of the base parameters that required gradients before.
    """

    config: BeaconConfig
    family: Family
    native_context: int
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    trainable: frozenset[str] = field(default_factory=frozenset)

    def __deepcopy__(self, memo: Any) -> Wrapping:
        """A copied model is a model of its own: caches and ``disabled`` tell the two apart."""
        return replace(self, owner=uuid.uuid4().hex)


def base_fingerprint(model: Any) -> dict[str, Any]:
    """What an adapter needs its base to be: model type, shapes, tokenizer size."""
    config = model.config
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }


def is_disabled(model: Any) -> bool:
    """Whether ``model`` is the stock model in this thread just now (see :func:`beacon.disabled`)."""
    return model.beacon_wrapping.owner in getattr(_here, "owners", ())


@contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """Make a wrapped model exactly the stock model inside the block, for this thread only.

    Args:
        model: A wrapped model.

    Yields:
        The model.

    Raises:
        TypeError: ``model`` is not wrapped.
    """
    if not isinstance(model, BeaconModel):
        raise TypeError(f"disabled() takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")
    before = getattr(_here, "owners", ())
    _here.owners = (*before, model.beacon_wrapping.owner)
    try:
        yield model
    finally:
        _here.owners = before


class BeaconModel(nn.Module):
    """Mixed into the stock class of a wrapped model."""

    beacon_wrapping: Wrapping
    config: Any
    model: Any
    lm_head: Any

    @property
    def beacon_config(self) -> BeaconConfig:
        """The configuration it was wrapped with."""
        return self.beacon_wrapping.config

    @property
    def _is_stateful(self) -> bool:
        """Tells ``generate`` that tokens cannot be taken back (assisted decoding is refused by name)."""
        return not is_disabled(self)

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        ratios: int | list[int] | None = None,
        expected_length: int | None = None,
        keep_first: int | None = None,
        keep_from: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read text in windows and return the logits of its raw tokens.

        Args:
            input_ids: Token ids ``[batch, seqlen]``; with a cache the whole text or only what is new.
            attention_mask: 1 for text, 0 for padding, over all columns so far or over ``input_ids``.
            position_ids: Used by the stock attention on short texts, ignored otherwise (the plan gives positions).
            past_key_values: A :class:`BeaconCache`, an empty ``DynamicCache``, or None.
            inputs_embeds: Refused.
            labels: Token ids ``[batch, seqlen]``, -100 not counted; gives the mean next-token loss.
            use_cache: Return a cache; default True without labels.
            logits_to_keep: As in Hugging Face: 0 all (none with labels), n the last n columns, or column indices.
            ratios: Ratio of every window (int), or one per window counted from the beginning of the text.
            expected_length: Length in tokens that the text will have, for the adaptive policy.
            keep_first: Tokens at the start that are kept as they are.
            keep_from: Text index from which on nothing is condensed.
            **kwargs: ``num_items_in_batch`` divides the loss; ``return_dict``.

        Returns:
            ``CausalLMOutputWithPast`` with ``loss``, ``logits [batch, kept, vocab]`` (rows of padding are those of a
            zero hidden state), and ``past_key_values``.

        Raises:
            NotImplementedError: ``inputs_embeds``, ``output_attentions`` or ``output_hidden_states``.
            TypeError: An argument of the wrong type, a cache of another kind.
            ValueError: Bad ids, mask, ratios, or a cache of another model or configuration.
        """
        if is_disabled(self):
            kwargs.update(inputs_embeds=inputs_embeds, labels=labels, logits_to_keep=logits_to_keep)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        options = _check_options(inputs_embeds, kwargs)
        input_ids = check_ids(input_ids)
        given = past_key_values is not None
        cache = self._cache_for(past_key_values, input_ids.shape[0])
        keep = use_cache if use_cache is not None else given or (labels is None and self.config.use_cache)
        text, trip = self._plan(
            cache, input_ids, attention_mask, ratios, expected_length, keep_first, keep_from, labels is not None, keep
        )
        labels = None if labels is None else self._check_labels(labels, text)
        columns = _kept_columns(text, logits_to_keep, labels)
        if self._stock_serves(cache, trip, keep):
            whole, after = self._read_stock(cache, trip, attention_mask, position_ids, keep)
            hidden = HiddenStates(text.pack(whole), torch.arange(sum(text.counts)))
            kept = None if columns is None else _slice(whole, logits_to_keep)
        else:
            check_checkpointing(self, cache.config.segment, trip, keep)
            hidden, after = read(self, self.beacon_rotary(), cache, trip, _wanted(text, columns, labels))
            kept = None if columns is None else _unpack(hidden, text, columns)
        logits = None if kept is None else self.beacon_head(kept)
        loss = None
        if labels is not None:
            loss = self._loss(hidden, text, labels, cache.last_hidden, options["num_items_in_batch"])
        past = self._finish(after, trip, hidden, past_key_values) if keep else None
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
        return result if options["return_dict"] else result.to_tuple()

    def compress(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        ratios: int | list[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        expected_length: int | None = None,
        keep_first: int | None = None,
        keep_from: int | None = None,
    ) -> BeaconCache:
        """Read (more) text into a cache without computing logits.

        Args:
            input_ids: Token ids ``[batch, seqlen]``, as in :meth:`forward`.
            attention_mask: As in :meth:`forward`.
            past_key_values: Cache to go on from; it is updated and returned.
            ratios: As in :meth:`forward`.
            progress: Called with (tokens read, tokens in all) after every pass.
            expected_length: As in :meth:`forward`.
            keep_first: As in :meth:`forward`.
            keep_from: As in :meth:`forward`.

        Returns:
            The cache; pass it (or a ``fork()`` of it) as ``past_key_values``.

        Raises:
            RuntimeError: Inside ``beacon.disabled``.
            TypeError: As :meth:`forward`.
            ValueError: As :meth:`forward`.
        """
        if is_disabled(self):
            raise RuntimeError("compress needs beacons, got a model inside beacon.disabled; call it outside the block.")
        input_ids = check_ids(input_ids)
        with torch.no_grad():
            cache = self._cache_for(past_key_values, input_ids.shape[0])
            span = (ratios, expected_length, keep_first, keep_from)
            text, trip = self._plan(cache, input_ids, attention_mask, *span, False, True)
            if self._stock_serves(cache, trip, True):
                whole, after = self._read_stock(cache, trip, attention_mask, None, True)
                hidden = HiddenStates(text.pack(whole), torch.arange(sum(text.counts)))
                if progress is not None:
                    progress(sum(text.counts), sum(text.counts))
            else:
                hidden, after = read(self, self.beacon_rotary(), cache, trip, _wanted(text, None, None), progress)
            return self._finish(after, trip, hidden, past_key_values)

    # -- generate ------------------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Ordinary ``generate``; with a cache ``input_ids`` is the whole text or only what is new.

        Args:
            inputs: Token ids ``[batch, seqlen]`` (or pass ``input_ids``).
            *args: As in Hugging Face.
            **kwargs: As in Hugging Face, and ``ratios``, ``expected_length``, ``keep_first``, ``keep_from``.

        Returns:
            As in Hugging Face; with only new tokens given, the sequences begin with those.

        Raises:
            ValueError: Right padding, nothing new, a text that departs from the cached one.
        """
        stock: Any = super()
        if is_disabled(self):
            return stock.generate(inputs, *args, **kwargs)
        ids = kwargs.get("input_ids", inputs)
        mask = kwargs.get("attention_mask")
        given = kwargs.get("past_key_values")
        past = given.columns.count if isinstance(given, BeaconCache) else 0
        mask = mask if ids is None else check_mask(mask, check_ids(ids), past)
        if mask is not None and bool((mask.any(dim=1) & (mask[:, -1] == 0)).any()):
            raise ValueError(
                "generate needs left padding, got an attention_mask whose last column has padding; "
                "tokenize with padding_side='left'."
            )
        if isinstance(kwargs.get("ratios"), torch.Tensor):  # generate would repeat a tensor for every beam
            kwargs["ratios"] = kwargs["ratios"].tolist()
        if isinstance(given, BeaconCache) and past:
            ids = check_ids(ids)
            cache, before = self._cache_for(given, ids.shape[0]), given.fork()
            text = new_text(ids, mask, cache, self.model.embed_tokens.num_embeddings)
            _, known = cache.columns.read()
            fresh = torch.ones(text.ids.shape, dtype=torch.bool) if text.mask is None else text.mask
            kwargs["attention_mask"] = torch.cat([known, fresh], dim=1).long().to(ids.device)
            self._expand(given, cache, args, kwargs)
            try:
                return stock.generate(inputs, *args, **kwargs)
            except Exception:
                given.__dict__.update(before.__dict__)
                raise
        return stock.generate(inputs, *args, **kwargs)

    def _expand(self, original: BeaconCache, cache: BeaconCache, args: tuple[Any, ...], kwargs: Any) -> None:
        """Give every beam or returned sequence a row of its own, in the caller's cache object."""
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        counts = (kwargs.get(name) or getattr(settings, name, None) for name in ("num_beams", "num_return_sequences"))
        repeats = max(count or 1 for count in counts)
        original.__dict__.update(cache.__dict__)
        if repeats > 1:
            original.batch_repeat_interleave(repeats)

    # -- saving --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's own, with all weights under their names, and the beacon configuration beside them.

        The folder loads as the stock model with ``from_pretrained`` (which reports the beacon weights as unexpected);
        :func:`beacon.load_adapter` then takes the beacon weights from the same folder.
        """
        stock: Any = super()
        manifest = self.beacon_manifest()  # refuses a callable ratio policy before anything is written
        result = stock.save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            (Path(save_directory) / CONFIG_FILE).write_text(manifest)
        return result

    def beacon_manifest(self) -> str:
        """What ``beacon_config.json`` holds: the configuration and the base's fingerprint."""
        return json.dumps({**json.loads(self.beacon_config.to_json()), "base": base_fingerprint(self)}, indent=2)

    # -- parts -------------------------------------------------------------------------------------------------------

    def beacon_rotary(self) -> Rotary:
        """The rotary embedding with the frequencies the base has for short texts."""
        module = self.model.rotary_emb
        frequencies = module.original_inv_freq if is_longrope(self.config) else module.inv_freq
        return Rotary(frequencies, float(getattr(module, "attention_scaling", 1.0)))

    def beacon_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of final hidden states."""
        logits: torch.Tensor = self.lm_head(hidden)
        divisor = self.beacon_wrapping.family.logits_divisor
        return logits if divisor is None else logits / getattr(self.config, divisor)

    def _cache_for(self, cache: Any, rows: int) -> BeaconCache:
        """The cache a call reads on from, with ``rows`` rows; the caller's own is not touched."""
        wrapping = self.beacon_wrapping
        if cache is None:
            return BeaconCache(wrapping.config, wrapping.owner, rows)
        if type(cache) is DynamicCache and cache.get_seq_length() == 0:
            return BeaconCache(wrapping.config, wrapping.owner, rows)
        if not isinstance(cache, BeaconCache):
            raise TypeError(
                f"past_key_values must be a BeaconCache or an empty DynamicCache, got a {type(cache).__name__}; "
                "read the text with model.compress(...) or model(..., use_cache=True)."
            )
        if cache.owner != wrapping.owner:
            raise ValueError("past_key_values was made by another model; read the text again with this one.")
        if cache.config != wrapping.config:
            raise ValueError(
                f"past_key_values was made with another configuration, got {cache.config} for {wrapping.config}; "
                "read the text again."
            )
        held = len(cache.states)
        if held not in (rows, 1):
            raise ValueError(
                f"past_key_values must hold one row or as many as input_ids, got {held} rows for a batch of {rows}; "
                "choose rows with cache.select([...])."
            )
        return cache.select([0] * rows) if held != rows else cache.fork()

    def _plan(
        self,
        cache: BeaconCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        ratios: Any,
        expected_length: int | None,
        keep_first: int | None,
        keep_from: int | None,
        labelled: bool,
        keep: bool,
    ) -> tuple[NewText, Itinerary]:
        """Validate a call and decide what it reads. Nothing is changed."""
        config, begun = cache.config, cache.columns.count > 0
        text = new_text(input_ids, attention_mask, cache, self.model.embed_tokens.num_embeddings)
        if begun:
            span = cache.span
            for name, value in (("keep_first", keep_first), ("keep_from", keep_from)):
                if value is not None and value != getattr(span, name):
                    raise ValueError(
                        f"{name} must be the same in every call on one cache, got {value} after {getattr(span, name)}; "
                        "leave it out or read the text again."
                    )
        else:
            span = Span(0 if keep_first is None else keep_first, keep_from).check(config)
        known = cache.ratios if ratios is None else check_ratios(ratios, config.step, cache.states)
        if expected_length is not None and (isinstance(expected_length, bool) or not isinstance(expected_length, int)):
            raise TypeError(f"expected_length must be an int, got {expected_length!r}; pass a number of tokens.")
        trip = plan_call(
            cache,
            text,
            ratios=known,
            span=span,
            expected_length=cache.expected_length if expected_length is None else expected_length,
            native_context=self.beacon_wrapping.native_context,
            text_ends=labelled and not keep and not begun,
        )
        return text, trip

    def _stock_serves(self, cache: BeaconCache, trip: Itinerary, keep: bool) -> bool:
        """Whether nothing is condensed yet and in this call: then the stock attention reads the text whole."""
        if cache.stock is None or trip.condenses:
            return False
        if (keep or cache.columns.count) and checkpoints(self):
            return False  # checkpointed stock layers neither read nor write a cache
        longest = max((row[-1][1].tokens for row in trip.steps if row), default=0)
        return not is_longrope(self.config) or longest <= self.beacon_wrapping.native_context

    def _read_stock(
        self,
        cache: BeaconCache,
        trip: Itinerary,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        keep: bool,
    ) -> tuple[torch.Tensor, BeaconCache]:
        """Hand the call to the stock decoder stack. Returns ``[rows, columns, hidden]`` and the cache afterwards."""
        text, after = trip.text, cache.fork()
        positions = _stock_positions(cache, text, position_ids)
        hidden = self.model(
            input_ids=text.ids,
            attention_mask=_stock_mask(cache, text, attention_mask),
            position_ids=positions,
            past_key_values=after.stock if keep or cache.columns.count else None,
            use_cache=keep,
        ).last_hidden_state
        if positions is None:
            start = cache.columns.count
            positions = torch.arange(start, start + text.ids.shape[1], device=text.ids.device)[None]
        after.stock_positions = [*cache.stock_positions, positions]
        after.attention_path = f"stock ({self.config._attn_implementation})"
        after.states = [steps[-1][1] if steps else state for steps, state in zip(trip.steps, cache.states, strict=True)]
        return hidden, after

    def _check_labels(self, labels: Any, text: NewText) -> torch.Tensor:
        """Labels of the new columns."""
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim != 2:
            raise TypeError(
                "labels must be an integer tensor [batch, seqlen], got "
                f"{tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__}; pass "
                "labels=input_ids with -100 where nothing counts."
            )
        new = labels[:, text.skipped :] if labels.shape[1] != text.ids.shape[1] else labels
        if new.shape != text.ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids, got {tuple(labels.shape)} for {tuple(text.ids.shape)}; "
                "pass labels=input_ids with -100 where nothing counts."
            )
        counted = new[new != IGNORED]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < self.config.vocab_size:
            raise ValueError(
                f"labels must be {IGNORED} or lie in [0, {self.config.vocab_size}), got "
                f"{int(counted.min())} to {int(counted.max())}; use this model's own tokenizer."
            )
        return new

    def _loss(
        self,
        states: HiddenStates,
        text: NewText,
        labels: torch.Tensor,
        last_hidden: list[torch.Tensor | None],
        num_items_in_batch: Any,
    ) -> torch.Tensor:
        """Mean next-token loss; the first label of a row belongs to the last token of the call before."""
        hidden = states.at(torch.arange(sum(text.counts)))
        wanted = text.pack(labels).to(hidden.device)
        targets = torch.full_like(wanted, IGNORED)
        targets[:-1] = wanted[1:]
        begin = 0
        carried: list[tuple[torch.Tensor, torch.Tensor]] = []
        for row, count in enumerate(text.counts):
            before = last_hidden[row]
            if count and before is not None:
                carried.append((before.to(hidden), wanted[begin]))
            if count:
                targets[begin + count - 1] = IGNORED
            begin += count
        if carried:
            hidden = torch.cat([hidden, torch.stack([h for h, _ in carried])])
            targets = torch.cat([targets, torch.stack([target for _, target in carried])])
        loss = chunked_cross_entropy(hidden, targets, self.beacon_head, num_items_in_batch)
        if loss.requires_grad:
            return loss
        # A text too short for beacons: nothing to learn from it, yet trainers call backward().
        return loss + 0.0 * self.model.beacon_embed_tokens(text.ids.new_zeros(1)).sum()

    def _finish(self, after: BeaconCache, trip: Itinerary, hidden: HiddenStates, given: Any) -> BeaconCache:
        """Complete the cache after a call; the caller's own object takes the new content."""
        text = trip.text
        after.columns.append(text.ids, text.mask)
        after.ratios, after.span, after.expected_length = trip.ratios, trip.span, trip.expected_length
        last = hidden.at(_last_tokens(text)).clone()
        rows = [row for row, count in enumerate(text.counts) if count]
        for row, state in zip(rows, last.unbind(), strict=True):
            after.last_hidden[row] = state
        if isinstance(given, BeaconCache):
            given.__dict__.update(after.__dict__)
            return given
        return after


def _check_options(inputs_embeds: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options a wrapped forward understands beyond its named parameters."""
    if inputs_embeds is not None:
        raise NotImplementedError(
            "inputs_embeds is not supported by a wrapped model (the cache keeps token ids); pass input_ids."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None):
            raise NotImplementedError(
                f"{name} is not supported by a wrapped model; call it inside beacon.disabled(model) for the stock one."
            )
    kwargs.pop("token_type_ids", None)
    return_dict = kwargs.pop("return_dict", None)
    options = {
        "num_items_in_batch": kwargs.pop("num_items_in_batch", None),
        "return_dict": return_dict is None or bool(return_dict),
    }
    if kwargs:
        raise TypeError(
            f"forward() of a wrapped model does not take {', '.join(sorted(kwargs))}; "
            "call it inside beacon.disabled(model) for the stock one."
        )
    return options


def _kept_columns(text: NewText, logits_to_keep: int | torch.Tensor, labels: Any) -> torch.Tensor | None:
    """Columns whose logits are returned (int64), or None for none."""
    columns = text.ids.shape[1]
    if isinstance(logits_to_keep, torch.Tensor):
        return torch.arange(columns)[logits_to_keep.cpu()]
    if logits_to_keep == 0:
        return torch.arange(columns) if labels is None else None
    return torch.arange(max(columns - logits_to_keep, 0), columns)


def _wanted(text: NewText, columns: torch.Tensor | None, labels: Any) -> torch.Tensor:
    """Which packed text tokens' final hidden states are read: bool ``[n]``."""
    if labels is not None:
        return torch.ones(sum(text.counts), dtype=torch.bool)
    mask = torch.zeros(text.ids.shape, dtype=torch.bool)
    if columns is not None:
        mask[:, columns] = True
    wanted = text.pack(mask)
    wanted[_last_tokens(text)] = True
    return wanted


def _last_tokens(text: NewText) -> torch.Tensor:
    """Place of every row's last token in the packed text (rows without new text left out)."""
    counts = torch.tensor(text.counts)
    return counts.cumsum(0)[counts > 0] - 1


def _slice(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The columns that the stock model would keep.

    Contiguous, for PyTorch multiplies a slice in another way where the head's weight is frozen than where it is not,
    and rounds differently; the stock model that users compare with is not frozen.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:].contiguous() if logits_to_keep else hidden


def _unpack(hidden: HiddenStates, text: NewText, columns: torch.Tensor) -> torch.Tensor:
    """States of the kept columns as ``[rows, kept columns, hidden]``, zeros at padding."""
    rows, width = text.ids.shape
    place = torch.full((rows * width,), -1)
    place[text.index] = torch.arange(sum(text.counts))
    place = place.view(rows, width)[:, columns].flatten()
    text_places = (place >= 0).nonzero()[:, 0]
    values = hidden.at(place[text_places])
    if len(text_places) < len(place):
        values = values.new_zeros(len(place), values.shape[1]).index_copy(0, text_places.to(values.device), values)
    return values.view(rows, len(columns), -1)


def _stock_mask(cache: BeaconCache, text: NewText, given: torch.Tensor | None) -> torch.Tensor | None:
    """The 2-D mask the stock model gets: the caller's, completed to all columns."""
    columns = cache.columns.count + text.ids.shape[1]
    if given is not None and given.shape[1] == columns:
        return given
    _, known = cache.columns.read()
    if given is None and bool(known.all()):
        return None
    new = torch.ones(text.ids.shape, dtype=torch.bool) if text.mask is None else text.mask
    return torch.cat([known.view(len(new), -1), new], dim=1).long().to(text.ids.device)


def _stock_positions(cache: BeaconCache, text: NewText, given: torch.Tensor | None) -> torch.Tensor | None:
    """The position ids the stock model gets.

    The caller's, or None as long as the stock model's own make every row's tokens consecutive; else the rows' own.
    """
    if not cache.columns.count:
        if given is not None or text.mask is None or not _gaps(text.mask):
            return given
        return (text.mask.long().cumsum(dim=1) - 1).clamp(min=0).to(text.ids.device)
    if text.mask is None and all(state.tokens == cache.columns.count for state in cache.states):
        return given
    new = torch.ones(text.ids.shape, dtype=torch.bool) if text.mask is None else text.mask
    offsets = (new.long().cumsum(dim=1) - 1).clamp(min=0).to(text.ids.device)
    return offsets + _next_position(cache)[:, None].to(text.ids.device)


def _gaps(mask: torch.Tensor) -> bool:
    """Whether a row's text is interrupted by padding."""
    return bool(((mask[:, 1:] & ~mask[:, :-1]).sum(dim=1) + mask[:, 0].long() > 1).any())


def _next_position(cache: BeaconCache) -> torch.Tensor:
    """Position that follows each row's last text token in the stock frame, ``[rows]``."""
    _, mask = cache.columns.read()
    positions = torch.cat([p.expand(len(cache.states), -1).cpu() for p in cache.stock_positions], dim=1)
    return torch.where(mask, positions, -1).amax(dim=1) + 1
