r"""What becomes of the classes: neural collapse, dimensional collapse, and how far a frame is off.

With the class means :math:`\mu_1, \dots, \mu_C`, *neural collapse* says that every embedding is its
class mean, and that the means are a regular simplex around the origin, also called an equiangular
tight frame: unit vectors of sum zero whose cosines are all :math:`-1/(C-1)`. *Dimensional
collapse* says that the means lie in fewer than :math:`C-1` dimensions, the most that they can.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from hcl import checks
from hcl.geometry import check_finite
from hcl.units import placed

Negatives = Literal["other", "all"]
LEAST = 0.01  # of the largest singular value: below it a dimension counts as collapsed


def class_means(z: Tensor, labels: Tensor) -> Tensor:
    """Mean embedding of each class, (C, d) float64, classes in ascending order.

    z: (n, d), not normalised here; labels: (n,) integers.
    Raises: ValueError for NaN, lengths that differ, a label -1, or one class only.

    >>> class_means(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([4, 4, 9])).tolist()
    [[2.0], [7.0]]
    """
    group, n_classes = _groups(z, labels)
    sums = z.new_zeros(n_classes, z.shape[1], dtype=torch.float64).index_add_(0, group, z.double())
    return sums / torch.bincount(group)[:, None]


def zero_sum(means: Tensor) -> float:
    r"""How far the class means are off centre, :math:`\|\frac1C \sum_c \mu_c\|`; 0 for a frame.

    means: (C, d). Source: Jiang et al. 2023 (neural collapse), the released code.
    Raises: ValueError for NaN or fewer than two rows.

    >>> zero_sum(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    0.5
    """
    _check_means(means)
    return means.double().mean(dim=0).norm().item()


def unit_norm(means: Tensor) -> float:
    r"""How far the class means are off the sphere, mean of :math:`|\|\mu_c\| - 1|`.

    means: (C, d). Source: Jiang et al. 2023 (neural collapse), the released code.
    Raises: ValueError for NaN or fewer than two rows.

    >>> unit_norm(torch.tensor([[3.0, 4.0], [0.5, 0.0]]))
    2.25
    """
    _check_means(means)
    return (means.double().norm(dim=1) - 1).abs().mean().item()


def equal_angle(means: Tensor) -> float:
    r"""How far the angles are off: mean over pairs of :math:`|\cos(\mu_c, \mu_{c'}) + 1/(C-1)|`.

    means: (C, d). Source: Jiang et al. 2023 (neural collapse), the released code, which calls it
    equal inner product.
    Raises: ValueError for NaN, fewer than two rows, or a mean of length zero.

    >>> equal_angle(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # cosine 0, and -1 would do
    1.0
    """
    _check_means(means)
    length = means.double().norm(dim=1, keepdim=True)
    if not length.all():
        where = length.flatten().argmin().item()
        raise ValueError(f"means has length 0 in row {where}: a cosine needs a direction")
    unit, n = means.double() / length, len(means)
    cosine = (unit @ unit.T)[~torch.eye(n, dtype=torch.bool, device=means.device)]
    return (cosine + 1 / (n - 1)).abs().mean().item()


def within_class(z: Tensor, labels: Tensor) -> float:
    r"""Mean distance of an embedding to its class mean, :math:`\|z_i - \mu_{y_i}\|`.

    z: (n, d); labels: (n,). Source: our reading of the released code's within-class distance.
    Raises: as :func:`class_means`.

    >>> within_class(torch.tensor([[0.0], [2.0], [7.0]]), torch.tensor([0, 0, 1])).__round__(3)
    0.667
    """
    group, _ = _groups(z, labels)
    return (z.double() - class_means(z, labels)[group]).norm(dim=1).mean().item()


def spectrum(means: Tensor) -> Tensor:
    r"""Singular values of the covariance of the class means, over the largest, falling.

    means: (C, d). Returns: (min(d, C - 1),) float64 in [0, 1]; further ones are 0 for any means.
    Source: Jiang et al. 2023 (neural collapse), the released code, whose figures show logarithms.
    Raises: ValueError for NaN, fewer than two rows, or means that coincide.

    >>> spectrum(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])).tolist()
    [1.0, 0.25]
    """
    _check_means(means)
    centred = means.double() - means.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)[: min(means.shape[1], len(means) - 1)].square()
    if not values[0] > 1e-24 * means.double().square().sum():
        raise ValueError("means coincide: two different ones would do")
    return values / values[0]


def dimensions(means: Tensor, *, least: float = LEAST) -> int:
    """How many dimensions the class means fill: values of :func:`spectrum` of at least ``least``.

    means: (C, d). A hundredth of the largest variance is a tenth of its standard deviation.
    Source: our reading; the paper counts by eye, where the logarithms fall off a cliff.
    Raises: as :func:`spectrum`, and ValueError for least outside (0, 1].

    >>> dimensions(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.01], [0.0, -0.01]]))
    1
    """
    if not 0 < least <= 1:
        raise ValueError(f"least is {least}: a share of the largest in (0, 1] would do")
    return int((spectrum(means) >= least).sum())


def nearest_mean(z_train: Tensor, y_train: Tensor, z_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy in [0, 1] of the class whose mean has the largest inner product.

    z_*: (n, d); y_*: (n,). A test label that no training point has counts as an error.
    Source: Jiang et al. 2023 (neural collapse), the released code.
    Raises: ValueError as :func:`class_means`, or for numbers of columns that differ.

    >>> z, y = torch.eye(2), torch.tensor([5, 8])
    >>> nearest_mean(z, y, torch.tensor([[2.0, 1.0], [1.0, 0.0]]), torch.tensor([5, 8]))
    0.5
    """
    _check_pair(z_test, y_test, "z_test", "y_test")
    means = class_means(z_train, y_train)
    if means.shape[1] != z_test.shape[1]:
        raise ValueError(
            f"z_test has {z_test.shape[1]} columns, z_train {means.shape[1]}: as many would do"
        )
    nearest = (z_test.double() @ means.T).argmax(dim=1)
    return (y_train.unique()[nearest] == y_test).double().mean().item()


