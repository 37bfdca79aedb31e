"""Results as JSON files that grow row by row, stamped with the machine: an evaluation goes on where it was stopped."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

COMMAND = "python examples/reproduce_100x/reproduce.py"


class Record:
    """One result file: what it is, the command, the machine, the settings, and rows.

    Args:
        file: Where it lies. Rows that are there are kept if the settings are the same, else they go.
        what: One line that says what the rows are.
        settings: What the rows depend on beside their own columns.
        command: The command that makes it.
    """

    def __init__(self, file: Path, what: str, settings: dict[str, Any], command: str = COMMAND) -> None:
        self.file = file
        self.content = {"what": what, "command": command, "machine": machine(), "settings": settings, "rows": []}
        if file.exists():
            old = json.loads(file.read_text())
            if old["settings"] == json.loads(json.dumps(settings)):
                self.content["rows"] = old["rows"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def has(self, **columns: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in columns.items()) for row in self.rows)

    def add(self, **columns: Any) -> None:
        """Add a row and write the file whole."""
        self.rows.append(columns)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".new")
        head = {name: value for name, value in self.content.items() if name != "rows"}
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        fresh.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]}}\n')
        os.replace(fresh, self.file)


def machine() -> dict[str, str]:
    """What computes: processor or GPU, versions, commit."""
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "unknown CPU"
