"""``generate`` of a wrapped model: Hugging Face's own, on a cache that knows its text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from beacon.attention import slot_path
from beacon.cache import BeaconCache
from beacon.config import check_whole
from beacon.decoding import condenses_next
from beacon.identity import Wrapping, is_disabled
from beacon.text import check_ids, check_mask, new_text

LOOK = 16  # tokens between two looks at whether all rows have ended; each waits for the device


class BeaconGeneration(nn.Module):
    """Mixed into the stock class of a wrapped model, as part of :class:`beacon.model.BeaconModel`."""

    model: Any
    generation_config: Any
    beacon_cache: Any
    beacon_wrapping: Wrapping

    @property
    def _is_stateful(self) -> bool:
        """Tells ``generate`` that tokens cannot be taken back (assisted decoding is refused by name)."""
        return not is_disabled(self)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Ordinary ``generate``; with a cache ``input_ids`` is the whole text or only what is new.

        Args:
            inputs: Token ids ``[batch, seqlen]`` (or pass ``input_ids``).
            *args: As in Hugging Face.
            **kwargs: As in Hugging Face, and ``ratios``, ``expected_length``, ``keep_first``, ``keep_from``.

        Returns:
            As in Hugging Face; with only new tokens given, the sequences begin with those. A cache that was given goes
            on with what was generated (one row for every beam or returned sequence), unless the call failed, was
            interrupted, or had ``use_cache=False``: then it is as it was.

        Raises:
            ValueError: Right padding, a row without new text, nothing new, a text that departs from the cached one.
        """
        stock: Any = super()
        if is_disabled(self):
            return stock.generate(inputs, *args, **kwargs)
        ids = kwargs.get("input_ids", inputs)
        given = kwargs.get("past_key_values")
        past = given.columns.count if isinstance(given, BeaconCache) else 0
        if ids is not None:
            kwargs["attention_mask"] = self._text_mask(check_ids(ids), past, args, kwargs)
        if isinstance(kwargs.get("ratios"), torch.Tensor):  # generate would repeat a tensor for every beam
            kwargs["ratios"] = kwargs["ratios"].tolist()
        if not isinstance(given, BeaconCache):
            return stock.generate(inputs, *args, **kwargs)
        before, done = given.fork(), False
        given.become(before.fork())  # out of the buffers of a static cache, once
        try:
            if past:
                self._continue_from(given, check_ids(ids), args, kwargs)
            result = stock.generate(inputs, *args, **kwargs)
            done = self._setting("use_cache", args, kwargs) is not False
            return result
        finally:
            if not done:  # an error, an interrupt, or nothing was to be kept
                given.become(before)

    def static_cache(self, max_tokens: int) -> BeaconCache:
        """An empty cache whose decoded tokens have static shapes; on a GPU a CUDA graph then replays each.

        Tokens are decoded so without gradients alone, as in ``generate``. A graph is what the model did when it was
        recorded: hooks registered since do not run. Where beacons interleave, each is a pass of its own.

        Args:
            max_tokens: Text tokens of a row, prompt included, that find room; for longer texts the buffers grow.

        Returns:
            The cache: pass it to ``compress``, ``generate`` or ``decode``.

        Raises:
            NotImplementedError: Memory in eight bits or on the CPU, or an ``attention_path`` that cannot serve.
            TypeError: ``max_tokens`` is no int.
            ValueError: No token.
        """
        weight, head_dim = self.model.embed_tokens.weight, self.model.layers[0].self_attn.head_dim
        slot_path(self.beacon_wrapping.config.attention_path, weight.device, weight.dtype, head_dim)
        return self.beacon_cache(None, 1).reserve(max_tokens)

    @torch.no_grad()
    def decode(
        self,
        input_ids: torch.Tensor,
        past_key_values: BeaconCache,
        max_new_tokens: int,
        *,
        attention_mask: torch.Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A lean ``generate``: nothing but the model runs between two tokens, and the host does not wait for them.

        Greedy decoding gives the tokens of ``generate``. Whether all rows have ended is looked up every few tokens;
        what was read too much is taken back. Interrupted, the cache has read what was decoded until then.

        Args:
            input_ids: Token ids ``[batch, seqlen]``: the whole text or only what is new.
            past_key_values: A cache of :meth:`static_cache`, or one with room reserved
                (:meth:`beacon.BeaconCache.reserve`). It goes on with what was decoded, but for the last token.
            max_new_tokens: Tokens to add at most.
            attention_mask: 1 for text, 0 for padding (on the left).
            eos_token_id: What ends a row; None takes the generation configuration's, an empty list nothing.
            pad_token_id: What follows the end of a row; None takes the generation configuration's, else the first eos.
            do_sample: Draw tokens in place of taking the likeliest.
            temperature: Divides the logits before a draw.
            top_k: Draw from the likeliest k.
            top_p: Draw from the likeliest that make up this probability.
            **kwargs: ``ratios``, ``expected_length``, ``keep_first``, ``keep_from``, as in :meth:`forward`.

        Returns:
            The new tokens ``[batch, n]``, padded after the end of a row; n is at most ``max_new_tokens``.

        Raises:
            ValueError: No cache of a wrapped model, or one without room reserved; no token to add; as :meth:`forward`.
        """
        check_whole("max_new_tokens", max_new_tokens, 1)
        if not isinstance(past_key_values, BeaconCache) or past_key_values.max_tokens is None:
            raise ValueError(
                f"decode needs a cache with room reserved, got {past_key_values!r}; make one with "
                "model.static_cache(max_tokens=...), or call cache.reserve(max_tokens)."
            )
        eos = self._setting("eos_token_id", (), {"eos_token_id": eos_token_id})
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = self._setting("pad_token_id", (), {"pad_token_id": pad_token_id})
        pick = partial(_draw, _warpers(temperature, top_k, top_p)) if do_sample else _likeliest
        ids = check_ids(input_ids)
        given = {"attention_mask": attention_mask, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        mask = self._text_mask(ids, past_key_values.columns.count, (), given)
        options = {"past_key_values": past_key_values, "logits_to_keep": 1, "use_cache": True, **kwargs}
        logits = self(ids, attention_mask=mask, **options).logits[:, -1]
        before = past_key_values.columns.count
        tokens = ids.new_empty(len(ids), max_new_tokens)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        stops = torch.tensor(ends, device=ids.device)
        for number in range(max_new_tokens):
            tokens[:, number] = pick(logits)
            if ends:
                tokens[:, number].masked_fill_(ended, ends[0] if pad is None else pad)
                ended |= torch.isin(tokens[:, number], stops)
            looks = number % LOOK == LOOK - 1 or condenses_next(past_key_values)
            if number == max_new_tokens - 1 or (ends and looks and bool(ended.all())):
                break
            logits = self(tokens[:, number : number + 1], **options).logits[:, -1]
        tokens = tokens[:, : number + 1]
        if ends:
            tokens = tokens[:, : _length(tokens, stops)]
            past_key_values.crop(before + tokens.shape[1] - 1 - past_key_values.columns.count)
        return tokens

    def _setting(self, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        """A generation setting as Hugging Face finds it: in the call, its configuration, the model's."""
        config = kwargs.get("generation_config") or (args[0] if args else None)
        for value in (kwargs.get(name), getattr(config, name, None), getattr(self.generation_config, name, None)):
            if value is not None:
                return value
        return None

    def _text_mask(self, ids: torch.Tensor, past: int, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
        """The mask given, or the one that Hugging Face infers from pad tokens.

        Raises:
            ValueError: A row does not end with text.
        """
        mask = check_mask(kwargs.get("attention_mask"), ids, past)
        pad, eos = self._setting("pad_token_id", args, kwargs), self._setting("eos_token_id", args, kwargs)
        if mask is None and pad is not None and pad not in (eos if isinstance(eos, (list, tuple)) else (eos,)):
            padding = ids == pad
            mask = (~padding).long() if bool(padding.any()) else None
        if mask is not None and bool(((mask[:, -1] == 0) & (mask.any(dim=1) | bool(past))).any()):
            raise ValueError(
                "generate needs left padding and new text in every row, got an attention_mask, or pad tokens, with "
                "padding in the last column; tokenize with padding_side='left', and leave rows without new text out."
            )
        return mask

    def _continue_from(self, given: BeaconCache, ids: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        """Give the caller's cache a row for every beam or returned sequence, and the mask all columns."""
        cache = self.beacon_cache(given, ids.shape[0])
        text = new_text(ids, kwargs["attention_mask"], cache, self.model.embed_tokens.num_embeddings)
        _, known = cache.columns.read()
        fresh = torch.ones(text.ids.shape, dtype=torch.bool) if text.mask is None else text.mask
        kwargs["attention_mask"] = torch.cat([known, fresh], dim=1).long().to(ids.device)
        repeats = max(self._setting(name, args, kwargs) or 1 for name in ("num_beams", "num_return_sequences"))
        given.become(cache)
        if repeats > 1:
            given.batch_repeat_interleave(repeats)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


def _warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        steps.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        steps.append(TopPLogitsWarper(top_p))
    return steps


def _draw(steps: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    """The first of exponential clocks to ring: a draw without ``torch.multinomial``'s look at the device."""
    nothing = torch.zeros(len(logits), 0, dtype=torch.int64, device=logits.device)
    chances = steps(nothing, logits.float()).softmax(dim=-1)
    return (chances / torch.empty_like(chances).exponential_()).argmax(dim=-1)


def _length(tokens: torch.Tensor, stops: torch.Tensor) -> int:
    """Columns up to the last row's end."""
    hits = torch.isin(tokens, stops)
    first = torch.where(hits.any(dim=1), hits.int().argmax(dim=1) + 1, tokens.shape[1])
    return int(first.max())
