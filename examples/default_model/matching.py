"""A first lesson for beacons: at ratio 1, become the raw token you stand for."""

from typing import Any

import torch


class Matching:
    """Compares beacons of ratio-1 windows with their raw tokens, at the output of every layer but the first and last.

    A beacon of ratio 1 that carries its token's hidden state keeps the base's own circuits (look-ups by induction heads
    among them) working through memory; larger ratios start from there. Without it copying through beacons had not
    formed after 3 million tokens.

    Args:
        model: A wrapped model; hooks stay on its decoder layers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parts: list[torch.Tensor] = []
        self.active = False
        for layer in model.model.layers[1:-1]:
            layer.register_forward_hook(self._compare, with_kwargs=True)

    def loss(self) -> torch.Tensor | None:
        """Mean over layers since the last call, of the squared distance between normalised states; None without."""
        parts, self._parts = self._parts, []
        return torch.stack(parts).mean() if parts else None

    def _compare(self, layer: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        beacon_pass = kwargs.get("beacon_pass")
        if not self.active or beacon_pass is None:
            return
        beacons, raws = [], []
        for block in beacon_pass.plan.blocks:
            if block.step.ratio == 1:
                count = block.beacon_queries.stop - block.beacon_queries.start
                beacons.append(torch.arange(block.beacon_queries.start, block.beacon_queries.stop))
                raws.append(beacon_pass.plan.raw_slots.pool[block.raw_slots][:count])
        if beacons:
            hidden = output[0]
            ours = _normalised(hidden[len(beacon_pass.plan.raw) + torch.cat(beacons)])
            theirs = _normalised(hidden[torch.cat(raws)].detach())
            self._parts.append((ours - theirs).pow(2).mean())


def _normalised(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * hidden.pow(2).mean(dim=-1, keepdim=True).add(1e-6).rsqrt()
