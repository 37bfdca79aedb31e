"""One implementation on one cell: run it, time it, and say how it went."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.cases import Cell
from benchmarks.measure import Call, Spread, alive, captured, first_call, peak_mb, settle, time_call
from benchmarks.results import Row

UNITS = {"tflops": 1e9, "gbps": 1e6}  # FLOPs, or bytes, per millisecond of one unit


class Unavailable(Exception):
    """An implementation cannot run here, and why."""


@dataclass(frozen=True)
class Attempt:
    """What an implementation is about to compute.

    Args:
        run: The call: gives the outputs.
        work: FLOPs or bytes that it takes.
        metric: ``tflops`` or ``gbps``: what work per time is called.
        leaves: What the backward pass gives gradients to; none for a call that is timed as it is.
        grads: Gradients of the outputs.
        extra: What was measured on the way, by metric.
        ours: Gives results in the order and shape of our kernels', where they are the same function.
    """

    run: Callable[[], list[torch.Tensor]]
    work: float
    metric: str
    leaves: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    extra: dict[str, Spread] = field(default_factory=dict)
    ours: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None


@dataclass(frozen=True)
class Implementation:
    """Ours, or a peer.

    Args:
        name: As in the results.
        build: Makes the attempt from a cell's tensors; may raise :class:`Unavailable`.
        graph: Replay a CUDA graph of the call.
    """

    name: str
    build: Callable[[Any], Attempt]
    graph: bool = False


@dataclass(frozen=True)
class Outcome:
    """Rows of one implementation on one cell, and its results in our order (None where they compare with nothing)."""

    rows: list[Row]
    results: list[torch.Tensor] | None = None

    @property
    def status(self) -> str:
        """Of the first row; all are alike."""
        return self.rows[0].status


def attempt(implementation: Implementation, cell: Cell, problem: Any, device: torch.device) -> Outcome:
    """Build, run and time an implementation; what goes wrong becomes a row.

    An implementation that is not there or does not serve this cell is ``unavailable``, one that breaks ``failed``.
    """
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")  # kernels that PyTorch refuses say why in warnings
        try:
            return _measure(implementation, cell, implementation.build(problem), device)
        except Unavailable as err:
            status, reason = "unavailable", str(err)
        except torch.OutOfMemoryError:
            status, reason = "failed", "out of memory"
        except Exception as err:  # whatever a library raises: the other cells go on
            status, reason = "failed", said(err)
    reason += "".join(f"; {_line(note.message)}" for note in notes)
    if device.type == "cuda" and alive(device):
        torch.cuda.empty_cache()
    return Outcome([Row(cell.name, implementation.name, cell.shape, cell.dtype, status=status, reason=reason[:400])])


def difference(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    """Norm of what two implementations differ by, relative to the norm; NaN where one gave NaN."""
    apart = total = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        apart += float((mine.float() - other.float()).square().sum(dtype=torch.float64))
        total += float(other.float().square().sum(dtype=torch.float64))
    return (apart / total) ** 0.5 if total else float("nan")


def said(err: Exception) -> str:
    """An error as one short line."""
    return f"{type(err).__name__}: {_line(err)}"[:400]


def _measure(implementation: Implementation, cell: Cell, work: Attempt, device: torch.device) -> Outcome:
    call = _call(work)
    found: list[torch.Tensor] = []
    first = first_call(lambda: found.extend(call()), device)
    results = None if work.ours is None else work.ours(found)
    if implementation.graph:
        if device.type != "cuda":
            raise Unavailable("CUDA graphs need a GPU")
        call = captured(call)
    times = time_call(call, device)
    values = {"ms": times, work.metric: times.rate(work.work / UNITS[work.metric]), "first_s": Spread(*[first] * 3)}
    peak = None if implementation.graph else peak_mb(call, device)
    if peak is not None:
        values["peak_mb"] = Spread(*[peak] * 3)
    settle(device)
    rows = [
        Row(cell.name, implementation.name, cell.shape, cell.dtype, metric, value)
        for metric, value in (values | work.extra).items()
    ]
    return Outcome(rows, results)


def _call(work: Attempt) -> Call:
    """The timed part: the run without gradients, or the backward pass of a run that comes before."""
    if not work.leaves:

        def forward() -> list[torch.Tensor]:
            with torch.no_grad():
                return work.run()

        return forward
    outputs: list[torch.Tensor] = []

    def backward() -> list[torch.Tensor]:
        if not outputs:
            outputs.extend(work.run())
        return list(torch.autograd.grad(outputs, work.leaves, work.grads, retain_graph=True))

    return backward


def _line(message: object) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(message).splitlines() if line.strip()), "no message")
