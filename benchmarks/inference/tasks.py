"""What a run measures, the most important first: where the budget ends, the rest is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.inference.contenders import (
    CUDNN,
    FULL,
    FULL_STATIC,
    KVPRESS,
    LOOP,
    PUBLISHED,
    SLIDING,
    STATIC,
    flops_of,
)
from benchmarks.inference.setting import BATCHES, TEXTS, K, Setting, Text
from benchmarks.models import ON_CPU
from benchmarks.results import OURS

PREFILL, DECODE, PREFILL_PARTS, DECODE_PARTS = "prefill", "decode", "prefill-parts", "decode-parts"
KINDS = (PREFILL, DECODE, PREFILL_PARTS, DECODE_PARTS)
CORE = (OURS, STATIC, FULL, LOOP)  # all that a second model is measured with
RATES = {"cuda": 350e12, "cpu": 25e9}  # FLOP/s, to foresee how long a cell takes
SLOW = {PUBLISHED: 2.0, SLIDING: 2.0, KVPRESS: 1.5}  # how much longer than its FLOPs say
STEPS = {"cuda": 25.0, "cpu": 10.0}  # decoding steps per second, likewise
REPEATED = {"cuda": (240 * K, 5), "cpu": (16 * K, 3)}  # tokens in all timed runs of a cell, and its most runs
START = {"cuda": 3.0, "cpu": 0.1}  # seconds: wrapping, first launches
COMPILATION = 90.0  # of a 7B model by torch.compile
PROCESS = 40.0  # a process of its own, with a model of its own


@dataclass(frozen=True)
class Task:
    """One contender on one text.

    Args:
        kind: One of `KINDS`.
        impl: The contender.
        text: What it reads.
        batches: Rows of the batches that are decoded.
    """

    kind: str
    impl: str
    text: Text
    batches: tuple[int, ...] = ()


def tasks(name: str) -> list[Task]:
    """All tasks of a scale, in order."""
    batches, texts = BATCHES[name], TEXTS[name]
    if name in ON_CPU:
        return _on_cpu(texts, batches)
    four, thirty_two, hundred, four_hundred, million = texts
    every = [
        *_prefill(hundred, OURS, FULL, LOOP),
        *_prefill(thirty_two, OURS, FULL, LOOP, PUBLISHED, CUDNN, SLIDING),
        *_prefill(hundred, CUDNN),
        *_decode(hundred, batches, STATIC, FULL),
        *_decode(four, batches, STATIC, OURS, FULL),
        Task(PREFILL_PARTS, OURS, thirty_two),
        Task(DECODE_PARTS, STATIC, hundred),
        *_prefill(four, OURS, FULL, LOOP, PUBLISHED, CUDNN, SLIDING),
        *_prefill(four_hundred, OURS, FULL, LOOP),
        *_decode(four_hundred, batches, STATIC, FULL),
        *_prefill(hundred, PUBLISHED, SLIDING),
        *_prefill(million, OURS, FULL),
        *_decode(hundred, batches, OURS),
        *_decode(four, batches, SLIDING),
        *_prefill(four_hundred, SLIDING, PUBLISHED),
        *_prefill(thirty_two, KVPRESS),
        *_prefill(hundred, KVPRESS),
        *_decode(four, batches[:1], FULL_STATIC),
        *_decode(hundred, batches[:1], FULL_STATIC),
        *_prefill(million, LOOP),
    ]
    if name == "7b":
        return every
    core = [task for task in every if task.impl in CORE]
    return sorted(core, key=lambda task: task.impl == FULL and task.text.length >= four_hundred.length)  # minutes each


def repeats(setting: Setting, text: Text) -> int:
    """How often a text is read for its time."""
    tokens, most = REPEATED[setting.device.type]
    return max(1, min(most, tokens // text.length))


def _on_cpu(texts: Sequence[Text], batches: tuple[int, ...]) -> list[Task]:
    readers = (OURS, FULL, LOOP, PUBLISHED, CUDNN, SLIDING, KVPRESS)
    decoding = (STATIC, OURS, FULL, FULL_STATIC, SLIDING)
    return [
        *(task for text in texts for task in _prefill(text, *readers)),
        *(task for text in (texts[0], texts[-1]) for task in _decode(text, batches, *decoding)),
        Task(PREFILL_PARTS, OURS, texts[-1]),
        Task(DECODE_PARTS, STATIC, texts[-1]),
        Task(DECODE_PARTS, OURS, texts[-1]),
    ]


def expected_seconds(task: Task, setting: Setting) -> float:
    """About how long a task takes, so that none begins that cannot end in time."""
    device = setting.device.type
    once = SLOW.get(task.impl, 1.0) * flops_of(task.impl, setting, task.text).model / RATES[device]
    if task.kind == PREFILL:
        process = PROCESS if task.impl == KVPRESS and setting.on_gpu else 0.0
        return START[device] + process + (repeats(setting, task.text) + 0.2) * once
    compiled = COMPILATION if task.impl == FULL_STATIC and setting.on_gpu else 0.0
    return START[device] + compiled + 2 * once + 2 * max(len(task.batches), 1) * setting.new_tokens / STEPS[device]


def _prefill(text: Text, *names: str) -> list[Task]:
    return [Task(PREFILL, name, text) for name in names]


def _decode(text: Text, batches: tuple[int, ...], *names: str) -> list[Task]:
    return [Task(DECODE, name, text, batches) for name in names]
