"""Checkpoints are whole or not there, whatever interrupts their writing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from beacon.training.checkpoints import STAGING, check_facts, last_checkpoint, read_facts, written_whole

FACTS = {"processes": 2, "seed": 0}


def write(output: Path, step: int, *, fail: Exception | None = None) -> None:
    with written_whole(output, step, FACTS, writes=True, wait=lambda: None) as staging:
        folder = staging / f"checkpoint-{step}"
        (folder / "rng").mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * step)
        (folder / "rng" / "0").write_text("state")
        if fail is not None:
            raise fail


def test_a_checkpoint_appears_when_it_is_complete(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    write(tmp_path, 9)
    write(tmp_path, 10)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert read_facts(tmp_path / "checkpoint-10")["step"] == 10
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),  # of torch.save
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, error: Exception) -> None:
    write(tmp_path, 3)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be written .* the last complete one is .*checkpoint-3"):
        write(tmp_path, 6, fail=error)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        write(tmp_path, 6, fail=RuntimeError("a bug"))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_has_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / STAGING / "checkpoint-4").mkdir(parents=True)
    (tmp_path / STAGING / "checkpoint-4" / "half").write_text("x")
    assert last_checkpoint(tmp_path) is None
    write(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 5)
    write(tmp_path, 8)
    (tmp_path / "checkpoint-8" / "weights").write_bytes(b"x")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert "weights has 1 bytes instead of 8" in caplog.text
    with pytest.raises(ValueError, match=r"is damaged \(weights has 1 bytes.*resume from .*checkpoint-5"):
        read_facts(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "weights").unlink()
    with pytest.raises(ValueError, match="weights has no bytes instead of 8"):
        read_facts(tmp_path / "checkpoint-8")


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 5)
    check_facts(tmp_path / "checkpoint-5", FACTS)
    with pytest.raises(ValueError, match=r"was written with processes 2 \(now 4\); go on with the same"):
        check_facts(tmp_path / "checkpoint-5", {**FACTS, "processes": 4})
    with pytest.raises(FileNotFoundError, match="is no complete checkpoint"):
        check_facts(tmp_path / "elsewhere", FACTS)


def test_only_one_process_renames(tmp_path: Path) -> None:
    (tmp_path / STAGING / "checkpoint-2").mkdir(parents=True)
    waits: list[int] = []
    with written_whole(tmp_path, 2, FACTS, writes=False, wait=lambda: waits.append(1)) as staging:
        assert staging == tmp_path / STAGING
    assert len(waits) == 3 and (tmp_path / STAGING / "checkpoint-2").is_dir()
