"""What reading and decoding are measured on: a model, texts of random tokens, and how much each is condensed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import beacon
from beacon.training.flops import ModelShape
from benchmarks.models import Scale

K = 1024
OWN = ("q", "k", "v", "o")  # projections of which beacons have their own copy, as in the paper's first version


@dataclass(frozen=True)
class Text:
    """A text of random tokens.

    Args:
        length: Tokens.
        ratio: Raw tokens per beacon, the same in every window.
    """

    length: int
    ratio: int


LONG = (Text(4 * K, 8), Text(32 * K, 16), Text(100 * K, 32), Text(400 * K, 128), Text(1024 * K, 128))
TEXTS = {
    "7b": LONG,
    "8b": LONG,
    "small": (Text(512, 8), Text(2048, 16), Text(8192, 32)),
    "tiny": (Text(128, 8), Text(512, 16)),
}
NEW_TOKENS = {"7b": 64, "8b": 64, "small": 16, "tiny": 4}
BATCHES = {"7b": (1, 8, 32), "8b": (1, 8, 32), "small": (1, 8), "tiny": (1, 2)}


@dataclass(frozen=True)
class Setting:
    """A model and where it runs.

    Args:
        name: Name of the scale.
        scale: Its sizes.
        device: Where to.
        dtype: Of weights and activations.
        texts: What is read.
        new_tokens: Decoded in a timed call.
        attention_path: Of the library's own contenders.
        fused: What computes norms and SwiGLU, of all contenders (:data:`benchmarks.models.FUSED`).
    """

    name: str
    scale: Scale
    device: torch.device
    dtype: torch.dtype
    texts: tuple[Text, ...]
    new_tokens: int = 16
    attention_path: str = "auto"
    fused: str = "none"

    @property
    def precision(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def room(self) -> int:
        """Tokens after a text for which caches of fixed size have room: half a window, and all that is decoded."""
        return self.scale.window // 2 + 8 * self.new_tokens + 64

    @property
    def positions(self) -> int:
        """Tokens that the model is said to be trained for: all that anybody reads."""
        return max(text.length for text in self.texts) + self.room

    @property
    def model_shape(self) -> ModelShape:
        """Sizes for counting FLOPs."""
        return self.scale.shape(OWN)

    def config(self, segment: int | None = None) -> beacon.BeaconConfig:
        """How ours reads; every call names its ratio.

        Args:
            segment: Windows in one pass; None: the library's choice.
        """
        return beacon.BeaconConfig(
            window=self.scale.window,
            ratios=tuple(dict.fromkeys(text.ratio for text in self.texts)),
            ratio_policy="fixed",
            projections=OWN,
            segment=segment,
            attention_path=self.attention_path,
        )

    def ids(self, count: int) -> torch.Tensor:
        """Random tokens ``[1, count]``."""
        generator = torch.Generator().manual_seed(count)
        return torch.randint(3, self.scale.vocab, (1, count), generator=generator).to(self.device)

    def case(self, kind: str, text: Text, batch: int | None = None) -> str:
        """A cell's name in the results; the ratio is part of it, for it differs from length to length."""
        rows = "" if batch is None else f" batch {batch}"
        fused = "" if self.fused == "none" else f" {self.fused}"
        return f"{kind} {self.name} {text.length} ratio {text.ratio}{rows} {self.precision}{fused}"

    def shape(self, text: Text, batch: int = 1) -> str:
        """All sizes of a cell."""
        return f"length={text.length} ratio={text.ratio} window={self.scale.window} {self.scale} batch={batch}"
