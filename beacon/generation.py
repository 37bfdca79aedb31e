"""``generate`` of a wrapped model: Hugging Face's own, on a cache that knows its text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from beacon.cache import BeaconCache
from beacon.identity import is_disabled
from beacon.text import check_ids, check_mask, new_text


class BeaconGeneration(nn.Module):
    """Mixed into the stock class of a wrapped model, as part of :class:`beacon.model.BeaconModel`."""

    model: Any
    generation_config: Any
    beacon_cache: Any

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
        try:
            if past:
                self._continue_from(given, check_ids(ids), args, kwargs)
            result = stock.generate(inputs, *args, **kwargs)
            done = self._setting("use_cache", args, kwargs) is not False
            return result
        finally:
            if not done:  # an error, an interrupt, or nothing was to be kept
                given.__dict__.update(before.__dict__)

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
        given.__dict__.update(cache.__dict__)
        if repeats > 1:
            given.batch_repeat_interleave(repeats)
