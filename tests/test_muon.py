"""Muon: the orthogonalised matrix against the SVD, its steps against loops, and that it learns."""

import pytest
import torch
from torch import nn

from hcl import train
from hcl.muon import Muon, orthogonalized

BAND = (0.65, 1.25)  # where the quintic leaves singular values that are not tiny to begin with


def matrix(m, n, values=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g)
    if values is None:
        return x
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag(torch.tensor(values)) @ v


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (16, 144), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_vectors_stay_and_singular_values_are_near_one(shape, scale):
    values = torch.linspace(1.0, 0.1, min(shape)).tolist()
    x = scale * matrix(*shape, values=values)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    inner = u.T @ orthogonalized(x).double() @ v.T  # diagonal, with the new singular values
    off = inner - torch.diag(inner.diagonal())
    assert off.abs().max() < 1e-3
    assert inner.diagonal().min() > BAND[0]
    assert inner.diagonal().max() < BAND[1]


def test_the_nearest_orthogonal_matrix_is_near():
    """U V^T minimises the distance to x among matrices with orthonormal rows."""
    x = matrix(6, 30)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    nearest = u @ v
    assert (orthogonalized(x) - nearest).norm() / nearest.norm() < 0.35
    cosine = (orthogonalized(x) * nearest).sum() / orthogonalized(x).norm() / nearest.norm()
    assert cosine > 0.95


def test_a_matrix_and_its_transpose_agree_and_sign_follows():
    x = matrix(4, 9)
    torch.testing.assert_close(orthogonalized(x.T), orthogonalized(x).T)
    torch.testing.assert_close(orthogonalized(-x), -orthogonalized(x))


def test_zeros_and_missing_ranks_stay_finite():
    assert not orthogonalized(torch.zeros(3, 4)).any()
    one = orthogonalized(torch.ones(3, 4))
    assert BAND[0] < torch.linalg.svdvals(one)[0] < BAND[1]
    assert torch.linalg.svdvals(one)[1:].max() < 1e-2


def by_hand(p, grads, *, lr, momentum, weight_decay):
    """Nesterov momentum as a weighted mean, the polar factor instead of the iterations."""
    p, buffer = p.double(), 0.0
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad.double()
        update = momentum * buffer + (1 - momentum) * grad.double()
        u, _, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
        tall = max(1.0, u.shape[0] / v.shape[1]) ** 0.5
        p = (1 - lr * weight_decay) * p - lr * tall * (u @ v).view_as(p)
    return p


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((4, 30), torch.contiguous_format), ((30, 4), torch.contiguous_format),
     ((8, 2, 3, 3), torch.contiguous_format), ((8, 2, 3, 3), torch.channels_last),
     ((40, 1, 3, 3), torch.channels_last)],
    ids=str,
)  # fmt: skip
def test_steps_are_those_of_the_polar_factor(shape, layout):
    """Filters of a convolution are the rows of a matrix, in whatever order they lie in memory."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    p = nn.Parameter(start.clone().to(memory_format=layout))
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(2 + i)) for i in range(3)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    optimizer = Muon([p], **options)
    for grad in grads:
        p.grad = grad.clone().to(memory_format=layout)
        optimizer.step()
        assert torch.equal(p.grad, grad)
    wanted = by_hand(start, grads, **options).float()
    moved = (wanted - start).norm()
    assert (p.detach() - wanted).norm() < 0.3 * moved  # singular values are near one, not one
    cosine = ((p.detach() - start) * (wanted - start)).sum() / moved / (p.detach() - start).norm()
    assert cosine > 0.97


def test_both_layouts_take_the_same_step():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        g = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(6, 3, 3, 3, generator=g).to(memory_format=layout))
        p.grad = torch.randn(6, 3, 3, 3, generator=g).to(memory_format=layout)
        Muon([p], lr=0.1).step()
        found.append(p.detach().contiguous())
    torch.testing.assert_close(*found)


def test_the_size_of_the_gradient_does_not_matter():
    found = []
    for scale in (1e-3, 1.0, 1e3):
        p = nn.Parameter(torch.zeros(3, 5))
        p.grad = scale * matrix(3, 5)
        Muon([p], lr=0.1).step()
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], found[1], rtol=1e-4, atol=1e-6)


def test_a_parameter_without_a_gradient_is_left_alone():
    one, two = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    one.grad = torch.eye(2)
    Muon([one, two], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(two, torch.ones(2, 2))
    assert not torch.equal(one, torch.ones(2, 2))


def test_a_closure_is_called_for_the_loss_as_in_other_optimizers():
    w = nn.Parameter(torch.eye(3))
    optimizer = Muon([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert first.item() == 3.0
    assert second.item() < 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": 0.0}, "lr=0.0"), ({"lr": float("nan")}, "lr=nan"),
     ({"lr": 0.1, "momentum": 1.0}, "momentum=1.0"), ({"lr": 0.1, "momentum": -0.1}, "momentum=-")],
)  # fmt: skip
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.eye(2))], **options)


@pytest.mark.parametrize("shape", [(3,), ()])
def test_vectors_and_numbers_are_refused(shape):
    with pytest.raises(ValueError, match=r"params of shape .*two dimensions"):
        Muon([nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(shape))], lr=0.1)


def test_its_state_survives_saving():
    found = []
    for interrupted in (False, True):
        p = nn.Parameter(matrix(3, 5))
        optimizer = Muon([p], lr=0.1)
        for step in range(4):
            p.grad = matrix(3, 5, seed=1 + step)
            optimizer.step()
            if interrupted and step == 1:
                state = optimizer.state_dict()
                optimizer = Muon([p], lr=7.0)  # the state brings its own
                optimizer.load_state_dict(state)
        found.append(p.detach())
    assert torch.equal(*found)


def test_the_small_encoder_learns_with_it():
    run = train.Run(
        data="digits", data_args={"n_train": 256, "n_test": 100}, encoder="small", epochs=6,
        batch=64, optimizer="muon", method="nt_xent", schedule="triangle", eval_every=1,
        hidden_dim=32, out_dim=16,
    )  # fmt: skip
    record = train.train(run, progress=False)
    losses = [row["loss"] for row in record.history[1:]]
    assert losses[-1] < losses[0] - 0.2
    assert record.history[-1]["knn"] > 0.3


def test_matrices_and_filters_are_muons_and_the_rest_is_adams(tiny):
    run = tiny(
        optimizer="muon", data="digits", data_args={"n_train": 64}, encoder="small", lr=0.002
    )
    model = train.build_model(run, train.load_data(run))
    (muon, adam), schedulers = train.optimizers_of(run, model, 2, fused=False)
    assert len(schedulers) == 2
    ours, theirs = ([p for g in o.param_groups for p in g["params"]] for o in (muon, adam))
    assert {p.ndim for p in ours} == {2, 4}
    assert {p.ndim for p in theirs} == {1}
    assert len(ours) + len(theirs) == len(list(model.parameters()))
    assert (muon.param_groups[0]["lr"], adam.param_groups[0]["lr"]) == pytest.approx((0.04, 0.002))
