"""The environment that kvpress runs in: it needs an older transformers than this package, so one of its own.

It is built once, from the package index that pip is configured for, and kept in the user's cache folder. What the
running environment has, PyTorch first of all, is shared with it: both compute with the same build, and nothing large
is fetched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from beacon.evaluation.failures import NotAvailable

logger = logging.getLogger(__name__)

VERSION = "0.5.5"
REQUIREMENTS = (f"kvpress=={VERSION}", "transformers==5.2.0")  # the pair that the worker is tested with
RECORD = "environment.json"
LINES = 3  # of what a failed command said
TRY = "import json, kvpress, torch, transformers as t; print(json.dumps([torch.__version__, t.__version__]))"

_failures: dict[Path, str] = {}  # folders that could not be built in this process, and why: nobody waits twice


def interpreter(folder: Path | None = None) -> Path:
    """The interpreter of the environment, which is built if it is not there.

    Args:
        folder: Where the environment is or will be; None: in the user's cache folder.

    Raises:
        NotAvailable: It cannot be built (most often for want of a network), and why.
    """
    folder = cache_folder() / f"kvpress-{VERSION}" if folder is None else folder
    if _record(folder) == _wanted():
        return _python(folder)
    if folder not in _failures:
        try:
            _build(folder)
            return _python(folder)
        except (OSError, subprocess.CalledProcessError) as err:
            _failures[folder] = _reason(err)
    raise NotAvailable(
        f"kvpress {VERSION} needs an environment of its own, which cannot be built in {folder}: {_failures[folder]}; "
        "run this once where pip reaches a package index, or name an interpreter that has kvpress (python=PATH)."
    )


def cache_folder() -> Path:
    """Where this package keeps what it has made on this machine."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "activation-beacon"


def _build(folder: Path) -> None:
    """Make the environment beside its place, try it, and move it there: it is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.warning("building an environment for kvpress %s in %s (once; some 230 MB on disk)", VERSION, folder)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _call([sys.executable, "-m", "venv", str(part)])
        own = Path(sysconfig.get_path("purelib", "venv", {"base": str(part)}))
        (own / "shared.pth").write_text(f"{_site()}\n")  # comes after its own packages
        pip = [str(_python(part)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        _call([*pip, f"torch=={torch.__version__}", *REQUIREMENTS])  # there already, and must stay
        _call([str(_python(part)), "-I", "-c", TRY])
        (part / RECORD).write_text(json.dumps(_wanted()))
        if _record(folder) != _wanted():  # no other process was faster
            shutil.rmtree(folder, ignore_errors=True)  # one of another PyTorch or Python
            with contextlib.suppress(OSError):
                part.rename(folder)
        if _record(folder) != _wanted():
            raise OSError(f"{folder} cannot be replaced")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _call(command: list[str]) -> None:
    """Run a command in the user's environment, without what would lead Python to the packages of the running one."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run(command, env=env, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _reason(err: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(err, OSError):
        return str(err)
    said = [line.strip() for line in f"{err.stdout}\n{err.stderr}".splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")] or said
    return " ".join(errors[-LINES:]) or f"{' '.join(err.cmd[:4])} ended with {err.returncode}"


def _record(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None


def _wanted() -> dict[str, Any]:
    """What an environment must have been built for to be used."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {"requirements": list(REQUIREMENTS), "python": python, "torch": torch.__version__, "shared": str(_site())}


def _site() -> Path:
    """The folder of packages that PyTorch was imported from."""
    return Path(torch.__file__).resolve().parents[1]


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
