"""MoCo's loss against a float64 loop; its queue and copy; training with them, also interrupted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from hcl import losses, train
from hcl.moco import MomentumQueue, queue_loss


def rows(n, d=5, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(b=6, k=9, seed=0, noise=0.5):
    query = rows(b, seed=seed)
    return query, query + noise * rows(b, seed=seed + 1), rows(k, seed=seed + 2)


# The loss -----------------------------------------------------------------------------------------


def by_hand(query, key, queue, *, temperature=0.5, beta=0.0, tau_plus=0.0):
    """Query by query in float64, as the docstring of hcl.moco has it, without logarithms."""
    t, found = temperature, []
    for x, y in zip(query.double(), key.double().detach(), strict=True):
        x, y = x / x.norm(), y / y.norm()
        s = torch.stack([x @ (k / k.norm()) / t for k in queue.double()])
        q = torch.exp(beta * s) / torch.exp(beta * s).sum()
        p = torch.exp(x @ y / t)
        ng = len(queue) / (1 - tau_plus) * ((q * torch.exp(s)).sum() - tau_plus * p)
        if tau_plus:
            ng = torch.clamp(ng, min=len(queue) * math.exp(-1 / t))
        found.append(torch.log(1 + ng / p))
    return torch.stack(found).mean()


@pytest.mark.parametrize("t", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("tau_plus", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0, 3.0])
def test_value_and_gradient_are_the_formulas(beta, tau_plus, t):
    results = []
    for function in (queue_loss, by_hand):
        query, key, queue = batch(seed=int(10 * t))
        query.requires_grad_()
        loss = function(query, key, queue, temperature=t, beta=beta, tau_plus=tau_plus)
        loss.backward()
        results.append((loss.item(), query.grad))
    (ours, our_grad), (wanted, grad) = results
    assert ours == pytest.approx(wanted, rel=2e-6)
    torch.testing.assert_close(our_grad, grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}, {"beta": 0.5, "tau_plus": 0.05}], ids=str)
def test_a_batch_of_one_image_has_no_negatives_but_the_queue(options):
    """Then the two anchors of hcl.losses.hard are a query and a key that change places."""
    for seed in range(5):
        one, two, queue = batch(b=1, seed=seed)
        wanted = losses.hard(one, two, queue=queue, **{"beta": 0.0, "tau_plus": 0.0, **options})
        both = [queue_loss(a, b, queue, **options) for a, b in ((one, two), (two, one))]
        assert sum(both).item() / 2 == pytest.approx(wanted.item(), rel=1e-5)


def test_without_hardness_it_is_the_cross_entropy_of_moco():
    query, key, queue = (normalize(z, dim=1) for z in batch())
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ queue.T], dim=1) / 0.2
    wanted = nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))
    assert queue_loss(query, key, queue, temperature=0.2).item() == pytest.approx(wanted.item())


def test_only_the_queries_get_a_gradient():
    query, key, queue = (z.requires_grad_() for z in batch())
    loss = queue_loss(query, key, queue.detach(), beta=1.0, tau_plus=0.1)
    loss.backward()
    assert query.grad.any()
    assert key.grad is None


def test_large_beta_keeps_the_hardest_key_alone():
    query, key, queue = batch()
    hardest = (normalize(query, dim=1) @ normalize(queue, dim=1).T).argmax(dim=1)
    wanted = [
        by_hand(query[i : i + 1], key[i : i + 1], queue[hardest[i]].expand(len(queue), -1))
        for i in range(len(query))
    ]
    ours = queue_loss(query, key, queue, beta=1e3)
    assert ours.item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_where_the_clamp_binds_the_queue_no_longer_counts(beta):
    """Aligned pairs and a prior of 0.9: Ng is K e^(-1/t), and the loss that of p alone."""
    query, _, queue = batch(k=7)
    found = []
    for negatives in (queue, queue.flip(1)):
        x = query.clone().requires_grad_()
        loss = queue_loss(x, query, negatives, beta=beta, tau_plus=0.9)
        loss.backward()
        found.append((loss.item(), x.grad))
    assert found[0][0] == pytest.approx(math.log(1 + 7 * math.exp(-2 - 2)), rel=1e-5)
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].isfinite().all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), beta=st.floats(0, 4), tau=st.sampled_from([0.0, 0.03, 0.3]))
def test_order_and_lengths_do_not_matter(seed, beta, tau):
    query, key, queue = batch(seed=seed)
    g = torch.Generator().manual_seed(seed)
    i, k = (torch.randperm(n, generator=g) for n in (len(query), len(queue)))
    ours = queue_loss(query, key, queue, beta=beta, tau_plus=tau)
    moved = queue_loss(3 * query[i], 0.2 * key[i], 7 * queue[k], beta=beta, tau_plus=tau)
    torch.testing.assert_close(ours, moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_is_computed_in_float32(dtype):
    made = [z.to(dtype) for z in batch()]
    loss = queue_loss(*made, beta=1.0, temperature=0.05)
    assert loss.dtype == torch.float32
    wanted = by_hand(*(z.double() for z in made), beta=1.0, temperature=0.05)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("t", [0.01, 0.05])
def test_small_temperatures_and_extreme_rows_stay_finite(t):
    query, key, queue = batch()
    queue[0], queue[1], query[2] = query[0], -query[0], 0.0
    for options in ({}, {"beta": 2.0}, {"beta": 50.0, "tau_plus": 0.1}):
        x = query.clone().requires_grad_()
        loss = queue_loss(x, key, queue, temperature=t, **options)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((4, 3), (5, 3), (2, 3)), r"\(4, 3\), \(5, 3\), \(2, 3\)"),
     (((4, 3), (4, 3), (2, 2)), r"\(2, 2\): give"), (((4,), (4,), (2,)), "give"),
     (((4, 3), (4, 3), (3,)), r"\(3,\): give"), (((4, 3), (4, 3), (1, 2, 3)), "give"),
     (((4, 3), (4, 3), (0, 3)), "queue.* 0"), (((0, 3), (0, 3), (2, 3)), "query.* 0")],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        queue_loss(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("beta", -0.5), ("tau_plus", 1.0),
     ("tau_plus", -0.1), ("beta", float("nan"))],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        queue_loss(*batch(), **{name: value})


# The queue and the copy ---------------------------------------------------------------------------


def linear(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def numbered(first, n):
    """Keys whose first coordinate is their number."""
    return torch.stack([torch.arange(first, first + n), torch.zeros(n)], dim=1)


def test_it_begins_as_random_unit_rows_that_no_seed_of_ours_changes():
    torch.manual_seed(3)
    one = MomentumQueue(linear(), size=50, dim=2)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(one.queue.norm(dim=1), torch.ones(50))
    assert torch.equal(one.queue, MomentumQueue(linear(1), size=50, dim=2).queue)
    assert one.queue.mean(dim=0).norm() < 0.4


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9), sizes=st.lists(st.integers(0, 20), max_size=6))
def test_it_keeps_the_youngest_keys(size, sizes):
    keys = MomentumQueue(linear(), size=size, dim=2)
    first = keys.queue[:, 0].tolist()
    pushed = []
    for n in sizes:
        keys.push(numbered(100 + len(pushed), n))
        pushed += range(100 + len(pushed), 100 + len(pushed) + n)
    kept = sorted(keys.queue[:, 0].tolist())
    assert kept[max(0, size - len(pushed)) :] == pushed[-size:]
    assert set(kept[: max(0, size - len(pushed))]) <= set(first)
    assert 0 <= int(keys.place) < size


def test_the_oldest_go_first_and_round_again():
    keys = MomentumQueue(linear(), size=5, dim=2)
    for first, n in ((1, 3), (4, 3), (7, 1)):
        keys.push(numbered(first, n))
    assert keys.queue[:, 0].tolist() == [6, 7, 3, 4, 5]


def test_the_copy_follows_by_its_momentum_and_gets_no_gradient():
    model, keys = linear(), MomentumQueue(linear(), size=3, dim=2, momentum=0.75)
    before = [p.clone().double() for p in keys.copy.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    keys.follow(model)
    for old, mine, theirs in zip(before, keys.copy.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), 0.75 * old + 0.25 * theirs.double())
        assert not mine.requires_grad
        assert theirs.requires_grad
    still = MomentumQueue(model, size=3, dim=2, momentum=0.0)
    still.follow(linear(5))
    for mine, theirs in zip(still.copy.parameters(), linear(5).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 10, 13, 33])
def test_a_key_is_the_copys_embedding_of_its_own_row(n):
    """Without BatchNorm the shuffle and the parts leave no trace."""
    keys, x = MomentumQueue(linear(), size=3, dim=2), rows(n, 3)
    found = keys.keys(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, normalize(keys.copy(x), dim=1))
    assert not found.requires_grad


@pytest.mark.parametrize("n", [*range(2, 18), 25, 34, 256])
def test_batchnorm_sees_parts_of_two_rows_or_more(n):
    """A part of one row would have no variance."""
    seen = []
    keys = MomentumQueue(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), size=3, dim=4)
    keys.copy.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    assert keys.keys(rows(n, 3), torch.Generator()).isfinite().all()
    assert sum(seen) == n
    assert min(seen) >= 2
    assert len(seen) == min(4, n // 2)
    assert max(seen) - min(seen) <= 1


def test_the_shuffle_is_the_generators():
    keys = MomentumQueue(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), size=3, dim=4)
    x = rows(16, 3)
    one, again, other = (keys.keys(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_all_of_it_is_in_the_state():
    one, two = (MomentumQueue(linear(s), size=5, dim=2) for s in (0, 1))
    one.push(numbered(1, 3))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.queue, two.queue)
    x = rows(4, 3)
    assert torch.equal(one.copy(x), two.copy(x))
    for keys in (one, two):
        keys.push(numbered(7, 4))
    assert one.queue[:, 0].tolist() == two.queue[:, 0].tolist() == [9, 10, 3, 7, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "size=0"), ({"momentum": 1.0}, "momentum=1.0"),
     ({"momentum": -0.1}, "momentum=-0.1"), ({"momentum": float("nan")}, "momentum=nan")],
)  # fmt: skip
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MomentumQueue(linear(), **{"size": 4, "dim": 2, **options})


# Training with a queue ----------------------------------------------------------------------------


def test_a_step_compares_with_the_keys_of_the_steps_before(tiny):
    run = tiny(queue=40, momentum=0.5, method="hard", beta=1.0, tau_plus=0.05)
    data = train.load_data(run)
    model = train.Model(nn.Linear(128, 8), nn.Identity())
    objective = train.Objective(run, model, data)
    objective.begin(1)
    at = torch.arange(32)
    queue = objective.keys.queue.clone()
    for step in range(2):
        loss = objective(at, torch.Generator().manual_seed(step))
        v1, v2 = data.views(data.x_train[at], torch.Generator().manual_seed(step))
        keys = normalize(objective.keys.copy(v2), dim=1)
        wanted = by_hand(model(v1), keys, queue, beta=1.0, tau_plus=0.05)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        queue = torch.cat([queue, keys])[-40:]
        where = torch.arange(32 * (step + 1), 32 * (step + 1) + 40) % 40  # oldest first
        torch.testing.assert_close(objective.keys.queue[where], queue)
        with torch.no_grad():
            model.encoder.weight += 0.1
        objective.after_step()
    moved = objective.keys.copy.encoder.weight - model.encoder.weight
    torch.testing.assert_close(moved, torch.full_like(moved, -0.1 * (0.5 + 0.25)))


@pytest.mark.parametrize("changes", [{}, {"batch": 10}, {"precision": "bfloat16"}], ids=str)
def test_training_with_a_queue_learns(tiny, changes):
    record = train.train(tiny(queue=64, epochs=6, eval_every=6, **changes), progress=False)
    assert record.metrics["knn"] > record.history[0]["knn"]
    assert "clamp_share" not in record.metrics  # of a loss with a clamp that nobody measured


def test_momentum_decides_and_the_loss_has_the_queues_size(tiny):
    found = {
        (queue, momentum): train.train(
            tiny(queue=queue, momentum=momentum, method="nt_xent"), progress=False
        ).metrics["loss"]
        for queue, momentum in ((64, 0.99), (64, 0.5), (512, 0.99))
    }
    assert found[64, 0.99] != found[64, 0.5]
    assert found[512, 0.99] - found[64, 0.99] == pytest.approx(math.log(8), abs=0.4)
