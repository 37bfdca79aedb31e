"""The processes that `accelerate launch` (or torchrun) starts, which share the work of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

PATIENCE = timedelta(days=30)  # one process may have the long texts


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is.

    Args:
        rank: Its number.
        count: How many there are.
        wait: Returns when all have come to it.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether it does what is done once."""
        return self.rank == 0


def processes() -> Processes:
    """Join the other processes, if this one was started as one of several.

    Raises:
        ImportError: It was, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError as err:
        raise ImportError(
            "several processes need accelerate, got no such module; pip install 'activation-beacon[eval]'."
        ) from err
    # Only short notes go from process to process, so these meet on the CPU even where models are on GPUs.
    state = PartialState(cpu=True, timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)
