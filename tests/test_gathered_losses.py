"""Every loss on two and three processes against the same loss of the whole batch in one."""

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hcl.losses import ContrastiveLoss, clamp_share, hard, supcon, weighted

D = 6
ROWS = {2: [(4, 4), (5, 2)], 3: [(3, 3, 3), (4, 1, 2), (5, 0, 3)]}  # the last batch is uneven
LOSSES = {
    "nt_xent": {},
    "debiased": {"tau_plus": 0.05},
    "hard": {"beta": 1.0, "tau_plus": 0.02},
    "hard separate": {"beta": 1.0, "tau_plus": 0.02, "debias": "separate"},
    "hard cross": {"beta": 0.5, "tau_plus": 0.0, "cross_modal": True},
    "hard exact": {"beta": 2.0, "tau_plus": 0.0, "temperature": 0.02},
    "decoupled": {"sigma": 0.5},
    "scl": {},
    "hard_scl": {"beta": 2.0, "Q": "negatives"},
    "hard_scl ignore": {"unlabelled": "ignore"},
    "supcon": {},
    "supcon cross": {"cross_modal": True},
    "schane": {"detach_weights": True},
}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request, tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("ranks") / "store", request.param)
    found.world = request.param
    yield found
    found.stop()


def batch(rows, dtype):
    g = torch.Generator().manual_seed(len(rows))
    b = sum(rows)
    z1, z2 = torch.randn(2, b, D, generator=g, dtype=torch.float64).to(dtype)
    return z1, z2, torch.randint(-1, 3, (b,), generator=g), torch.randn(4, D, generator=g).to(dtype)


def module(name, **more):
    return ContrastiveLoss(name.split()[0], **LOSSES[name], **more)


def part(rows, rank):
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def on_a_rank(rank, rows, dtype, names, queued):
    """Loss and gradient of this rank's rows, for each loss."""
    z1, z2, labels, queue = batch(rows, dtype)
    own, found = part(rows, rank), {}
    for name in names:
        a, b = (z[own].clone().requires_grad_() for z in (z1, z2))
        extra = {"queue": queue} if queued else {}
        loss = module(name, gather="summed")(a, b, labels[own], **extra)
        loss.backward()
        found[name] = loss.item(), a.grad, b.grad
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("queued", [False, True])
def test_loss_and_gradient_are_those_of_one_process(ranks, dtype, tolerance, queued):
    for rows in ROWS[ranks.world]:
        answers = ranks.values(on_a_rank, rows, dtype, list(LOSSES), queued)
        z1, z2, labels, queue = batch(rows, dtype)
        for name in LOSSES:
            a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
            loss = module(name)(a, b, labels, **({"queue": queue} if queued else {}))
            loss.backward()
            for rank, answer in enumerate(answers):
                value, grad1, grad2 = answer[name]
                own, close = part(rows, rank), {"rtol": tolerance, "atol": tolerance}
                assert value == pytest.approx(loss.item(), rel=tolerance), (name, rows)
                torch.testing.assert_close(grad1, a.grad[own], **close, msg=f"{name} {rows}")
                torch.testing.assert_close(grad2, b.grad[own], **close, msg=f"{name} {rows}")


def trained(rank, rows):
    z1, z2, _, _ = batch(rows, torch.float64)
    own = part(rows, rank)
    net = DistributedDataParallel(linear())
    hard(net(z1[own]), net(z2[own]), gather="averaged").backward()
    return net.module.weight.grad


def linear():
    torch.manual_seed(0)
    return nn.Linear(D, 4, bias=False, dtype=torch.float64)


def test_averaged_gradients_of_a_data_parallel_model_are_those_of_the_whole_batch(ranks):
    rows = ROWS[ranks.world][0]
    z1, z2, _, _ = batch(rows, torch.float64)
    net = linear()
    hard(net(z1), net(z2)).backward()
    for grad in ranks.values(trained, rows):
        torch.testing.assert_close(grad, net.weight.grad, rtol=1e-12, atol=1e-14)


def others(rank, rows):
    z1, z2, labels, _ = batch(rows, torch.float64)
    own = part(rows, rank)
    synthetic = made(z1, z2)
    both = torch.cat([synthetic[: len(z1)][own], synthetic[len(z1) :][own]])
    a, b = z1[own], z2[own]
    near = weighted(a, b, nearest, gather="summed")
    return (
        near.item(),
        clamp_share(a, b, tau_plus=0.2, gather="summed"),
        hard(a, b, synthetic=both, gather="summed").item(),
        supcon(a, None, labels[own], gather="summed").item(),
    )


def made(z1, z2):
    """Synthetic negatives (2B, 2, D) that differ from anchor to anchor."""
    z = torch.cat([z1, z2])
    return torch.stack([z.roll(1, 1) + 1, z.flip(1)], dim=1)


def nearest(s, i, j):
    """Negatives of even index alone, harder the larger the index: to see that indices are right."""
    return (0.1 * j.to(s) + s).masked_fill((i[:, None] + j) % 2 == 0, float("-inf"))


def test_weights_of_ones_own_synthetic_negatives_and_single_views(ranks):
    rows = ROWS[ranks.world][1]
    z1, z2, labels, _ = batch(rows, torch.float64)
    wanted = (
        weighted(z1, z2, nearest).item(),
        clamp_share(z1, z2, tau_plus=0.2),
        hard(z1, z2, synthetic=made(z1, z2)).item(),
        supcon(z1, None, labels).item(),
    )
    for answer in ranks.values(others, rows):
        assert answer == pytest.approx(wanted, rel=1e-12)


def refused(rank, rows):
    z1, z2, _, _ = batch(rows, torch.float64)
    own = part(rows, rank)
    z1 = z1[own].clone()
    if rank == 1:
        z1[0, 0] = float("nan")
    hard(z1, z2[own], gather="averaged")


def test_a_rank_with_bad_rows_is_named_on_all(ranks):
    answers = ranks(refused, ROWS[ranks.world][0])
    assert all(isinstance(error, ValueError) for error in answers)
    assert "z1: NaN or infinity in row(s) [0]" in str(answers[1])
    assert "rank 1" in str(answers[0])
    assert ranks.values(others, ROWS[ranks.world][1])  # and the group is as good as before
