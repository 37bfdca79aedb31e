"""Kernels compiled for Ampere and Hopper without a GPU: they fit, spill nothing where it counts, use tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from beacon_kernels.testing import SHARED_LIMITS
from beacon_kernels.tiles import ARCHITECTURES, HEAD_DIMS

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import dataclasses, json, sys
from beacon_kernels.testing import compile_kernel
name, head_dim, dtype, capability, packed = sys.argv[1:]
found = compile_kernel(name, int(head_dim), dtype, int(capability), packed=int(packed))
print(json.dumps(dataclasses.asdict(found)))
"""


def compiled(name: str, head_dim: int, dtype: str, capability: int, packed: int = 1) -> dict[str, int]:
    """In a process of its own: the interpreter's switch breaks the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-c", CODE, name, str(head_dim), dtype, str(capability), str(packed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, int], head_dim: int, dtype: str, capability: int) -> None:
    assert found["shared"] <= SHARED_LIMITS[capability] and found["registers"] <= 255
    if dtype != "fp32":
        assert found["tensor_cores"] > 0
        if head_dim <= 128:
            assert found["spilled"] == 0, found


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_headline_kernel(capability: int) -> None:
    check(compiled("forward", 128, "bf16", capability), 128, "bf16", capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("packed", [1, 4])
def test_every_tile_of_the_table(head_dim: int, dtype: str, capability: int, packed: int) -> None:
    check(compiled("forward", head_dim, dtype, capability, packed), head_dim, dtype, capability)
