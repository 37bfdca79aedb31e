"""Where the time goes: kernels of one call grouped by what they are for, and the gaps in which nothing runs.

On a GPU the times are the kernels' own, and the wall time is that of a call without the profiler; on a CPU they are
the operations' times without those inside them, and the wall time is the profiled call's. Our kernels of attention and
of rotation share a name, so the calls around them are marked for the profiler.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measure import first_call

PRODUCTS, ATTENTION, ROTARY, ELEMENTWISE, COPIES = "products", "attention", "rotary_commit", "elementwise", "copies"
OTHER, HOST = "other", "host"
GROUPS = (PRODUCTS, ATTENTION, ROTARY, ELEMENTWISE, COPIES, OTHER, HOST)
MARKS = {"benchmark: attention": ATTENTION, "benchmark: rotation": ROTARY}
NAMES = (  # the first that is found in a kernel's or an operation's name
    (ROTARY, r"rotate|rotary|rope"),
    (ATTENTION, r"flash|fmha|attention|sdpa|decode_kernel|combine_kernel|split_?kv"),
    (PRODUCTS, r"gemm|gemv|nvjet|cublas|cutlass|xmma|splitk|\bmm\b|\bbmm\b|addmm|matmul|linear|::dot\b"),
    (COPIES, r"memcpy|memset|copy|::cat\b|catarray|index|gather|scatter|clone|contiguous|::to\b|fill|zero|repeat"),
    (
        ELEMENTWISE,
        r"elementwise|vectorized|reduce|norm|::(mul|add|sub|neg|silu|pow|mean|rsqrt|cos|sin|div|arange|argmax|softmax)_?\b|softmax",
    ),
)
OURS = "forward_kernel"  # of attention; the backward pass is not profiled


def parts(call: Callable[[], Any], device: torch.device) -> tuple[float, dict[str, float]]:
    """Seconds of a call, and of them by group (`GROUPS`); the call has been made before.

    Args:
        call: What is profiled.
        device: Where it runs.
    """
    on_gpu = device.type == "cuda"
    wall = first_call(call, device) if on_gpu else 0.0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with marked(), profile(activities=activities) as profiler:
        profiled = first_call(call, device)
    events = profiler.events() or []
    found = _on_gpu(events) if on_gpu else _on_cpu(events)
    wall = wall or profiled
    return wall, {**found, HOST: max(0.0, wall - sum(found.values()))}


@contextmanager
def marked() -> Iterator[None]:
    """Inside, attention and rotation of a wrapped model stand between marks for the profiler."""
    import beacon.modules
    import beacon.reading

    attention, rotation = MARKS
    before = {
        (beacon.reading, "load_path"): beacon.reading.load_path,
        (beacon.reading, "load_rotation"): beacon.reading.load_rotation,
        (beacon.modules, "rotate"): beacon.modules.rotate,
    }
    load_path, load_rotation, rotate = before.values()

    def marked_rotation(name: str) -> Any:
        found = load_rotation(name)
        return found and type(found)(*(_marking(rotation, call) for call in vars(found).values()))

    beacon.reading.load_path = lambda name: _marking(attention, load_path(name))
    beacon.reading.load_rotation = marked_rotation
    beacon.modules.rotate = _marking(rotation, rotate)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def group_of(name: str, mark: str | None = None) -> str:
    """The group of a kernel or operation.

    Args:
        name: Its name.
        mark: The group of the mark it stands in.
    """
    if mark == ROTARY:
        return ROTARY
    found = next((group for group, pattern in NAMES if re.search(pattern, name.lower())), OTHER)
    if found == OTHER and OURS in name:
        return ATTENTION
    return ATTENTION if mark == ATTENTION and found == PRODUCTS else found


def _marking(mark: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function(mark):
            return call(*args, **kwargs)

    return wrapped


def _on_gpu(events: Any) -> dict[str, float]:
    """Seconds by group of all kernels; a mark covers the device from its first kernel to its last."""
    there = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = sorted(
        (event.time_range.start, event.time_range.end, MARKS[event.name]) for event in there if event.name in MARKS
    )
    starts = [span[0] for span in spans]
    found = dict.fromkeys(GROUPS[:-1], 0.0)
    for event in there:
        if event.is_user_annotation or event.name in MARKS:
            continue
        place = bisect.bisect_right(starts, event.time_range.start) - 1
        inside = place >= 0 and event.time_range.end <= spans[place][1]
        mark = spans[place][2] if inside else None
        found[group_of(event.name, mark)] += event.time_range.elapsed_us() / 1e6
    return found


def _on_cpu(events: Any) -> dict[str, float]:
    """Seconds by group of all operations, without those inside them; Python's own time in a mark is the host's."""
    found = dict.fromkeys(GROUPS[:-1], 0.0)
    for event in events:
        if event.name in MARKS or event.name.startswith(("ProfilerStep", "Optimizer")):
            continue
        above, mark = event.cpu_parent, None
        while above is not None and mark is None:
            above, mark = above.cpu_parent, MARKS.get(above.name)
        found[group_of(event.name, mark)] += event.self_cpu_time_total / 1e6
    return found
