r"""Negatives by optimal transport: the exponential tilt, with no view used more than another.

A plan :math:`\pi` spreads the mass 1 / n of each of the n views over its negatives. Of all plans
whose columns, too, sum to 1 / n, the entropic one minimises

.. math:: \sum_{ij} \pi_{ij} c_{ij} + \varepsilon \sum_{ij} \pi_{ij} \log \pi_{ij},
          \qquad\text{so}\qquad
          q_{ij} := n \pi_{ij} = \frac{e^{-c_{ij} / \varepsilon} v_j}
                                      {\sum_k e^{-c_{ik} / \varepsilon} v_k} .

With squared distances of unit vectors, :math:`e^{-c_{ij}/\varepsilon}` is proportional to
:math:`e^{\beta s_{ij}}` with :math:`\beta = 2t / \varepsilon`: the weights of
:func:`hcl.losses.hard`, times a factor of the column. The whole (n, n) matrix is made, in
O(n^2) memory.
"""

import math
import warnings
from typing import NamedTuple, Unpack

import torch
from scipy import sparse
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor
from torch.nn import functional as F

from hcl import checks, losses
from hcl.debiasing import Clamp
from hcl.losses import Temperature
from hcl.negatives import DEFAULTS, Among
from hcl.tiles import wide

QUICK = 10  # rounds between two in log space


class Plan(NamedTuple):
    """What :func:`sinkhorn` found.

    Args:
        log_weights: (n, n) log of q, n times the plan: its rows sum to one.
        log_columns: (n,) log of the factors v, their mean zero.
        iterations: how many there were.
        error: the largest difference of a column's sum from one.
    """

    log_weights: Tensor
    log_columns: Tensor
    iterations: int
    error: float


@torch.no_grad()
def squared_distances(z1: Tensor, z2: Tensor) -> Tensor:
    r"""Cost of moving between views, :math:`\|z_i - z_j\|^2`, infinite for views of one image.

    z1, z2: (B, d), B >= 2, normalised inside; row i of one is the positive of row i of the other.
    Returns (2B, 2B), for cat([z1, z2]), in float64.

    Source: Jiang et al. 2021 (optimal transport), the released code.
    Raises: ValueError, TypeError: as :func:`hcl.losses.nt_xent`.

    >>> z = torch.eye(2)
    >>> squared_distances(z, z)[0]
    tensor([inf, 2., inf, 2.], dtype=torch.float64)
    """
    checks.batch(z1, z2, 1.0, None, "negative", DEFAULTS)
    checks.enough(len(z1), None, DEFAULTS)
    both = torch.cat([z1, z2])
    z = F.normalize(both.to(wide(both)), dim=1)
    image = torch.arange(len(z1), device=z.device).repeat(2)
    cost = (2 - 2 * z @ z.T).clamp(min=0)  # a rounding below zero
    return cost.masked_fill(image[:, None] == image, math.inf)


@torch.no_grad()
def sinkhorn(cost: Tensor, *, eps: float, tol: float = 1e-6, max_iter: int = 1000) -> Plan:
    r"""The entropic plan between n points and themselves, in log space, so for any eps.

    Args:
        cost: (n, n) floating point, inf where nothing may move.
        eps: > 0, the weight of the entropy: small ones leave the cheapest plan, large ones all
            plans' mean.
        tol: stop when no column's sum is further from one.
        max_iter: rounds of one scaling of the columns and one of the rows. Small eps need many.

    Returns: a :class:`Plan`; rows sum to one exactly, columns up to its ``error``. Where that is
    above tol after max_iter rounds, a RuntimeWarning says so.

    Source: Sinkhorn's algorithm, as Cuturi 2013 uses it; the rounds between those in log space are
    products with the plan so far (as Schmitzer 2019 stabilises it), which changes speed only.
    Raises: ValueError: eps, tol or max_iter out of range, a cost that is not square or has NaN or
    -inf, or whose finite entries no plan with these sums can use.

    >>> inf = float("inf")
    >>> cost = torch.tensor([[inf, 1.0, 5.0], [1.0, inf, 2.0], [5.0, 2.0, inf]])
    >>> sinkhorn(cost, eps=0.5).log_weights.exp()[0]  # three points: the columns leave no choice
    tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    _check(cost, eps, tol, max_iter)
    a = -cost.to(wide(cost)) / eps  # (n, n) log of the kernel
    if (a.isinf() & cost.isfinite()).any():
        raise ValueError(f"eps={eps}: cost / eps is too large for doubles, a larger eps would do")
    rows = columns = a.new_zeros(len(a))
    rounds = 0
    while True:
        columns = -(a + rows[:, None]).logsumexp(dim=0)
        rows = -(a + columns).logsumexp(dim=1)
        log_q = a + rows[:, None] + columns
        q, rounds = log_q.exp(), rounds + 1
        error = (q.sum(dim=0) - 1).abs().max().item()
        if error <= tol or rounds >= max_iter:
            break
        quick = min(QUICK, max_iter - rounds - 1)
        more_rows, more_columns = _rounds(q, quick)
        rows, columns, rounds = rows + more_rows, columns + more_columns, rounds + quick
    if error > tol:
        _feasible(cost)
        warnings.warn(
            f"after max_iter={max_iter} rounds a column's sum is off by {error:.1e}, more than "
            f"tol={tol:g}: more rounds, or an eps above {eps:g}, would do",
            RuntimeWarning,
            stacklevel=3,
        )
    return Plan(log_q, columns - columns.mean(), rounds, error)


def _rounds(q: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Rounds by products with the plan so far, much quicker; none where doubles do not reach."""
    u = v = q.new_ones(len(q))
    for _ in range(number):
        v = 1 / (u @ q)
        u = 1 / (q @ v)
    log_u, log_v = u.log(), v.log()
    if not (log_u.isfinite().all() and log_v.isfinite().all()):
        return torch.zeros_like(u), torch.zeros_like(v)
    return log_u, log_v


