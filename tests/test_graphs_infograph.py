"""InfoGraph's objective, as its equation and as released, against loops over nodes and graphs."""

import math

import pytest
import torch
from torch.nn import functional as F

from hcl.graphs import Heads, local_global, local_global_released
from hcl.graphs.infograph import floor_share

V, G, D = 11, 4, 5
GRID = [(b, t) for b in (0.0, 1.0, 2.0, 10.0) for t in (0.0, 0.1, 0.5)]


def batch_of(scale=1.0, seed=0, d=D):
    """Nodes, graphs, and which graph a node is of, in float64."""
    g = torch.Generator().manual_seed(seed)
    nodes = scale * torch.randn(V, d, generator=g, dtype=torch.float64)
    graphs = scale * torch.randn(G, d, generator=g, dtype=torch.float64)
    return nodes, graphs, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])


def sp(a):
    return max(a, 0.0) + math.log1p(math.exp(-abs(a)))


def scores(nodes, graphs):
    return [[float(u @ v) for v in graphs] for u in nodes]


def equation(nodes, graphs, batch, beta, tau, sign=1, floor=True):
    """The population objective's estimate, node by node."""
    total = 0.0
    for n, row in enumerate(scores(nodes, graphs)):
        own = int(batch[n])
        negatives = [row[g] for g in range(len(row)) if g != own]
        weights = [math.exp(sign * beta * s) for s in negatives]
        mean = sum(w * sp(s) for w, s in zip(weights, negatives, strict=True)) / sum(weights)
        rest = (mean - tau * sp(row[own])) / (1 - tau)
        total += sp(-row[own]) + (max(rest, 0.0) if floor else rest)
    return total / len(nodes)


def released(nodes, graphs, batch, beta, tau=0.5, sign=-1):
    """The released code's sums over all V * G entries, masked ones too, entry by entry."""
    s = scores(nodes, graphs)
    v, g = len(s), len(s[0])
    p = [[s[n][k] if k == int(batch[n]) else 0.0 for k in range(g)] for n in range(v)]
    q = [[s[n][k] if k != int(batch[n]) else 0.0 for k in range(g)] for n in range(v)]
    e_pos = e_neg = 0.0
    largest = max(max(map(max, q)), abs(min(map(min, q))))
    for n in range(v):
        omega = [math.exp(beta * sign * 2 * x / largest) for x in q[n]]
        mean = sum(omega) / g
        for k in range(g):
            e_pos += math.log(2) - sp(-p[n][k]) - tau / (1 - tau) * sp(p[n][k])
            if beta == 0:
                e_neg += (sp(q[n][k]) - math.log(2)) / (1 - tau)
            else:
                e_neg += omega[k] / mean * sp(q[n][k]) / (1 - tau) - math.log(2)
    return e_neg / (v * (g - 1)) - e_pos / v


# --- as the equation has it


@pytest.mark.parametrize(("beta", "tau"), GRID)
@pytest.mark.parametrize("floor", [True, False])
@pytest.mark.parametrize("sign", ["hard", "easy"])
def test_the_equation(beta, tau, sign, floor):
    data = batch_of()
    found = local_global(*data, beta=beta, tau_plus=tau, sign=sign, floor=floor)
    wanted = equation(*data, beta, tau, 1 if sign == "hard" else -1, floor)
    assert found.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("loss", [local_global, local_global_released])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("sign", ["hard", "easy"])
def test_gradients_are_those_of_finite_differences(loss, beta, sign):
    nodes, graphs, batch = batch_of(0.5)
    inputs = [x.requires_grad_() for x in (nodes, graphs)]
    assert torch.autograd.gradcheck(
        lambda u, v: loss(u, v, batch, beta=beta, tau_plus=0.3, sign=sign), inputs
    )


def infograph(nodes, graphs, batch):
    """InfoGraph's own estimator, masked zeros and all: its Jensen-Shannon measure."""
    res = nodes @ graphs.T
    pos = F.one_hot(batch, len(graphs)).to(res)
    p, q = res * pos, res * (1 - pos)
    e_pos = (math.log(2) - F.softplus(-p)).sum() / len(nodes)
    e_neg = (F.softplus(-q) + q - math.log(2)).sum() / (len(nodes) * (len(graphs) - 1))
    return e_neg - e_pos


def test_without_hardness_and_prior_it_is_infographs_whose_masked_zeros_cancel():
    data = batch_of()
    wanted = infograph(*data) + 2 * math.log(2)
    assert local_global(*data).item() == pytest.approx(wanted.item(), abs=1e-12)
    assert local_global_released(*data, beta=0, tau_plus=0).item() == pytest.approx(
        infograph(*data).item(), abs=1e-12
    )


