"""Losses of consecutive sentences against loops written from their formulas, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from hcl import losses
from hcl.neighbours import found_share, hard_neighbours, quick_thoughts


def draw(n=9, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))


def neighbours(i, n, book, reach):
    return [
        j
        for j in range(n)
        if j != i and abs(i - j) <= reach and (book is None or book[i] == book[j])
    ]


def loop_quick_thoughts(f, g, book, t, reach):
    n, found = len(f), []
    for i in range(n):
        if near := neighbours(i, n, book, reach):
            s = [0.0 if j == i else float(f[i] @ g[j]) / t for j in range(n)]
            log_all = math.log(sum(math.exp(x) for x in s))
            found.append(sum(log_all - s[p] for p in near) / len(near))
    return sum(found) / len(found)


def loop_hard(f, g, book, t, beta, tau, reach, floor):
    n, found = len(f), []
    for i in range(n):
        near = neighbours(i, n, book, reach)
        u = [math.exp(float(f[i] @ g[j]) / t) for j in range(n) if j != i and j not in near]
        for p in near:
            up = math.exp(float(f[i] @ g[p]) / t)
            mean = sum(x ** (1 + beta) for x in u) / sum(x**beta for x in u)
            mean = max((mean - tau * up) / (1 - tau), floor)
            found.append((math.log(1 + len(u) * mean / up), 1 / len(near)))
    return sum(x * w for x, w in found) / sum(w for _, w in found)


BOOKS = [None, [0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2, 3, 3]]


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize(("t", "reach"), [(1.0, 1), (0.5, 2)])
def test_quick_thoughts_is_its_formula(book, t, reach):
    f, g = draw()
    tensor = None if book is None else torch.tensor(book)
    got = quick_thoughts(f, g, tensor, temperature=t, reach=reach).item()
    assert got == pytest.approx(loop_quick_thoughts(f, g, book, t, reach), rel=1e-12)


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize(
    ("beta", "tau"), [(0.0, 0.0), (1.0, 0.0), (2.5, 0.0), (0.0, 0.1), (1.0, 0.1)]
)
@pytest.mark.parametrize("bounded", [True, False])
def test_hard_neighbours_are_their_formula(book, beta, tau, bounded):
    f, g = (F.normalize(z, dim=1) for z in draw()) if bounded else draw()
    t = 0.5 if bounded else 1.0
    floor = math.exp(-1 / t) if bounded else 0.0
    tensor = None if book is None else torch.tensor(book)
    got = hard_neighbours(f, g, tensor, temperature=t, beta=beta, tau_plus=tau, bounded=bounded)
    assert got.item() == pytest.approx(loop_hard(f, g, book, t, beta, tau, 1, floor), rel=1e-10)


def test_one_neighbour_is_the_books_own_loss():
    """Pairs of consecutive sentences alone: a cross-modal batch of the library's HCL."""
    f, g = draw(2)
    f, g = (F.normalize(z, dim=1) for z in (f, g))
    book = torch.tensor([0, 0, 1, 1, 2, 2])
    z, w = (torch.cat([x, *draw(4, seed=3)])[:6] for x in (f, g))
    z, w = F.normalize(z, dim=1), F.normalize(w, dim=1)
    other = torch.tensor([1, 0, 3, 2, 5, 4])  # w of row i, z of its neighbour
    got = hard_neighbours(z, w, book, temperature=0.5, beta=1.0, bounded=True)

    def strip(s, i, j):  # z against w alone, and not the sentence itself, whose w stands elsewhere
        ours, theirs = i[:, None] < 6, j >= 6
        itself = theirs & ((j - 6)[None, :] == other[i % 6][:, None])
        return (1.0 * s).masked_fill(~(ours & theirs) | itself, -math.inf)

    want = 2 * losses.weighted(z, w[other], strip, temperature=0.5)  # half the anchors count 0
    assert got.item() == pytest.approx(want.item(), rel=1e-9)


def test_the_weights_are_constants_when_detached():
    f, g = draw()
    f.requires_grad_()
    values, gradients = [], []
    for detach in (False, True):
        loss = hard_neighbours(f, g, beta=2.0, detach_weights=detach)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, f)[0])
    assert values[0] == pytest.approx(values[1], rel=1e-14)
    assert not torch.allclose(*gradients)
    assert torch.autograd.gradcheck(lambda x: hard_neighbours(x, g, beta=2.0), f)
    assert torch.autograd.gradcheck(lambda x: quick_thoughts(x, g), f)