def metrics(
    z_train: Tensor, y_train: Tensor, z_test: Tensor, y_test: Tensor, *, least: float = LEAST
) -> dict[str, float]:
    """All of this module's numbers: of the training points, and the accuracy on the test points.

    Returns: zero_sum, unit_norm, equal_angle, within_class, dimensions, nearest_mean, and
    singular_1, singular_2, … of the :func:`spectrum`.
    Raises: as the functions.

    >>> z, y = torch.eye(3), torch.tensor([0, 1, 2])
    >>> [round(v, 3) for v in metrics(z - 1 / 3, y, z, y).values()]
    [0.0, 0.184, 0.0, 0.0, 2, 1.0, 1.0, 1.0]
    """
    means = class_means(z_train, y_train)
    values = spectrum(means).tolist()
    return {
        "zero_sum": zero_sum(means),
        "unit_norm": unit_norm(means),
        "equal_angle": equal_angle(means),
        "within_class": within_class(z_train, y_train),
        "dimensions": dimensions(means, least=least),
        "nearest_mean": nearest_mean(z_train, y_train, z_test, y_test),
        **{f"singular_{k}": value for k, value in enumerate(values, start=1)},
    }


def latent_class_loss(
    z: Tensor,
    labels: Tensor,
    *,
    negatives: Negatives = "other",
    temperature: float = 1.0,
    beta: float = 0.0,
    Q: float = 1.0,
    detach_weights: bool = False,
) -> Tensor:
    r"""The population loss of the points given: positives of the label, negatives of others or all.

    .. math::
        \mathcal L = \mathrm{mean}_{i,\,p:\,y_p=y_i} \log\big(1 + Q\, g_i\, e^{-s_{ip}}\big),
        \qquad g_i = \frac{\sum_j e^{\beta s_{ij}}\, e^{s_{ij}}}{\sum_j e^{\beta s_{ij}}}, \qquad
        s_{ij} = \langle z_i, z_j \rangle / t

    Args:
        z: (n, d), as it is: see :func:`hcl.units.placed`; labels: (n,) integers.
        negatives: j over the points of "other" labels (SCL, and H-SCL for beta > 0), or over "all"
            of them, i among them (UCL and H-UCL in the latent class model). A point is its own
            positive as well, so all three are independent draws from the points.
        temperature, beta, Q: as in :func:`hcl.losses.hard_scl`.
        detach_weights: stop the gradient through the weights, as negatives that are drawn would.

    Returns: scalar. Memory O(n^2): a loss for theory, not for training.
    Source: Jiang et al. 2023 (neural collapse), with the mean over draws in place of 256 draws.
    Raises: ValueError as :func:`class_means`, or for an option out of its range.

    >>> from hcl.packing import simplex
    >>> z, y = simplex(3, 2), torch.arange(3)
    >>> round(latent_class_loss(z, y).item(), 4)  # log(1 + e^(-3/2))
    0.2014
    """
    checks.choice("negatives", negatives, ("other", "all"))
    checks.temperature(temperature)
    checks.tilt(beta)
    checks.number("Q", Q, "a positive weight on the negatives", above=0)
    group, _ = _groups(z, labels)
    same = group[:, None] == group
    s = z @ z.T / temperature
    a = beta * (s.detach() if detach_weights else s)
    if negatives == "other":
        a = a.masked_fill(same, -torch.inf)
    log_g = (s + a).logsumexp(dim=1) - a.logsumexp(dim=1) + math.log(Q)
    pairs = -torch.nn.functional.logsigmoid(s - log_g[:, None])  # (n, n)
    count = torch.bincount(group)[group]
    return ((pairs * same).sum(dim=1) / count / len(z)).sum()


