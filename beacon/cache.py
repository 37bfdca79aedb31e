"""What has been read: memory and open windows of every row, the token ids, and the ratios in force."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, DynamicCache

from beacon.config import BeaconConfig, check_whole
from beacon.modules import LayerStore, Rotary, rotate, unrotate
from beacon.plan import RowState, Span
from beacon.slots import Slots


class ColumnLog:
    """Token ids and text mask of all columns fed so far (a column holds one token of every row, or padding).

    Chunks stay where they came from until somebody reads them, so a decoded token costs no device
    synchronisation; read ids are int32 on the CPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self._chunks: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def append(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add columns: ids ``[rows, n]``, and which of them are text (bool, CPU; None: all)."""
        # A prefill has synchronised already (its ids are checked); a decoded token must not.
        ids = ids.to("cpu", torch.int32, copy=True) if ids.shape[1] > 1 else ids.detach().clone()
        self._chunks.append((ids, None if mask is None else mask.clone()))
        self.count += ids.shape[1]
        if len(self._chunks) > 256:
            self.read()

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All ids (int32) and the text mask (bool), each ``[rows, columns]`` on the CPU."""
        if not self._chunks:
            return torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, 0, dtype=torch.bool)
        ids = torch.cat([ids.to("cpu", torch.int32) for ids, _ in self._chunks], dim=1)
        masks = [torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask for ids, mask in self._chunks]
        mask = torch.cat(masks, dim=1)
        self._chunks = [(ids, mask)]
        return ids, mask

    def select(self, rows: Sequence[int]) -> ColumnLog:
        """The given rows."""
        log = ColumnLog()
        if self._chunks:
            ids, mask = self.read()
            log._chunks = [(ids[list(rows)], mask[list(rows)])]
        log.count = self.count
        return log

    def fork(self) -> ColumnLog:
        """An independent log of the same columns."""
        log = ColumnLog()
        log._chunks, log.count = list(self._chunks), self.count
        return log

    def crop(self, columns: int) -> None:
        """Forget the last columns."""
        ids, mask = self.read()
        self._chunks = [(ids[:, : ids.shape[1] - columns], mask[:, : ids.shape[1] - columns])]
        self.count -= columns


