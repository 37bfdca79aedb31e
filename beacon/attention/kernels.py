"""This project's Triton kernels (`beacon_kernels`): attention, decoding, and rotation fused with gathering.

Raw tokens and beacons are two lists of queries. Each sees one run of four stores: memory of earlier calls, memory that
this pass commits, raw slots, beacon slots. Of one row no store is copied; of several, their memories of earlier calls
are packed into one store per layer and pass. A few new tokens per row without gradients take the decoding kernel,
whose programs share the keys of a row. Work lists are made on the CPU once per pass and serve all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from beacon.attention.inputs import AttentionInputs, Entries, Outputs, Rotation, Table
from beacon.plan import Plan, Queries, upload
from beacon_kernels.beacon_attention import Schedule, beacon_attention, beacon_decode, schedule_for
from beacon_kernels.rotate_commit import Gather, build_gather, rotate_commit

DECODED = 16  # new tokens per row up to which keys are split over programs
KINDS = ("raw_slots", "beacon_slots", "commits")


def attend(inputs: AttentionInputs, plan: Plan) -> Outputs:
    """Condensed attention of all raw and beacon queries.

    Returns:
        Outputs ``[n_raw, heads, head_dim]`` and ``[n_beacon, heads, head_dim]`` (None if not asked for).

    Raises:
        ValueError: A dtype, head_dim or GPU that the kernels have no tile for.
    """
    keys, values, sizes = _stores(inputs, plan)
    queries = [inputs.raw_q] if inputs.beacon_q is None else [inputs.raw_q, inputs.beacon_q]
    alike = _alike([*queries, *keys, *values])
    (raw_q, *beacon_q), stores = alike[: len(queries)], alike[len(queries) :]
    call = _Call(inputs, plan.host, stores[: len(keys)], stores[len(keys) :], sizes)
    count = 0 if inputs.records else _once(inputs.memo, "decoded", lambda: decoded(plan.host))
    raw = call.decode(raw_q, count) if count else call.attend(raw_q, "raw")
    return raw, call.attend(beacon_q[0], "beacon") if beacon_q else None


def decoded(plan: Plan) -> int:
    """New tokens per row, where these are few and as many in every row that has any; else 0."""
    counts = [0] * plan.rows
    for block in plan.blocks:
        counts[block.step.row] += block.raw_queries.stop - block.raw_queries.start
    found = {count for count in counts if count}
    return found.pop() if len(found) == 1 and max(found) <= DECODED else 0


def query_runs(queries: Queries, old: list[int], new: list[int]) -> torch.Tensor:
    """What each query sees of the four stores, half-open: int64 ``[4, 2, n]``.

    Args:
        queries: One list of a plan, on the CPU.
        old: Memory entries of earlier passes per row, packed in store 0.
        new: Memory entries of this pass per row, packed in store 1.
    """
    old_at, new_at = (torch.tensor([0, *sizes]).cumsum(0)[:-1][queries.row] for sizes in (old, new))
    in_old = torch.minimum(queries.memory, torch.tensor(old)[queries.row])
    return torch.stack(
        [
            torch.stack([old_at, old_at + in_old]),
            torch.stack([new_at, new_at + queries.memory - in_old]),
            torch.stack([queries.raw_lo, queries.raw_hi]),
            torch.stack([queries.beacon_lo, queries.beacon_hi]),
        ]
    )


def rotate_queries(q: torch.Tensor, table: Table) -> torch.Tensor:
    """Rotate ``[n, heads, head_dim]``."""
    return rotate_commit([q], None, None, *_halves(table))[0] if len(q) else q


def rotate_keys(sources: list[torch.Tensor], plan: Plan, table: Table, memo: dict[Any, Any]) -> list[torch.Tensor]:
    """Gather raw slots, beacon slots and commits from the pool and rotate them, in one launch."""
    gradients = torch.is_grad_enabled() and any(source.requires_grad for source in sources)

    def gather() -> Gather:
        index = torch.cat([getattr(plan.host, kind).pool for kind in KINDS])
        return build_gather(index, sum(map(len, sources)), gradients=gradients).to(sources[0].device)

    sources = _alike(sources)
    k, _ = rotate_commit(sources, None, _once(memo, ("gather", gradients), gather), *_halves(table))
    return list(k.split([len(getattr(plan, kind)) for kind in KINDS]))


def write(entries: Entries, table: Table, slots: Entries, places: torch.Tensor) -> None:
    """Rotate keys and write them and their values into slots, in one launch."""
    (k, v), (k_out, v_out) = entries, slots
    rotate_commit([k], [v], None, *_halves(table), k_out=k_out, v_out=v_out, places=places)


ROTATION = Rotation(rotate_queries, rotate_keys, write)


@dataclass(frozen=True)
class _Call:
    """Stores of one layer, and the work lists that all layers share."""

    inputs: AttentionInputs
    plan: Plan
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    sizes: tuple[list[int], list[int]]

    def attend(self, q: torch.Tensor, which: str) -> torch.Tensor:
        """Raw tokens or beacons, with gradients where they are recorded."""
        if not len(q):
            return q
        records = self.inputs.records

        def build() -> Schedule:
            blocks = [getattr(block, f"{which}_queries") for block in self.plan.blocks]
            return schedule_for(
                query_runs(getattr(self.plan, which), *self.sizes),
                [len(k) for k in self.keys],
                [block.start for block in blocks if block.stop > block.start],
                heads=q.shape[1],
                kv_heads=self.keys[0].shape[1],
                head_dim=q.shape[2],
                dtype=q.dtype,
                device=q.device,
                gradients=records,
            )

        schedule = _once(self.inputs.memo, (which, records, q.dtype), build)
        return beacon_attention(q, self.keys, self.values, schedule, softmax_scale=self.inputs.scale)[0]

    def decode(self, q: torch.Tensor, count: int) -> torch.Tensor:
        """``count`` raw tokens per row, without gradients."""

        def build() -> torch.Tensor:
            return upload([query_runs(self.plan.raw, *self.sizes).int()], q.device)[0]

        runs = _once(self.inputs.memo, "runs", build)
        return beacon_decode(q, self.keys, self.values, runs, seqlen_q=count, softmax_scale=self.inputs.scale)[0]


def _alike(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors in one dtype: autocast's, or the one that holds all of them.

    Copies of those made in inference mode where gradients are recorded: autograd does not save them.
    """
    device = tensors[0].device.type
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device) and any(tensor.dtype != dtype for tensor in tensors):
        dtype = torch.get_autocast_dtype(device)
    tensors = [tensor.to(dtype) for tensor in tensors]
    if torch.is_grad_enabled():
        tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]
    return tensors


