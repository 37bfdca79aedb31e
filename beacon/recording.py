"""Work of fixed shapes on tensors of fixed addresses: done once, recorded in a CUDA graph, then replayed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

_one_at_a_time = threading.Lock()


class Recorder:
    """Records what one cache does again and again. Its graphs share their scratch memory, so they must not overlap.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, which makes no host decision that may change and never waits for the device.

        The first call runs it (kernels are compiled, libraries start up), the second records it, and from then on it
        is replayed. What it returns is overwritten by the next call. Where recording fails it stays as it is.
        """
        calls = 0
        replay: Callable[[], Any] | None = None

        def call() -> Any:
            nonlocal calls, replay
            calls += 1
            if calls == 2:
                try:
                    replay = record(function, self.device, self.pool)
                except RuntimeError as err:  # what a library does behind our back may not be recordable
                    logger.warning("decoding goes on without a CUDA graph, which could not be recorded: %s", err)
            return function() if replay is None else replay()

        return call

    def pool(self) -> Any:
        """The handle of the graphs' scratch memory."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def record(function: Callable[[], Any], device: torch.device, pool: Callable[[], Any]) -> Callable[[], Any]:
    """Record a function in a CUDA graph; what is returned replays it and gives its outputs.

    On a stream of its own, for PyTorch's is on one device for good; other threads may go on meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream(device)
    with _one_at_a_time, torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool(), stream=stream, capture_error_mode="thread_local"):
                outputs = function()
        finally:  # PyTorch stays on the other stream if recording fails
            torch.cuda.set_stream(before)

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
