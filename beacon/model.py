"""The methods that :func:`beacon.wrap` mixes into a causal LM: forward, compress, generate, save_pretrained."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from beacon.cache import BeaconCache
from beacon.columns import kept_columns, last_tokens, stock_columns, unpack, wanted_tokens
from beacon.config import BeaconConfig
from beacon.decoding import decode_token, decodes
from beacon.documents import Documents, packed_documents
from beacon.families import is_longrope
from beacon.generation import BeaconGeneration
from beacon.identity import Wrapping, base_fingerprint, home_of, is_disabled
from beacon.loss import IGNORED, check_labels, check_weights, text_loss
from beacon.modules import Rotary
from beacon.plan import Span
from beacon.reading import HiddenStates, Itinerary, check_checkpointing, plan_call, read
from beacon.stock import read_stock, stock_serves
from beacon.text import (
    NewText,
    all_text,
    check_ids,
    check_place,
    check_ratios,
    check_vocabulary,
    new_text,
    pad_documents,
)
from beacon.weights import CONFIG_FILE, WEIGHTS_FILE, check_finite, collect_weights, is_beacon_weight, write_adapter


class BeaconModel(BeaconGeneration):
    """Mixed into the stock class of a wrapped model."""

    beacon_wrapping: Wrapping
    config: Any
    model: Any
    lm_head: Any

    @property
    def beacon_config(self) -> BeaconConfig:
        """The configuration it was wrapped with."""
        return self.beacon_wrapping.config

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
            position_ids: Where they start again at 0 in the one row of a call without mask and cache, documents packed
                one after the other, each read by itself (``ratios`` count in each). Else they are used by the stock
                attention on short texts and ignored otherwise (the plan gives positions).
            past_key_values: A :class:`BeaconCache`, an empty ``DynamicCache``, or None.
            inputs_embeds: Refused.
            labels: Token ids ``[batch, seqlen]``, -100 not counted; gives the mean next-token loss. The text ends with
                them, so its last window has no beacons, unless ``use_cache`` says that it goes on.
            use_cache: Return a cache; default True without labels.
            logits_to_keep: As in Hugging Face: 0 all (none with labels), n the last n columns, or column indices
                ``[n]``.
            ratios: Ratio of every window (int), or one per window counted from the beginning of the text.
            expected_length: Length in tokens that the text will have, for the adaptive policy.
            keep_first: Tokens at the start that are kept as they are.
            keep_from: Text index from which on nothing is condensed.
            **kwargs: ``num_items_in_batch`` divides the loss; ``weights`` ``[batch, seqlen]`` are factors of the
                labels' losses; ``return_dict``. For processes that share a model, which must call its parts
                equally often: ``one_pass=True`` reads all windows at once, ``chunks`` is how often the loss calls the
                head at least.

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
        input_ids = check_place(check_ids(input_ids), self.model.embed_tokens)
        given = past_key_values is not None
        documents = None if given else packed_documents(input_ids, attention_mask, position_ids)
        if documents is not None:
            return self._forward_packed(documents, input_ids, labels, use_cache, logits_to_keep, ratios, options)
        keep = use_cache if use_cache is not None else given or (labels is None and self.config.use_cache)
        if keep and labels is None and options["weights"] is None and decodes(past_key_values, input_ids):
            span = (ratios, expected_length, keep_first, keep_from)
            logits = self._decode(past_key_values, input_ids, attention_mask, *span)
            if logits is not None:
                if not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool) or logits_to_keep < 0:
                    logits = logits[:, kept_columns(1, logits_to_keep, None)]
                result = CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
                return result if options["return_dict"] else result.to_tuple()
        cache = self.beacon_cache(past_key_values, input_ids.shape[0])
        text, trip = self._plan(
            cache, input_ids, attention_mask, ratios, expected_length, keep_first, keep_from, labels is not None, keep
        )
        labels = None if labels is None else check_labels(labels, text, self.config.vocab_size)
        weights = None if options["weights"] is None else check_weights(options["weights"], text)
        columns = kept_columns(text.ids.shape[1], logits_to_keep, labels)
        trains = self.training and labels is not None and torch.is_grad_enabled()
        if not trains and stock_serves(self, cache, trip, keep):
            whole, after = read_stock(self, cache, trip, attention_mask, position_ids, keep)
            hidden = HiddenStates(text.pack(whole), torch.arange(sum(text.counts)))
            kept = None if columns is None else stock_columns(whole, logits_to_keep)
        else:
            check_checkpointing(self, cache.config.segment, trip, keep)
            wanted = wanted_tokens(text, columns, labels)
            hidden, after = read(self, self.beacon_rotary(), cache, trip, wanted, one_pass=options["one_pass"])
            kept = None if columns is None else unpack(hidden, text, columns)
        logits = None if kept is None else self.beacon_head(kept)
        loss = None
        if labels is not None:
            items = options["num_items_in_batch"]
            loss = text_loss(
                hidden, text, labels, cache.last_hidden, self.beacon_head, items, weights, options["chunks"]
            )
            if not loss.requires_grad:  # in eval mode a text too short for beacons teaches nothing; backward() is legal
                loss = loss + 0.0 * self.model.beacon_embed_tokens(text.ids.new_zeros(1)).sum()
        past = self._finish(after, trip, hidden, past_key_values) if keep else None
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
        return result if options["return_dict"] else result.to_tuple()

    def _forward_packed(
        self,
        documents: Documents,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | torch.Tensor,
        ratios: Any,
        options: dict[str, Any],
    ) -> Any:
        """:meth:`forward` of packed documents ``[1, T]``: a row each inside (where padding costs nothing)."""
        if use_cache:
            raise ValueError("packed documents have no common cache, got use_cache=True; pass a row per document.")
        for name, value in (("labels", labels), ("weights", options["weights"])):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, got {list(value.shape)} for {list(input_ids.shape)}."
                )
        columns = kept_columns(input_ids.shape[1], logits_to_keep, labels)
        out = BeaconModel.forward(
            self,
            documents.rows(input_ids, 0),
            documents.mask,
            labels=None if labels is None else documents.rows(labels, IGNORED),
            weights=None if options["weights"] is None else documents.rows(options["weights"], 0.0),
            logits_to_keep=0 if columns is None else torch.arange(max(documents.lengths)),
            num_items_in_batch=options["num_items_in_batch"],
            one_pass=options["one_pass"],
            chunks=options["chunks"],
            ratios=ratios,
            use_cache=False,
        )
        if columns is not None:
            out.logits = out.logits[documents.mask.bool().to(out.logits.device)][columns.to(out.logits.device)][None]
        return out if options["return_dict"] else out.to_tuple()

    def compress(
        self,
        input_ids: torch.Tensor | Sequence[Any],
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
            input_ids: Token ids ``[batch, seqlen]``, as in :meth:`forward` or on the CPU (those of each pass are copied
                ahead); or a list of documents of any lengths, each a list of ints or a tensor ``[n]``. Their windows
                share passes, and each gets a row of the cache (``cache.select([row])``).
            attention_mask: As in :meth:`forward`; a list of documents needs none.
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
        if isinstance(input_ids, (list, tuple)):
            if attention_mask is not None:
                raise ValueError("a list of documents is padded here, got an attention_mask too; leave it out.")
            input_ids, attention_mask = pad_documents(input_ids, torch.device("cpu"))
        input_ids = check_place(check_ids(input_ids), self.model.embed_tokens, host=True)
        with torch.no_grad():
            cache = self.beacon_cache(past_key_values, input_ids.shape[0])
            span = (ratios, expected_length, keep_first, keep_from)
            text, trip = self._plan(cache, input_ids, attention_mask, *span, False, True)
            if stock_serves(self, cache, trip, True):
                whole, after = read_stock(self, cache, trip, attention_mask, None, True)
                hidden = HiddenStates(text.pack(whole), torch.arange(sum(text.counts)))
                if progress is not None:
                    progress(sum(text.counts), sum(text.counts))
            else:
                hidden, after = read(self, self.beacon_rotary(), cache, trip, wanted_tokens(text, None, None), progress)
            return self._finish(after, trip, hidden, past_key_values)

    # -- saving --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's own, with all weights under their names, and the beacon configuration beside them.

        The folder loads as the stock model with ``from_pretrained`` (which reports the beacon weights as unexpected);
        :func:`beacon.load_adapter` then takes the beacon weights from the same folder. Where Hugging Face leaves the
        model out and saves its LoRA layers alone, the beacon weights get a file of their own.
        """
        stock: Any = super()
        given = inspect.signature(stock.save_pretrained).bind(save_directory, *args, **kwargs).arguments
        folder = Path(save_directory)
        if given.get("is_main_process", True) and not folder.is_file():
            manifest = self.beacon_manifest()  # refuses a callable ratio policy before anything is written
            if getattr(self, "_hf_peft_config_loaded", False):
                state = given.get("state_dict")
                ours = None if state is None else {n: t.cpu() for n, t in state.items() if is_beacon_weight(n)}
                weights = ours or collect_weights(self)
                check_finite(weights)
                write_adapter(folder, manifest, weights)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / WEIGHTS_FILE).unlink(missing_ok=True)  # an adapter saved here before would be found first
                (folder / CONFIG_FILE).write_text(manifest)
        return stock.save_pretrained(save_directory, *args, **kwargs)

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

    def beacon_cache(self, cache: Any, rows: int) -> BeaconCache:
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
        self._check_cache(cache)
        held = cache.batch_size
        if not cache.columns.count:
            fresh = BeaconCache(wrapping.config, wrapping.owner, rows)
            fresh.max_tokens = cache.max_tokens
            return fresh
        if held not in (rows, 1):
            raise ValueError(
                f"past_key_values must hold one row or as many as input_ids, got {held} rows for a batch of {rows}; "
                "choose rows with cache.select([...])."
            )
        return cache.select([0] * rows) if held != rows else cache.fork()

    def _check_cache(self, cache: BeaconCache) -> None:
        """Refuse a cache that is not this model's."""
        wrapping = self.beacon_wrapping
        if cache.owner != wrapping.owner:
            raise ValueError("past_key_values was made by another model; read the text again with this one.")
        if cache.config != wrapping.config:
            raise ValueError(
                f"past_key_values was made with another configuration, got {cache.config} for {wrapping.config}; "
                "read the text again."
            )
        if cache.interrupted:
            raise ValueError(
                "past_key_values was interrupted while a window was condensed and holds parts of two states; read the "
                "text again, or go on from a fork() made before."
            )
        held = None if cache.in_slots else cache.device  # slots are made where the model is
        if held is not None and _elsewhere(held, home_of(self.model.layers[0])):
            raise ValueError(
                f"past_key_values must be where the model is, {home_of(self.model.layers[0])}, got one on {held}; move "
                "it with cache.to(device)."
            )

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
        text = new_text(input_ids, attention_mask, cache, self.model.embed_tokens.num_embeddings)
        known, expected_length, span = self._settings(cache, ratios, expected_length, keep_first, keep_from)
        trip = plan_call(
            cache,
            text,
            ratios=known,
            span=span,
            expected_length=expected_length,
            native_context=self.beacon_wrapping.native_context,
            text_ends=labelled and not keep and not cache.columns.count,
        )
        return text, trip

    def _settings(
        self,
        cache: BeaconCache,
        ratios: Any,
        expected_length: int | None,
        keep_first: int | None,
        keep_from: int | None,
    ) -> tuple[int | tuple[int, ...] | None, int | None, Span]:
        """Ratios, expected length and span in force after a call that names these."""
        config = cache.config
        if cache.columns.count:
            span = cache.span
            for name, value in (("keep_first", keep_first), ("keep_from", keep_from)):
                if value is not None and value != getattr(span, name):
                    raise ValueError(
                        f"{name} must be the same in every call on one cache, got {value} after {getattr(span, name)}; "
                        "leave it out or read the text again."
                    )
        else:
            span = Span(0 if keep_first is None else keep_first, keep_from).check(config)
        known = cache.ratios if ratios is None else check_ratios(ratios, cache)
        if expected_length is not None and (isinstance(expected_length, bool) or not isinstance(expected_length, int)):
            raise TypeError(f"expected_length must be an int, got {expected_length!r}; pass a number of tokens.")
        return known, cache.expected_length if expected_length is None else expected_length, span

    def _decode(
        self,
        cache: BeaconCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        ratios: Any,
        expected_length: int | None,
        keep_first: int | None,
        keep_from: int | None,
    ) -> torch.Tensor | None:
        """Logits ``[rows, 1, vocab]`` of a token per row in static shapes; None where a row gets padding."""
        self._check_cache(cache)
        if not all_text(attention_mask, input_ids, cache.columns.count):
            return None
        check_vocabulary(input_ids, self.model.embed_tokens.num_embeddings)
        known, expected_length, _ = self._settings(cache, ratios, expected_length, keep_first, keep_from)
        logits = decode_token(self, cache, input_ids, known, expected_length)
        return logits[:, None].clone()  # the next token's overwrite them

    def _finish(self, after: BeaconCache, trip: Itinerary, hidden: HiddenStates, given: Any) -> BeaconCache:
        """Complete the cache after a call; the caller's own object takes the new content."""
        text = trip.text
        after.columns.append(text.ids, text.mask)
        after.ratios, after.span, after.expected_length = trip.ratios, trip.span, trip.expected_length
        last = hidden.at(last_tokens(text)).clone()
        rows = [row for row, count in enumerate(text.counts) if count]
        for row, state in zip(rows, last.unbind(), strict=True):
            after.last_hidden[row] = state
        if isinstance(given, BeaconCache):
            given.become(after)
            return given
        return after


def _elsewhere(held: torch.device, home: torch.device) -> bool:
    """Whether two devices differ; parameters on the CPU may compute on a GPU (offloaded by FSDP2 or ZeRO-3)."""
    if held.type != home.type:
        return (held.type, home.type) != ("cuda", "cpu")
    return None not in (held.index, home.index) and held.index != home.index


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
        "weights": kwargs.pop("weights", None),
        "one_pass": bool(kwargs.pop("one_pass", False)),
        "chunks": kwargs.pop("chunks", None),
        "return_dict": return_dict is None or bool(return_dict),
    }
    if kwargs:
        raise TypeError(
            f"forward() of a wrapped model does not take {', '.join(sorted(kwargs))}; "
            "call it inside beacon.disabled(model) for the stock one."
        )
    return options
