r"""Synthetic hard negatives: mixtures of an anchor's hardest negatives, and of them and the anchor.

With unit rows, an anchor q and the K negatives n most similar to it,

.. math::
    h = \frac{\alpha n_i + (1 - \alpha) n_j}{\|\cdot\|}, \; \alpha \sim U(0, 1), \; i \ne j
    \qquad \text{and} \qquad
    h = \frac{a q + (1 - a) n_j}{\|\cdot\|}, \; a \sim U(0, \tfrac12)

are more negatives of this anchor alone. Every loss takes them as its option ``synthetic``:

* MoCHi is ``nt_xent(z1, z2, synthetic=mixtures(z1, z2, ...))``, here over a batch where the paper
  has a queue: our reading;
* SSCL is ``hard(z1, z2, synthetic=mixtures(z1, z2, ...))``, the estimator of HCL over the real and
  the synthetic negatives together: our reading.

A mixture with the anchor is harder than the real negative it is made of. A mixture of negatives of
the anchor's own class is a false negative too, one of a false and a true negative partly so. MoCHi
makes none in its first epochs: that is for a trainer to do.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hcl import checks
from hcl.negatives import DEFAULTS
from hcl.units import EPSILON


def mixtures(
    z1: Tensor,
    z2: Tensor,
    *,
    hardest: int,
    between: int = 0,
    with_anchor: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Each anchor's own synthetic negatives, the option ``synthetic`` of the losses.

    Args:
        z1, z2: (B, d) floating point, two views of B images; normalised inside.
        hardest: K, how many negatives are mixed: the most similar of the other images' 2B - 2
            views. 1 to 2B - 2; 2 or more with ``between``.
        between: S, mixtures of two of the K, at most K (K - 1) / 2. Their pairs are distinct, and
            each pair is equally likely.
        with_anchor: S', mixtures of the anchor and one of the K, which may repeat.
        generator: draws the pairs and the shares; on the device of z1.

    Returns:
        (2B, S + S', d) unit rows of the dtype of z1, without gradient: of z1's anchors, then of
        z2's; the S mixtures of two negatives first. Opposite rows in equal shares give a zero row.

    Raises: ValueError: what :func:`check` refuses, shapes that do not fit, NaN or infinity,
    ``hardest`` above 2B - 2. TypeError: no whole numbers, no floating point.

    Source: Kalantidis et al. 2020 (MoCHi), whose pairs may repeat; Dong et al. 2023 (SSCL) mix
    negatives too.

    >>> z = torch.eye(3)
    >>> h = mixtures(z, z, hardest=4, between=5, with_anchor=2)
    >>> h.shape, bool(h.norm(dim=2).allclose(torch.ones(6, 7)))
    (torch.Size([6, 7, 3]), True)
    >>> (h[0, :5, 0] == 0).all(), (h[0, 5:, 0] > 0).all()  # without the anchor, and with it
    (tensor(True), tensor(True))
    """
    check(hardest=hardest, between=between, with_anchor=with_anchor)
    checks.batch(z1, z2, 1.0, None, "negative", DEFAULTS)
    if hardest > 2 * len(z1) - 2:
        raise ValueError(
            f"hardest={hardest}: {len(z1)} images leave an anchor {2 * len(z1) - 2} negatives; "
            "take fewer of them, or a larger batch"
        )
    with torch.no_grad(), torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2])
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        near = _hardest(z, hardest)
        kinds = _between(near, between, generator), _with_anchor(near, with_anchor, generator)
        pairs, share = (torch.cat(parts, dim=1) for parts in zip(*kinds, strict=True))
        return _mix(z, pairs, share.to(z)).to(z1.dtype)


def check(*, hardest: int, between: int, with_anchor: int) -> None:
    """Refuse what no batch makes possible; arguments and errors as in :func:`mixtures`.

    >>> check(hardest=3, between=4, with_anchor=0)
    Traceback (most recent call last):
    ValueError: between=4: more synthetic negatives than the 3 pairs of hardest=3 negatives
    """
    least = {"hardest": (hardest, 1), "between": (between, 0), "with_anchor": (with_anchor, 0)}
    for name, (value, bound) in least.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: must be a whole number, {bound} or more")
        if value < bound:
            raise ValueError(f"{name}={value}: must be {bound} or more")
    if not between + with_anchor:
        raise ValueError("between=0, with_anchor=0: nothing to make; one of them must be 1 or more")
    if between and hardest < 2:
        raise ValueError(f"hardest={hardest}: must be 2 or more to mix pairs (between={between})")
    if between > (pairs := _count(hardest)):
        raise ValueError(
            f"between={between}: more synthetic negatives than the {pairs} pairs of "
            f"hardest={hardest} negatives"
        )


def _count(k: int) -> int:
    """Unordered pairs of k things."""
    return k * (k - 1) // 2


def _hardest(z: Tensor, k: int) -> Tensor:
    """Index (2B, k) in z (2B, d) of the most similar views of other images, in no order."""
    s = z @ z.T
    for offset in (-len(z) // 2, 0, len(z) // 2):  # the anchor itself and its other view
        s.diagonal(offset).fill_(-torch.inf)
    return s.topk(k, dim=1, sorted=False).indices


def _between(near: Tensor, s: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """S distinct pairs (2B, S, 2) of the hardest (2B, K), and the share (2B, S) of the first.

    The pairs, numbered in a circle, are cut into S runs from a random start; each run gives one.
    """
    (n, k), pairs, device = near.shape, _count(near.shape[1]), near.device
    if not s:
        return near.new_empty(n, 0, 2), torch.empty(n, 0, device=device)
    run = pairs // s
    number = torch.randint(pairs, (n, 1), generator=generator, device=device)
    number = number + run * torch.arange(s, device=device)
    number += torch.randint(run, (n, s), generator=generator, device=device)
    number %= pairs
    i = number % k  # and the one number // k + 1 places on, in a circle: each pair once
    j = (i + number // k + 1) % k
    share = torch.rand(n, s, generator=generator, device=device)
    return torch.stack([near.gather(1, i), near.gather(1, j)], dim=2), share


def _with_anchor(near: Tensor, s: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Pairs (2B, S', 2) of the anchor and one of the hardest, and the anchor's share (2B, S')."""
    (n, k), device = near.shape, near.device
    j = torch.randint(k, (n, s), generator=generator, device=device)
    anchor = torch.arange(n, device=device)[:, None].expand(n, s)
    share = torch.rand(n, s, generator=generator, device=device) / 2
    return torch.stack([anchor, near.gather(1, j)], dim=2), share


def _mix(z: Tensor, pairs: Tensor, share: Tensor) -> Tensor:
    """Unit mixtures (n, S, d) of the pairs (n, S, 2) of rows of z (m, d)."""
    shares = torch.stack([share, 1 - share], dim=2)
    mixed = F.embedding_bag(  # a weighted sum of rows, without a copy of them
        pairs.view(-1, 2), z, mode="sum", per_sample_weights=shares.view(-1, 2)
    )
    norm = torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
    return mixed.div_(norm.clamp_(min=EPSILON)).view(*share.shape, -1)
