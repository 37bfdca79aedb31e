"""The public function of decoding: checks, how many splits, then the named implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beacon_kernels.beacon_attention.autograd import decoding
from beacon_kernels.beacon_attention.reference import reference
from beacon_kernels.beacon_attention.schedule import SMS
from beacon_kernels.beacon_attention.validation import check_decode, check_scale
from beacon_kernels.dispatch import IMPLEMENTATIONS, check_device, launches_directly

WAVES = 2  # programs per multiprocessor
KEYS_PER_SPLIT = 128  # fewer are not worth a program and a row of scratch


def beacon_decode(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    runs: torch.Tensor,
    *,
    seqlen_q: int = 1,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    impl: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to one contiguous run of every store per query, for few queries per row and no gradients.

    The host never reads runs: a CUDA graph of this call replays while they change. For two rows of capacity 4 that hold
    3 and 1 entries, in one store of 8 and with one query each, ``runs = [[[0, 4], [3, 5]]]``:

        row 0    1 1 1 . . . . .
        row 1    . . . . 1 . . .

    Args:
        q: ``[n, heads, head_dim]``, float32, float16 or bfloat16; any strides but in head_dim. n is rows times
            seqlen_q, row after row.
        keys: Up to four stores ``[m, kv_heads, head_dim]``; a cache ``[rows, capacity, kv_heads, head_dim]`` is one
            store, viewed as ``[rows * capacity, kv_heads, head_dim]``.
        values: Likewise.
        runs: int32 ``[stores, 2, n]`` on the device of q: query i sees entries ``[runs[s, 0, i], runs[s, 1, i])`` of
            store s, as far as they exist.
        seqlen_q: Queries per row. The programs of a row read every key that one of them sees.
        softmax_scale: Factor of the logits, positive; None for ``head_dim ** -0.5``.
        num_splits: Programs that share the keys of a row and kv_head; None chooses by shapes and GPU. The same number
            gives the same result bit by bit.
        impl: ``triton`` or ``reference`` (one dense mask); an explicit choice never falls back.

    Returns:
        ``out [n, heads, head_dim]`` and ``lse [heads, n]`` (natural logarithm, float32). A query that sees nothing gets
        0 and minus infinity.

    Raises:
        NotImplementedError: Gradients.
        ValueError: Arguments that do not fit each other, no tile for this head_dim or GPU, or CPU tensors for compiled
            kernels.

    Source: arXiv 2401.03462, section 3.2; splitting keys over programs is Flash-Decoding's.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    check_decode(q, keys, values, runs, seqlen_q, num_splits)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, *keys, *values)):
        raise NotImplementedError(
            "beacon_decode computes no gradients, got tensors that require them; use beacon_attention, or "
            "torch.no_grad()."
        )
    scale = check_scale(q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    if impl == "reference":
        return reference(q, keys, values, runs.long(), scale)
    check_device(q)
    if num_splits is None:
        num_splits = _splits(q.shape[0] // seqlen_q, keys, q.device)
    if launches_directly(q, *keys, *values, runs):
        from beacon_kernels.beacon_attention.decode import decode

        return decode(q, list(keys), list(values), runs, seqlen_q, scale, num_splits)
    found: tuple[torch.Tensor, torch.Tensor] = decoding(q, list(keys), list(values), runs, seqlen_q, scale, num_splits)
    return found


def _splits(rows: int, keys: Sequence[torch.Tensor], device: torch.device) -> int:
    """As many as fill the GPU, none of which gets too few keys when every row fills its part of the stores."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS
    rows = max(rows, 1)
    capacity = sum(len(k) for k in keys) // rows
    return max(1, min(WAVES * sms // (rows * keys[0].shape[1]), capacity // KEYS_PER_SPLIT))
