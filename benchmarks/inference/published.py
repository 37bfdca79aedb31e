"""The published schedule for reading: one window after the other, keys rotated anew in each, SDPA with a mask.

The layer and its mask are those of `benchmarks.training.published`, which says what is prescribed and where the
baseline gets the better; here there are no gradients, a full window that ends the text gets its beacons, and only the
last token's logits are computed. It gives the memory and the hidden states of ours, which a test asserts.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.inference.readers import Contender, Reading
from benchmarks.training.published import check_first_version, materialised_mask, positions, read_layer

Memory = list[tuple[torch.Tensor, torch.Tensor]]


class Published(Contender):
    """A wrapped Llama with its own q, k, v and o, read by the published schedule."""

    def read(self, ids: torch.Tensor, ratio: int) -> Reading:
        hidden, memory = read(self.model, ids, ratio)
        return Reading.of(memory, ids, self.model.lm_head(hidden[:, -1]))

    def cache_bytes(self, cache: Memory) -> int:
        return sum(k.nbytes + v.nbytes for k, v in cache)


def read(model: Any, ids: torch.Tensor, ratio: int) -> tuple[torch.Tensor, Memory]:
    """Read one text.

    Args:
        model: A wrapped Llama.
        ids: The text, ``[1, tokens]``.
        ratio: Raw tokens per beacon.

    Returns:
        Final hidden states of the last window's raw tokens ``[1, n, hidden]``, and of every layer the keys before
        rotation and the values of all beacons ``[1, kv_heads, entries, head_dim]``.

    Raises:
        NotImplementedError: Another configuration than append, step-expansion, S = W, without sinks.
    """
    check_first_version(model.beacon_config)
    body, window = model.model, model.beacon_config.window
    memory: list[tuple[Any, Any]] = [(None, None)] * len(body.layers)
    entries = 0
    for piece in ids.split(window, dim=1):
        length = piece.shape[1]
        beacons = window // ratio if length == window else 0
        hidden = body.embed_tokens(piece)
        if beacons:
            own = body.beacon_embed_tokens(ids.new_zeros(1)).to(hidden).expand(1, beacons, -1)
            hidden = torch.cat([hidden, own], dim=1)
        table = body.rotary_emb(hidden, positions(entries, length, beacons, ratio, ids.device))
        mask = materialised_mask(entries, length, beacons, ratio, hidden.dtype, ids.device)
        for index, layer in enumerate(body.layers):
            hidden, k, v = read_layer(layer, hidden, length, *memory[index], table, mask)
            if beacons:
                memory[index] = k, v
        entries += beacons
    return body.norm(hidden[:, :length]), memory