class BeaconCache(Cache):
    """Condensed activations of what a wrapped model has read; passed and returned as ``past_key_values``.

    As long as nothing is condensed (short texts, ratio 0) it holds an ordinary ``DynamicCache`` that the stock
    attention reads and writes (``stock``); from the first beacon on, one :class:`~beacon.modules.LayerStore` per
    layer. Where room is reserved, decoded tokens go into buffers of fixed size (``slots``) instead, from which every
    other use copies.

    Args:
        config: Configuration of the wrapped model.
        owner: Identity of the wrapped model.
        rows: Rows of the batch.
    """

    def __init__(self, config: BeaconConfig, owner: str, rows: int) -> None:
        super().__init__(layers=[])
        self.config, self.owner = config, owner
        self._states: list[RowState] = []
        self._ahead = 0
        self.states = [RowState(row) for row in range(rows)]
        self.stores: list[LayerStore] = []
        self.stock: DynamicCache | None = DynamicCache()
        self.stock_positions: list[torch.Tensor] = []
        self.columns = ColumnLog()
        self.span = Span()
        self.ratios: int | tuple[int, ...] | None = None
        self.expected_length: int | None = None
        self.last_hidden: list[torch.Tensor | None] = [None] * rows
        self.attention_path = "none yet"
        self.warned = False
        self.max_tokens: int | None = None
        self.slots: Slots | None = None
        self.decoder: Any = None  # what reads into the slots (beacon.decoder)
        self.in_slots = False
        self.interrupted = False

    @property
    def states(self) -> list[RowState]:
        """Where every row stands."""
        if self._ahead:
            count, self._ahead = self._ahead, 0
            self._states = [replace(state, tokens=state.tokens + count) for state in self._states]
        return self._states

    @states.setter
    def states(self, states: list[RowState]) -> None:
        self._states, self._ahead = states, 0
        self.mark = object()  # of these states; not of what advance makes of them

    def advance(self, tokens: int) -> None:
        """Every row has read tokens that changed nothing else (told in one number: decoding does it for each token)."""
        self._ahead += tokens

    def reserve(self, max_tokens: int) -> BeaconCache:
        """Decode with static shapes from now on, in buffers that are made before the first decoded token.

        Args:
            max_tokens: Text tokens of a row, prompt included, that find room; for longer texts the buffers grow.

        Returns:
            The cache itself.

        Raises:
            NotImplementedError: Memory in eight bits or on the CPU.
            TypeError: Not an int.
            ValueError: No token.
        """
        check_whole("max_tokens", max_tokens, 1)
        if self.config.memory_dtype != "auto" or self.config.offload_memory:
            raise NotImplementedError(
                "a static cache keeps memory in the model's dtype where it computes, got memory_dtype="
                f"{self.config.memory_dtype!r} and offload_memory={self.config.offload_memory}; leave these out, or "
                "use the ordinary cache that compress returns."
            )
        self.max_tokens = max_tokens
        return self

    def refill(self, other: BeaconCache) -> BeaconCache:
        """Forget everything read and go on from what another cache has read; buffers and recorded graphs stay.

        For many questions to one document: one static cache is refilled from the document's for each.

        Args:
            other: A cache of the same model; it stays as it is.

        Returns:
            The cache itself.

        Raises:
            ValueError: The cache of another model or configuration.
        """
        if other.owner != self.owner or other.config != self.config:
            raise ValueError("refill takes a cache of the same model and configuration, got another's; read it again.")
        kept = self.max_tokens
        self.become(other.fork())
        self.max_tokens = kept
        return self

    def become(self, other: BeaconCache) -> None:
        """Take over the content of a cache that is out of slots; own buffers stay, to be filled again."""
        slots, decoder = self.slots, self.decoder
        self.__dict__.update(other.__dict__)
        self.slots, self.decoder = slots, decoder

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no part in what is recorded."""
        return {**self.__dict__, "decoder": None}

    # -- what Hugging Face asks a cache -------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included (``generate`` slices ``input_ids`` by it)."""
        return self.columns.count

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Key length and offset of a stock mask over all columns."""
        return self.columns.count + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return len(self._states)

    @property
    def device(self) -> torch.device | None:
        """Where the first layer's entries are; None before anything is read."""
        if self.in_slots and self.slots is not None:
            return self.slots.layers[0].k.device
        if self.stores:
            return self.stores[0].open_k[0].device
        held = [layer.keys.device for layer in self.stock.layers if layer.is_initialized] if self.stock else []
        return held[0] if held else None

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self.columns.count > 0

    @property
    def is_compileable(self) -> bool:
        """False: sizes change while reading."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: what is condensed cannot be taken back."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """No layer slides."""
        return [False] * max(len(self.stores), 1)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        """Refused: only a wrapped model's own forward writes here.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a BeaconCache serves the wrapped model that made it, got a stock attention layer writing to it; "
            "inside beacon.disabled(model) or after beacon.unwrap pass past_key_values=None or a DynamicCache."
        )

    def reset(self) -> None:
        """Forget everything read."""
        fresh = BeaconCache(self.config, self.owner, len(self.states))
        fresh.max_tokens = self.max_tokens
        self.become(fresh)

    # -- rows ----------------------------------------------------------------------------------------------------

    def fork(self) -> BeaconCache:
        """An independent cache that shares the tensors read so far (nothing is copied, nothing written in place).

        While a static cache is decoding its buffers are copied; compress once, and fork or :meth:`refill` before.
        """
        return self.select(range(len(self.states)))

    def select(self, rows: Sequence[int] | torch.Tensor) -> BeaconCache:
        """A cache of the given rows, in order; repeated rows share their tensors.

        Raises:
            TypeError: Rows that are no ints.
            ValueError: A row that is not there.
        """
        held = len(self.states)
        rows = rows.tolist() if isinstance(rows, torch.Tensor) else list(rows)
        if any(isinstance(row, bool) or not isinstance(row, int) for row in rows):
            raise TypeError(f"rows must be ints, got {rows}; pass for example [0, 2].")
        if not all(-held <= row < held for row in rows):
            raise ValueError(f"rows must lie in [0, {held}), got {rows}; this cache holds {held} rows.")
        rows = [row % held for row in rows]
        if self.in_slots:
            return self._out_of_slots().select(rows)
        other = copy.copy(self)
        other.slots = None  # nobody else's
        same = rows == list(range(len(self.states)))
        other.states = [self.states[row] for row in rows]
        other.last_hidden = [self.last_hidden[row] for row in rows]
        other.columns = self.columns.fork() if same else self.columns.select(rows)
        other.stores = [store.select(rows) for store in self.stores]
        other.stock_positions = [p if same or p.shape[0] == 1 else p[rows] for p in self.stock_positions]
        if self.stock is not None:
            other.stock = DynamicCache()
            other.stock.layers = [copy.copy(layer) for layer in self.stock.layers]
            if not same and self.columns.count:
                other.stock.batch_select_indices(torch.tensor(rows))
        return other

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i becomes row ``beam_idx[i]``."""
        rows = beam_idx.tolist()
        if not (self.in_slots and self.slots is not None and len(rows) == len(self._states)):
            self.become(self.select(rows))
            return
        self.slots.reorder(rows)
        self.states = [self.states[row] for row in rows]
        self.columns = self.columns.select(rows)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, side by side."""
        rows = [row for row in range(len(self.states)) for _ in range(repeats)]
        self.become(self.select(rows))

    def _out_of_slots(self) -> BeaconCache:
        """The same content in tensors of its own."""
        assert self.slots is not None
        states = self.states
        other = copy.copy(self)
        other.stores = self.slots.stores(self.config, states)
        hidden = self.slots.hidden
        other.stock, other.stock_positions = None, []
        other.last_hidden = [None] * len(self.states) if hidden is None else list(hidden.clone().unbind())
        other.slots, other.in_slots = None, False
        return other

    def to(self, device: torch.device | str) -> BeaconCache:
        """The same cache on another device (ids stay on the CPU)."""
        other = self.fork()
        other.stores = [store.to(device) for store in other.stores]
        other.last_hidden = [None if h is None else h.to(device) for h in other.last_hidden]
        other.stock_positions = [positions.to(device) for positions in other.stock_positions]
        if other.stock is not None:
            for layer in other.stock.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
                    layer.device = layer.keys.device
        return other

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row, given as a negative number, inside the raw tail.

        The hidden state of the token that is last then is not known any more: a label of the next call's first token
        does not count.

        Raises:
            TypeError: Not an int.
            ValueError: Positive number, padding among the last columns, or the tokens are condensed already.
        """
        if isinstance(tokens_to_remove, bool) or not isinstance(tokens_to_remove, int):
            raise TypeError(f"crop takes an int, got {tokens_to_remove!r}; pass for example -3.")
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, got {tokens_to_remove}; pass {-tokens_to_remove}."
            )
        count = -tokens_to_remove
        if count == 0:
            return
        _, mask = self.columns.read()
        for row, state in enumerate(self.states):
            if count > state.tokens - state.committed_at:
                raise ValueError(
                    f"crop can remove the tokens read since the last condensation, {state.tokens - state.committed_at} "
                    f"in row {row}, got {count}; fork() the cache before reading what may have to be taken back."
                )
            if not bool(mask[row, -count:].all()):
                raise ValueError(f"crop needs text in the last {count} columns, got padding in row {row}; crop less.")
        states = [_cropped(self.config, state, count) for state in self.states]
        if self.stock is not None:
            self.stock.crop(-count)
            positions = torch.cat([p.expand(len(self.states), -1) for p in self.stock_positions], dim=1)
            self.stock_positions = [positions[:, :-count]]
        self.stores = [_cropped_store(store, self.states, states) for store in self.stores]
        self.columns.crop(count)
        self.states = states
        self.last_hidden = [None] * len(states)
        if self.slots is not None:
            self.slots.hidden = None

    # -- leaving the stock phase -----------------------------------------------------------------------------------

    def condensed_stores(self, rotary: Rotary) -> list[LayerStore]:
        """The layers' stores; keys that the stock attention cached are brought into the memory frame.

        Returns:
            The stores (empty before anything is read). The cache itself is left as it is.
        """
        if self.stock is None or not self.columns.count:
            return self.stores
        _, mask = self.columns.read()
        positions = torch.cat([p.expand(len(self.states), -1) for p in self.stock_positions], dim=1)
        stores = []
        for layer in self.stock.layers:
            memory_k, memory_v, open_k, open_v = [], [], [], []
            for row, state in enumerate(self.states):
                text = mask[row].nonzero()[:, 0].to(layer.keys.device)
                at = positions[row].to(layer.keys.device)[text]
                k = layer.keys[row][:, text].transpose(0, 1)
                v = layer.values[row][:, text].transpose(0, 1)
                k = unrotate(k, rotary.table(at, k.dtype))
                memory = torch.arange(state.memory, device=k.device)
                memory_k.append(rotate(k[: state.memory], rotary.table(memory, k.dtype)))
                memory_v.append(v[: state.memory].contiguous())
                open_k.append(k[state.open_start :])
                open_v.append(v[state.open_start :].contiguous())
            stores.append(LayerStore(memory_k, memory_v, open_k, open_v))
        return stores

    # -- report ------------------------------------------------------------------------------------------------------

    def stats(self) -> list[dict[str, Any]]:
        """Per row: text tokens read, entries held by kind, bytes, effective ratio, attention path."""
        report = []
        for row, state in enumerate(self.states):
            if self.in_slots and self.slots is not None:
                size = self.slots.nbytes // len(self.states)
            elif self.stock is None:
                size = sum(store.nbytes(row) for store in self.stores)
            else:
                layers = [layer for layer in self.stock.layers if layer.is_initialized]
                size = sum(layer.keys[row].nbytes + layer.values[row].nbytes for layer in layers)
            raw = state.kept + state.open_raw
            entries = state.sinks + state.beacons + state.open_beacons + raw
            report.append(
                {
                    "text_tokens": state.tokens,
                    "sinks": state.sinks,
                    "beacons": state.beacons + state.open_beacons,
                    "raw": raw,
                    "windows": len(state.ratios),
                    "bytes": size,
                    "effective_ratio": state.tokens / entries if entries else 1.0,
                    "attention_path": self.attention_path,
                }
            )
        return report

    def __repr__(self) -> str:
        tokens = [state.tokens for state in self.states]
        entries = [state.memory + state.open_raw + state.open_beacons for state in self.states]
        return f"BeaconCache(rows={len(self.states)}, text_tokens={tokens}, entries={entries})"


def _cropped(config: BeaconConfig, state: RowState, count: int) -> RowState:
    open_raw = state.open_raw - count
    ratio = state.open_ratio if open_raw else None
    return replace(
        state,
        tokens=state.tokens - count,
        open_beacons=open_raw // ratio if ratio else 0,
        open_ratio=ratio,
    )


def _cropped_store(store: LayerStore, before: list[RowState], after: list[RowState]) -> LayerStore:
    """Open entries are raws, then beacons: cut the end of both."""

    def cut(tensor: torch.Tensor, old: RowState, new: RowState) -> torch.Tensor:
        beacons = tensor[old.open_raw : old.open_raw + new.open_beacons]
        return torch.cat([tensor[: new.open_raw], beacons])

    rows = range(len(before))
    return LayerStore(
        store.memory_k,
        store.memory_v,
        [cut(store.open_k[row], before[row], after[row]) for row in rows],
        [cut(store.open_v[row], before[row], after[row]) for row in rows],
    )
