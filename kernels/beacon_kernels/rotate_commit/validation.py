"""Checks before a launch: what must hold, what came, what to do. No kernel reads out of bounds after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beacon_kernels.rotate_commit.gather import MAX_POOL, Gather

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SOURCES = 3
MAX_HEAD_DIM = 256


def check(
    k_sources: Sequence[torch.Tensor],
    v_sources: Sequence[torch.Tensor] | None,
    gather: Gather | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_out: torch.Tensor | None,
    v_out: torch.Tensor | None,
    places: torch.Tensor | None,
) -> None:
    """Check tensors against each other and the gather; see :func:`beacon_kernels.rotate_commit.rotate_commit`.

    Raises:
        ValueError: Shapes, dtypes, devices or sizes that do not fit, or results that would overwrite what is read.
        NotImplementedError: Gradients through results that are written in place.
    """
    _check_sources(k_sources, v_sources)
    first = k_sources[0]
    pool = sum(source.shape[0] for source in k_sources)
    if pool > MAX_POOL:
        raise ValueError(f"the sources must have fewer than 2**31 entries, got {pool}; split the pass.")
    if gather is not None and (gather.pool != pool or gather.index.device != first.device):
        raise ValueError(
            f"the gather must be for these {pool} entries on {first.device}, got one for {gather.pool} on "
            f"{gather.index.device}; build it for them, and move it with to()."
        )
    count = pool if gather is None else len(gather)
    _check_tables(cos, sin, count, first)
    sources = [*k_sources, *(v_sources or [])]
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        if k_out is not None:
            raise NotImplementedError(
                "what is written into k_out and v_out has no gradients; leave them out, or call under torch.no_grad()."
            )
        if gather is not None and gather.order is None:
            raise ValueError("the gather was built with gradients=False; build it with gradients=True.")
    rows = count
    if places is not None:
        _check_places(places, k_out, count, first)
        rows = 0 if k_out is None else k_out.shape[0]
    _check_outputs(k_out, v_out, v_sources is not None, (rows, *first.shape[1:]), sources)


def _check_places(places: torch.Tensor, k_out: torch.Tensor | None, count: int, like: torch.Tensor) -> None:
    if k_out is None:
        raise ValueError("places say where rows of k_out are written, got no k_out; give both or neither.")
    wanted = places.dtype in (torch.int32, torch.int64) and list(places.shape) == [count]
    if not wanted or places.device != like.device or (count > 1 and places.stride(0) != 1):
        raise ValueError(
            f"places must be contiguous int32 or int64 of shape [{count}] on {like.device}, got {places.dtype} of "
            f"shape {list(places.shape)} on {places.device}; give every result a row."
        )


def _check_sources(k_sources: Sequence[torch.Tensor], v_sources: Sequence[torch.Tensor] | None) -> None:
    if not 1 <= len(k_sources) <= MAX_SOURCES or len(k_sources) != len(k_sources if v_sources is None else v_sources):
        raise ValueError(
            f"k_sources must be 1 to {MAX_SOURCES} tensors and v_sources as many or None, got {len(k_sources)} and "
            f"{None if v_sources is None else len(v_sources)}; concatenate some."
        )
    first = k_sources[0]
    for name, sources in (("k_sources", k_sources), ("v_sources", v_sources or ())):
        for number, source in enumerate(sources):
            if source.ndim != 3 or source.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"sources must have shape [entries, heads, head_dim] with the same heads and head_dim, got "
                    f"{list(source.shape)} in {name}[{number}] and {list(first.shape)} in k_sources[0]."
                )
            if source.dtype != first.dtype or source.dtype not in DTYPES:
                raise ValueError(
                    f"sources must share one of float32, float16 and bfloat16, got {source.dtype} in {name}[{number}] "
                    f"and {first.dtype} in k_sources[0]; cast them."
                )
            if source.device != first.device:
                raise ValueError(
                    f"sources must be on one device, got {name}[{number}] on {source.device} and k_sources[0] on "
                    f"{first.device}."
                )
            if source.shape[0] != k_sources[number].shape[0]:
                raise ValueError(
                    f"k_sources[{number}] and {name}[{number}] must have as many entries, got "
                    f"{k_sources[number].shape[0]} and {source.shape[0]}."
                )
            if source.stride(2) != 1:
                raise ValueError(
                    f"head_dim must be contiguous, got stride {source.stride(2)} in {name}[{number}]; "
                    "call contiguous()."
                )
    head_dim = first.shape[2]
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be even and in [2, {MAX_HEAD_DIM}], got {head_dim}; rotate in PyTorch.")


def _check_tables(cos: torch.Tensor | None, sin: torch.Tensor | None, count: int, like: torch.Tensor) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must come together, got one of them; give both, or None twice to copy keys.")
    if cos is None or sin is None:
        return
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim not in (2, 3) or table.shape[0] != count or table.shape[1:-1].numel() != 1:
            raise ValueError(
                f"{name} must have shape [m, rotary_dim / 2] or [m, 1, rotary_dim / 2] with m={count}, got "
                f"{list(table.shape)}; take the rows of what is gathered."
            )
        if table.shape[-1] != cos.shape[-1] or not 0 < 2 * table.shape[-1] <= like.shape[2]:
            raise ValueError(
                f"cos and sin must hold rotary_dim / 2 channels, rotary_dim <= head_dim={like.shape[2]}, got "
                f"{table.shape[-1]} in {name}; pass table[..., : rotary_dim // 2] where halves stand twice."
            )
        if table.dtype != cos.dtype or table.dtype not in DTYPES or table.device != like.device:
            raise ValueError(
                f"cos and sin must share one of float32, float16 and bfloat16 on {like.device}, got {name} in "
                f"{table.dtype} on {table.device} and cos in {cos.dtype}."
            )
        if table.shape[-1] > 1 and table.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous along its channels, got stride {table.stride(-1)}; call contiguous()."
            )
        if table.requires_grad:
            raise ValueError(f"{name} must not require gradients: none are computed for it; detach() it.")


def _check_outputs(
    k_out: torch.Tensor | None,
    v_out: torch.Tensor | None,
    has_values: bool,
    shape: tuple[int, ...],
    sources: Sequence[torch.Tensor],
) -> None:
    if (v_out is not None) != (k_out is not None and has_values):
        raise ValueError(
            "v_out must be given exactly when k_out and v_sources are, got "
            f"{'one' if v_out is not None else 'none'}; values go with their keys."
        )
    outputs = [(name, out) for name, out in (("k_out", k_out), ("v_out", v_out)) if out is not None]
    for name, out in outputs:
        if tuple(out.shape) != shape or out.dtype != sources[0].dtype or out.device != sources[0].device:
            raise ValueError(
                f"{name} must be {list(shape)} in {sources[0].dtype} on {sources[0].device}, got {list(out.shape)} in "
                f"{out.dtype} on {out.device}; slice the buffer to what is written."
            )
        if out.stride(2) != 1 or any(n > 1 and step == 0 for n, step in zip(shape, out.stride(), strict=True)):
            raise ValueError(
                f"{name} must be contiguous along head_dim and not expanded, got strides {list(out.stride())}; "
                "allocate it."
            )
        if out.requires_grad:
            raise ValueError(f"{name} is written in place and must not require gradients; detach() it.")
        if any(_same_rows(out, other) for other in [*sources, *(o for n, o in outputs if n != name)]):
            raise ValueError(
                f"{name} must not share entries with a source or the other output: programs run in any order; write "
                "elsewhere, or clone() the source."
            )


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both are slices of one buffer and share entries (other overlaps are the caller's to avoid)."""
    if torch.compiler.is_compiling():  # no addresses yet
        return False
    if a.stride() != b.stride() or not a.numel() or not b.numel():
        return False
    apart = (b.data_ptr() - a.data_ptr()) // a.element_size()
    rows, rest = divmod(apart, a.stride(0)) if a.stride(0) else (0, apart)
    return rest == 0 and -b.shape[0] < rows < a.shape[0]
