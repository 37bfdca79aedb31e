"""Checkpoints that are whole or not there: written aside, listed, renamed; checked before a run goes on from one."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

MANIFEST = "beacon_checkpoint.json"
STAGING = ".checkpoint.partial"
TORCH_WRITES = ("PytorchStreamWriter", "inline_container")  # in what torch.save says of a full disk
PATTERN = re.compile(r"checkpoint-(\d+)")


@contextmanager
def written_whole(
    output: Path, step: int, facts: dict[str, Any], *, writes: bool, wait: Any, parts: Sequence[str] = ()
) -> Iterator[Path]:
    """A folder to write ``checkpoint-<step>`` into; it takes its place once it is complete.

    Args:
        output: Folder of the run.
        step: Number of the step.
        facts: What a resumed run has to agree with (see :func:`check_facts`).
        writes: Whether this process is the one that renames.
        wait: Called where every process has to have come as far.
        parts: Files that must be there in the end, one of every process for example.

    Yields:
        The folder that stands for ``output`` meanwhile: the checkpoint is written to ``checkpoint-<step>`` in it.

    Raises:
        OSError: It could not be written (a full disk); earlier checkpoints are as they were.
    """
    staging = output / STAGING
    if writes:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
    wait()
    name = f"checkpoint-{step}"
    try:
        yield staging
        wait()
        if writes:
            missing = [part for part in parts if not (staging / name / part).is_file()]
            if missing:
                raise OSError(f"{', '.join(missing)} is not there: all processes must see the folder under this path")
            _list_files(staging / name, {"step": step, **facts})
            shutil.rmtree(output / name, ignore_errors=True)
            (staging / name).rename(output / name)
    except BaseException as err:
        if not _failed_to_write(err):
            raise
        left = last_checkpoint(output)
        kept = f"the last complete one is {left}" if left else "there is none before it"
        raise OSError(f"{name} could not be written to {output} ({err}); {kept}. Free some space and resume.") from err
    finally:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
    wait()


def _failed_to_write(err: BaseException) -> bool:
    """Whether an error is one of writing; every library has its own for a full disk."""
    if isinstance(err, RuntimeError):
        return any(word in str(err) for word in TORCH_WRITES)
    return isinstance(err, (OSError, SafetensorError)) or type(err).__name__ == "CheckpointException"  # of sharded ones


def abandon_after(output: Path, step: int) -> None:
    """Rename checkpoints of later steps, for a run goes on from an earlier one and writes its own."""
    for path in sorted(output.glob("checkpoint-*")):
        match = PATTERN.fullmatch(path.name)
        if match and int(match[1]) > step:
            aside = output / f"abandoned-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("%s belongs to what came after step %d before; it is now %s", path, step, aside.name)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = {int(match[1]): path for path in output.glob("checkpoint-*") if (match := PATTERN.fullmatch(path.name))}
    for step in sorted(found, reverse=True):
        damage = _damage(found[step])
        if damage is None:
            return found[step]
        logger.warning("%s is not complete (%s) and is passed over", found[step], damage)
    return None


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What :func:`written_whole` noted about a checkpoint.

    Raises:
        FileNotFoundError: It is no checkpoint of this trainer.
        ValueError: A file is missing or cut off.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{checkpoint} is no complete checkpoint (it has no {MANIFEST}); name a folder checkpoint-<step> that "
            "beacon train wrote."
        )
    damage = _damage(checkpoint)
    if damage is not None:
        other = last_checkpoint(checkpoint.parent)
        raise ValueError(f"{checkpoint} is damaged ({damage}); resume from {other or 'another one'}.")
    facts: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    return facts


def check_facts(checkpoint: Path, mine: dict[str, Any]) -> None:
    """Refuse to go on under settings that would change what the run is.

    Args:
        checkpoint: Where to go on from.
        mine: This run's facts, by the names of the settings.

    Raises:
        ValueError: Names what differs.
    """
    theirs = read_facts(checkpoint)
    wrong = [f"{name} {theirs[name]} (now {value})" for name, value in mine.items() if theirs.get(name, value) != value]
    if wrong:
        raise ValueError(
            f"{checkpoint} was written with {', '.join(wrong)}; go on with the same settings and as many processes, or "
            f"begin a new run from its weights (model.adapter: {checkpoint})."
        )


def _list_files(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest, last: names and sizes of all files beside the facts."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2))


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as err:
        return f"no readable {MANIFEST}: {err}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} has {path.stat().st_size if path.is_file() else 'no'} bytes instead of {size}"
    return None
