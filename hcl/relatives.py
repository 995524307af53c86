r"""Losses of other papers in a few lines each: other weights over the negatives of an anchor.

A loss whose negatives are weighted is :func:`hcl.losses.weighted` with a function that gives the
log-weights. What its relatives put there, for an anchor's N negatives with scores s and their
empirical distribution function F:

=======================================  =====================================  ====================
loss                                     weight of a negative                   source
=======================================  =====================================  ====================
:func:`hcl.losses.decoupled`             1, no positive in the denominator      Yeh et al. 2022
:func:`ring`                             1 in a band of the ranks of s, else 0  Wu et al. 2021
:func:`bayesian`                         posterior of a true negative, given F  Liu et al. 2023
:func:`hcl.transport.transported`        :math:`e^{\beta s} v_j`, v by          Jiang et al. 2021
                                         Sinkhorn
:func:`hcl.losses.hard`, ``threshold``   1 where s reaches a threshold, else 0  Jiang et al. 2022
:func:`hcl.losses.hard`                  :math:`e^{\beta s}`                    Robinson et al. 2021
=======================================  =====================================  ====================

The two losses here look at the order of the scores alone, so their weights have no gradient and do
not change with the temperature. They sort strips of rows: O(N log N) for an anchor.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from hcl import checks, losses
from hcl.losses import Temperature
from hcl.negatives import Among
from hcl.tiles import wide


def ring(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.5,
    inner: float = 0.1,
    outer: float = 0.1,
    **among: Unpack[Among],
) -> Tensor:
    r"""Ring: the negatives are those similar to the anchor, but for the most similar of them.

    .. math::
        \ell_i = -\log \frac{e^{p_i}}{e^{p_i} + \sum_{j \in R_i} e^{s_{ij}}}, \qquad
        R_i = \{ j : \lfloor \mathrm{inner} \cdot k \rfloor < \mathrm{rank}_i(j) \le k \}, \quad
        k = \lfloor \mathrm{outer} \cdot N \rfloor,

    with rank 1 the most similar of the anchor's N negatives. So ``inner`` is a share of what
    ``outer`` keeps.

    Args:
        z1, z2, temperature, among: as in :func:`hcl.losses.nt_xent`.
        inner: in [0, 1): the share of the band that is cut off. Zero is the paper's "Ball". A small
            one cuts nothing off where the band has few negatives.
        outer: in (0, 1]: the share of the negatives that the band is taken from.

    Returns: scalar, the mean over the 2B anchors; of equal scores at an end of the band some count.

    Source: Wu et al. 2021 (Ring), the released code, whose queue has 65536 negatives and whose
    defaults these are. Over the negatives of a batch is our reading: the code's own such variant
    has outer = 0.5 in its settings, and counts the anchor and its positive among the candidates.
    Raises: ValueError, TypeError: as :func:`hcl.losses.nt_xent`, :func:`check_ring`, and a batch
    whose band is empty.

    >>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    >>> torch.allclose(ring(z1, z2, inner=0.0, outer=1.0), losses.nt_xent(z1, z2))
    True
    """
    check_ring(inner, outer)

    def log_weights(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
        first, last = _band(_negatives(s, among), inner, outer)
        near = s.detach().topk(last, dim=1).indices[:, first:]
        return torch.full_like(s, -math.inf).scatter(1, near, 0.0)

    return losses.weighted(z1, z2, log_weights, temperature=temperature, **among)


def check_ring(inner: float, outer: float) -> None:
    """The options of :func:`ring`, as far as they can be judged without a batch.

    Raises: ValueError, TypeError: inner not in [0, 1), outer not in (0, 1].

    >>> check_ring(0.0, 1.0)
    """
    wanted = "a share in [0, 1) (released: 0.1; the paper's Ball: 0)"
    checks.number("inner", inner, wanted)
    if not 0 <= inner < 1:
        raise ValueError(f"inner={inner}: {wanted}")
    wanted = "a share in (0, 1] (released: 0.1)"
    checks.number("outer", outer, wanted, above=0)
    if outer > 1:
        raise ValueError(f"outer={outer}: {wanted}")


def bayesian(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.5,
    alpha: float = 0.9,
    tau_plus: float = 0.1,
    concentration: float = 0.5,
    **among: Unpack[Among],
) -> Tensor:
    r"""BCL: a negative is weighted by the probability that it is a true one, given its rank.

    .. math::
        \ell_i = -\log \frac{e^{p_i}}{e^{p_i} + N \sum_j q_{ij} e^{s_{ij}}}, \qquad
        q_{ij} \propto \omega(F_i(s_{ij})),

    with :math:`F_i` the share of the anchor's N negatives whose score is no larger, and
    :math:`\omega` of :func:`bayesian_weights`.

    Args:
        z1, z2, temperature, among: as in :func:`hcl.losses.nt_xent`.
        alpha, tau_plus, concentration: as in :func:`bayesian_weights`.

    Returns: scalar, the mean over the 2B anchors. No gradient flows through the weights.

    Source: Liu et al. 2023 (BCL), and the released code. That does not divide by the mean of the
    weights, which is 1 + O(1 / N), and adds 0.001 to two denominators, which here cannot be zero.
    As there, nothing is debiased by the positive and nothing is clamped.
    Raises: ValueError, TypeError: as :func:`hcl.losses.nt_xent` and :func:`check_bayesian`.

    >>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    >>> torch.allclose(bayesian(z1, z2, alpha=0.5), losses.nt_xent(z1, z2))
    True
    """
    check_bayesian(alpha, tau_plus, concentration)

    def log_weights(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
        number = _negatives(s, among)
        excluded = s.shape[1] - number  # at -inf, so the first in order
        ordered, places = s.detach().sort(dim=1)
        up_to = torch.searchsorted(ordered, ordered, right=True) - excluded
        F = torch.arange(number + 1, dtype=wide(s), device=s.device) / number
        weights = bayesian_weights(F, alpha=alpha, tau_plus=tau_plus, concentration=concentration)
        return torch.empty_like(ordered).scatter(1, places, weights.log().to(s)[up_to])

    return losses.weighted(z1, z2, log_weights, temperature=temperature, **among)


def bayesian_weights(
    F: Tensor, *, alpha: float = 0.9, tau_plus: float = 0.1, concentration: float = 0.5
) -> Tensor:
    r"""Weights of BCL for values F of the distribution function of an anchor's scores.

    Take two draws of a law with distribution function :math:`\Phi`. The score of a true negative is
    the smaller one with probability alpha and the larger one otherwise, that of a false negative
    the other way round, so that relative to the law their densities are

    .. math::
        f^-(\Phi) = 2 \alpha (1 - \Phi) + 2 (1 - \alpha) \Phi, \qquad
        f^+(\Phi) = 2 (1 - \alpha) (1 - \Phi) + 2 \alpha \Phi .

    A candidate is a false negative with probability :math:`\tau^+`. This gives :math:`\Phi` from F:

    .. math::
        F = 2 A \Phi + (1 - 2A) \Phi^2, \quad A = \tau^- \alpha + \tau^+ (1 - \alpha)
        \quad\Rightarrow\quad \Phi = \frac{F}{A + \sqrt{A^2 + (1 - 2A) F}} .

    With b the concentration,

    .. math::
        \omega = \frac{h(\Phi)}{\tau^- f^-(\Phi) + \tau^+ f^+(\Phi)}, \qquad
        h = \frac{2 \alpha (1 - b) (1 - \Phi) + 2 (1 - \alpha) b \Phi}
                 {\alpha (1 - b) + (1 - \alpha) b} .

    At b = 0.5, h is :math:`f^-` and :math:`\tau^- \omega` the posterior of a true negative: weights
    fall with similarity. At b = 1, h is the density of the larger draw: they rise.

    Args:
        F: (...) floating point, in [0, 1].
        alpha: in [0.5, 1), the paper's estimate of the encoder's AUC. At 0.5 and concentration 0.5
            all weigh 1.
        tau_plus: class prior in [0, 1).
        concentration: in [0.5, 1], hardness. The released code calls it beta; its README has 1.

    Returns: (...) weights, their mean over F in [0, 1] is one.

    Source: Liu et al. 2023 (BCL) and the released code; this form of the root is ours.
    Raises: ValueError, TypeError: as :func:`check_bayesian`.

    >>> bayesian_weights(torch.tensor([0.0, 0.5, 1.0]), alpha=0.9, tau_plus=0.1)
    tensor([1.0976, 1.0394, 0.5556])
    """
    check_bayesian(alpha, tau_plus, concentration)
    A = (1 - tau_plus) * alpha + tau_plus * (1 - alpha)
    Phi = F / (A + (A**2 + (1 - 2 * A) * F).sqrt())
    low, high = alpha * (1 - concentration), (1 - alpha) * concentration
    wanted = (low * (1 - Phi) + high * Phi) / (low + high)
    weights: Tensor = wanted / (A * (1 - Phi) + (1 - A) * Phi)
    return weights


def check_bayesian(alpha: float, tau_plus: float = 0.1, concentration: float = 0.5) -> None:
    """The options of :func:`bayesian`.

    Raises: ValueError, TypeError: alpha not in [0.5, 1), tau_plus not in [0, 1), concentration not
    in [0.5, 1].

    >>> check_bayesian(0.9, 0.1)
    """
    wanted = "an AUC in [0.5, 1) (released, for CIFAR-10: 0.9)"
    checks.number("alpha", alpha, wanted)
    if not 0.5 <= alpha < 1:
        raise ValueError(f"alpha={alpha}: {wanted}")
    checks.tilt(0.0, tau_plus)
    wanted = "hardness in [0.5, 1]; 0.5 only removes bias"
    checks.number("concentration", concentration, wanted)
    if not 0.5 <= concentration <= 1:
        raise ValueError(f"concentration={concentration}: {wanted}")


def _negatives(s: Tensor, among: Among) -> int:
    """How many an anchor has: all candidates but itself, where it is one, and its positive."""
    return s.shape[1] - (1 if among.get("cross_modal") else 2)


def _band(negatives: int, inner: float, outer: float) -> tuple[int, int]:
    """Ranks, from 0: from the first on, the last not included."""
    last = _floor(outer * negatives)
    if not last:
        raise ValueError(
            f"outer={outer} of {negatives} negatives leaves none: outer of at least "
            f"1/{negatives}, or {math.ceil(1 / outer)} negatives, would do"
        )
    return min(_floor(inner * last), last - 1), last


def _floor(x: float) -> int:
    return math.floor(x + 1e-9)  # 0.29 * 100 is 28.999…
