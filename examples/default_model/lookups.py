"""A first lesson for beacons, without any reading: keep, head by head, what the base looks tokens up by.

The frozen base finds a token again with several heads that do the same (induction heads), and one of them is enough if
its value speaks louder. A beacon has one key and one value per head; so each of these heads is given one distance, and
learns to keep the key and the value of the raw token that far before the beacon. Nothing but one window's own raw keys
and values is needed for that, so it costs a small part of a training step that reads.
"""

import numpy as np
import torch
from torch import Tensor, nn

import beacon
from beacon.modules import rotate
from tasks import NUM_DIGITS, TaskSampler

GAIN = 4.0  # of the values: one head answers for all that the base asks
SHARE = 0.5  # mean attention to the right token that makes a head one to look tokens up with
DISTANCES = (4, 1, 2, 5, 6, 8, 3, 7)  # of such heads, from the lowest layer up


@torch.no_grad()
def lookup_heads(model: nn.Module, sampler: TaskSampler, rows: int = 32) -> dict[tuple[int, int], int]:
    """Distance by (layer, head) for the heads by which the base finds the digits of a passkey again.

    Args:
        model: A wrapped model.
        sampler: Draws the texts with passkeys.
        rows: How many.
    """
    config = model.config
    ids = torch.from_numpy(np.stack([sampler.passkey(400, depth=(n + 0.5) / rows / 2)[0] for n in range(rows)]))
    windows = ids[:, : -NUM_DIGITS - 1].unfold(1, NUM_DIGITS, 1)
    found = (windows == ids[:, None, -NUM_DIGITS:]).all(-1)
    starts = found.float().argmax(1)
    queries = torch.arange(ids.shape[1] - NUM_DIGITS - 1, ids.shape[1] - 1)
    implementation, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with beacon.disabled(model):
            maps = model(ids.to(model.device), output_attentions=True, use_cache=False).attentions
    finally:
        config._attn_implementation = implementation
    right = starts[:, None] + torch.arange(NUM_DIGITS)
    able = []
    for number, weights in enumerate(maps):
        rows_at = torch.arange(len(ids))[:, None]
        shares = weights.cpu()[rows_at, :, queries, right].mean((0, 1))  # [heads]
        able += [(number, head) for head, share in enumerate(shares.tolist()) if share >= SHARE]
    return dict(zip(able, DISTANCES, strict=False))


class Lookups:
    """Beacons of single windows, compared with the raw tokens at every head's distance.

    Args:
        model: A wrapped Llama.
        distances: Distance by (layer, head).
        window: Raw tokens of a window.
        every: Raw tokens from one beacon to the next.
    """

    def __init__(self, model: nn.Module, distances: dict[tuple[int, int], int], window: int, every: int = 2) -> None:
        self.model, self.distances = model, distances
        self.heads, self.width = model.config.num_attention_heads, model.config.head_dim
        device = model.device
        self.ends = torch.arange(max(distances.values()), window + 1, every, device=device)
        raws = torch.arange(window, device=device)
        rotary = model.beacon_rotary()
        self.raw_table, self.table = (rotary.table(at, torch.float32) for at in (raws, self.ends))
        own = torch.eye(len(self.ends), dtype=torch.bool, device=device)
        self.mask = torch.cat([raws < self.ends[:, None], own], dim=1)
        self.store: dict[tuple[int, str], Tensor] = {}
        self._keeping = False
        for number, layer in enumerate(model.model.layers):
            for name in ("k_proj", "v_proj"):
                getattr(layer.self_attn, name).register_forward_hook(
                    lambda _, args, out, key=(number, name): self._keep(key, out)
                )

    def errors(self, ids: Tensor) -> dict[str, Tensor]:
        """Relative squared error of keys and values, by head.

        Args:
            ids: Token ids ``[rows, window]``.
        """
        self._keeping = True
        with torch.no_grad(), beacon.disabled(self.model):
            self.model.model(input_ids=ids, use_cache=False)
        self._keeping = False
        rows, count = ids.shape[0], len(self.ends)
        hidden = self.model.model.beacon_embed_tokens.weight.expand(rows, count, -1)
        errors: dict[str, Tensor] = {}
        for number, layer in enumerate(self.model.model.layers):
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            k, v = self._split(attention.beacon_k_proj(x)), self._split(attention.beacon_v_proj(x))
            raw_k, raw_v = (self._split(self.store[number, name]) for name in ("k_proj", "v_proj"))
            for (place, head), distance in self.distances.items():
                if place == number:
                    at = self.ends - distance
                    errors[f"key {number}.{head}"] = _relative(k[:, :, head], raw_k[:, at, head])
                    errors[f"value {number}.{head}"] = _relative(v[:, :, head], GAIN * raw_v[:, at, head])
            if number == len(self.model.model.layers) - 1:
                break
            q = self._rotate(self._split(attention.beacon_q_proj(x)), self.table)
            keys = torch.cat([self._rotate(raw_k, self.raw_table), self._rotate(k, self.table)], dim=1)
            out = nn.functional.scaled_dot_product_attention(
                *(part.transpose(1, 2) for part in (q, keys, torch.cat([raw_v, v], dim=1))), attn_mask=self.mask
            )
            hidden = hidden + attention.beacon_o_proj(out.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return errors

    def _keep(self, key: tuple[int, str], out: Tensor) -> None:
        if self._keeping:
            self.store[key] = out.detach()

    def _split(self, channels: Tensor) -> Tensor:
        return channels.unflatten(-1, (self.heads, self.width))

    def _rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(x.transpose(0, 1).flatten(1, 2), table).unflatten(1, (x.shape[0], self.heads)).transpose(0, 1)


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).pow(2).sum(-1).mean() / theirs.pow(2).sum(-1).mean()
