"""What a wrapped model's attention and last decoder layer do in place of the stock ones.

Both are mixed into the stock class of the module at hand. Without a ``beacon_pass`` keyword they are the stock
modules; with one they read a pass's raw tokens and beacons, packed as ``[1, n_raw + n_beacon, hidden]``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from beacon.attention import AttentionInputs, AttentionPath, MemoryParts, Rotation
from beacon.families import Family
from beacon.memory import AtRest, Bringing, Growing, MemoryFormat, take_in
from beacon.plan import Keys, Plan


class LayerStore:
    """Keys and values of one layer, one tensor ``[entries, kv_heads, head_dim]`` per row and kind.

    Memory keys are rotated at their place in memory; open keys (the open window's raws, then its beacons) are not
    rotated. Memory may rest in another form (:mod:`beacon.memory`). Tensors are never written in place, so stores
    share them freely.
    """

    __slots__ = ("memory_k", "memory_v", "open_k", "open_v")

    def __init__(
        self,
        memory_k: Sequence[AtRest],
        memory_v: Sequence[AtRest],
        open_k: list[torch.Tensor],
        open_v: list[torch.Tensor],
    ) -> None:
        self.memory_k, self.memory_v, self.open_k, self.open_v = memory_k, memory_v, open_k, open_v

    @classmethod
    def empty(cls, rows: int, like: torch.Tensor) -> LayerStore:
        """A store without entries; ``like`` is ``[n, kv_heads, head_dim]``."""
        nothing = like.new_empty(0, *like.shape[1:])  # not like[:0], which would keep all of it
        return cls(*([nothing] * rows for _ in cls.__slots__))

    def select(self, rows: list[int]) -> LayerStore:
        """The given rows (repeats share their tensors)."""
        return LayerStore(*([getattr(self, name)[row] for row in rows] for name in self.__slots__))

    def to(self, device: torch.device | str) -> LayerStore:
        """The same entries on another device."""
        return LayerStore(*([tensor.to(device) for tensor in getattr(self, name)] for name in self.__slots__))

    def nbytes(self, row: int) -> int:
        """Bytes held for one row."""
        return sum(getattr(self, name)[row].nbytes for name in self.__slots__)

    def packed(self, memory: MemoryFormat) -> LayerStore:
        """The same with its memory at rest in a format."""
        rows = range(len(self.open_k))
        keys, values = (
            [memory.rest(kept[row], self.open_k[row].device) for row in rows] for kept in (self.memory_k, self.memory_v)
        )
        return LayerStore(keys, values, self.open_k, self.open_v)


class Rotary:
    """Rotary embedding with fixed frequencies, as the stock module computes it for short texts.

    Args:
        inv_freq: Inverse frequencies ``[rotary_dim / 2]``.
        scaling: Factor of cos and sin (yarn, longrope), else 1.
    """

    def __init__(self, inv_freq: torch.Tensor, scaling: float = 1.0) -> None:
        self.inv_freq, self.scaling = inv_freq.float(), scaling

    def table(self, position: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at integer positions ``[n]``: two of ``[n, 1, rotary_dim]``."""
        angles = position[:, None].float() * self.inv_freq.to(position.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate ``[n, heads, head_dim]`` (its first ``rotary_dim`` channels) by a table."""
    if not len(x):
        return x
    cos, sin = table
    width = cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    first, second = head.chunk(2, dim=-1)
    rotated = head * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)


def unrotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Undo :func:`rotate` (computed in at least float32), whatever the table is scaled by and rounded to."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(dtype) for part in table)
    norm = cos.square() + sin.square()
    return rotate(x.to(dtype), (cos / norm, -sin / norm)).to(x.dtype)


class _OnDevice:
    """A plan and its rotary tables on one device, and the masks made from them."""

    def __init__(self, plan: Plan, rotary: Rotary, device: torch.device, dtype: torch.dtype) -> None:
        self.plan = plan.to(device)
        self.memo: dict[Any, Any] = {}
        kinds = ("raw", "beacon", "raw_slots", "beacon_slots", "commits")
        positions = [getattr(self.plan, kind).position for kind in kinds]
        cos, sin = rotary.table(torch.cat(positions), dtype)
        sizes = [len(position) for position in positions]
        self.tables = dict(zip(kinds, zip(cos.split(sizes), sin.split(sizes), strict=True), strict=True))
        first = sizes[0] + sizes[1]
        self.key_table = cos[first:], sin[first:]  # of raw slots, beacon slots and commits
        self.runs = {kind: _run(getattr(plan, kind)) for kind in (*kinds[2:], "opens")}

    def take(self, pool: _Pool, kind: str) -> torch.Tensor:
        """The pool's entries of one kind; a view where they are one run."""
        run = self.runs[kind]
        if run is not None:
            return pool.run(run.start, run.stop)
        keys: Keys = getattr(self.plan, kind)
        return pool.joined.index_select(0, keys.pool)

    def keys(self, pool: _Pool) -> list[torch.Tensor]:
        """Keys of the raw slots, the beacon slots and the commits, rotated."""
        kinds = ("raw_slots", "beacon_slots", "commits")
        return [rotate(self.take(pool, kind), self.tables[kind]) for kind in kinds]


class _Pool:
    """Open windows' entries, then a pass's raw tokens, then its beacons: joined only where somebody has to."""

    def __init__(self, open_rows: list[torch.Tensor], raw: torch.Tensor, beacons: torch.Tensor) -> None:
        self.sources = [source for source in (*open_rows, raw, beacons) if len(source)] or [raw]
        self._kinds = open_rows, raw, beacons

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @cached_property
    def joined(self) -> torch.Tensor:
        """All entries, in memory of their own."""
        return torch.cat(self.sources)

    @property
    def kinds(self) -> list[torch.Tensor]:
        """The same as at most three sources: open entries of all rows, raw tokens, beacons."""
        rows, raw, beacons = self._kinds
        cached = rows[0] if len(rows) == 1 else torch.cat(rows)
        return [source for source in (cached, raw, beacons) if len(source)] or [raw]

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Entries ``[start, stop)``: a view, of one source if it can be, but never of one for the whole pool.

        A cache may keep what it gets of the whole pool, and a source may be a slice of something larger.
        """
        if stop - start < len(self):
            first = 0
            for source in self.sources:
                if first <= start and stop <= first + len(source):
                    return source[start - first : stop - first]
                first += len(source)
        return self.joined[start:stop]


def _run(keys: Keys) -> slice | None:
    count = len(keys)
    if count == 0:
        return slice(0, 0)
    first = int(keys.pool[0])
    whole = torch.equal(keys.pool, torch.arange(first, first + count))
    return slice(first, first + count) if whole else None


class Pass(Protocol):
    """What a model call brings its layers as ``beacon_pass``.

    It travels as a keyword, so nothing on a module is state, and the recomputation of a checkpointed layer sees the
    same pass. Deliberately no dataclass and without ``to``: parallel engines copy or move such arguments.
    """

    outputs: bool

    @property
    def raw_tokens(self) -> int:
        """Raw tokens of the pass (packed before its beacons)."""

    def run(self, attention: BeaconAttention, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention of one layer does: ``[n, hidden]`` in and out."""

    def for_last_layer(self, beacon_input: torch.Tensor) -> Pass:
        """The same pass for the last layer, whose beacons stop at keys and values."""


class BeaconPass:
    """One pass of a plan through all layers: what each layer has kept, and what it keeps next.

    Args:
        plan: Who sees whom.
        stores: What each layer has kept, by layer index; empty for a new text.
        rotary: The model's rotary embedding.
        attend: Implementation of attention.
        outputs: Whether anybody reads the last layer's raw outputs.
        rotation: How the path rotates; None for plain PyTorch.
        memory: How what is committed is kept.
        growing: Where it grows, keys and values of every row by layer; None: nowhere in particular.
    """

    def __init__(
        self,
        plan: Plan,
        stores: list[LayerStore],
        rotary: Rotary,
        attend: AttentionPath,
        outputs: bool,
        rotation: Rotation | None = None,
        memory: MemoryFormat | None = None,
        growing: Sequence[tuple[list[Growing], list[Growing]]] | None = None,
    ) -> None:
        self.plan, self.stores, self.rotary, self.attend, self.outputs = plan, stores, rotary, attend, outputs
        self.rotation, self.memory, self.growing = rotation, memory or MemoryFormat(), growing
        self.bringing = Bringing([(store.memory_k, store.memory_v) for store in stores])
        self.kept: dict[int, LayerStore] = {}
        self.beacon_input: torch.Tensor | None = None
        self._devices: dict[tuple[torch.device, torch.dtype], _OnDevice] = {}

    @property
    def raw_tokens(self) -> int:
        """Raw tokens of the pass (packed before the beacons)."""
        return len(self.plan.raw)

    def on(self, like: torch.Tensor) -> _OnDevice:
        """Plan and tables where ``like`` lives."""
        key = (like.device, like.dtype)
        if key not in self._devices:
            self._devices[key] = _OnDevice(self.plan, self.rotary, *key)
        return self._devices[key]

    def run(self, attention: BeaconAttention, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention of one layer does: ``[n, hidden]`` in and out."""
        return attention.read(hidden, self)

    def for_last_layer(self, beacon_input: torch.Tensor) -> BeaconPass:
        """The same pass for the last layer, whose beacons stop at keys and values."""
        last = copy.copy(self)
        last.beacon_input = beacon_input
        return last


class BeaconAttention(nn.Module):
    """Mixed into a stock attention class: condensed attention where a ``beacon_pass`` comes along."""

    beacon_family: Family
    layer_idx: int
    head_dim: int
    scaling: float
    o_proj: nn.Module

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock attention, or ``([1, n, hidden], None)`` for the packed tokens of a pass."""
        beacon_pass: Pass | None = kwargs.pop("beacon_pass", None)
        if beacon_pass is None:
            return super().forward(hidden_states, *args, **kwargs)
        return beacon_pass.run(self, hidden_states[0])[None], None

    def read(self, hidden: torch.Tensor, beacon_pass: BeaconPass) -> torch.Tensor:
        """Attend and keep this layer's new memory.

        Args:
            hidden: ``[n_raw + n_beacon, hidden]``; in the last layer ``[n_raw, hidden]``.
            beacon_pass: The pass.

        Returns:
            ``[n, hidden]`` for the same tokens; without rows if nobody reads the last layer's.
        """
        last = beacon_pass.beacon_input is not None
        raw = hidden[: beacon_pass.raw_tokens]
        beacon = hidden[beacon_pass.raw_tokens :] if beacon_pass.beacon_input is None else beacon_pass.beacon_input
        wanted = beacon_pass.outputs or not last
        raw_q, raw_k, raw_v = self.project(raw, own=False, queries=wanted)
        ties: list[torch.Tensor] = []
        if len(beacon) or torch.is_grad_enabled():  # every process calls the same modules in the same order
            beacon_q, beacon_k, beacon_v = self.project(beacon, own=True, queries=not last)
            if not len(beacon):
                ties = [part for part in (beacon_q, beacon_k, beacon_v) if part is not None]
                beacon_q = None
        else:  # most decoded tokens bring no beacon
            beacon_q, beacon_k, beacon_v = None, raw_k[:0], raw_v[:0]
        stores, parts = self._keep(beacon_pass, (raw_k, beacon_k), (raw_v, beacon_v))
        if raw_q is None:
            return raw[:0]
        here = beacon_pass.on(raw_q)
        turn = rotate if beacon_pass.rotation is None else beacon_pass.rotation.queries
        rotated = AttentionInputs(
            turn(raw_q, here.tables["raw"]),
            None if beacon_q is None else turn(beacon_q, here.tables["beacon"]),
            *stores,
            scale=self.scaling,
            memo=here.memo,
            parts=parts,
        )
        raw_out, beacon_out = beacon_pass.attend(rotated, here.plan)
        inner = raw_out.flatten(1)
        out: torch.Tensor = self.o_proj(inner)
        if torch.is_grad_enabled():
            idle = {"o": inner[:0], "q": raw[:0]} if last else {"o": inner[:0]} if beacon_out is None else {}
            out = self._tie(out, ties, idle)
        if beacon_out is None:
            return out
        own_o = getattr(self, "beacon_o_proj", self.o_proj)
        return torch.cat([out, own_o(beacon_out.flatten(1))])

    def project(
        self, hidden: torch.Tensor, *, own: bool, queries: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """q (or None), k, v as ``[n, heads, head_dim]``, normed but not rotated; ``own`` takes the beacons' copies."""
        names = ("q", "k", "v")[not queries :]
        mine = {name: getattr(self, f"beacon_{name}_proj", None) if own else None for name in names}
        family = self.beacon_family
        if family.fused_qkv and None in mine.values():
            stock = dict(zip(("q", "k", "v"), split_qkv(self, getattr(self, family.fused_qkv)(hidden)), strict=True))
        else:
            stock = {}
        out: dict[str, torch.Tensor | None] = {"q": None}
        for name, projection in mine.items():
            if projection is not None:
                x = projection(hidden)
            else:
                x = stock[name] if stock else getattr(self, f"{name}_proj")(hidden)
            norm = getattr(self, f"{name}_norm") if family.qk_norm and name != "v" else None
            if norm is not None and family.qk_norm == "all":
                x = norm(x)
            x = x.unflatten(-1, (-1, self.head_dim))
            out[name] = norm(x) if norm is not None and family.qk_norm == "head" else x
        k, v = out["k"], out["v"]
        assert k is not None and v is not None
        return out["q"], k, v

    def _tie(self, out: torch.Tensor, empty: list[torch.Tensor], idle: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add 0 times the trainable projections that a pass does without (a text too short, the last layer).

        Parallel engines wait for a gradient of every parameter from every process. Inside the layer, for there the
        parameters are whole under ``fully_shard``.

        Args:
            out: ``[n, hidden]``.
            empty: What projections made of no beacons.
            idle: Names of projections that have not been called, each with an input of no rows.
        """
        own = [(getattr(self, f"beacon_{name}_proj", None), nothing.detach()) for name, nothing in idle.items()]
        sums = [part.sum() for part in empty if part.requires_grad]
        sums += [p(x).sum() for p, x in own if p is not None and any(w.requires_grad for w in p.parameters())]
        return out + torch.stack(sums).sum().to(out.dtype) if sums else out

    def _keep(
        self, beacon_pass: BeaconPass, new_k: tuple[torch.Tensor, ...], new_v: tuple[torch.Tensor, ...]
    ) -> tuple[_Stores, MemoryParts | None]:
        """Rotate keys into both frames, keep memory and open window; returns the stores attention reads."""
        here, index = beacon_pass.on(new_k[0]), self.layer_idx
        plan = here.plan
        old = beacon_pass.stores[index] if beacon_pass.stores else LayerStore.empty(plan.rows, new_k[0])
        k, v = _Pool(old.open_k, *new_k), _Pool(old.open_v, *new_v)
        if beacon_pass.rotation is None:
            raw_k, beacon_k, commit_k = here.keys(k)
        else:
            raw_k, beacon_k, commit_k = beacon_pass.rotation.keys(k.kinds, plan, here.key_table, here.memo)
        parts = None
        kept_k, kept_v = old.memory_k, old.memory_v
        memory_k, memory_v = beacon_pass.bringing.take(index) if beacon_pass.stores else take_in(kept_k, kept_v)
        if sum(plan.commit_counts):
            before, commit, counts = (memory_k, memory_v), beacon_pass.memory.commit, plan.commit_counts
            grown_k, grown_v = (None, None) if beacon_pass.growing is None else beacon_pass.growing[index]
            kept_k, memory_k, commit_k = commit(kept_k, memory_k, commit_k, counts, grown_k)
            kept_v, memory_v, commit_v = commit(kept_v, memory_v, here.take(v, "commits"), counts, grown_v)
            parts = MemoryParts(*before, commit_k, commit_v)
        open_k, open_v = (_rows(here.take(pool, "opens"), plan.open_counts, pool) for pool in (k, v))
        beacon_pass.kept[index] = LayerStore(kept_k, kept_v, open_k, open_v)
        raw_v, beacon_v = here.take(v, "raw_slots"), here.take(v, "beacon_slots")
        return (raw_k, raw_v, beacon_k, beacon_v, memory_k, memory_v), parts


# Raw keys and values, beacon keys and values, then memory keys and values of every row.
_Stores: TypeAlias = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]
]


def _rows(entries: torch.Tensor, counts: tuple[int, ...], pool: _Pool) -> list[torch.Tensor]:
    """Each row's share of the entries, copied: a view would keep the whole pool, unless it is the whole pool."""
    if counts == (len(pool),):
        return [entries]
    return [row.clone() for row in entries.split(counts)]


def split_qkv(attention: Any, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split the last dimension of a fused projection (or its weight, transposed) into q, k and v."""
    config, width = attention.config, attention.head_dim
    sizes = [config.num_attention_heads * width, *[config.num_key_value_heads * width] * 2]
    return fused.split(sizes, dim=-1)


class LastLayer(nn.Module):
    """Mixed into the stock class of the last decoder layer: beacons stop at their keys and values."""

    beacon_family: Family
    self_attn: BeaconAttention

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stock layer, or ``[1, n_raw, hidden]`` for a pass (no rows where nobody reads them)."""
        beacon_pass: Pass | None = kwargs.pop("beacon_pass", None)
        if beacon_pass is None:
            return super().forward(hidden_states, *args, **kwargs)
        norm_name = self.beacon_family.attention_norm
        norm = nn.Identity() if norm_name is None else getattr(self, norm_name)
        count = beacon_pass.raw_tokens
        raw, beacon = hidden_states[:, :count], hidden_states[0, count:]
        last = beacon_pass.for_last_layer(norm(beacon))
        if not beacon_pass.outputs:
            last.run(self.self_attn, norm(raw)[0])
            return raw[:, :0]
        return super().forward(raw, *args, beacon_pass=last, **kwargs)
