"""The rival: a stock model that keeps a few first tokens (sinks) and the last tokens of the text, and nothing else.

Every token sees the ``sinks`` first tokens and the last ``window`` ones, itself included, at the positions these have
in such a cache: sinks at 0 .. sinks - 1, the window right after them, however long the text is. Who (rows) sees what
with 1 sink and a window of 3, and where the two kinds of keys stand for the last row:

    t0  1 . . . . . .
    t1  1 1 . . . . .
    t2  1 1 1 . . . .
    t3  1 1 1 1 . . .
    t4  1 . 1 1 1 . .
    t5  1 . . 1 1 1 .
    t6  1 . . . 1 1 1      t0 at 0; t4 t5 t6 at 1 2 3

Source: StreamingLLM, arXiv 2309.17453, section 3.2 (rolling cache with positions inside the cache).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from beacon.attention import AttentionInputs, Outputs
from beacon.attention.inputs import part, within
from beacon.evaluation.methods.dialogue import Growing
from beacon.evaluation.methods.greedy import decode_greedily
from beacon.evaluation.methods.held import attention_bytes
from beacon.evaluation.methods.interface import LiveMethod, Outcome, Progress
from beacon.modules import BeaconPass, LayerStore, Rotary, rotate
from beacon.plan import Keys, Plan, Queries

PIECE_TOKENS = 2048  # read in one pass
BLOCK_TOKENS = 128  # queries whose keys are taken as one run


@dataclass(frozen=True)
class SlidingWindow(LiveMethod):
    """The stock model sees the first tokens and the last ones (StreamingLLM).

    Args:
        window: Raw tokens in view, the reading one included.
        sinks: First tokens in view.
    """

    window: int
    sinks: int = 4

    @property
    def name(self) -> str:  # type: ignore[override]
        """With its size."""
        return f"sliding window {self.window}"

    @torch.no_grad()
    def read(self, model: Any, ids: torch.Tensor, keep: int, progress: Progress | None = None) -> Outcome:
        hidden = self._reader(model, ids).read(self._relevant(model, ids, keep), progress)
        return Outcome(model.beacon_head(hidden[-keep:]), min(len(ids), self.sinks + self.window))

    @torch.no_grad()
    def continue_text(self, model: Any, ids: torch.Tensor, count: int) -> list[int]:
        # One decoded token reaches as far back as its layers; every further one begins a token later.
        return decode_greedily(self._logits(self._reader(model, ids)), self._relevant(model, ids, 1), count, ())

    def _begin(self, model: Any, expected_length: int | None) -> Growing:
        return _Rolling(model, self)

    def held_bytes(self, model: Any, length: int) -> int:
        """As :meth:`Method.held_bytes`: between two calls, when the next token has not come yet."""
        return attention_bytes(model, min(length, self.sinks + self.window - 1))

    def _reader(self, model: Any, ids: torch.Tensor) -> SlidingWindowReader:
        """A reader of a text that begins so; one shorter than the sinks is all sinks."""
        return SlidingWindowReader(model, self.window, min(self.sinks, len(ids)))

    def _relevant(self, model: Any, ids: torch.Tensor, keep: int) -> torch.Tensor:
        return relevant(ids, keep, self.window, self.sinks, model.config.num_hidden_layers)

    @staticmethod
    def _logits(reader: SlidingWindowReader) -> Callable[[torch.Tensor], torch.Tensor]:
        def logits(ids: torch.Tensor) -> torch.Tensor:
            last: torch.Tensor = reader.model.beacon_head(reader.read(ids)[-1:])[0]
            return last

        return logits


def relevant(ids: torch.Tensor, keep: int, window: int, sinks: int, num_layers: int) -> torch.Tensor:
    """The tokens that the last ``keep`` outputs depend on: the sinks, and as far as windows over all layers reach.

    What lies between has no influence, and positions are relative, so it need not be read at all.

    Args:
        ids: Token ids ``[T]``.
        keep: Number of outputs wanted, from the end.
        window: Raw tokens in view.
        sinks: First tokens in view.
        num_layers: Decoder layers, each of which looks ``window - 1`` tokens further back.

    Returns:
        Token ids ``[n]``, n <= T.
    """
    reach = keep + num_layers * (window - 1)
    return ids if len(ids) <= sinks + reach else torch.cat([ids[:sinks], ids[-reach:]])


class SlidingWindowReader:
    """Reads one text, call by call, through the stock weights of a wrapped model.

    Args:
        model: A wrapped model (its beacons are not used).
        window: Raw tokens in view, the reading one included.
        sinks: First tokens of the text that stay in view.

    Raises:
        ValueError: ``window`` below 1 or ``sinks`` below 0.
    """

    def __init__(self, model: Any, window: int, sinks: int = 4) -> None:
        if window < 1 or sinks < 0:
            raise ValueError(
                f"window must be at least 1 and sinks at least 0, got window={window} and sinks={sinks}; choose others."
            )
        self.model, self.window, self.sinks = model, window, sinks
        self.rotary: Rotary = model.beacon_rotary()
        self.tokens = 0
        self._stores: list[LayerStore] = []

    @torch.no_grad()
    def read(self, ids: torch.Tensor, progress: Callable[[int, int], None] | None = None) -> torch.Tensor:
        """Read more tokens.

        Args:
            ids: Token ids ``[n]``; the first call brings at least the sinks.
            progress: Called with (tokens read, tokens in all) after every piece.

        Returns:
            Final hidden states ``[n, hidden]``.

        Raises:
            ValueError: The first call brings fewer tokens than there are sinks, or none.
        """
        if len(ids) == 0 or self.tokens + len(ids) < self.sinks:
            raise ValueError(
                f"the first call must bring all {self.sinks} sinks and every call a token, got {len(ids)} tokens; "
                "read more at once."
            )
        hidden = []
        for piece in self._pieces(ids):
            hidden.append(self._read(piece))
            if progress is not None:
                progress(sum(map(len, hidden)), len(ids))
        return torch.cat(hidden)

    def fork(self) -> SlidingWindowReader:
        """Another reader of what has been read so far (whose tensors they share: none is written in place)."""
        return copy.copy(self)

    def _pieces(self, ids: torch.Tensor) -> list[torch.Tensor]:
        return list(ids.split(max(PIECE_TOKENS, self.sinks)))

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        plan, seen_at = self._plan(len(ids))
        attend = _Banded(self.rotary, seen_at.to(ids.device))
        beacon_pass = BeaconPass(plan, self._stores, self.rotary, attend, outputs=True)
        body = self.model.model
        embeds = body.embed_tokens(ids)[None]
        out = body(
            inputs_embeds=embeds,
            attention_mask=embeds.new_zeros(1, 1, 1, 1),  # 4-D: Hugging Face hands it on and builds none of its own
            position_ids=torch.arange(len(ids), device=ids.device)[None],
            use_cache=False,
            beacon_pass=beacon_pass,
        )
        self._stores = [beacon_pass.kept[layer] for layer in range(len(beacon_pass.kept))]
        self.tokens += len(ids)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def _plan(self, count: int) -> tuple[Plan, torch.Tensor]:
        """Who sees whom for the next tokens, and their positions as the sinks see them.

        Window frame: the first raw key that is at hand stands right after the sinks, so positions stay small.
        """
        first_call = self.tokens == 0
        kept = 0 if first_call else min(self.tokens - self.sinks, self.window - 1)
        first = self.tokens - kept  # text index of the first raw slot
        origin = 0 if first_call else first - self.sinks
        index = torch.arange(self.tokens, self.tokens + count)
        raw_hi = index + 1 - first
        raw_lo = torch.minimum((index - self.window + 1).clamp(min=self.sinks) - first, raw_hi)
        none, zeros = torch.zeros(0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        raw = Queries(
            zeros, index - origin, (index + 1).clamp(max=self.sinks), raw_lo.clamp(min=0), raw_hi, zeros, zeros
        )
        slots = torch.arange(kept + count)
        sinks = torch.arange(self.sinks if first_call else 0)
        stays = min(self.tokens + count - self.sinks, self.window - 1)
        opens = slots[len(slots) - stays :]
        plan = Plan(
            config=self.model.beacon_config,
            rows=1,
            raw=raw,
            beacon=Queries(*[none] * 7),
            raw_slots=Keys(slots, slots + first - origin),
            beacon_slots=Keys(none, none),
            commits=Keys(sinks, sinks),
            opens=Keys(opens, torch.zeros_like(opens)),
            commit_counts=(len(sinks),),
            open_counts=(stays,),
            blocks=(),
        )
        return plan, index.clamp(max=self.sinks + self.window - 1)


class _Rolling(Growing):
    """A reader that goes on; until there are all sinks, their tokens wait.

    Args:
        model: A wrapped model.
        method: Window and sinks.
    """

    def __init__(self, model: Any, method: SlidingWindow) -> None:
        super().__init__(model, method.sinks)
        self._method = method
        self._reader: SlidingWindowReader | None = None

    def _grow(self, ids: torch.Tensor) -> None:
        if self._reader is None:
            reader, ids = self._method._reader(self._model, ids), self._method._relevant(self._model, ids, 1)
        else:
            reader = self._reader.fork()
        reader.read(ids)
        self._reader = reader

    def _fork(self, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        reader = self._method._reader(self._model, ids) if self._reader is None else self._reader.fork()
        return self._method._logits(reader)


class _Banded:
    """Attention over sinks and a band of raw keys; a query stands at one place for the band, at another for the sinks.

    Args:
        rotary: The model's rotary embedding.
        seen_at: Position of every query in the frame of the sinks.
    """

    def __init__(self, rotary: Rotary, seen_at: torch.Tensor) -> None:
        self.turn = Rotary(rotary.inv_freq)  # turns rotated queries further: without the scaling they carry already
        self.seen_at = seen_at

    def __call__(self, inputs: AttentionInputs, plan: Plan) -> Outputs:
        groups = inputs.raw_q.shape[1] // inputs.raw_k.shape[1]
        q, q_sink = inputs.raw_q, rotate(inputs.raw_q, self._table(inputs, plan))
        k, v, k_sink, v_sink = (
            x.repeat_interleave(groups, dim=1)
            for x in (inputs.raw_k, inputs.raw_v, inputs.memory_k[0], inputs.memory_v[0])
        )
        out = []
        for start in range(0, len(q), BLOCK_TOKENS):
            block = slice(start, min(start + BLOCK_TOKENS, len(q)))
            seen = part(plan.raw, block)
            keys = slice(int(seen.raw_lo[0]), int(seen.raw_hi[-1]))
            logits = torch.cat(
                [
                    torch.einsum("qhd,khd->hqk", q_sink[block], k_sink),
                    torch.einsum("qhd,khd->hqk", q[block], k[keys]),
                ],
                dim=-1,
            )
            mask = torch.cat(
                [
                    within(torch.zeros_like(seen.memory), seen.memory, 0, len(k_sink)),
                    within(seen.raw_lo, seen.raw_hi, keys.start, keys.stop),
                ],
                dim=1,
            )
            weights = (logits * inputs.scale).masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
            out.append(torch.einsum("hqk,khd->qhd", weights.to(v.dtype), torch.cat([v_sink, v[keys]])))
        return torch.cat(out), None

    def _table(self, inputs: AttentionInputs, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much further the queries turn for the sinks (the same in every layer)."""
        if "turn" not in inputs.memo:
            inputs.memo["turn"] = self.turn.table(self.seen_at - plan.raw.position, inputs.raw_q.dtype)
        table: tuple[torch.Tensor, torch.Tensor] = inputs.memo["turn"]
        return table