def _stores(
    inputs: AttentionInputs, plan: Plan
) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[list[int], list[int]]]:
    """Keys and values of the four stores, and the memory entries of every row in the first two."""
    parts = inputs.parts
    if parts is None:
        old_k, old_v = inputs.memory_k, inputs.memory_v
        new_k, new_v, new = inputs.raw_k[:0], inputs.raw_v[:0], [0] * plan.rows
    else:
        old_k, old_v, new_k, new_v, new = parts.old_k, parts.old_v, parts.new_k, parts.new_v, list(plan.commit_counts)
    keys = [_packed(old_k), new_k, inputs.raw_k, inputs.beacon_k]
    values = [_packed(old_v), new_v, inputs.raw_v, inputs.beacon_v]
    return keys, values, ([len(row) for row in old_k], new)


def _packed(rows: list[torch.Tensor]) -> torch.Tensor:
    filled = [row for row in rows if len(row)]
    return torch.cat(filled) if len(filled) > 1 else (filled or rows)[0]


def _halves(table: Table) -> Table:
    """HF's tables hold every angle twice."""
    cos, sin = table
    return cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]


def _once(memo: dict[Any, Any], key: Any, build: Callable[[], Any]) -> Any:
    key = ("kernels", key)
    if key not in memo:
        memo[key] = build()
    return memo[key]
