r"""Four losses of one batch that differ in their negatives, and the assumption that orders them.

With unit views z, scores s = cosine / t, an anchor's other view as its only positive, and a weight
Q on the negatives, :math:`\ell = \log(1 + Q\,\mathbb E_q[e^s] / e^p)`, where q is

=======  ===================================================================
loss     distribution q of the negatives
=======  ===================================================================
UCL      all other images' views, alike
H-UCL    all other images' views, tilted by :math:`e^{\beta s}`
SCL      views of other labels, alike
H-SCL    views of other labels, tilted by :math:`e^{\beta s}`
=======  ===================================================================

H-SCL <= H-UCL holds for an anchor if and only if its negatives of its own label have the larger
tilted mean of :math:`e^s`: the mean over all negatives is then a mixture of a larger and a smaller
one.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hcl import checks, losses
from hcl.negatives import DEFAULTS


@torch.no_grad()
def four_losses(
    z1: Tensor, z2: Tensor, labels: Tensor, *, temperature: float = 0.5, beta: float = 1.0
) -> dict[str, float]:
    """UCL, H-UCL, SCL and H-SCL of one batch, without debiasing and clamp, Q = 2B - 2.

    z1, z2: (B, d), row i of one the positive of row i of the other; labels: (B,) integers, an
    image of -1 a class of its own. Keys:
    ucl, h_ucl, scl, h_scl. Anchors whose label all images share have no negatives and count 0 in
    the last two.

    Raises: ValueError, TypeError: as :func:`hcl.losses.hard_scl`.

    Source: Jiang et al. 2022 (H-SCL), the released code that compares the four losses; it too
    takes the other view as the only positive.

    >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> {name: round(value, 3) for name, value in four_losses(z, z, labels).items()}
    {'ucl': 0.594, 'h_ucl': 0.594, 'scl': 0.594, 'h_scl': 0.594}
    """
    both = _labels(z1, z2, labels, temperature, beta)
    Q = 2 * len(z1) - 2

    def supervised(tilt: float) -> float:
        def other_labels(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (tilt * s).masked_fill(both[i][:, None] == both[j], -math.inf)

        return losses.weighted(z1, z2, other_labels, temperature=temperature, Q=Q).item()

    def unsupervised(tilt: float) -> float:
        return losses.hard(z1, z2, temperature=temperature, beta=tilt, tau_plus=0.0).item()

    return {
        "ucl": unsupervised(0.0),
        "h_ucl": unsupervised(beta),
        "scl": supervised(0.0),
        "h_scl": supervised(beta),
    }


def _labels(z1: Tensor, z2: Tensor, labels: Tensor, temperature: float, beta: float) -> Tensor:
    """Labels (2B,) of both views, an unlabelled image a class of its own; refuses what is wrong."""
    checks.tilt(beta)
    checks.batch(z1, z2, temperature, labels, "negative", DEFAULTS)
    checks.enough(len(z1), None, DEFAULTS)
    own = -1 - torch.arange(len(labels), device=labels.device)
    return torch.where(labels < 0, own, labels).repeat(2)


@torch.no_grad()
def tilted_means(
    z1: Tensor, z2: Tensor, labels: Tensor, *, temperature: float = 0.5, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""log of the tilted mean of :math:`e^s` over same-label and over other-label negatives.

    z1, z2: (B, d); labels: (B,). Two (2B,) tensors for the anchors of z1, then of z2, NaN where an
    anchor has no negative of that kind:
    :math:`\log \sum_j e^{(1+\beta)s_{ij}} - \log \sum_j e^{\beta s_{ij}}`.

    Raises: ValueError, TypeError: shapes or labels that do not fit.

    Source: Jiang et al. 2022 (H-SCL), Assumption 1 as recalled, unverified: the first is at least
    the second for every anchor.
    """
    both = _labels(z1, z2, labels, temperature, beta)
    z = F.normalize(torch.cat([z1, z2]).double(), dim=1)
    image = torch.arange(len(z1), device=z.device).repeat(2)
    s = z @ z.T / temperature
    same = both[:, None] == both
    negative = image[:, None] != image
    found = []
    for kind in (same & negative, ~same):
        masked = s.masked_fill(~kind, -math.inf)
        mean = ((1 + beta) * masked).logsumexp(1)
        mean = mean - ((beta * s).masked_fill(~kind, -math.inf)).logsumexp(1)
        found.append(mean.masked_fill(~kind.any(1), math.nan))
    return found[0], found[1]


def assumption_share(
    z1: Tensor, z2: Tensor, labels: Tensor, *, temperature: float = 0.5, beta: float = 1.0
) -> float:
    """Share of anchors, in [0, 1], for which Assumption 1 holds; NaN where none can tell.

    Arguments, errors and source as :func:`tilted_means`. Anchors without a negative of either kind
    are left out.

    >>> z, labels = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2])
    >>> assumption_share(z, z, labels)  # the two of label 0 coincide
    1.0
    """
    same, other = tilted_means(z1, z2, labels, temperature=temperature, beta=beta)
    known = ~(same.isnan() | other.isnan())
    return (same >= other)[known].double().mean().item()
