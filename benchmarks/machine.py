"""What every result is stamped with: the machine, its software and the code that ran."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "beacon_kernels"
REHEARSAL = "cpu-interpreter"  # the machine of a dry run: its figures say nothing about speed
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Stamp:
    """Where and with what a result was taken.

    Args:
        machine: Name of the GPU, or ``REHEARSAL``.
        driver: Version of its driver.
        torch: Version of PyTorch.
        triton: Version of Triton.
        commit: Commit of the tree.
        dirty: Whether tracked files other than results differ from it: ``yes``, ``no`` or ``unknown``.
        kernels: Fingerprint of the kernels' source, the same wherever the tree lies.
    """

    machine: str
    driver: str
    torch: str
    triton: str
    commit: str
    dirty: str
    kernels: str


def stamp(device: torch.device, commit: str | None = None) -> Stamp:
    """Ask the machine.

    Args:
        device: Where kernels run.
        commit: What to write where the tree comes without its history.
    """
    on_gpu = device.type == "cuda"
    found = _run("git", "rev-parse", "HEAD")
    changes = _run("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return Stamp(
        machine=torch.cuda.get_device_name(device) if on_gpu else REHEARSAL,
        driver=_driver() if on_gpu else "none",
        torch=torch.__version__,
        triton=triton.__version__,
        commit=(found or commit or UNKNOWN)[:12],
        dirty=UNKNOWN if found is None or changes is None else "yes" if changes else "no",
        kernels=fingerprint(),
    )


def named_stamp(device: torch.device, commit: str | None = None) -> Stamp:
    """The stamp of a run in which nothing is interpreted: a CPU counts under its own name."""
    mark = stamp(device, commit)
    if device.type == "cuda":
        return mark
    return dataclasses.replace(mark, machine=f"{_cpu_name()}, {torch.get_num_threads()} threads")


def slug(machine: str) -> str:
    """The machine's name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def fingerprint() -> str:
    """Twelve hexadecimal digits that change with any source file of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(path.relative_to(KERNELS).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _driver() -> str:
    found = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else UNKNOWN


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _run(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
