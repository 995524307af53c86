"""How good is a representation: probes of frozen features, and the geometry of embeddings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from hcl.train import Data

Array = np.ndarray


def features(
    encoder: nn.Module, x: Tensor, inputs: Callable[[Tensor], Tensor], batch: int = 1024
) -> Tensor:
    """Encode the rows of x in eval mode without gradient: (n, …) -> (n, d) float32.

    Every module of the encoder is in its former mode afterwards.

    >>> features(nn.Dropout(0.9), torch.ones(3, 2), lambda x: 2 * x, batch=2).tolist()
    [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            return torch.cat([encoder(inputs(rows)).float() for rows in x.split(batch)])
    finally:
        for module, training in modes:
            module.training = training


def linear_probe(
    f_train: Tensor,
    y_train: Tensor,
    f_test: Tensor,
    y_test: Tensor,
    *,
    l2: float = 1e-3,
    max_iter: int = 200,
) -> float:
    r"""Test accuracy in [0, 1] of multinomial logistic regression on standardised features.

    f_*: (n, d), y_*: (n,) int64.  Minimises $\frac1n\sum_i \mathrm{CE}(Wf_i+b,\,y_i)
    + \frac{\mathrm{l2}}2\|W\|^2$ by full-batch L-BFGS from zero, so nothing is random.  Mean and
    standard deviation come from f_train.

    Source: our fast default; `linear_probe_released` is the released code's.
    Raises: ValueError for features or labels that cannot be probed, l2 < 0 or max_iter < 1.

    >>> f = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    >>> linear_probe(f, torch.tensor([0, 0, 1, 1]), f, torch.tensor([0, 0, 1, 0]))
    0.75
    """
    _check_probe(f_train, y_train, f_test, y_test)
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2 is {l2}: a finite penalty of at least 0 would do")
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}: at least one iteration is needed")
    f_train, f_test = _standardise(f_train.float(), f_test.float())
    classes, targets = y_train.unique(return_inverse=True)
    weight, bias = _logistic_regression(f_train, targets, len(classes), l2, max_iter)
    predicted = classes[(f_test @ weight + bias).argmax(dim=1)]
    return _accuracy(predicted, y_test)


def linear_probe_released(
    encoder: nn.Module,
    data: Data,
    *,
    epochs: int = 100,
    batch: int = 512,
    lr: float = 1e-3,
    weight_decay: float = 1e-6,
    generator: torch.Generator,
) -> float:
    """Test accuracy of a linear layer trained as the released code does, after the last epoch.

    Three habits of that code raise or lower the number and are kept: the layer sees one random
    training view of each row an epoch, not the plain input; the frozen encoder is in train mode
    meanwhile, so its BatchNorm uses batch statistics and goes on updating its running ones, which
    the test then uses; features are neither normalised nor standardised.  The encoder handed in
    is copied and stays as it was.  A last batch of one row is left out: BatchNorm refuses it.

    Source: Robinson et al. 2021, `image/linear.py`.
    Raises: ValueError for epochs, batch or labels that cannot be probed.
    """
    if epochs < 1 or batch < 2:
        raise ValueError(f"epochs is {epochs} and batch {batch}: epochs >= 1, batch >= 2 would do")
    _check_labels(data.x_probe, data.y_probe, data.x_test, data.y_test)
    encoder = copy.deepcopy(encoder).train()
    classes, targets = data.y_probe.unique(return_inverse=True)
    width = int(encoder.out_dim)  # type: ignore[arg-type]
    layer = _linear(width, len(classes), generator).to(data.x_probe.device)
    adam = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in tqdm(range(epochs), desc="linear probe", leave=False):
        for rows in _batches(len(targets), batch, generator):
            view, _ = data.views(data.x_probe[rows], generator)
            with torch.no_grad():
                f = encoder(view).float()
            adam.zero_grad()
            F.cross_entropy(layer(f), targets[rows]).backward()
            adam.step()
    with torch.no_grad():
        predicted = classes[layer(features(encoder, data.x_test, data.inputs)).argmax(dim=1)]
    return _accuracy(predicted, data.y_test)


