"""How good is a representation: probes of frozen features."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hcl.geometry import check_finite

if TYPE_CHECKING:
    from hcl.train import Data


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
    check_finite(f_train=f_train, f_test=f_test)
    if f_train.shape[1] != f_test.shape[1]:
        raise ValueError(
            f"f_test has {f_test.shape[1]} columns, f_train {f_train.shape[1]}: as many would do"
        )
    _check_labels(f_train, y_train, f_test, y_test)