def test_weights_rise_with_the_score_or_fall():
    nodes, graphs = torch.ones(1, 1).double(), torch.tensor([[5.0], [-3], [-1], [3]]).double()
    plain, hard, easy = (
        local_global(nodes, graphs, torch.tensor([0]), beta=b, sign=s).item()
        for b, s in ((0, "hard"), (1, "hard"), (1, "easy"))
    )
    assert easy < plain < hard
    hardest = local_global(nodes, graphs, torch.tensor([0]), beta=500)
    assert hardest.item() == pytest.approx(sp(-5) + sp(3), abs=1e-9)  # the most similar alone


def test_detached_weights_change_the_gradient_alone():
    nodes, graphs, batch = batch_of()
    nodes.requires_grad_()
    found = [local_global(nodes, graphs, batch, beta=1, detach_weights=d) for d in (False, True)]
    assert found[0].item() == found[1].item()
    through, stopped = (torch.autograd.grad(x, nodes)[0] for x in found)
    assert not torch.allclose(through, stopped)
    s = nodes.detach() @ graphs.T
    q = s.scatter(1, batch[:, None], -math.inf).softmax(dim=1)  # constants
    wanted = torch.zeros_like(s)
    wanted.scatter_(1, batch[:, None], -torch.sigmoid(-s.gather(1, batch[:, None])))
    wanted = (wanted + q * torch.sigmoid(s)) @ graphs / V
    torch.testing.assert_close(stopped, wanted)


def test_debiasing_without_a_floor_falls_without_end():
    nodes, graphs, batch = batch_of()
    graphs = F.normalize(graphs, dim=1)
    nodes = graphs[batch]  # aligned
    values = [
        local_global(k * nodes, graphs, batch, tau_plus=0.5, floor=False).item()
        for k in (1, 100, 10_000)
    ]
    assert values[0] > values[1] > values[2]
    assert values[2] < -1000
    assert local_global(10_000 * nodes, graphs, batch, tau_plus=0.5).item() >= 0


def test_the_released_debiasing_penalises_what_the_equation_rewards():
    """With tau_plus 0.5 the positive's part is least at a score of 0."""
    graphs = torch.eye(2, dtype=torch.float64)
    at = [
        local_global_released(torch.tensor([[x, 0.0]]).double(), graphs, torch.tensor([0]), beta=0)
        for x in (-1.0, 0.0, 1.0)
    ]
    assert at[1] < at[0]
    assert at[0].item() == pytest.approx(at[2].item())
    ours = [
        local_global(
            torch.tensor([[x, 0.0]]).double(), graphs, torch.tensor([0]), tau_plus=0.5, floor=False
        )
        for x in (-1.0, 0.0, 1.0)
    ]
    assert ours[0] > ours[1] > ours[2]


def test_the_floor_binds_where_the_positive_is_high_enough():
    nodes, graphs, batch = batch_of(2.0)
    shares = [floor_share(nodes, graphs, batch, tau_plus=t) for t in (0.0, 0.1, 0.5, 0.9)]
    s = nodes @ graphs.T
    for tau, share in zip((0.0, 0.1, 0.5, 0.9), shares, strict=True):
        bound = 0
        for n in range(V):
            rest = [sp(float(s[n, g])) for g in range(G) if g != int(batch[n])]
            bound += sum(rest) / (G - 1) < tau * sp(float(s[n, int(batch[n])]))
        assert share == pytest.approx(bound / V)
    assert shares[0] == 0
    assert sorted(shares) == shares


# --- as released


@pytest.mark.parametrize(("beta", "tau"), GRID)
@pytest.mark.parametrize("sign", ["easy", "hard"])
def test_the_released_sums(beta, tau, sign):
    data = batch_of()
    found = local_global_released(*data, beta=beta, tau_plus=tau, sign=sign)
    wanted = released(*data, beta, tau, -1 if sign == "easy" else 1)
    assert found.item() == pytest.approx(wanted, abs=1e-11)


def test_the_released_weights_fall_with_the_score_and_have_mean_one():
    from hcl.graphs.infograph import _released_weights

    q = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0]])
    weight = _released_weights(q, -1.0)
    wanted = torch.tensor([[3.36, 0.89, 0.46, 0.23, 0.06]])  # as worked out by hand, to two places
    torch.testing.assert_close(weight, wanted, atol=0.01, rtol=0)
    assert weight.mean().item() == pytest.approx(1)


