"""Muon in the parameters' own dtype: `torch.optim.Muon` works in bfloat16, which CPUs without it emulate."""

import torch
from torch import Tensor


def orthogonalize(updates: Tensor, steps: int = 5) -> Tensor:
    """Move all singular values near one with quintic Newton-Schulz iterations.

    Args:
        updates: [matrices, rows, columns].
        steps: number of iterations.

    Returns:
        Matrices of the same shape, about U V^T of each.

    Source: https://kellerjordan.github.io/posts/muon (coefficients as in `torch.optim.Muon`).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = updates.size(-2) > updates.size(-1)
    x = updates.mT if tall else updates
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of one shape are treated in one batch.

    Args:
        params: two-dimensional weights.
        lr: step size before the factor sqrt(max(1, rows / columns)).
        momentum: Nesterov momentum.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step with the gradients at hand."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = []
                for weight in weights:
                    buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                    buffer.lerp_(weight.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(weight.grad, buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(weights, orthogonalize(torch.stack(updates)), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
