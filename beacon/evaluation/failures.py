"""Why a method did not read an item, and what is told of an exception."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch


class CannotRun(Exception):
    """A method cannot read an item, for a reason that is a result of its own (a text too long for it, no memory)."""


class NotAvailable(CannotRun):
    """It cannot here and now (no network, no memory left by others): tried again when the run goes on."""


def out_of_memory(err: Exception) -> bool:
    """Whether memory ran out; on the CPU PyTorch tells by a RuntimeError, another process in words."""
    said = str(err)
    told = "DefaultCPUAllocator" in said or said.startswith("kvpress: out of memory")
    return told or isinstance(err, (torch.OutOfMemoryError, MemoryError))


def may_pass(err: Exception) -> bool:
    """Whether it may be otherwise another time: what was asked is tried again when the run goes on."""
    return isinstance(err, NotAvailable) or out_of_memory(err)


def free_memory() -> None:
    """Give back what PyTorch keeps for later; outside of the handler, whose traceback holds on to tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def where(err: BaseException) -> str:
    """The line that raised it, as ``file.py:12``."""
    frames = traceback.extract_tb(err.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


def one_line(err: BaseException) -> str:
    """A message in one line, without pages of details."""
    text = " ".join(str(err).split())
    return text if len(text) <= 500 else text[:497] + "..."
