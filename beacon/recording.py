"""Work of fixed shapes on tensors of fixed addresses: done once, recorded in a CUDA graph, then replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Recorded:
    """A function without arguments that writes where it always writes.

    The first call runs it (kernels are compiled, libraries start up), the second records it, and from then on it is
    replayed. What it returns is overwritten by the next call. Where recording fails it stays an ordinary function.

    Args:
        function: Makes no host decision that may change, and never waits for the device.
        device: Where it computes.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self._function, self._device = function, device
        self._calls = 0
        self._replay: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        """Its result."""
        self._calls += 1
        if self._calls == 2:
            try:
                self._replay = record(self._function, self._device)
            except RuntimeError as err:  # what a library does behind our back may not be recordable
                logger.warning("decoding goes on without a CUDA graph, which could not be recorded: %s", err)
        return self._function() if self._replay is None else self._replay()


def record(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Record a function in a CUDA graph; what is returned replays it and gives its outputs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        outputs = function()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