def knn(
    f_train: Tensor,
    y_train: Tensor,
    f_test: Tensor,
    y_test: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.5,
    chunk: int = 1024,
) -> float:
    r"""Test accuracy in [0, 1] of the weighted vote of the k most similar training rows.

    f_*: (n, d), y_*: (n,) int64.  Similarity s is the cosine and a vote weighs
    $e^{s/\mathrm{temperature}}$; k is capped at the number of training rows.  `chunk` test rows
    are compared at a time.

    Source: Robinson et al. 2021, `image/main.py` (k = 200, temperature 0.5); Wu et al. 2018.
    Raises: ValueError for features or labels that cannot be probed, k < 1, temperature <= 0.

    >>> f = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> knn(f, torch.tensor([0, 0, 1]), f, torch.tensor([0, 0, 1]), k=1)
    1.0
    """
    _check_probe(f_train, y_train, f_test, y_test)
    if k < 1:
        raise ValueError(f"k is {k}: at least one neighbour is needed")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: a positive number would do")
    classes, targets = y_train.unique(return_inverse=True)
    bank = F.normalize(f_train.float(), dim=1)
    predicted = []
    for queries in F.normalize(f_test.float(), dim=1).split(chunk):
        similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (chunk, k)
        votes = similarity.new_zeros(len(queries), len(classes))
        votes.scatter_add_(1, targets[nearest], (similarity / temperature).exp())
        predicted.append(classes[votes.argmax(dim=1)])
    return _accuracy(torch.cat(predicted), y_test)


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> float:
    r"""Mean distance of positive pairs, $E\,\|z_1-z_2\|^\alpha$ on the unit sphere; 0 is best.

    z1, z2: (n, d), normalised inside.  Source: Wang & Isola 2020, equation of $L_{align}$.
    Raises: ValueError for shapes that differ, no rows, NaN, or alpha <= 0.

    >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[-5.0, 0.0]]))
    4.0
    """
    _check_finite(z1=z1, z2=z2)
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
    _check_finite(z=z)
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

    Source: Robinson et al. 2021, histograms of Section 5.
    Raises: ValueError for NaN, lengths that differ, bins < 1, or labels without both sorts of pair.

    >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> edges, same, different = similarity_histograms(z, labels, bins=2)
    >>> edges.tolist(), same.tolist()
    ([-1.0, 0.0, 1.0], [0.0, 1.0])
    """
    _check_finite(z=z)
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


def _standardise(f_train: Tensor, f_test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = f_train.mean(dim=0), f_train.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-12), std, 1.0)  # constant features
    return (f_train - mean) / std, (f_test - mean) / std


def _logistic_regression(
    f: Tensor, targets: Tensor, n_classes: int, l2: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    weight = f.new_zeros(f.shape[1], n_classes, requires_grad=True)
    bias = f.new_zeros(n_classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(f @ weight + bias, targets) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()


def _linear(in_dim: int, out_dim: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear with its usual uniform start, drawn from the generator."""
    layer = nn.Linear(in_dim, out_dim, device=generator.device)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(in_dim**-0.5), in_dim**-0.5, generator=generator)
    return layer


def _batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(n, generator=generator, device=generator.device)
    yield from (rows for rows in order.split(batch) if len(rows) > 1)


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not len(tensor):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: (n, d) with n >= 1 would do")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite entries: did training diverge?")


def _check_labels(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> None:
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y) or not len(y):
            raise ValueError(
                f"{part} has {len(x)} rows and {len(y)} labels: as many of both would do"
            )
    if (y_train < 0).any():
        raise ValueError("y_train has -1, an unlabelled row: probe the labelled rows only")
    if len(y_train.unique()) < 2:
        raise ValueError(f"y_train has one class only, {y_train[0].item()}: two or more would do")


def _check_probe(f_train: Tensor, y_train: Tensor, f_test: Tensor, y_test: Tensor) -> None:
    _check_finite(f_train=f_train, f_test=f_test)
    if f_train.shape[1] != f_test.shape[1]:
        raise ValueError(
            f"f_test has {f_test.shape[1]} columns, f_train {f_train.shape[1]}: as many would do"
        )
    _check_labels(f_train, y_train, f_test, y_test)
