"""Full attention: the stock model with PyTorch's fused kernels, its cache growing or of fixed size.

Long texts are read in pieces, so that activations stay bounded. Transformers would then hand a materialised mask to
SDPA, which the flash kernel refuses; here later pieces get PyTorch's lower-right causal bias, which it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu.attempts import Unavailable
from benchmarks.inference.readers import GENERATE, LEAN, Contender, Decoder, Reading, generating
from benchmarks.measure import captured

PIECE_TOKENS = 32 * 1024
LOWER_RIGHT = "benchmark_lower_right"
ALIGNED = 64  # entries that a fixed size is a multiple of


class FullDynamic(Contender):
    """The stock model with a ``DynamicCache``.

    Args:
        model: A stock model with attention ``sdpa``.
        piece: Tokens read in one pass.
    """

    ways: tuple[str, ...] = (GENERATE,)

    def __init__(self, model: Any, piece: int = PIECE_TOKENS) -> None:
        super().__init__(model)
        self.piece = piece

    def read(self, ids: torch.Tensor, ratio: int) -> Reading:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with lower_right(self.model):
            for piece in ids.split(self.piece, dim=1):
                logits = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return Reading.of(cache, ids, logits[:, -1])

    def cache_bytes(self, cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def repeated(self, reading: Reading, rows: int) -> Reading:
        if rows == 1:  # at 100K tokens a copy would be 50 GB
            return reading
        cache = copy.deepcopy(reading.cache)
        cache.batch_repeat_interleave(rows)
        return Reading(cache, reading.ids.repeat(rows, 1), reading.logits)

    def decoder(self, way: str, reading: Reading) -> Decoder:
        return generating(self.model, reading, only_new=False)


class FullCudnn(FullDynamic):
    """The same in one pass with cuDNN's kernel, which has no lower-right bias in PyTorch."""

    ways = ()

    def read(self, ids: torch.Tensor, ratio: int) -> Reading:
        from transformers import DynamicCache

        if ids.device.type != "cuda":
            raise Unavailable("cuDNN's attention needs a CUDA GPU")
        cache = DynamicCache(config=self.model.config)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return Reading.of(cache, ids, logits[:, -1])


class FullStatic(FullDynamic):
    """The same decoding with a ``StaticCache``: through ``generate``, which compiles on a GPU, and a graph's replay.

    Args:
        model: A stock model with attention ``sdpa``.
        room: Tokens that the cache has room for after the text.
        piece: Tokens read in one pass.
    """

    ways = (LEAN, GENERATE)

    def __init__(self, model: Any, room: int, piece: int = PIECE_TOKENS) -> None:
        super().__init__(model, piece)
        self.room = room

    def repeated(self, reading: Reading, rows: int) -> Reading:
        from transformers import StaticCache

        entries = -(-(reading.ids.shape[1] + self.room) // ALIGNED) * ALIGNED
        cache = StaticCache(config=self.model.config, max_cache_len=entries)
        for number, layer in enumerate(reading.cache.layers):
            cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
        return Reading(cache, reading.ids.repeat(rows, 1), reading.logits)

    def decoder(self, way: str, reading: Reading) -> Decoder:
        return super().decoder(way, reading) if way == GENERATE else replaying(self.model, reading)


def replaying(model: Any, reading: Reading) -> Decoder:
    """Decode by replaying one graph of a step (on a CPU by calling it).

    Raises:
        Unavailable: This version's cache counts its tokens on the host, where a replay cannot.
    """
    token = reading.ids[:, -1:].clone()

    def step() -> None:
        logits = model(token, past_key_values=reading.cache, use_cache=True, logits_to_keep=1).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    made: list[Any] = [] if token.device.type == "cuda" else [step]

    def decode(count: int) -> torch.Tensor:
        if not made:
            made.append(captured(step))  # its warm-up decodes tokens too, which nobody keeps
            before = int(reading.cache.get_seq_length())
            made[0]()
            if int(reading.cache.get_seq_length()) != before + 1:
                raise Unavailable("this version's StaticCache counts its tokens on the host")
        new = []
        for _ in range(count):
            made[0]()
            new.append(token.clone())
        out = torch.cat(new, dim=1)
        reading.ids = torch.cat([reading.ids, out], dim=1)
        return out

    return decode


@contextmanager
def lower_right(model: Any) -> Iterator[None]:
    """Inside, every call's queries are the last tokens of all keys, and the flash kernel computes that where it can."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(LOWER_RIGHT, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(LOWER_RIGHT, lambda *args, **kwargs: None)
    before, model.config._attn_implementation = model.config._attn_implementation, LOWER_RIGHT
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: ``[rows, heads, n, head_dim]`` in, ``[rows, n, heads, head_dim]`` out."""
    grouped = query.shape[1] != key.shape[1]
    bias = causal_lower_right(query.shape[2], key.shape[2])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None