def transported(
    z1: Tensor,
    z2: Tensor,
    *,
    eps: float = 0.7,
    temperature: Temperature = 0.5,
    tau_plus: float = 0.0,
    clamp: Clamp = "scaled",
    Q: float | None = None,
    tol: float = 1e-6,
    max_iter: int = 1000,
    **among: Unpack[Among],
) -> Tensor:
    r"""Contrastive loss whose negatives are weighted by an optimal transport plan.

    .. math::
        \ell_i = -\log \frac{e^{p_i}}{e^{p_i} + \mathrm{Ng}_i}, \qquad
        \mathrm{Ng}_i = \max\Big\{ \frac{Q}{1-\tau^+}
        \Big( \sum_j q_{ij} e^{s_{ij}} - \tau^+ e^{p_i} \Big), Q e^{-1/t} \Big\}, \qquad
        q = 2B\, \pi .

    Args:
        z1, z2, temperature, tau_plus, clamp, Q, among: as in :func:`hcl.losses.weighted`; of
            ``among``, what adds candidates or leaves some out does not go with a plan.
        eps: > 0; 2 t / eps takes the place of beta.
        tol, max_iter: see :func:`sinkhorn`.

    Returns: scalar, the mean over the 2B anchors. No gradient flows through the plan.

    Source: Jiang et al. 2021 (optimal transport), the released code, where eps is ``reg``.
    Raises: ValueError, TypeError: as :func:`hcl.losses.weighted` and :func:`sinkhorn`.

    >>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    >>> even = transported(z1, z2, eps=1e6)  # so much entropy that all negatives weigh the same
    >>> torch.allclose(even, losses.nt_xent(z1, z2))
    True
    """
    for name in ("queue", "synthetic", "cross_modal", "gather"):
        if among.get(name, DEFAULTS[name]) is not DEFAULTS[name]:
            raise ValueError(f"{name}: a plan is between the views of one batch, leave it out")
    if among.get("normalize", True) is not True:
        raise ValueError("normalize=False: the cost is that of unit rows, leave it out")
    plan = sinkhorn(squared_distances(z1, z2), eps=eps, tol=tol, max_iter=max_iter)

    def log_weights(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return plan.log_weights[i[:, None], j].to(s)

    return losses.weighted(
        z1, z2, log_weights, temperature=temperature, tau_plus=tau_plus, clamp=clamp, Q=Q, **among
    )


def check_eps(eps: float) -> None:
    """Refuse an eps that is no positive number."""
    checks.number("eps", eps, "must be positive (the released code has 0.7)", above=0)


def _check(cost: Tensor, eps: float, tol: float, max_iter: int) -> None:
    check_eps(eps)
    checks.number("tol", tol, "must be positive", above=0)
    if max_iter < 1:
        raise ValueError(f"max_iter={max_iter}: at least one round would do")
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not len(cost):
        raise ValueError(f"cost has shape {tuple(cost.shape)}: (n, n) with n >= 1 would do")
    if (cost.isnan() | (cost == -math.inf)).any():
        raise ValueError("cost has NaN or -inf: finite numbers, and inf for what may not be")
    finite = cost.isfinite()
    for name, some in (("row", finite.any(dim=1)), ("column", finite.any(dim=0))):
        if not some.all():
            raise ValueError(f"cost: {name} {int(some.int().argmin())} has no finite entry")


def _feasible(cost: Tensor) -> None:
    """Refuse a pattern without a permutation: then no plan has these sums (Birkhoff, König)."""
    pattern = sparse.csr_matrix(cost.isfinite().cpu().numpy())
    matched = int((maximum_bipartite_matching(pattern) >= 0).sum())
    if matched < len(cost):
        raise ValueError(
            f"cost: no plan has equal sums, since at most {matched} of the {len(cost)} points can "
            "be paired with different negatives: fewer inf would do"
        )
