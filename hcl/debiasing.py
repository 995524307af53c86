r"""log Ng from the log-sum-exps over an anchor's negatives: the tilted mean, debiased and clamped.

.. math::
    \mathrm{Ng}_i = \max\Big\{\frac{Q g_i - \tau^+ Q e^{p_i}}{1 - \tau^+}, Q e^{-1/t}\Big\},
    \qquad g_i = \frac{A_i}{C_i}, \quad A_i = \sum_j e^{(1+\beta) s_{ij}},
    \quad C_i = \sum_j e^{\beta s_{ij}}

All of it in logarithms, so that nothing overflows and no small difference of large numbers is
taken but the one that debiasing is. :func:`hcl.losses.hard` explains the options.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from hcl.negatives import Batch
from hcl.tiles import wide

Clamp = Literal["scaled", "unscaled"]
Debias = Literal["released", "separate"]


def log_tilted_sums(
    batch: Batch, beta: float, detach_weights: bool, threshold: float | None = None
) -> tuple[Tensor, Tensor | float]:
    """Logarithms of A, the sum of e^((1 + beta) s), and C, of e^(beta s), over the negatives.

    threshold: over those alone whose cosine reaches it, and the hardest in any case.
    """
    if threshold is not None and threshold > -1:  # -1 keeps all, whatever rounding does
        return _log_kept_sums(batch, beta, detach_weights, threshold)
    if beta == 0:
        return batch.log_sums(1.0)[0], log_count(batch.negatives)
    log_a, log_c = batch.log_sums(1 + beta, beta)
    none = log_a == -math.inf  # without negatives A / C is 0
    log_a, log_c = log_a.masked_fill(none, 0.0), log_c.masked_fill(none, 0.0)
    if detach_weights:
        # d log A / ds is 1 + beta times the softmax; beta of that is the weights', as is log C
        attached = log_a / (1 + beta)
        log_a, log_c = attached + (log_a - attached).detach(), log_c.detach()
    return log_a.masked_fill(none, -math.inf), log_c


def _log_kept_sums(
    batch: Batch, beta: float, detach_weights: bool, threshold: float
) -> tuple[Tensor, Tensor]:
    least = threshold / batch.temperature

    def strip(s: Tensor, excluded: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = s.detach().masked_fill(excluded, -math.inf)
        # no candidates at all: every image was left out
        hardest = seen.amax(dim=1, keepdim=True) if s.shape[1] else seen.new_zeros(len(s), 1)
        kept = (seen >= hardest.clamp(max=least)) & ~excluded
        none = ~kept.any(dim=1)
        a = (beta * (s.detach() if detach_weights else s)).masked_fill(~kept, -math.inf)
        a = a.masked_fill(none[:, None], 0.0)  # -inf throughout would give NaN
        log_c = a.logsumexp(dim=1)
        log_a = (s + a).logsumexp(dim=1).masked_fill(none, -math.inf)
        return torch.stack([log_a, log_c], dim=1)

    log_a, log_c = batch.over_negatives(strip).to(batch.positives).unbind(dim=1)
    return log_a, log_c


def log_negatives(
    batch: Batch, beta: float, tau_plus: float, detach_weights: bool, debias: Debias, clamp: Clamp,
    Q: float | None, threshold: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log Ng (n,), and where a clamp decides it (n,) bool."""
    log_a, log_c = log_tilted_sums(batch, beta, detach_weights, threshold)
    log_q = math.log(batch.others if Q is None else Q)
    if debias == "released" or tau_plus == 0 or beta == 0:
        return released(log_a - log_c, batch, tau_plus, clamp, log_q)
    weight = beta * (batch.positives.detach() if detach_weights else batch.positives)
    assert isinstance(log_c, Tensor)  # as beta > 0
    return separate(log_a, log_c, weight, batch, beta, tau_plus, clamp, log_q)


def released(
    log_g: Tensor, batch: Batch, tau_plus: float, clamp: Clamp, log_q: float | Tensor
) -> tuple[Tensor, Tensor]:
    """log Ng from the log of the weighted mean g, and where the clamp decides it."""
    if tau_plus == 0 and (clamp == "scaled" or (isinstance(log_q, float) and log_q >= 0)):
        # a weighted mean of unit rows' terms never falls below e^(-1/t)
        return log_q + log_g, torch.zeros_like(log_g, dtype=torch.bool)
    floor = -batch.bound - (log_q if clamp == "unscaled" else 0)
    log_difference, bound = log_minus(log_g, _log(tau_plus) + batch.positives)
    log_difference = log_difference - math.log1p(-tau_plus)
    bound = bound | (log_difference < floor)
    return log_q + torch.where(bound, floor, log_difference), bound


def separate(
    log_a: Tensor, log_c: Tensor, weight: Tensor, batch: Batch, beta: float,
    tau_plus: float, clamp: Clamp, log_q: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log Ng with both sums debiased, and where any of the clamps decides it."""
    most, log_m = batch.bound, math.log(batch.others)
    means, bounds = [], []
    for power, log_sum, log_term in (
        (1 + beta, log_a, batch.positives + weight),
        (beta, log_c, weight),
    ):
        mean, bound = log_minus(log_sum - log_m, math.log(tau_plus) + log_term)
        least = math.log1p(-tau_plus) - power * most
        bound = bound | (mean < least)
        means.append(torch.where(bound, least, mean))
        bounds.append(bound)
    log_g = means[0] - means[1]
    least = -most - (log_q if clamp == "unscaled" else 0)
    low, high = log_g < least, log_g > most
    log_g = torch.where(low, least, torch.where(high, most, log_g))
    return log_q + log_g, bounds[0] | bounds[1] | low | high


def log_minus(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """log(e^x - e^y), and where there is none, as y >= x; the value there means nothing."""
    gap = y - x
    none = ~(gap < 0)
    safe = gap.masked_fill(none, -1.0)  # keeps NaN out of the branch that is not taken
    return x + torch.log(-torch.expm1(safe)), none


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


def log_count(count: int | Tensor) -> Any:
    """log of a number of negatives, 0 where there are none."""
    if isinstance(count, int):
        return math.log(max(count, 1))
    return count.to(wide(count)).clamp(min=1).log()
