"""Kernels compiled for Ampere and Hopper without a GPU: they fit, spill nothing where it counts, use tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from beacon_kernels.testing import KERNELS, SHARED_LIMITS
from beacon_kernels.tiles import ARCHITECTURES, HEAD_DIMS

ROOT = Path(__file__).resolve().parents[2]
OTHERS = 99 * 1024  # bytes of shared memory that sm_86, sm_89 and sm_120 have; sm_80 has 163 KB
MULTIPLY = ("forward", "backward", "decode")  # kernels of matrix products; the others move bytes
CODE = """
import dataclasses, json, sys
from beacon_kernels.testing import compile_kernel
for name, head_dim, dtype, capability, packed, alike in json.loads(sys.argv[1]):
    found = compile_kernel(name, head_dim, dtype, capability, packed=packed, alike=alike)
    print(json.dumps(dataclasses.asdict(found)))
"""


def compiled(specs: list[tuple[str, int, str, int, int, bool]]) -> list[dict[str, Any]]:
    """In a process of its own: the interpreter's switch breaks the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-c", CODE, json.dumps(specs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(found: dict[str, Any]) -> None:
    limit = SHARED_LIMITS[90] if found["capability"] == 90 else OTHERS  # Ampere's tiles serve all others, too
    assert found["shared"] <= limit and found["registers"] <= 255, found
    if found["dtype"] != "fp32":
        if found["kernel"].startswith(MULTIPLY):
            assert found["tensor_cores"] > 0, found
        if found["head_dim"] <= 128:
            assert found["spilled"] == 0, found


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_tile_of_the_table(head_dim: int, dtype: str, capability: int) -> None:
    found = compiled([(name, head_dim, dtype, capability, 1, True) for name in KERNELS])
    assert [one["kernel"] for one in found] == list(KERNELS)
    for one in found:
        check(one)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_heads_that_share_a_tile_and_stores_of_different_strides(capability: int) -> None:
    for one in compiled([(name, 128, "bf16", capability, 4, False) for name in KERNELS]):
        check(one)
