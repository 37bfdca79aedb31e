"""The one configuration object: how text is cut into windows and how each window is condensed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

FORMAT_VERSION = 1
PAPER_RATIOS = (2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 8, 8, 16, 16, 32, 32, 64, 128)

PLACEMENTS = ("append", "interleave")
COVERAGES = ("step-expansion", "segmentation", "full-coverage")
POLICIES = ("fixed", "step-random", "instance-random", "sequence", "adaptive", "retrieval")
PROJECTIONS = ("q", "k", "v", "o")
MEMORY_DTYPES = ("auto", "int8", "float8_e4m3fn")
ATTENTION_PATHS = ("auto", "reference", "sdpa", "flex", "flash", "triton")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not one of the allowed.

    Raises:
        ValueError: Names value and allowed ones.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}; choose one of these.")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or a smaller one than ``least``.

    Raises:
        TypeError: No int.
        ValueError: Too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}; pass a whole number.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; pass a larger number.")


def check_ratio(ratio: object, stride: int) -> int:
    """Return ``ratio`` if it is 0 or divides ``stride``.

    Raises:
        TypeError: ``ratio`` is not an int.
        ValueError: ``ratio`` is negative or does not divide ``stride``.
    """
    check_whole("ratio", ratio, 0)
    assert isinstance(ratio, int)
    if ratio and stride % ratio:
        fitting = ", ".join(str(r) for r in range(1, stride + 1) if stride % r == 0)
        raise ValueError(
            f"stride must divide by ratio, got stride={stride} and ratio={ratio}; "
            f"choose a ratio from 0, {fitting} or change stride."
        )
    return ratio


@dataclass(frozen=True, kw_only=True)
class BeaconConfig:
    """How a wrapped model reads text that is longer than its context.

    Args:
        window: Tokens read together before they are condensed (W).
        stride: Tokens that one condensation consumes (S <= W); None means ``window``.
        ratios: Raw tokens per beacon, a multiset in the given order (repeats weigh random draws). 0 keeps
            the raw keys and values. Every ratio must divide ``stride``.
        ratio_policy: Which ratio each window gets: ``fixed`` (the first), ``step-random`` (per window and row),
            ``instance-random`` (per row), ``sequence`` (cycle by window number), ``adaptive`` (the smallest that
            lets text and ``reserve`` fit the native context), ``retrieval`` (given per call, see
            :func:`beacon.retrieval_ratios`), or a callable taking a :class:`beacon.RatioRequest`.
        reserve: Tokens that ``adaptive`` keeps free for what is still to come.
        attention: Which raw tokens of its window a beacon reads: ``step-expansion``, ``segmentation``,
            ``full-coverage``.
        placement: ``append`` (beacons after the window's raw tokens) or ``interleave`` (one after every
            ``ratio`` raw tokens).
        attend_memory: Beacons see the memory of earlier windows (raw tokens always do).
        attend_beacons: Beacons see the earlier beacons of their own window.
        sink: First raw tokens of the text whose keys and values stay in memory for good.
        projections: Attention projections of which beacons have their own copy.
        native_context: Longest position the base model was trained for; None takes the model's
            ``max_position_embeddings``, capped by a uniform sliding window.
        seed: Seed of the random ratio policies.
        segment: Windows computed in one pass; None chooses. It changes speed and memory, never results.
        attention_path: ``auto`` or the name of the implementation (``reference``, ``sdpa``, ``flex``, ``flash``,
            ``triton``). An explicit choice never falls back.
        memory_dtype: What memory is kept in between passes: ``auto`` (the model's dtype), ``int8``, or
            ``float8_e4m3fn``, with a scale per entry and head. Each pass, so each decoded token too, brings a layer's
            memory back to the model's dtype while it is read. While gradients are recorded it is ``auto``.
        offload_memory: Keep memory on the CPU between passes; each layer's is brought in while the one before computes.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value or a combination of values is not allowed.

    Source: arXiv 2401.03462, sections 3.1-3.3.
    """

    window: int = 1024
    stride: int | None = None
    ratios: tuple[int, ...] = (0, 2, 4, 8, 16, 32, 64, 128)
    ratio_policy: str | Callable[[Any], int] = "adaptive"
    reserve: int = 1024
    attention: str = "step-expansion"
    placement: str = "append"
    attend_memory: bool = True
    attend_beacons: bool = False
    sink: int = 0
    projections: tuple[str, ...] = ("q", "k", "v", "o")
    native_context: int | None = None
    seed: int = 0
    segment: int | None = None
    attention_path: str = "auto"
    memory_dtype: str = "auto"
    offload_memory: bool = False

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1)
        if self.stride is None:
            object.__setattr__(self, "stride", self.window)
        check_whole("stride", self.stride, 1)
        if self.step > self.window:
            raise ValueError(
                f"stride must not exceed window, got stride={self.stride} and window={self.window}; lower stride."
            )
        self._check_ratios()
        self._check_names()
        self._check_combinations()

    @property
    def step(self) -> int:
        """The stride as an int (``stride`` is only None before construction has finished)."""
        return self.window if self.stride is None else self.stride

    def _check_ratios(self) -> None:
        if isinstance(self.ratios, (str, int)) or not isinstance(self.ratios, Sequence):
            raise TypeError(f"ratios must be a sequence of ints, got {self.ratios!r}; pass for example (2, 4, 8).")
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not self.ratios:
            raise ValueError("ratios must name at least one ratio, got an empty sequence; pass for example (8,).")
        for ratio in self.ratios:
            check_ratio(ratio, self.step)

    def _check_names(self) -> None:
        if not callable(self.ratio_policy):
            check_choice("ratio_policy", self.ratio_policy, POLICIES)
        check_choice("attention", self.attention, COVERAGES)
        check_choice("placement", self.placement, PLACEMENTS)
        check_choice("attention_path", self.attention_path, ATTENTION_PATHS)
        check_choice("memory_dtype", self.memory_dtype, MEMORY_DTYPES)
        if isinstance(self.projections, str) or not isinstance(self.projections, Sequence):
            raise TypeError(f"projections must be a sequence of names, got {self.projections!r}; pass ('q', 'k').")
        chosen = tuple(self.projections)
        for name in chosen:
            check_choice("projections", name, PROJECTIONS)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"projections must name each of q, k, v, o at most once and at least one, got {chosen}.")
        object.__setattr__(self, "projections", tuple(name for name in PROJECTIONS if name in chosen))
        for name in ("attend_memory", "attend_beacons", "offload_memory"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}; pass True or False.")
        check_whole("reserve", self.reserve, 0)
        check_whole("sink", self.sink, 0)
        check_whole("seed", self.seed, 0)
        if self.segment is not None:
            check_whole("segment", self.segment, 1)
        if self.native_context is not None:
            check_whole("native_context", self.native_context, 1)
            if self.window > self.native_context:
                raise ValueError(
                    f"window must fit the native context, got window={self.window} and "
                    f"native_context={self.native_context}; lower window."
                )

    def _check_combinations(self) -> None:
        if self.sink > self.step:
            raise ValueError(f"sink must not exceed stride, got sink={self.sink} and stride={self.step}; lower sink.")
        if self.attention == "segmentation" and (self.attend_beacons or self.placement == "interleave"):
            raise ValueError(
                "attention='segmentation' needs placement='append' and attend_beacons=False, got "
                f"placement={self.placement!r} and attend_beacons={self.attend_beacons}; use 'step-expansion'."
            )
        if self.placement != "interleave":
            return
        if self.step != self.window:
            raise ValueError(
                f"placement='interleave' needs stride == window, got stride={self.step} and window={self.window}; "
                "leave stride out or use placement='append'."
            )
        if self.attend_beacons != (self.attention == "full-coverage"):
            raise ValueError(
                "placement='interleave' needs attend_beacons=True with attention='full-coverage' and "
                f"attend_beacons=False with 'step-expansion', got attention={self.attention!r} and "
                f"attend_beacons={self.attend_beacons}; change one of the two."
            )

    @classmethod
    def paper(cls, **overrides: Any) -> BeaconConfig:
        """The paper's first version (Llama-2): append, step-expansion, own q, k, v and o.

        Training recipes draw from the ratios with ``ratio_policy="step-random"``; reading adapts to the length.

        Source: arXiv 2401.03462v2, section 4.1.
        """
        return cls(**{"window": 1024, "ratios": PAPER_RATIOS, **overrides})

    @classmethod
    def iclr2025(cls, **overrides: Any) -> BeaconConfig:
        """The ICLR 2025 version: interleaved beacons in plain causal order, own q, k and v.

        Llama reads windows of 1024; pass ``window=2048`` for Mistral and Qwen-2, ``sink=1`` for Llama-3.

        Source: arXiv 2401.03462v3, section 4.1.
        """
        preset: dict[str, Any] = {
            "window": 1024,
            "ratios": (2, 4, 8, 16, 32),
            "attention": "full-coverage",
            "placement": "interleave",
            "attend_beacons": True,
            "projections": ("q", "k", "v"),
        }
        return cls(**{**preset, **overrides})

    def replace(self, **changes: Any) -> BeaconConfig:
        """A copy with some fields changed (validated again); a stride that equals the window follows it."""
        return replace(self, **_follow(self.window, self.stride, changes))

    def to_json(self) -> str:
        """Serialise to JSON with a ``format_version``.

        Raises:
            ValueError: ``ratio_policy`` is a callable, which no file can hold.
        """
        if callable(self.ratio_policy):
            raise ValueError(
                f"ratio_policy must be a name to be saved, got the callable {self.ratio_policy!r}; "
                "save with config.replace(ratio_policy='adaptive') and pass the callable again after loading."
            )
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> BeaconConfig:
        """Build from a dict that :meth:`to_json` wrote; unknown keys warn, overrides are as in :meth:`replace`.

        Raises:
            ValueError: The format is newer than this package reads.
        """
        version = values.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"format_version must be at most {FORMAT_VERSION}, got {version!r}; "
                "upgrade activation-beacon to read it."
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known - {"format_version"})
        if unknown:
            warnings.warn(f"unknown keys in the beacon configuration are ignored: {', '.join(unknown)}", stacklevel=2)
        chosen = {key: value for key, value in values.items() if key in known}
        for key in ("ratios", "projections"):
            if isinstance(chosen.get(key), list):
                chosen[key] = tuple(chosen[key])
        return cls(**{**chosen, **_follow(chosen.get("window"), chosen.get("stride"), overrides)})


def _follow(window: Any, stride: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Changes to a configuration, where a stride as long as the window stays so."""
    return {"stride": None, **changes} if "window" in changes and stride == window else changes
