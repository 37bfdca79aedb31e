"""What results are stamped with: the model, the machine, its software and the code that ran."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import beacon

PACKAGES = ("torch", "transformers", "triton", "lm_eval")
SAMPLES = 64  # numbers of each weight in a fingerprint
BLOCK = 1 << 16  # bytes of a large file that are looked at in three places
PROBE = "  The pass key is 48213;\n\tdef naïve(x): return x  # 世界 🙂 it's\n"


def stamp() -> dict[str, Any]:
    """Time, versions (None where a package is missing), commit and machine; JSON values.

    ``commit`` and ``dirty`` (whether files differ from it, those that git does not know included) are None where the
    code does not run from a repository.
    """
    versions = {"python": platform.python_version(), "activation-beacon": beacon.__version__}
    commit, dirty = _commit()
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "commit": commit,
        "dirty": dirty,
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "gpus": torch.cuda.device_count(),
        },
    }


def model_fingerprint(model: Any) -> str:
    """Twelve hexadecimal digits that change with names, shapes and (samples of) values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if flat.numel() and flat.device.type != "meta":  # where accelerate has offloaded it, its name must do
            places = torch.arange(SAMPLES, device=flat.device) * (flat.numel() - 1) // (SAMPLES - 1)
            digest.update(flat[places].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str | None] | None:
    """What changes with a tokenizer: with its tokens or how it cuts and frames a text, and with its chat template."""
    if tokenizer is None:
        return None
    specials = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    known = [sorted(tokenizer.get_vocab().items()), specials, tokenizer(PROBE)["input_ids"]]
    return {"tokens": _digest(known), "chat_template": _digest(template) if template else None}


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that change with names, sizes and contents (of large files, samples) of files.

    Args:
        paths: Files, or folders with all that is in them but for hidden files. Where they are does not count.
    """
    digest = hashlib.sha256()
    for root in paths:
        for file in [root] if root.is_file() else sorted(root.rglob("*")):
            inner = file.relative_to(root)
            if file.is_file() and not any(part.startswith(".") for part in inner.parts):
                size = file.stat().st_size
                digest.update(json.dumps([root.name, inner.as_posix(), size]).encode())
                with file.open("rb") as opened:
                    for place in [0] if size <= 3 * BLOCK else [0, (size - BLOCK) // 2, size - BLOCK]:
                        opened.seek(place)
                        digest.update(opened.read(3 * BLOCK if size <= 3 * BLOCK else BLOCK))
    return digest.hexdigest()[:12]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, "") or platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    here = Path(beacon.__file__).parent
    if _git(here, "ls-files", "--error-unmatch", "__init__.py") is None:  # installed into somebody else's repository
        return None, None
    changes = _git(here, "status", "--porcelain")
    return _git(here, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, or it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
