r"""MoCo: negatives from a queue of past keys, made by a slowly moving copy of the encoder.

A step embeds one view by the encoder (the query, with gradient) and the other by the copy (the
key, without); the negatives are the K keys of the steps before. Hardness weighs them as it weighs
those of a batch:

.. math::
    \ell_i = \log\Big(1 + \frac{\mathrm{Ng}_i}{e^{p_i}}\Big), \qquad
    \mathrm{Ng}_i = \max\Big\{\frac{K}{1-\tau^+}\Big(\sum_{k=1}^K q_{ik} e^{s_{ik}}
    - \tau^+ e^{p_i}\Big), K e^{-1/t}\Big\}, \qquad q_{ik} \propto e^{\beta s_{ik}} .
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcl import checks
from hcl.debiasing import log_minus

SHARES = 4  # parts of a batch of keys, each with BatchNorm statistics of its own


def queue_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 0.0,
    tau_plus: float = 0.0,
) -> Tensor:
    """The mean loss of B queries, each with its key as positive and the queue as negatives.

    Args:
        query, key: (B, d) floating point, normalised inside; no gradient reaches the keys.
        queue: (K, d), normalised inside.
        temperature, beta, tau_plus: as in :func:`hcl.losses.hard`; beta = tau_plus = 0 is MoCo's.

    Returns: scalar.

    Raises: ValueError: shapes that do not fit, a parameter out of its range.

    Source: He et al. 2020 (MoCo), with the weights of Robinson et al. 2021 over the queue: our
    reading of their MoCo experiment, whose code is not released.

    >>> z = torch.eye(2)
    >>> round(queue_loss(z, z, -z, temperature=1.0).item(), 4)  # log(1 + (e^-1 + e^0) / e)
    0.4076
    """
    checks.temperature(temperature)
    checks.tilt(beta, tau_plus)
    if query.shape != key.shape or query.ndim != 2 or queue.shape[1:] != query.shape[1:]:
        shapes = ", ".join(str(tuple(z.shape)) for z in (query, key, queue))
        raise ValueError(f"query, key, queue have shapes {shapes}: give (B, d), (B, d), (K, d)")
    if not len(query) or not len(queue):
        raise ValueError(f"query, queue have {len(query)} and {len(queue)} rows: give 1 or more")
    query, key, queue = (F.normalize(z.float(), dim=1) for z in (query, key.detach(), queue))
    p = (query * key).sum(dim=1) / temperature  # (B,)
    s = query @ queue.T / temperature  # (B, K)
    log_g = ((1 + beta) * s).logsumexp(dim=1) - (beta * s).logsumexp(dim=1)
    if tau_plus:
        difference, none = log_minus(log_g, math.log(tau_plus) + p)
        difference = difference - math.log1p(-tau_plus)
        log_g = torch.where(none, -math.inf, difference).clamp(min=-1 / temperature)
    return F.softplus(math.log(len(queue)) + log_g - p).mean()


class MomentumQueue(nn.Module):
    """The moving copy of a model and its queue of keys; all of it is in the state_dict.

    Args: model: maps a batch to (B, d); size: K, how many keys are kept; momentum: m in [0, 1) of
    ``copy = m * copy + (1 - m) * model``. The queue begins as random unit rows, as MoCo's does.

    Source: He et al. 2020, algorithm 1. Their keys are shuffled between GPUs, so that BatchNorm
    cannot tell which key belongs to which query; here a batch of keys is shuffled and embedded in
    four parts.

    >>> keys = MomentumQueue(nn.Linear(3, 2), size=5, dim=2, momentum=0.9)
    >>> keys.push(torch.ones(4, 2)); keys.push(torch.zeros(4, 2)); keys.queue[:, 0].int().tolist()
    [0, 0, 0, 1, 0]
    """

    queue: Tensor
    place: Tensor

    def __init__(self, model: nn.Module, *, size: int, dim: int, momentum: float = 0.99):
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size}: the queue must hold 1 key or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        self.copy, self.momentum = copy.deepcopy(model).requires_grad_(False), momentum
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("queue", F.normalize(torch.randn(size, dim, generator=generator)))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def keys(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Unit keys (B, d) of a batch (B, ...), embedded by the copy in shuffled parts."""
        self.copy.train()
        order = torch.randperm(len(x), generator=generator, device=generator.device)
        shares = min(SHARES, len(x) // 2) or 1
        z = torch.cat([self.copy(part) for part in x[order].tensor_split(shares)])
        found = torch.empty_like(z)
        found[order] = z
        return F.normalize(found.float(), dim=1)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Put keys (B, d) in place of the oldest."""
        size = len(self.queue)
        keys = keys[-size:].to(self.queue)
        where = (self.place + torch.arange(len(keys), device=self.queue.device)) % size
        self.queue[where] = keys
        self.place.copy_((self.place + len(keys)) % size)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move the copy towards the model, weight by weight."""
        for mine, theirs in zip(self.copy.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - self.momentum)