def test_the_released_hardness_does_not_see_the_scale_of_all_scores():
    """r lies in [-2, 2] whatever the scores, so beta is not that of the equation."""
    nodes, graphs, batch = batch_of()
    from hcl.graphs.infograph import _released_weights

    s = nodes @ graphs.T
    torch.testing.assert_close(_released_weights(s, 1.0), _released_weights(9 * s, 1.0))
    few, many = (local_global(k * nodes, graphs, batch, beta=1) for k in (1, 9))
    assert not math.isclose(few.item(), many.item())


def test_the_defaults_are_the_released_ones():
    data = batch_of()
    assert local_global_released(*data).item() == pytest.approx(released(*data, 1.0, 0.5, -1))


def test_scores_that_are_all_zero_have_a_value():
    nodes, graphs, batch = batch_of(0.0)
    wanted = G / (G - 1) * math.log(2) + G * math.log(2)
    found = local_global_released(nodes.requires_grad_(), graphs, batch, beta=2)
    assert found.item() == pytest.approx(wanted)
    found.backward()
    assert torch.isfinite(nodes.grad).all()


@pytest.mark.parametrize("loss", [local_global, local_global_released])
@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
def test_large_scores_do_not_overflow(loss, beta):
    nodes, graphs, batch = (x.float() if x.is_floating_point() else x for x in batch_of(300.0))
    nodes.requires_grad_()
    value = loss(nodes, graphs, batch, beta=beta, tau_plus=0.1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(nodes.grad).all()


@pytest.mark.parametrize("loss", [local_global, local_global_released])
def test_the_order_of_nodes_and_the_names_of_graphs_do_not_matter(loss):
    nodes, graphs, batch = batch_of()
    rows, names = torch.randperm(V), torch.randperm(G)
    value = loss(nodes, graphs, batch, beta=2, tau_plus=0.2)
    moved = loss(nodes[rows], graphs[names], names.argsort()[batch[rows]], beta=2, tau_plus=0.2)
    assert moved.item() == pytest.approx(value.item())


# --- heads, and what is refused


def test_heads_are_two_networks_of_three_layers_and_a_shortcut():
    torch.manual_seed(0)
    heads = Heads(6)
    h = torch.randn(4, 6)
    for name, found in (("local", heads.local(h)), ("whole", heads(h))):
        head = getattr(heads, name)
        x = h
        for k in (0, 2, 4):
            x = (x @ head.block[k].weight.T + head.block[k].bias).relu()
        torch.testing.assert_close(found, x + h @ head.shortcut.weight.T + head.shortcut.bias)
    assert not torch.allclose(heads(h), heads.local(h))
    assert sum(p.numel() for p in heads.parameters()) == 2 * 4 * (6 * 6 + 6)


REFUSED = [
    ({"beta": -1.0}, ValueError, "beta=-1.0"), ({"beta": math.inf}, ValueError, "beta=inf"),
    ({"tau_plus": 1.0}, ValueError, "tau_plus=1.0"),
    ({"tau_plus": -0.1}, ValueError, "tau_plus=-0.1"),
    ({"sign": "plus"}, ValueError, "sign='plus': choose one of 'hard', 'easy'"),
    ({"graphs": torch.zeros(1, D).double()}, ValueError, "1 leave.* no negatives"),
    ({"graphs": torch.zeros(G, 3).double()}, ValueError, r"must be \(G, 5\)"),
    ({"graphs": torch.zeros(G, D)}, TypeError, "share a dtype"),
    ({"nodes": torch.zeros(V, D).long()}, TypeError, "floating point"),
    ({"nodes": torch.full((V, D), math.nan).double()}, ValueError, "NaN or infinity"),
    ({"batch": torch.zeros(3).long()}, ValueError, r"batch \(3,\): must be \(11,\)"),
    ({"batch": torch.zeros(V)}, TypeError, "batch: must be integers"),
    ({"batch": torch.full((V,), G)}, ValueError, "batch: 4 to 4; must be 0 to 3"),
    ({"batch": torch.full((V,), -1)}, ValueError, "batch: -1 to -1"),
    ({"nodes": torch.zeros(0, D).double(), "batch": torch.zeros(0).long()}, ValueError, "V >= 1"),
]  # fmt: skip


@pytest.mark.parametrize("loss", [local_global, local_global_released, floor_share])
@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_bad_input_is_refused(loss, change, error, message):
    values = dict(zip(("nodes", "graphs", "batch"), batch_of(), strict=True)) | change
    with pytest.raises(error, match=message):
        loss(**values)
