r"""UnReMix, our reading: negatives weighted by a mixture of three scores.

Everything here is a reconstruction. We know the abstract of the paper, a reader's notes on its
first version, and no code. For the views i and j of a batch of n = 2B unit rows z, with scores
:math:`s_{ij} = \langle z_i, z_j \rangle / t`:

.. math::
    a_{ij} &= \mathrm{softmax}_j(s_{ij}) \text{ over the negatives of } i, \\
    u_{ij} &= \langle g_i, g_j \rangle
            = \langle p_i - e_{y_i}, p_j - e_{y_j} \rangle \langle h_i, h_j \rangle, \qquad
    p_i = \mathrm{softmax}_{k \ne i}(s_{ik}), \quad y_i = \arg\max_{k \ne i} s_{ik}, \\
    r_j &= \frac{1}{n - 1} \sum_{k \ne j} (1 - \langle z_j, z_k \rangle) .

* The anchor score a says how near a negative is.
* The uncertainty u compares gradients. The task is to name the other view of i among all views;
  its pseudo-label y is what the model answers now, and :math:`g_i` is the gradient of the
  cross-entropy with that label at a linear last layer whose input is h. It is an outer product,
  so inner products of gradients need no backward pass.
* The representativeness r says how far a view is from all others.

Each is normalised over the negatives of an anchor, and

.. math::
    w_{ij} \propto \lambda_1 \mathrm{norm}(a_{ij}) + \lambda_2 \mathrm{norm}(u_{ij})
                   + \lambda_3 \mathrm{norm}(r_j), \qquad \sum_j w_{ij} = 2B - 2 .

Open, and an option where we could not settle it: how scores are normalised, the lambdas, whether
gradients flow through w, whether far or near negatives are representative, whether the loss is
debiased, and of which layer h is the input. All of it is in O(B^2) memory: about a dozen (2B, 2B)
matrices.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from hcl import checks, debiasing
from hcl.losses import Temperature
from hcl.negatives import Batch

Normalisation = Literal["minmax", "sum"]
Nearness = Literal["far", "near"]

NOISE = 64  # roundings: scores of an anchor that differ by less are equal


class Scores(NamedTuple):
    """What the weights are mixed of, for n = 2B views.

    Args:
        anchor: (n, n) a, rows sum to one over the negatives and are zero elsewhere.
        uncertainty: (n, n) u, symmetric.
        representativeness: (n,) r.
    """

    anchor: Tensor
    uncertainty: Tensor
    representativeness: Tensor


@torch.no_grad()
def scores(
    z1: Tensor, z2: Tensor, *, temperature: float = 0.5, features: Tensor | None = None
) -> Scores:
    r"""The three scores of all views, before they are normalised; see the module.

    Args:
        z1, z2: (B, d) floating point, B >= 2, normalised inside; row i of one is the positive of
            row i of the other.
        temperature: t > 0, divides the cosine similarities.
        features: (2B, d') h, for the rows of z1, then of z2, used as they are; None takes the unit
            rows z.

    Returns: :class:`Scores` for ``cat([z1, z2])``, float64 for float64 embeddings, else float32.
    Among equal scores the pseudo-label is ``torch.argmax``'s.

    Source: our reading of Tabassum et al. 2022 (UnReMix).
    Raises: ValueError, TypeError: as :func:`hcl.losses.nt_xent`; features of another shape.

    >>> scores(torch.eye(2), torch.eye(2)).anchor[0]
    tensor([0.0000, 0.5000, 0.0000, 0.5000])
    """
    batch = Batch(z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        views = _Views(batch, features)
        a, u, r = _anchor(views), _uncertainty(views), _representativeness(views)
    return Scores(_as_given(batch, a), _as_given(batch, u), _as_given(batch, r))


@torch.no_grad()
def weights(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    anchor: float = 1.0,
    uncertainty: float = 1.0,
    representativeness: float = 1.0,
    normalisation: Normalisation = "minmax",
    nearness: Nearness = "far",
    features: Tensor | None = None,
) -> Tensor:
    """The distribution over negatives, w / (2B - 2), of every anchor.

    Args: as in :func:`unremix`.

    Returns:
        (2B, 2B): rows are the anchors of z1, then of z2; each sums to one; an anchor's own column
        and its positive's are zero. Negatives may be zero, too: with "minmax" the least of all is.

    Source: our reading of Tabassum et al. 2022 (UnReMix). Raises: as :func:`unremix`.

    >>> weights(torch.eye(3), torch.eye(3))[0]  # nothing to tell the negatives apart
    tensor([0.0000, 0.2500, 0.2500, 0.0000, 0.2500, 0.2500])
    """
    shares = _shares(anchor, uncertainty, representativeness)
    check(normalisation=normalisation, nearness=nearness)
    batch = Batch(z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        w = _mixture(_Views(batch, features), shares, normalisation, nearness)
    return _as_given(batch, w)


def unremix(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.5,
    anchor: float = 1.0,
    uncertainty: float = 1.0,
    representativeness: float = 1.0,
    normalisation: Normalisation = "minmax",
    nearness: Nearness = "far",
    tau_plus: float = 0.0,
    detach_weights: bool = True,
    features: Tensor | None = None,
) -> Tensor:
    r"""UnReMix, our reading: NT-Xent whose negatives weigh what a mixture of three scores says.

    .. math:: \ell_i = -\log \frac{e^{s_{ii^+}}}{e^{s_{ii^+}} + \sum_j w_{ij} e^{s_{ij}}}

    Args:
        z1, z2, features: as in :func:`scores`.
        temperature: t > 0; a tensor of one element may learn.
        anchor, uncertainty, representativeness: the lambdas, >= 0, not all 0. They are divided by
            their sum, so 1, 1, 1 are a third each.
        normalisation: of each score over the negatives of an anchor: "minmax" moves it to [0, 1],
            "sum" moves its least value to 0 and divides by the sum. A score that is the same for
            all of them, up to rounding, is left out for that anchor; without any left, its
            negatives weigh alike.
        nearness: "far" gives more weight to negatives far from all other views, "near" to those
            near them: the order of r is turned.
        tau_plus: class prior in [0, 1); above 0 the weighted mean is debiased and clamped as in
            :func:`hcl.losses.hard`.
        detach_weights: stop the gradient through w. Otherwise it flows through all scores and
            features; pseudo-labels are constants.

    Returns:
        Scalar, the mean over the 2B anchors: float64 for float64 embeddings, else float32, also
        under autocast.

    Source: our reading of Tabassum et al. 2022 (UnReMix); debiasing it is ours.
    Raises: ValueError, TypeError: as :func:`hcl.losses.nt_xent` and :func:`check`, and for features
    of another shape.

    >>> z = torch.eye(2)
    >>> round(unremix(z, z, temperature=0.5).item(), 4)  # equal weights: as nt_xent
    0.2395
    """
    shares = _shares(anchor, uncertainty, representativeness)
    check(
        normalisation=normalisation, nearness=nearness, tau_plus=tau_plus,
        detach_weights=detach_weights,
    )  # fmt: skip
    batch = Batch(z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        views = _Views(batch, features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_weights):
            w = _mixture(views, shares, normalisation, nearness)
        log_w = w.log() if detach_weights else _log(w)
        log_g = (views.scores + log_w).logsumexp(dim=1).to(batch.positives)
        log_q = math.log(batch.others)
        log_ng, _ = debiasing.released(log_g, batch, tau_plus, "scaled", log_q)
        return batch.mean(-F.logsigmoid(batch.positives - log_ng))


def check(
    *,
    temperature: Any = 0.5,
    anchor: Any = 1.0,
    uncertainty: Any = 1.0,
    representativeness: Any = 1.0,
    normalisation: Any = "minmax",
    nearness: Any = "far",
    tau_plus: Any = 0.0,
    detach_weights: Any = True,
) -> None:
    """Refuse options of :func:`unremix` that are impossible whatever the batch.

    Raises: ValueError, TypeError: lambdas that are negative or all zero, unknown names, tau_plus
    out of [0, 1), temperature <= 0.

    >>> check(anchor=1.0, uncertainty=0.0)
    """
    checks.temperature(temperature)
    _shares(anchor, uncertainty, representativeness)
    checks.choice("normalisation", normalisation, get_args(Normalisation))
    checks.choice("nearness", nearness, get_args(Nearness))
    checks.tilt(0.0, tau_plus)
    checks.choice("detach_weights", detach_weights, (True, False))


def _shares(*lambdas: float) -> list[float]:
    """The lambdas divided by their sum."""
    for name, value in zip(Scores._fields, lambdas, strict=True):
        checks.number(name, value, "a weight of 0 or more (a third each is even)")
        if value < 0:
            raise ValueError(f"{name}={value}: a weight of 0 or more (a third each is even)")
    total = math.fsum(lambdas)
    if not 0 < total < math.inf:
        names = ", ".join(f"{n}={v}" for n, v in zip(Scores._fields, lambdas, strict=True))
        raise ValueError(f"{names}: their sum is {total}, one of them must be above 0, say 1")
    return [value / total for value in lambdas]


class _Views:
    """The views of a batch in its order: cosines and scores (n, n), their features if given.

    ``negatives`` (n, n) is 1 at negatives, else 0; ``away`` is 0 there, else infinite.
    """

    def __init__(self, batch: Batch, features: Tensor | None):
        (side,) = batch.sides
        z = side.x if batch.root is None else side.x / batch.root.to(side.x)
        self.cosines = _Products.apply(z)
        self.scores = self.cosines * batch.bound
        excluded = side.own[:, None] == side.own
        self.negatives = (~excluded).to(z)
        self.away = torch.zeros_like(self.negatives).masked_fill_(excluded, math.inf)
        self.features = None
        if features is not None:
            checks.embeddings("features", features)
            if len(features) != len(z) or features.device != z.device:
                raise ValueError(
                    f"features {tuple(features.shape)} on {features.device}: must be "
                    f"({len(z)}, d) on {z.device}, for the rows of z1, then of z2"
                )
            self.features = features.to(z)[batch.rows(side)]


class _Products(torch.autograd.Function):
    """x @ x.T with half of the work: above the diagonal, and copied; one product backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        n, step = len(x), max(64, -(-len(x) // 8))
        out = x.new_empty(n, n)
        for top in range(0, n, step):
            end = min(top + step, n)
            out[top:end, top:] = x[top:end] @ x[top:].T
            out[end:, top:end] = out[top:end, end:].T
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = (grad + grad.T) @ x
        return gradient


def _anchor(views: _Views) -> Tensor:
    """a (n, n)."""
    return (views.scores - views.away).softmax(dim=1)


def _uncertainty(views: _Views) -> Tensor:
    """u (n, n)."""
    h = views.features
    p = views.scores.clone().fill_diagonal_(-math.inf).softmax(dim=1)
    y = p.argmax(dim=1, keepdim=True)
    others = p.scatter(1, y, 0.0)
    g = others.scatter(1, y, -others.sum(dim=1, keepdim=True))  # p_y - 1 without a cancellation
    products: Tensor = _Products.apply(g)
    return products * (views.cosines if h is None else _Products.apply(h))


def _representativeness(views: _Views) -> Tensor:
    """r (n,)."""
    cosines = views.cosines
    return 1 - (cosines.sum(dim=1) - cosines.diagonal()) / (len(cosines) - 1)


def _mixture(
    views: _Views, shares: list[float], normalisation: Normalisation, nearness: Nearness
) -> Tensor:
    """w (n, n), rows sum to one; scores whose lambda is zero are not made."""
    parts = []
    for share, score in zip(shares, (_anchor, _uncertainty, _representativeness), strict=True):
        if not share:
            continue
        x = score(views)
        size = _size(x)
        if score is _representativeness and nearness == "near":
            x = -x
        parts.append(_normalised(x, size, views, normalisation, share))
    w = functools.reduce(torch.add, parts)
    w = w + (w.sum(dim=1, keepdim=True) == 0) * views.negatives  # all alike where none is left
    return w / w.sum(dim=1, keepdim=True)


def _size(x: Tensor) -> Tensor:
    """Of what a score was summed, (n, 1) or (1, 1): its rounding error is in proportion."""
    if x.ndim == 1:  # cosines
        return x.new_ones(1, 1)
    # of an inner product, the lengths; the anchor score has no diagonal, nor a cancellation
    length = x.detach().diagonal().clamp(min=0).sqrt()
    return (length * length.max())[:, None]


def _normalised(
    x: Tensor, size: Tensor, views: _Views, normalisation: Normalisation, share: float
) -> Tensor:
    """Its share times x, (n, n) or (n,) for all anchors alike; 0 where all negatives are equal."""
    low = (x + views.away).amin(dim=1, keepdim=True)
    high = (x - views.away).amax(dim=1, keepdim=True)
    about, spread = torch.finfo(x.dtype), high - low
    noise = NOISE * about.eps * torch.maximum(size, high.detach().abs())
    equal = spread <= noise.clamp(min=about.tiny**0.5)  # whose square can still be divided by
    x = (x - low) * views.negatives
    total = spread if normalisation == "minmax" else x.sum(dim=1, keepdim=True)
    return x * (share / total.masked_fill(equal, 1.0)).masked_fill(equal, 0.0)


def _log(w: Tensor) -> Tensor:
    """log w; weights of 0 stay so whatever happens to the scores nearby, so have no gradient."""
    none = w == 0
    return w.masked_fill(none, 1.0).log().masked_fill(none, -math.inf)


def _as_given(batch: Batch, x: Tensor) -> Tensor:
    """(n,) or (n, n) in the order of cat([z1, z2])."""
    (side,) = batch.sides
    back = batch.rows(side).argsort()
    return x[back] if x.ndim == 1 else x[back[:, None], back]
