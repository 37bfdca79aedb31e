"""Compile kernels ahead of time for GPUs that are not here, and read what they cost on the chip.

Not in a process that has TRITON_INTERPRET set: the compiler needs Triton's own functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from beacon_kernels.tiles import TABLES, Tile, tile_for

ITEMSIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
UNTILED = Tile(1, 1, 4, 1)  # of kernels that derive their blocks from head_dim
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may use


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a chip.

    Args:
        kernel: Its name.
        head_dim: Channels per head.
        dtype: ``fp16``, ``bf16`` or ``fp32``.
        capability: 80 or 90.
        registers: Per thread.
        spilled: Bytes of stack and local memory per thread.
        shared: Bytes of shared memory per block.
        tensor_cores: Instructions that use them (``mma.sync`` or ``wgmma``).
    """

    kernel: str
    head_dim: int
    dtype: str
    capability: int
    registers: int
    spilled: int
    shared: int
    tensor_cores: int


def compile_kernel(
    name: str, head_dim: int, dtype: str, capability: int, *, group: int = 4, packed: int = 1, alike: bool = True
) -> Compiled:
    """Compile a kernel with its tile from the table.

    Args:
        name: A key of ``KERNELS``.
        head_dim: Channels per head.
        dtype: ``fp16``, ``bf16`` or ``fp32``.
        capability: 80 or 90.
        group: Heads per kv_head.
        packed: Heads that share a tile.
        alike: Whether all stores have the same, small strides.
    """
    tile = tile_of(name, head_dim, dtype, capability)
    kernel, constants, pointers = KERNELS[name](tile, head_dim, group, packed, int(alike))
    signature: dict[str, str] = {}
    for parameter in kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.name.endswith("_ptr"):
            signature[parameter.name] = pointers.get(parameter.name, f"*{dtype}")
        else:
            signature[parameter.name] = "fp32" if parameter.name.startswith("scale") else "i32"
    return _compile(kernel, signature, constants, tile, (name, head_dim, dtype, capability))


def tile_of(name: str, head_dim: int, dtype: str, capability: int) -> Tile:
    """The tile that :func:`compile_kernel` takes."""
    return tile_for(name, head_dim, ITEMSIZES[dtype], capability) if name in TABLES else UNTILED


# What a kernel is compiled with: the function, its compile-time constants, and pointers that are not to q's dtype.
Source: TypeAlias = tuple[Any, dict[str, int], dict[str, str]]
INDICES = {
    **dict.fromkeys(("runs_ptr", "tiles_ptr", "key_runs_ptr"), "*i32"),
    **dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr"), "*fp32"),
}


def _forward(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.beacon_attention.forward import constants, forward_kernel

    return forward_kernel, {"PACKED": packed, "SAME": alike, **constants(tile, head_dim, group)}, INDICES


def _delta(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.beacon_attention.backward import DELTA_TILE, delta_kernel
    from beacon_kernels.beacon_attention.forward import constants

    return delta_kernel, constants(DELTA_TILE, head_dim, group), INDICES


def _dq(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.beacon_attention.backward import dq_kernel
    from beacon_kernels.beacon_attention.forward import constants

    return dq_kernel, {"PACKED": packed, "SAME": alike, **constants(tile, head_dim, group)}, INDICES


def _dkv(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.beacon_attention.backward_dkv import dkv_kernel
    from beacon_kernels.beacon_attention.forward import constants

    return dkv_kernel, {"SPLITS": 1, "NEAR": alike, **constants(tile, head_dim, group)}, INDICES


def _decode(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.beacon_attention.decode import decode_constants, decode_kernel

    constants = decode_constants(tile, head_dim, group, seqlen_q=1)
    return decode_kernel, constants, {"runs_ptr": "*i32", "out_ptr": "*fp32", "lse_ptr": "*fp32"}


def _combine(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.beacon_attention.decode import combine_constants, combine_kernel

    return combine_kernel, combine_constants(head_dim), {"out_i_ptr": "*fp32", "lse_i_ptr": "*fp32", "lse_ptr": "*fp32"}


def _rotate_commit(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.rotate_commit.forward import rotate_commit_kernel, widths

    switches = {"SOURCES": 3, "HAS_INDEX": True, "HAS_PLACES": True, "HAS_V": True}
    pointers = {"index_ptr": "*i32", "places_ptr": "*i64", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    return rotate_commit_kernel, {**switches, **widths(head_dim, head_dim // 2)}, pointers


def _rotate_commit_backward(tile: Tile, head_dim: int, group: int, packed: int, alike: int) -> Source:
    from beacon_kernels.rotate_commit.backward import backward_kernel

    _, constants, pointers = _rotate_commit(tile, head_dim, group, packed, alike)
    del constants["HAS_PLACES"]
    return backward_kernel, constants, {"offsets_ptr": "*i32", "order_ptr": "*i32", **pointers}


KERNELS: dict[str, Callable[[Tile, int, int, int, int], Source]] = {
    "forward": _forward,
    "forward_middle": _forward,
    "forward_narrow": _forward,
    "delta": _delta,
    "backward_dq": _dq,
    "backward_dq_middle": _dq,
    "backward_dq_narrow": _dq,
    "backward_dkv": _dkv,
    "decode": _decode,
    "combine": _combine,
    "rotate_commit": _rotate_commit,
    "rotate_commit_backward": _rotate_commit_backward,
}


def _compile(kernel: Any, signature: dict[str, str], constants: dict[str, int], tile: Any, key: Any) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    names = list(signature)
    divisible = {(i,): aligned for i, n in enumerate(names) if n.endswith("_ptr") or n.startswith("stride_")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, divisible)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", key[3], 32), options=options)
    registers, stack, local = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    cores = ptx.count("mma.sync") + ptx.count("wgmma.mma_async")
    shared: int = compiled.metadata.shared
    return Compiled(key[0], key[1], key[2], key[3], registers, stack + local, shared, cores)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory per thread, as the bundled cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {report[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local
