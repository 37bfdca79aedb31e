"""Measure a wrapped model on long text beside what one would do without beacons."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from beacon import default_model, load_adapter
from beacon.evaluation import (
    Beacon,
    Method,
    PasskeyScore,
    Perplexity,
    SlidingWindow,
    Stock,
    Text,
    Truncated,
    ask_passkey,
    build_passkey,
    file_texts,
    full_cache_bytes,
    library_texts,
    measure_perplexity,
    native_context,
)

SINKS = 4  # of the sliding windows
DECODED = 64  # tokens generated to tell the speed


@dataclass(frozen=True)
class Settings:
    """What the demo measures.

    Args:
        length: Tokens of the longest text, at least twice the targets.
        ratio: Ratio of every window in the row that fixes it; another row lets the configured policy choose.
        texts: Texts whose targets are taken together.
        targets: Last tokens of each text that are counted.
        depths: Where passkeys are hidden.
        file: A text file to read in place of the standard library.
    """

    length: int = 8192
    ratio: int = 8
    texts: int = 3
    targets: int = 256
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.length < 2 * self.targets:
            raise ValueError(
                f"length must be at least {2 * self.targets} tokens (twice the targets), got {self.length}; pass more."
            )
        if self.ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {self.ratio}; pass for example 8.")


@dataclass(frozen=True)
class Demo:
    """What was measured.

    Args:
        settings: What was asked for.
        window: Raw tokens in a window of the model, and in the sliding window beside it.
        texts: Names of the texts, and whether the shipped model was trained without them.
        perplexity: By method and length.
        passkeys: Every answer.
        cache_bytes: Bytes of the longest text's cache with beacons, at the fixed ratio.
        full_bytes: Bytes of all its keys and values.
        tokens_per_second: Speed of reading it.
        decoded_per_second: Speed of generating after it.
        seconds: Time of everything.
    """

    settings: Settings
    window: int
    texts: tuple[tuple[str, bool], ...]
    perplexity: tuple[Perplexity, ...]
    passkeys: tuple[PasskeyScore, ...]
    cache_bytes: int
    full_bytes: int
    tokens_per_second: float
    decoded_per_second: float
    seconds: float


def load_default(device: str = "cpu", folder: Path | None = None) -> tuple[Any, Any]:
    """The shipped model with its adapter, and its tokenizer.

    Args:
        device: Where to.
        folder: Another folder of the same layout.

    Returns:
        The wrapped model in float32 on a CPU, else in bfloat16, and the tokenizer.
    """
    folder = default_model() if folder is None else folder
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return load_adapter(model, folder / "adapter"), AutoTokenizer.from_pretrained(folder)


def run(model: Any, tokenizer: Any, settings: Settings, advance: Callable[[str, int, int], None] | None = None) -> Demo:
    """Measure everything.

    Args:
        model: A wrapped model.
        tokenizer: Its tokenizer.
        settings: What to measure.
        advance: Called with (what, steps done, steps in all).

    Returns:
        The figures.

    Raises:
        FileNotFoundError: ``settings.file`` does not exist.
        ValueError: It is no text, or too short.
    """
    began = time.perf_counter()
    say = advance or (lambda what, done, total: None)
    wanted = settings.length + 1
    if settings.file is None:
        texts = library_texts(tokenizer, wanted, settings.texts)
    else:
        texts = file_texts(tokenizer, settings.file, wanted, settings.texts)
    longest = min(len(text.ids) for text in texts) - 1
    if longest < 2 * settings.targets:
        raise ValueError(
            f"the file must have at least {2 * settings.targets + 1} tokens, got {longest + 1}; give a longer one."
        )
    perplexity = _perplexities(model, texts, longest, settings, say)
    passkeys = _passkeys(model, tokenizer, texts, longest, settings, say)
    say("speed", 0, 1)
    cost = _cost(model, texts[0].ids[:longest][None].to(model.device), settings.ratio)
    say("speed", 1, 1)
    return Demo(
        settings=settings,
        window=model.beacon_config.window,
        texts=tuple((text.name, text.held_out) for text in texts),
        perplexity=tuple(perplexity),
        passkeys=tuple(passkeys),
        **cost,
        seconds=time.perf_counter() - began,
    )


def _cost(model: Any, ids: torch.Tensor, ratio: int) -> dict[str, Any]:
    """Bytes and speeds of reading a text, and of generating after it."""
    start = time.perf_counter()
    cache = model.compress(ids, ratios=ratio)
    reading = time.perf_counter() - start
    held = int(cache.stats()[0]["bytes"])
    start = time.perf_counter()
    model.generate(
        ids[:, -1:],
        attention_mask=ids.new_ones(1, ids.shape[1] + 1),
        past_key_values=cache,
        min_new_tokens=DECODED,
        max_new_tokens=DECODED,
        do_sample=False,
        pad_token_id=0,
    )
    decoding = time.perf_counter() - start
    return {
        "cache_bytes": held,
        "full_bytes": full_cache_bytes(model.config, ids.shape[1], next(model.parameters()).element_size()),
        "tokens_per_second": ids.shape[1] / reading,
        "decoded_per_second": DECODED / decoding,
    }


def _lengths(least: int, longest: int) -> list[int]:
    """Powers of two from ``least`` up, and the longest itself."""
    lengths = [least]
    while lengths[-1] * 2 < longest:
        lengths.append(lengths[-1] * 2)
    return lengths if lengths[-1] == longest else [*lengths, longest]


def _perplexities(
    model: Any, texts: list[Text], longest: int, settings: Settings, say: Callable[[str, int, int], None]
) -> list[Perplexity]:
    # The rival "as many entries" gets a full window beside the memory, the most that a target sees through beacons, but
    # not more than its native context, beyond which it gets worse.
    config = model.beacon_config
    ids = [text.ids.to(model.device) for text in texts]
    lengths = _lengths(min(native_context(model), longest), longest)
    results: list[Perplexity] = []
    for number, length in enumerate(lengths):
        say("perplexity", number, len(lengths))
        fixed = measure_perplexity(model, ids, length + 1, settings.targets, Beacon(settings.ratio))
        rivals: list[Method] = [
            Stock(),
            Truncated(),
            SlidingWindow(config.window, SINKS),
            SlidingWindow(min(round(fixed.entries) + config.window, native_context(model)) - SINKS, SINKS),
            Beacon(),
        ]
        results += [measure_perplexity(model, ids, length + 1, settings.targets, method) for method in rivals]
        results.append(fixed)
    say("perplexity", len(lengths), len(lengths))
    return results


def _passkeys(
    model: Any,
    tokenizer: Any,
    texts: list[Text],
    longest: int,
    settings: Settings,
    say: Callable[[str, int, int], None],
) -> list[PasskeyScore]:
    lengths = [length for length in (1024, 4096) if length <= longest] or [longest]
    methods: list[Method] = [Truncated(), SlidingWindow(model.beacon_config.window), Beacon(), Beacon(settings.ratio)]
    prompts = [
        build_passkey(tokenizer, text.ids, length, depth, seed=1000 * number + place)
        for length in lengths
        for number, text in enumerate(texts[:2])
        for place, depth in enumerate(settings.depths)
    ]
    scores = []
    for number, prompt in enumerate(prompts):
        say("passkeys", number, len(prompts))
        scores += [ask_passkey(model, tokenizer, prompt, method) for method in methods]
    say("passkeys", len(prompts), len(prompts))
    return scores
