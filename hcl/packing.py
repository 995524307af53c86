r"""Points far apart on the sphere: what the worst-case loss of finitely many classes asks for.

Let class c, of prior :math:`\rho(c)`, have one unit vector :math:`v_c`. With infinitely many
negatives, and without :math:`\log Q`, the loss is
:math:`\sum_c\rho(c)\log\mathbb E_{q_\beta}[e^{v_c\cdot v/t}] - 1/t`. At :math:`\beta=\infty` that
is :math:`-\frac1{2t}\sum_c\rho(c)\min_{c'\ne c}\|v_c-v_{c'}\|^2`. Its minimisers are good
packings, but not always those of the largest smallest distance (Tammes' problem), not even for
equal priors: of 13 classes on S^2 two coincide in the best that we find. Both problems are here.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hcl import checks

Anchors = Literal["mean", "worst"]

# Largest cosine of the best C points on S^2. Decimals where no short closed form is known to us.
SPHERE = {
    7: 1 - 4 / math.sqrt(3) * math.cos(7 * math.pi / 18),
    8: (2 * math.sqrt(2) - 1) / 7,
    9: 1 / 3,
    10: 0.40439432521625,  # the root in [0, 1/2] of 7 a^3 - 4 a^2 - 2 a + 1
    11: 1 / math.sqrt(5),
    12: 1 / math.sqrt(5),
    13: 0.54263648683,
    14: 0.56395030036,
}
NAMES = ("triangle", "tetrahedron", "octahedron", "square antiprism", "icosahedron")


def known_cosine(classes: int, d: int = 3) -> float:
    r"""Cosine of the largest possible smallest angle between C points on :math:`S^{d-1}`.

    Known here: :math:`-1/(C-1)` for C <= d + 1 (regular simplex); 0 for d + 2 <= C <= 2d (part of
    the cross-polytope); :math:`\cos(2\pi/C)` on the circle; C <= 14 on :math:`S^2`.

    Source: Rankin 1955 (C <= 2d). On S^2, with proofs of optimality: Fejes Tóth 1943 (12),
    Schütte and van der Waerden 1951 (7, 8, 9), Danzer 1986 (10, 11), Musin and Tarasov 2012 and
    2015 (13, 14). Decimals are of our own optimisation, which the tests repeat.
    Raises: ValueError for fewer than two points, for more than two on :math:`S^0`, and for what is
    not known here.

    >>> [round(known_cosine(C), 4) for C in (2, 4, 6, 8, 12)]
    [-1.0, -0.3333, 0.0, 0.2612, 0.4472]
    """
    _counts(classes, d)
    if classes <= d + 1:
        return -1 / (classes - 1)
    if classes <= 2 * d:
        return 0.0
    if d == 2:
        return math.cos(2 * math.pi / classes)
    if d == 3 and classes in SPHERE:
        return SPHERE[classes]
    raise ValueError(
        f"classes={classes}, d={d}: not known here; at most {max(2 * d, 14 * (d == 3))} points "
        "would do, or hcl.packing.pack for a good packing"
    )


def known_distance(classes: int, d: int = 3) -> float:
    r"""Largest possible smallest distance between C points of :math:`S^{d-1}`.

    Source, errors: as :func:`known_cosine`. On a sphere of radius r it is r times as long.

    >>> round(known_distance(4) ** 2, 4)
    2.6667
    """
    return math.sqrt(2 - 2 * known_cosine(classes, d))


def simplex(classes: int, d: int) -> Tensor:
    """The regular simplex, C unit vectors (C, d) float64 of pairwise cosine -1/(C-1).

    Raises: ValueError for C > d + 1, where there is none.

    >>> v = simplex(3, 5)
    >>> (v @ v.T).round(decimals=6).tolist()[0]
    [1.0, -0.5, -0.5]
    """
    _counts(classes, d)
    if classes > d + 1:
        raise ValueError(
            f"classes={classes}: a regular simplex in {d} dimensions has at most {d + 1} points"
        )
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    axes = torch.linalg.eigh(centred).eigenvectors[
        :, 1:
    ]  # of eigenvalue 1: orthogonal to (1 ... 1)
    return F.pad(F.normalize(axes, dim=1), (0, d - classes + 1))


def configuration(name: str) -> Tensor:
    """A best packing on S^2 by its name, (C, 3) float64, exact up to rounding.

    name: one of `NAMES`. Raises: ValueError for another.

    >>> {name: len(configuration(name)) for name in NAMES[2:]}
    {'octahedron': 6, 'square antiprism': 8, 'icosahedron': 12}
    """
    checks.choice("name", name, NAMES)
    if name in NAMES[:2]:
        return simplex(3 + NAMES.index(name), 3)
    eye = torch.eye(3, dtype=torch.float64)
    if name == "octahedron":
        return torch.cat([eye, -eye])
    if name == "icosahedron":
        golden = (1 + math.sqrt(5)) / 2
        ends = [[0, a, b * golden] for a in (1, -1) for b in (1, -1)]
        v = torch.tensor(ends, dtype=torch.float64)
        return F.normalize(torch.cat([v.roll(k, 1) for k in range(3)]), dim=1)
    height = math.sqrt(SPHERE[8])  # both rings: -> within a ring the cosine is height^2
    turn = torch.arange(8, dtype=torch.float64) * math.pi / 4
    radius = math.sqrt(1 - height**2)
    up = torch.tensor([height, -height], dtype=torch.float64).repeat(4)
    return torch.stack([radius * turn.cos(), radius * turn.sin(), up], dim=1)


def nearest_cosines(v: Tensor) -> Tensor:
    """Cosine of each point with the nearest other one; (…, C, d) to (…, C).

    Raises: ValueError, TypeError for less than two points, NaN, or a vector of length zero.

    >>> nearest_cosines(configuration("octahedron")).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    return _cosines(v).amax(dim=-1)