def test_large_scores_and_a_lost_estimate_stay_finite():
    f, g = (300 * z for z in draw())
    f.requires_grad_()
    for tau in (0.0, 0.1):
        loss = hard_neighbours(f.float(), g.float(), beta=2.0, tau_plus=tau)
        loss.backward()
        assert loss.isfinite()
        assert f.grad.isfinite().all()
    # a positive far above every negative, and nothing to bound the estimate: no loss, no gradient
    z = torch.eye(5, dtype=torch.float64).roll(1, 0) * 20
    w = torch.eye(5, dtype=torch.float64, requires_grad=True)
    loss = hard_neighbours(z, w * 1.0, torch.tensor([0, 0, 1, 2, 3]), beta=0.0, tau_plus=0.1)
    assert loss.isfinite()


@pytest.mark.parametrize("loss", [quick_thoughts, hard_neighbours])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(8, 5)}, "equal shapes"),
        ({"temperature": 0.0}, "temperature"),
        ({"reach": 0}, "reach=0"),
        ({"book": torch.zeros(4)}, r"book is \(4,\): \(9,\) would do"),
        ({"book": torch.arange(9)}, "no two of 9 sentences"),
        ({"f": torch.full((9, 5), math.nan)}, "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(loss, change, message):
    args = {"f": torch.zeros(9, 5), "g": torch.zeros(9, 5)} | change
    with pytest.raises(ValueError, match=message):
        loss(**args)


def test_a_batch_without_negatives_is_refused():
    with pytest.raises(ValueError, match="no negatives"):
        hard_neighbours(torch.zeros(3, 2), torch.zeros(3, 2), reach=2)
    with pytest.raises(ValueError, match="beta"):
        hard_neighbours(torch.zeros(9, 2), torch.zeros(9, 2), beta=-1.0)


@pytest.mark.parametrize("tau", [1.0, -0.1, math.nan])
def test_a_class_prior_out_of_range_is_refused(tau):
    with pytest.raises(ValueError, match="tau_plus"):
        hard_neighbours(torch.zeros(9, 2), torch.zeros(9, 2), tau_plus=tau)


@pytest.mark.parametrize("loss", [quick_thoughts, hard_neighbours])
def test_types_that_differ_are_refused(loss):
    with pytest.raises(TypeError, match=r"f is torch\.float32 and g torch\.float64"):
        loss(torch.zeros(9, 2), torch.zeros(9, 2).double())


# What is nearest ----------------------------------------------------------------------------------


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_share_of_neighbours_found_is_a_count(book, reach, seed):
    f, g = draw(seed=seed)
    found = []
    for i in range(9):
        scores = {j: float(f[i] @ g[j]) for j in range(9) if j != i}
        if near := neighbours(i, 9, book, reach):
            found.append(max(scores, key=scores.get) in near)
    tensor = None if book is None else torch.tensor(book)
    share = found_share(f, g, tensor, reach=reach)
    assert share == pytest.approx(sum(found) / len(found))
    assert isinstance(share, float)


def test_the_share_counts_only_sentences_that_have_a_neighbour():
    book = torch.tensor([0, 0, 1, 2, 2])
    f = torch.eye(5)
    g = torch.eye(5)[[1, 0, 2, 4, 3]]  # row 2 is alone in its book, and finds none
    assert found_share(f, g, book) == 1.0
    assert found_share(f, torch.eye(5)[[1, 2, 0, 4, 3]], book) == 0.75  # row 0 finds row 2


def test_a_sentence_does_not_find_itself_and_nothing_is_changed():
    f, g = (100 * torch.eye(6), 100 * torch.eye(6) + torch.eye(6).roll(1, 0))
    before = f.clone(), g.clone()
    assert found_share(f, g) == pytest.approx(5 / 6)
    assert torch.equal(f, before[0])
    assert torch.equal(g, before[1])
    f.requires_grad_()
    assert found_share(f, g) == pytest.approx(5 / 6)


@pytest.mark.parametrize("n", [20, 50])
def test_the_share_of_random_embeddings_is_that_of_chance(n):
    """Two neighbours among n - 1 other sentences, but for those at the ends, which have one."""
    found = [found_share(*draw(n, 6, seed)) for seed in range(200)]
    chance = (2 * (n - 2) + 2) / n / (n - 1)
    assert sum(found) / 200 == pytest.approx(chance, abs=5 * (chance / n / 200) ** 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(8, 5)}, "equal shapes"),
        ({"f": torch.zeros(1, 5), "g": torch.zeros(1, 5)}, "B >= 2"),
        ({"reach": 0}, "reach=0"),
        ({"book": torch.arange(9)}, "no two of 9 sentences"),
        ({"f": torch.full((9, 5), math.inf)}, "NaN"),
    ],
)
def test_a_share_of_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        found_share(**({"f": torch.zeros(9, 5), "g": torch.ones(9, 5)} | change))
