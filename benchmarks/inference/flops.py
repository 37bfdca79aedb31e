"""FLOPs of reading a text for its last token's logits, by closed formulas; nobody is credited with more.

A product ``[m, k] x [k, n]`` counts 2 m k n, a visible pair of query and key 4 head_dim per head (two products). Norms,
rotations and softmax are not counted. With L layers, n raw tokens and b beacons,

    matrices  = 2 ((L - 1) (n + b) layer + (n + b) (k + v) + (layer - k - v))
    attention = 4 heads head_dim ((L - 1) pairs + the last token's keys)
    head      = 2 hidden vocab

where ``layer`` is the number of parameters of a layer's matrices, ``k`` and ``v`` of two of them: the last layer is
needed for keys and values, and beyond that for one token. That is less than 2 x parameters x tokens by up to 1 / L, for
everybody alike. What is counted is the plan of `beacon.plan` for windows of W = S, append, step-expansion, as in
`beacon.training.flops`; a window that is full gets its beacons, the last one too.
"""

from __future__ import annotations

from dataclasses import dataclass

from beacon.training.flops import LAST, ModelShape
from benchmarks.inference.setting import Text


@dataclass(frozen=True)
class ReadingFlops:
    """FLOPs of reading one text.

    Args:
        raw_tokens: Tokens of the text.
        beacons: Beacons that read it.
        matrices: The layers' matrices.
        attention: Pairs that are visible.
        head: Logits of one token.
    """

    raw_tokens: int
    beacons: int
    matrices: int
    attention: int
    head: int

    @property
    def model(self) -> int:
        """All of it: for MFU."""
        return self.matrices + self.attention + self.head


def condensed(shape: ModelShape, window: int, text: Text) -> ReadingFlops:
    """Of reading in windows that are condensed, whoever does it."""
    full, rest = divmod(text.length, window)
    own = window // text.ratio
    memory = own * full * (full - 1) // 2  # entries before every full window, summed
    raw_pairs = window * memory + full * _triangle(window) + rest * own * full + _triangle(rest)
    beacon_pairs = own * memory + full * (text.ratio * _triangle(own) + own)
    last_keys = rest + own * full if rest else window + own * (full - 1)
    return _count(shape, text.length, own * full, raw_pairs + beacon_pairs, last_keys)


def full(shape: ModelShape, text: Text) -> ReadingFlops:
    """Of full causal attention."""
    return _count(shape, text.length, 0, _triangle(text.length), text.length)


def sliding(shape: ModelShape, window: int, text: Text) -> ReadingFlops:
    """Of attention to the last ``window`` tokens, the reading one included."""
    seen = min(window, text.length)
    return _count(shape, text.length, 0, _triangle(seen) + (text.length - seen) * seen, seen)


def _count(shape: ModelShape, raw: int, beacons: int, pairs: int, last_keys: int) -> ReadingFlops:
    kept = sum(shape.projections[name] for name in LAST)
    passed = (shape.layers - 1) * (raw + beacons) * shape.layer + (raw + beacons) * kept + shape.layer - kept
    return ReadingFlops(
        raw_tokens=raw,
        beacons=beacons,
        matrices=2 * passed,
        attention=4 * shape.heads * shape.head_dim * ((shape.layers - 1) * pairs + last_keys),
        head=2 * shape.hidden * shape.vocab,
    )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