def smallest_distance(v: Tensor) -> float:
    """The smallest distance between two of the points (C, d), once normalised.

    Raises: as :func:`nearest_cosines`.

    >>> round(smallest_distance(configuration("octahedron")) ** 2, 6)
    2.0
    """
    return math.sqrt(max(0.0, 2 - 2 * nearest_cosines(v).max().item()))


def contacts(v: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """The pairs c < c' at the smallest distance, (n, 2): the edges of the picture.

    tolerance: on the cosine. Raises: as :func:`nearest_cosines`.

    >>> len(contacts(configuration("icosahedron")))
    30
    """
    cosines = _cosines(v)
    return (cosines >= cosines.max() - tolerance).triu(1).nonzero()


def objective(v: Tensor, rho: Tensor | None = None) -> Tensor:
    r"""The packing objective :math:`\sum_c\rho(c)\min_{c'\ne c}\|v_c-v_{c'}\|^2`; (…, C, d) to (…).

    rho: (C,) priors of the anchors' classes, uniform by default. The points are normalised; on a
    sphere of radius r the value is r^2 times as large.

    Source: Robinson et al. 2021, the theorem on optimal embeddings (maximised there).
    Raises: as :func:`nearest_cosines`, and ValueError for priors that are no distribution.

    >>> round(objective(simplex(4, 3)).item(), 4)
    2.6667
    """
    return ((2 - 2 * nearest_cosines(v)) * _priors(rho, v.shape[-2]).to(v)).sum(-1)


def log_tilted_mean(s: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    r"""The log of the mean of e^s in the law tilted by beta; (…, n) scores to (…).

    .. math:: \log g_\beta = \log\sum_jp_je^{(1+\beta)s_j} - \log\sum_jp_je^{\beta s_j},

    and the largest score at ``beta=inf``, which is also what it tends to where beta is too large
    for s. weights: (n,) probabilities p > 0, alike by default; a score of -inf is left out.
    Taken from the largest score, so that nothing overflows. Differentiable.

    Source: Robinson et al. 2021, E under q_beta by importance sampling.
    Raises: ValueError for a negative or NaN beta, or weights that are no distribution.

    >>> s = torch.tensor([0.0, 1.0])
    >>> [round(log_tilted_mean(s, beta).item(), 3) for beta in (0.0, 1.0, math.inf)]
    [0.62, 0.814, 1.0]
    """
    beta = _tilt(beta)
    top = s.amax(dim=-1, keepdim=True)
    if math.isinf(beta):
        return top.squeeze(-1)
    beta = min(beta, torch.finfo(s.dtype).max / 2)  # 1 + beta, too, must be finite
    left_out = s.isneginf()
    below = (s - top.detach()).masked_fill(left_out, 0.0)  # <= 0
    log_p = _priors(weights, s.shape[-1]).to(s).log()
    log_p = log_p.expand_as(s).masked_fill(left_out, -math.inf)
    upper = ((1 + beta) * below + log_p).logsumexp(-1)
    return top.detach().squeeze(-1) + upper - (beta * below + log_p).logsumexp(-1)


def class_loss(
    v: Tensor, *, beta: float = math.inf, temperature: float = 0.5, rho: Tensor | None = None
) -> Tensor:
    r"""The loss of class vectors for infinitely many true negatives; (…, C, d) to (…).

    .. math:: \sum_c\rho(c)\log\frac{\sum_{c'\ne c}\rho(c')e^{(1+\beta)s_{cc'}}}
              {\sum_{c'\ne c}\rho(c')e^{\beta s_{cc'}}} - \frac1t, \quad s = \cos/t,

    with the largest :math:`s_{cc'}` in place of the logarithm at ``beta=inf``, which is also what
    a beta tends to that is too large for doubles. Differentiable.

    Source: Robinson et al. 2021, :math:`L_\infty` (Q to infinity without log Q), our reading.
    Raises: ValueError as :func:`objective`, for a negative or NaN beta, for a temperature <= 0.

    >>> round(class_loss(simplex(3, 2)).item(), 4)  # (-1/2 - 1) / 0.5
    -3.0
    """
    cosines = _cosines(v)
    priors = _priors(rho, v.shape[-2])
    means = log_tilted_mean(cosines / checks.temperature(temperature), beta, priors)
    return (priors.to(v) * means).sum(-1) - 1 / temperature


def descend(
    classes: int, d: int = 3, *, rho: Tensor | None = None, anchors: Anchors = "mean",
    betas: tuple[float, float] = (1.0, 1000.0), temperature: float = 1.0,
    restarts: int = 24, steps: int = 400, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Points moved by the loss itself; (restarts, C, d) float64, the lowest loss first.

    Adam on free vectors, all restarts at once, while the hardness grows by a constant factor a
    step from ``betas[0]`` to ``betas[1]``. anchors: "mean" minimises :func:`class_loss`; "worst"
    tilts over the anchors too, with the same beta, so that at the end the smallest distance of all
    is what counts: Tammes' problem.

    Source: our design. Raises: ValueError for counts below one, for betas that are not positive
    or do not grow (two equal ones keep it, 0 too), or as :func:`class_loss`.

    >>> v = descend(6, anchors="worst", restarts=4)[0]
    >>> known_distance(6) - smallest_distance(v) < 1e-3
    True
    """
    _counts(classes, d)
    _positive(restarts=restarts, steps=steps)
    first, last = _hardnesses(betas)
    priors, t = _anchors(anchors, rho, classes), checks.temperature(temperature)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(restarts, classes, d, dtype=torch.float64, generator=draw).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1)
    for k in range(steps):
        beta = first * (last / first) ** (k / steps) if last > first else last
        adam.param_groups[0]["lr"] = 0.1 * (1 - k / steps)
        adam.zero_grad()
        _loss(x, beta, t, priors, anchors).sum().backward()
        adam.step()
    v = F.normalize(x.detach(), dim=-1)
    return v[_loss(v, last, t, priors, anchors).argsort()]


def polish(v: Tensor, *, rho: Tensor | None = None, anchors: Anchors = "mean") -> Tensor:
    r"""The local optimum near given points to rounding, (C, d) to (C, d) float64.

    Minimises :math:`\sum_c\rho(c)\,m_c` such that :math:`v_c\cdot v_{c'}\le m_c` and
    :math:`\|v_c\|=1` by sequential quadratic programming (SciPy's SLSQP); with
    ``anchors="worst"`` all classes share one m. For tens of points, not hundreds.

    Raises: as :func:`descend`.

    >>> v = polish(descend(8, restarts=4)[0])
    >>> abs(smallest_distance(v) - known_distance(8)) < 1e-9
    True
    """
    from scipy.optimize import minimize  # heavy

    nearest = nearest_cosines(v.detach().double())
    if v.ndim != 2:
        raise ValueError(f"v has shape {tuple(v.shape)}: (C, d), one set of points, would do")
    priors = _anchors(anchors, rho, len(v))
    start = F.normalize(v.detach().double(), dim=-1)
    levels = nearest if anchors == "mean" else nearest.amax()[None]
    problem = _Programme(start.shape, len(levels))
    slope = np.zeros(start.numel() + len(levels))
    slope[start.numel() :] = priors if anchors == "mean" else 1.0
    found = minimize(
        lambda x: slope @ x, torch.cat([start.flatten(), levels]).numpy(), jac=lambda x: slope,
        constraints=problem.constraints(), method="SLSQP", options={"maxiter": 300, "ftol": 1e-14},
    )  # fmt: skip
    end = F.normalize(torch.from_numpy(problem.points(found.x).copy()), dim=1)
    better = torch.stack([start, end])
    return better[_value(better, priors, anchors).argmin()]


def pack(
    classes: int, d: int = 3, *, rho: Tensor | None = None, anchors: Anchors = "mean",
    restarts: int = 60, seed: int = 0,
) -> Tensor:  # fmt: skip
    """A good packing, (C, d) float64: the best of many starts, each polished.

    Starts are `restarts` random ones and four ends of a short :func:`descend`, whose growing
    hardness leads nearly all to one local optimum, which may not be the best. Global optimality is
    not guaranteed. Other arguments and errors: as :func:`descend`.

    >>> v = pack(5)  # a square pyramid, better in the mean than the best for Tammes' problem
    >>> round(objective(v).item(), 6), round(objective(pack(5, anchors="worst")).item(), 6)
    (2.025, 2.0)
    """
    _positive(restarts=restarts)
    moved = descend(classes, d, rho=rho, anchors=anchors, restarts=4, steps=100, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randn(restarts, classes, d, dtype=torch.float64, generator=draw)
    ends = torch.stack([polish(v, rho=rho, anchors=anchors) for v in (*moved, *starts)])
    return ends[_value(ends, _priors(rho, classes), anchors).argmin()]


class _Programme:
    """Constraints of `polish` and their derivatives, in x = (points, levels)."""

    def __init__(self, shape: tuple[int, ...], levels: int) -> None:
        self.C, self.d = shape
        self.n, self.size = self.C * self.d, self.C * self.d + levels
        pairs = ~np.eye(self.C, dtype=bool) if levels > 1 else np.triu(np.ones(shape[:1] * 2), 1)
        self.i, self.j = np.nonzero(pairs)
        self.level = self.n + (self.i if levels > 1 else np.zeros_like(self.i))

    def points(self, x: np.ndarray) -> np.ndarray:
        return x[: self.n].reshape(self.C, self.d)

    def below(self, x: np.ndarray) -> np.ndarray:
        v = self.points(x)
        return x[self.level] - (v[self.i] * v[self.j]).sum(1)

    def below_slope(self, x: np.ndarray) -> np.ndarray:
        v, rows = self.points(x), np.arange(len(self.i))
        slope = np.zeros((len(rows), self.size))
        slope[rows, self.level] = 1
        of_points = slope[:, : self.n].reshape(len(rows), self.C, self.d)  # a view
        of_points[rows, self.i], of_points[rows, self.j] = -v[self.j], -v[self.i]
        return slope

    def unit(self, x: np.ndarray) -> np.ndarray:
        return (self.points(x) ** 2).sum(1) - 1

    def unit_slope(self, x: np.ndarray) -> np.ndarray:
        slope = np.zeros((self.C, self.size))
        rows = np.arange(self.C)
        slope[:, : self.n].reshape(self.C, self.C, self.d)[rows, rows] = 2 * self.points(x)
        return slope

    def constraints(self) -> list[dict[str, Any]]:
        return [
            {"type": "ineq", "fun": self.below, "jac": self.below_slope},
            {"type": "eq", "fun": self.unit, "jac": self.unit_slope},
        ]


def _cosines(v: Tensor) -> Tensor:
    """All cosines (…, C, C), -inf on the diagonal; refuses what has none."""
    if not (isinstance(v, Tensor) and v.is_floating_point()):
        raise TypeError(f"v: must be a floating point tensor, not {checks.kind(v)}")
    if v.ndim < 2 or v.shape[-2] < 2 or not v.shape[-1]:
        raise ValueError(f"v has shape {tuple(v.shape)}: (…, C, d) with C >= 2 would do")
    length = v.detach().norm(dim=-1)
    if not (length.isfinite() & (length > 0)).all():
        raise ValueError("v: a vector is of length zero, infinite or NaN: it has no direction")
    z = v / v.norm(dim=-1, keepdim=True)
    return (z @ z.mT).masked_fill(
        torch.eye(v.shape[-2], dtype=torch.bool, device=v.device), -math.inf
    )


def _loss(v: Tensor, beta: float, t: float, priors: Tensor, anchors: Anchors) -> Tensor:
    """What `descend` minimises, (…, C, d) to (…), up to a constant."""
    means = log_tilted_mean(_cosines(v) / t, beta, priors)
    if anchors == "mean" or not beta:
        return means @ priors
    return (beta * means).logsumexp(-1) / beta


def _value(v: Tensor, priors: Tensor, anchors: Anchors) -> Tensor:
    """What a packing is judged by: the mean or the largest of the nearest cosines."""
    nearest = nearest_cosines(v)
    return nearest @ priors if anchors == "mean" else nearest.amax(-1)


def _priors(rho: Tensor | None, classes: int) -> Tensor:
    if rho is None:
        return torch.full((classes,), 1 / classes, dtype=torch.float64)
    priors = torch.as_tensor(rho, dtype=torch.float64)
    if priors.shape != (classes,):
        raise ValueError(
            f"rho has shape {tuple(priors.shape)}: ({classes},), one prior each, would do"
        )
    if not ((priors > 0).all() and abs(priors.sum().item() - 1) < 1e-6):
        raise ValueError(f"rho={priors.tolist()}: positive numbers that sum to 1 would do")
    return priors


def _anchors(anchors: str, rho: Tensor | None, classes: int) -> Tensor:
    checks.choice("anchors", anchors, get_args(Anchors))
    if anchors == "worst" and rho is not None:
        raise ValueError("rho: the worst anchor has no prior; anchors='mean' has")
    return _priors(rho, classes)


def _hardnesses(betas: tuple[float, float]) -> tuple[float, float]:
    first, last = map(_tilt, betas)
    if not (0 < first < last < math.inf or first == last < math.inf):
        raise ValueError(f"betas={betas}: (1.0, 1000.0) would do, positive and growing, or equal")
    return first, last


def _tilt(beta: Any) -> float:
    if not (isinstance(beta, int | float) and beta >= 0):
        raise ValueError(f"beta={beta!r}: a hardness of 0 or more would do, or math.inf")
    return min(float(beta), 1e300) if math.isfinite(beta) else math.inf


def _counts(classes: int, d: int) -> None:
    _positive(classes=classes, d=d)
    if classes < 2:
        raise ValueError(f"classes={classes}: a packing needs 2 points")
    if d == 1 and classes > 2:
        raise ValueError(f"classes={classes}, d=1: there are only 2 unit vectors on a line")


def _positive(**counts: int) -> None:
    for name, value in counts.items():
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ValueError(f"{name}={value!r}: a whole number of at least 1 would do")
