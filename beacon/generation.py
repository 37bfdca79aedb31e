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
            cache, before = self.beacon_cache(given, ids.shape[0]), given.fork()
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