def free_embeddings(
    start: Tensor,
    labels: Tensor,
    *,
    normalize: str = "ball",
    steps: int = 500,
    lr: float = 0.02,
    **options: Any,
) -> tuple[Tensor, list[float]]:
    """Embeddings that minimise :func:`latent_class_loss` themselves, without an encoder, by Adam.

    Args:
        start: (n, d) points to begin with; labels: (n,).
        normalize: "sphere", "ball" or "none", see :func:`hcl.units.placed`.
        steps: full-batch steps; the learning rate falls from lr to 0 as a cosine.
        options: of the loss.

    Returns: embeddings (n, d), placed, and the loss before each step.
    Source: our design: the geometry of the loss, apart from encoder and data.
    Raises: ValueError as the loss, for steps < 1, lr <= 0 or an unknown normalize.

    >>> z, losses = free_embeddings(torch.randn(4, 3), torch.arange(4))
    >>> round(losses[-1], 3), round(equal_angle(z), 2)  # log(1 + e^(-4/3)), a regular simplex
    (0.234, 0.0)
    """
    checks.choice("normalize", normalize, ("sphere", "ball", "none"))
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least one is needed")
    checks.number("lr", lr, "a positive learning rate", above=0)
    free = start.clone().requires_grad_()
    adam = torch.optim.Adam([free], lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    losses = []
    for _ in range(steps):
        loss = latent_class_loss(placed(free, normalize), labels, **options)
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
        losses.append(loss.item())
    return placed(free.detach(), normalize), losses


def _groups(z: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Class of each row, counted from 0, and how many classes there are."""
    _check_pair(z, labels, "z", "labels")
    classes, group = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels has one class only, {classes[0].item()}: two or more would do")
    return group, len(classes)


def _check_pair(z: Tensor, labels: Tensor, z_name: str, labels_name: str) -> None:
    check_finite(**{z_name: z})
    if labels.ndim != 1 or len(labels) != len(z):
        raise ValueError(
            f"{labels_name} has shape {tuple(labels.shape)} and {z_name} {len(z)} rows: a label "
            "for each row would do"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{labels_name} is {labels.dtype}: integers would do")
    if (labels < 0).any():
        raise ValueError(f"{labels_name} has -1, an unlabelled row: give the labelled rows only")


def _check_means(means: Tensor) -> None:
    check_finite(means=means)
    if len(means) < 2:
        raise ValueError(f"means has {len(means)} row(s): two classes or more would do")
