"""The geometry of embeddings on the sphere: alignment, uniformity, similarities of pairs."""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> float:
    r"""Mean distance of positive pairs, $E\,\|z_1-z_2\|^\alpha$ on the unit sphere; 0 is best.

    z1, z2: (n, d), normalised inside.  Source: Wang & Isola 2020, equation of $L_{align}$.
    Raises: ValueError for shapes that differ, no rows, NaN, or alpha <= 0.

    >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[-5.0, 0.0]]))
    4.0
    """
    check_finite(z1=z1, z2=z2)
    if z1.shape != z2.shape:
        raise ValueError(f"z1 is {tuple(z1.shape)} and z2 {tuple(z2.shape)}: equal shapes would do")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}: a positive number would do")
    distance = (F.normalize(z1.double(), dim=1) - F.normalize(z2.double(), dim=1)).norm(dim=1)
    return distance.pow(alpha).mean().item()


def uniformity(z: Tensor, *, t: float = 2.0, chunk: int = 1024) -> float:
    r"""Spread over the sphere, $\log E_{i<j}\,e^{-t\|z_i-z_j\|^2}$; lower is more uniform.

    z: (n, d), normalised inside.  Source: Wang & Isola 2020, equation of $L_{uniform}$.
    Raises: ValueError for fewer than two rows, NaN, or t <= 0.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 6)
    -8.0
    """
    check_finite(z=z)
    if len(z) < 2:
        raise ValueError(f"z has {len(z)} row(s): a pair needs two")
    if not t > 0:
        raise ValueError(f"t is {t}: a positive number would do")
    # On the sphere ||a - b||^2 = 2 - 2 cos.
    pairs = _pairs(F.normalize(z.float(), dim=1), torch.zeros(len(z), device=z.device), chunk)
    parts = [(2 * t * (cosine.double() - 1)).logsumexp(dim=0) for cosine, _ in pairs]
    return torch.stack(parts).logsumexp(dim=0).item() - math.log(len(z) * (len(z) - 1) / 2)


def similarity_histograms(
    z: Tensor, labels: Tensor, *, bins: int = 50, chunk: int = 1024
) -> tuple[Array, Array, Array]:
    """Densities of the cosine similarity of same-label and of different-label pairs i < j.

    z: (n, d), normalised inside; labels: (n,).  Returns edges (bins + 1,) from -1 to 1 and two
    densities (bins,) in float64, each integrating to one.  Rows are taken `chunk` at a time.

    Source: Robinson et al. 2021, as recalled (histograms of their embeddings).
    Raises: ValueError for NaN, lengths that differ, bins < 1, or labels without both sorts of pair.

    >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> edges, same, different = similarity_histograms(z, labels, bins=2)
    >>> edges.tolist(), same.tolist()
    ([-1.0, 0.0, 1.0], [0.0, 1.0])
    """
    check_finite(z=z)
    if len(z) != len(labels):
        raise ValueError(f"labels has {len(labels)} rows and z {len(z)}: equal lengths would do")
    if bins < 1:
        raise ValueError(f"bins is {bins}: at least one bin is needed")
    counts = torch.zeros(2, bins, dtype=torch.int64, device=z.device)
    for cosine, same in _pairs(F.normalize(z.float(), dim=1), labels.to(z.device), chunk):
        where = ((cosine + 1) / 2 * bins).long().clamp(0, bins - 1)
        counts += torch.bincount(where + bins * ~same, minlength=2 * bins).view(2, bins)
    totals = counts.sum(dim=1, keepdim=True)
    if not totals.all():
        raise ValueError(
            "labels give only one sort of pair: two classes, one of them twice, would do"
        )
    same_density, different_density = (counts.double() / totals * bins / 2).cpu().numpy()
    return np.linspace(-1, 1, bins + 1), same_density, different_density


def overlap(same: Array, different: Array, edges: Array) -> float:
    r"""The mass two densities share, $\int\min(p, q)$: 0 is separated, 1 is indistinguishable.

    same, different: (bins,) densities; edges: (bins + 1,).
    Raises: ValueError for lengths that do not fit.

    >>> overlap(np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.array([-1.0, 0.0, 1.0]))
    0.5
    """
    same, different, edges = np.asarray(same), np.asarray(different), np.asarray(edges)
    if not len(same) == len(different) == len(edges) - 1:
        raise ValueError(
            f"edges has {len(edges)} entries for densities of {len(same)} and {len(different)}: "
            "one more than bins would do"
        )
    return float(np.sum(np.minimum(same, different) * np.diff(edges)))


def same_label_share(weights: Tensor, labels: Tensor, *, top: int) -> float:
    """Of each anchor's `top` heaviest negatives, the share with the anchor's label; their mean.

    weights: (2B, 2B) floating point, for two views of B images, as
    :func:`hcl.losses.negative_weights` makes them; an anchor's own column and its positive's are
    not looked at.  labels: (B,).  Of negatives that weigh the same at the border of the `top`, each
    counts as often as a draw among them would take it, so even weights give the share among all.

    Source: our reading of Tabassum et al. 2022 (UnReMix), whose motive it is that nearness to the
    anchor alone picks false negatives.
    Raises: ValueError for weights that are not (2B, 2B), B >= 2, or not finite, labels of another
    length, and top outside 1..2B - 2.

    >>> even = torch.ones(6, 6)
    >>> round(same_label_share(even, torch.tensor([0, 0, 1]), top=1), 4)  # (1/2 + 1/2 + 0) / 3
    0.3333
    """
    check_finite(weights=weights)
    n = len(weights)
    if weights.shape != (n, n) or n % 2 or n < 4:
        raise ValueError(f"weights is {tuple(weights.shape)}: (2B, 2B) with B >= 2 would do")
    if labels.shape != (n // 2,):
        raise ValueError(f"labels is {tuple(labels.shape)}: ({n // 2},), one an image, would do")
    if not 1 <= top <= n - 2:
        raise ValueError(f"top is {top}: 1 to {n - 2}, the number of negatives, would do")
    image = torch.arange(n // 2, device=weights.device).repeat(2)
    label = labels.to(weights.device).repeat(2)
    own = image[:, None] == image
    same = (label[:, None] == label) & ~own
    w = weights.masked_fill(own, -math.inf)
    least = w.topk(top, dim=1).values[:, -1:]
    above, border = w > least, w == least
    left = top - above.sum(dim=1).double()
    tied = left * (same & border).sum(dim=1) / border.sum(dim=1)
    return (((same & above).sum(dim=1) + tied) / top).mean().item()


def _pairs(z: Tensor, labels: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine and label agreement of all pairs i < j, flat, `chunk` rows at a time."""
    for start in range(0, len(z), chunk):
        rows = z[start : start + chunk]
        cosine = rows @ z[start:].T  # (m, n - start)
        same = labels[start : start + chunk, None] == labels[start:]
        m = len(rows)
        upper = torch.ones(m, m, dtype=torch.bool, device=z.device).triu(1)
        if m > 1:
            yield cosine[:, :m][upper], same[:, :m][upper]
        if start + m < len(z):
            yield cosine[:, m:].flatten(), same[:, m:].flatten()


def check_finite(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor, named by its keyword, that is not (n, d), n >= 1, finite."""
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not len(tensor):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: (n, d) with n >= 1 would do")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite entries: did training diverge?")
