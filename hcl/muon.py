"""Muon: momentum whose matrix is replaced by the nearest orthogonal one before the step.

torch.optim.Muon (torch 2.9 and later) takes matrices alone; this one takes the filters of
convolutions too, as matrices of one row a filter.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; its singular values end in [0.7, 1.2]
ITERATIONS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix (m, n) with the same singular vectors and all singular values near one.

    Source: Jordan et al. 2024 (Muon), five Newton-Schulz iterations of a quintic.

    >>> values = torch.linalg.svdvals(orthogonalized(torch.diag(torch.tensor([3.0, 1.0, 0.2]))))
    >>> bool((values > 0.6).all() and (values < 1.3).all())
    True
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for parameters of two or more dimensions.

    Args: lr: step; an orthogonalised step of (m, n) is scaled by sqrt(max(1, m / n)). momentum,
    weight_decay (decoupled): as usual.

    Raises: ValueError: a parameter of one dimension, lr or momentum out of range.

    Source: Jordan et al. 2024 (Muon), our reading of its description.

    >>> w = nn.Parameter(torch.eye(2)); optimizer = Muon([w], lr=0.1)
    >>> w.sum().backward(); optimizer.step(); bool(w.sum() < 2)
    True
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        if not lr > 0:
            raise ValueError(f"lr={lr}: must be positive (0.02 is common)")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        params = list(params)
        if flat := [tuple(p.shape) for p in params if p.ndim < 2]:
            raise ValueError(f"params of shape {flat[0]}: Muon needs two dimensions or more")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient; a closure is called for its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = orthogonalized(update)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)
        return loss
