"""The streaming passes against the whole matrix in float64, through every branch they have."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

from hcl import tiles
from hcl.losses import hard, hard_scl, nt_xent, supcon, weighted
from hcl.rowstats import by_strips, logsumexps

TILES = [(1, 1), (2, 5), (3, 3), (7, 8), (256, 1024)]
POWERS = [
    (1.0,), (2.0, 1.0), (1.0, 2.0), (1.5, 0.5), (1.7, 0.7), (3.0, 2.0), (6.0, 1.0), (0.25,),
    (2.0, 2.0), (3.0, 1.0, 2.0), (51.0, 50.0), (0.5, 1.7, 1.0),
]  # fmt: skip


def dense(x, y, own, other, powers, scale, dim=1):
    """Log-sum-exps over the candidates of other groups; -inf of nothing."""
    s = scale * x.double() @ y.double().T
    negative = own[:, None] != other
    total = torch.stack([torch.exp(k * s).mul(negative).sum(dim=dim) for k in powers])
    return total.where(total > 0, 1.0).log().masked_fill(total == 0, -math.inf)


def groups(kind, n, m, g):
    """Ascending groups of n anchors and m candidates."""
    if kind == "alone":  # no two of a group, and as far as they go the same
        return torch.arange(n), torch.arange(m)
    if kind == "pairs":
        return torch.arange(n) // 2, torch.arange(m) // 2
    if kind == "one":
        return torch.zeros(n, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
    if kind == "disjoint":  # all candidates are negatives
        return torch.zeros(n, dtype=torch.int64), torch.ones(m, dtype=torch.int64)
    if kind == "before":  # groups of the anchors lie outside those of the candidates
        return torch.full((n,), -1), torch.arange(m)
    sizes = torch.randint(0, 4, (n,), generator=g).sort().values
    return sizes, torch.randint(0, 5, (m,), generator=g).sort().values


KINDS = ["alone", "pairs", "one", "disjoint", "before", "mixed"]


def compare(n, m, kind, powers, *, columns=False, bound=math.inf, scale=1.3, seed=0):
    """Values and gradients of one call, in float64, with every statistic weighted at random."""
    g = torch.Generator().manual_seed(seed)
    symmetric = m is None
    x = torch.randn(n, 3, generator=g, dtype=torch.float64).clamp(-1, 1)
    y = None if symmetric else torch.randn(m, 3, generator=g, dtype=torch.float64).clamp(-1, 1)
    own, other = groups(kind, n, n if symmetric else m, g)
    if symmetric:
        other = None
    results = []
    for ours in (True, False):
        leaves = [v.clone().requires_grad_() for v in ((x,) if symmetric else (x, y))]
        a, b = leaves[0], leaves[-1]
        if ours:
            rows, cols = logsumexps(
                a, None if symmetric else b, own, other, powers=powers, scale=scale, bound=bound,
                columns=columns,
            )  # fmt: skip
            assert (cols is None) == (not columns)
        else:
            every = (own, own if symmetric else other, powers, scale)
            rows = dense(a, b, *every)
            cols = dense(a, b, *every, dim=0) if columns else None
        assert rows.shape == (len(powers), n)
        found = [rows] if cols is None else [rows, cols]
        total = 0.0
        for k, part in enumerate(found):
            weights = torch.randn(part.shape, generator=torch.Generator().manual_seed(k)).double()
            total = total + (weights * part.masked_fill(part == -math.inf, 0.0)).sum()
        grads = torch.autograd.grad(total, leaves)
        results.append(([v.detach() for v in found], grads))
    for one, wanted in zip(*results, strict=True):
        for a, b in zip(one, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# Every way through --------------------------------------------------------------------------------


@pytest.fixture(params=TILES, ids=str)
def tile(request, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", {"cpu": request.param, "cuda": request.param})


@pytest.mark.parametrize("keep", [0, 1 << 19])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tile")
def test_tiles_of_any_size_agree_with_the_matrix(kind, keep, monkeypatch):
    monkeypatch.setattr(tiles, "KEEP", keep)
    for powers in ((2.0, 1.0), (1.5, 0.5), (1.7, 0.7)):
        compare(9, None, kind, powers, bound=4.0)
        compare(9, 6, kind, powers, bound=4.0)
        compare(5, 11, kind, powers, bound=4.0, columns=True)


def test_tiles_taller_than_wide_agree_with_the_matrix(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", {"cpu": (3, 2), "cuda": (3, 2)})
    compare(9, 6, "pairs", (2.0, 1.0), bound=4.0)
    compare(9, None, "pairs", (2.0, 1.0), bound=4.0)


@pytest.mark.parametrize("strip", [1, 7, 1 << 19])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_any_size_agree_with_the_matrix(kind, strip, monkeypatch):
    monkeypatch.setattr(tiles, "STRIP", {"cpu": strip})
    monkeypatch.setattr(tiles, "LEAST", 1)
    for powers in ((2.0, 1.0), (1.7, 0.7)):
        compare(9, None, kind, powers)
        compare(9, 6, kind, powers)
        compare(5, 11, kind, powers, columns=True)


@pytest.mark.parametrize("bound", [0.6, math.inf])
@pytest.mark.parametrize("powers", POWERS, ids=str)
def test_powers_of_every_kind(powers, bound):
    scale = 0.2  # so that 51 of them are bounded, too
    compare(8, None, "mixed", powers, bound=bound, scale=scale)
    compare(6, 9, "mixed", powers, bound=bound, scale=scale, columns=True)


@pytest.mark.parametrize("bound", [4.0, math.inf])
@pytest.mark.parametrize(("n", "m"), list(itertools.product([0, 1, 2], [None, 0, 1, 2])))
def test_few_rows_and_none(n, m, bound):
    for kind in KINDS:
        compare(n, m, kind, (2.0, 1.0), bound=bound)
        if m is not None:
            compare(n, m, kind, (2.0, 1.0), bound=bound, columns=True)


@pytest.mark.parametrize("bound", [4.0, math.inf])
def test_a_matrix_of_many_tiles(bound):
    compare(700, None, "mixed", (2.0, 1.0), bound=bound)
    compare(300, 1500, "pairs", (1.5, 0.5), bound=bound, columns=True)


@pytest.mark.parametrize("bound", [4.0, math.inf])
def test_candidates_that_are_the_anchors_may_be_given_twice(bound):
    """As two arguments, with the gradient parted between them."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64)
    own = torch.arange(7) // 2
    options = {"powers": (2.0, 1.0), "scale": 0.5, "bound": bound}
    a, b, c = (x.clone().requires_grad_() for _ in range(3))
    once, _ = logsumexps(a, None, own, None, **options)
    twice, _ = logsumexps(b, c, own, own, **options)
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-14)
    once.sum().backward()
    twice.sum().backward()
    torch.testing.assert_close(a.grad, b.grad + c.grad)


@pytest.mark.parametrize("bound", [4.0, math.inf])
@pytest.mark.parametrize("wanted", ["x", "y", "columns alone"])
def test_a_gradient_is_made_for_those_who_want_it(wanted, bound):
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (5, 4))
    own, other = torch.arange(5) // 2, torch.arange(4) // 2
    leaf = (y if wanted == "y" else x).requires_grad_()
    options = {"powers": (1.0,), "scale": 0.5, "bound": bound, "columns": True}
    rows, cols = logsumexps(x, y, own, other, **options)
    made = cols if wanted == "columns alone" else rows
    (grad,) = torch.autograd.grad(made.sum(), leaf)
    dim = 0 if wanted == "columns alone" else 1
    (naive,) = torch.autograd.grad(dense(x, y, own, other, (1.0,), 0.5, dim).sum(), leaf)
    torch.testing.assert_close(grad, naive)
    with torch.no_grad():
        plain, _ = logsumexps(x, y, own, other, **options)
    assert not plain.requires_grad
    assert torch.equal(plain, rows)


@pytest.mark.parametrize("bound", [4.0, math.inf])
def test_second_derivatives_of_rows_and_columns(bound):
    g = torch.Generator().manual_seed(4)
    x, y = (torch.randn(n, 2, generator=g, dtype=torch.float64).requires_grad_() for n in (3, 4))
    own, other = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1, 2])
    options = {"powers": (2.0, 1.0), "scale": 0.5, "bound": bound}

    def both(x, y):
        return logsumexps(x, y, own, other, columns=True, **options)

    def rows(x):
        return logsumexps(x, None, own, None, **options)[0]

    for function, inputs in ((both, (x, y)), (rows, (x,))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# Any statistic of strips --------------------------------------------------------------------------


def spread(s, rows, cols, factor):
    return torch.stack([s.square().mean(dim=1) * factor, s.amax(dim=1)], dim=1)


@pytest.mark.parametrize("height", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("strip", [1, 9, 1 << 19])
def test_strips_of_any_height_agree_with_the_matrix(strip, height, monkeypatch):
    monkeypatch.setattr(tiles, "STRIP", {"cpu": strip})
    monkeypatch.setattr(tiles, "LEAST", 1)
    g = torch.Generator().manual_seed(5)
    x, y, factor = (
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((7, 3), (4, 3), (7,))
    )
    weights = torch.randn(7, 2, generator=g, dtype=torch.float64)
    strips = height and [
        (slice(top, min(top + height, 7)), slice(0, 4)) for top in range(0, 7, height)
    ]
    ours = by_strips(spread, x, y, factor, scale=0.7, strips=strips)
    wanted = spread(0.7 * x @ y.T, None, None, factor)
    torch.testing.assert_close(ours, wanted)
    leaves = (x, y, factor)
    for again in (False, True):
        one = torch.autograd.grad(ours, leaves, weights, retain_graph=True, create_graph=again)
        other = torch.autograd.grad(wanted, leaves, weights, retain_graph=True)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("again", [False, True])
def test_strips_of_anchors_that_are_the_candidates(again):
    """x and y are one tensor: its gradient is that of both roles, once."""
    x = torch.randn(6, 3, dtype=torch.float64)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    for leaf in (a, 2.0 * a):
        made = by_strips(lambda s, rows, cols: s.square().sum(dim=1), leaf, leaf, scale=0.5)
        other = 2.0 * b if leaf is not a else b
        wanted = (0.5 * other @ other.T).square().sum(dim=1)
        (one,) = torch.autograd.grad(made.sum(), a, create_graph=again)
        (two,) = torch.autograd.grad(wanted.sum(), b)
        torch.testing.assert_close(one, two)


def test_strips_see_the_columns_they_ask_for_and_where_they_are():
    x = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    seen = []

    def diagonal(s, rows, cols):
        seen.append((rows, cols, tuple(s.shape)))
        return s.diagonal()

    blocks = [slice(0, 4), slice(4, 6)]
    ours = by_strips(diagonal, x, x, scale=1.0, strips=[(block, block) for block in blocks])
    assert seen == [(slice(0, 4), slice(0, 4), (4, 4)), (slice(4, 6), slice(4, 6), (2, 2))]
    torch.testing.assert_close(ours, x.square().sum(dim=1))
    (grad,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(grad, 2 * x)


def test_strips_of_no_rows_and_of_no_columns():
    x = torch.randn(4, 3, requires_grad=True)
    for a, b in ((x[:0], x), (x, x[:0]), (x[:0], x[:0])):
        made = by_strips(lambda s, rows, cols: s.sum(dim=1), a, b, scale=1.0)
        assert made.tolist() == [0.0] * len(a)
        made.sum().backward()
    assert not x.grad.any()


# float32 ------------------------------------------------------------------------------------------


def pair(n, d, seed=0, noise=0.5, dtype=torch.float32):
    """Two views of n / 2 images."""
    g = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n // 2, d, generator=g)
    z2 = z1 + noise * torch.randn(n // 2, d, generator=g)
    return z1.to(dtype), z2.to(dtype)


def errors(function, z1, z2):
    """Relative, of the loss and of the gradient, against float64 of the same input."""
    found = []
    for wide in (False, True):
        a, b = ((z.double() if wide else z).detach().requires_grad_() for z in (z1, z2))
        loss = function(a, b)
        loss.backward()
        found.append((loss.item(), torch.cat([a.grad, b.grad]).double()))
    (ours, grad), (wanted, wanted_grad) = found
    assert torch.isfinite(grad).all()
    off = (grad - wanted_grad).norm() / wanted_grad.norm()
    return abs(ours - wanted) / abs(wanted), off.item()


@pytest.mark.parametrize("t", [0.05, 0.07, 0.1, 0.2, 0.5])
def test_float32_is_right_to_1e_6(t):
    z1, z2 = pair(512, 128)
    for beta, tau in itertools.product((0.0, 0.5, 1.0, 2.0), (0.0, 0.1, 0.2)):
        options = {"temperature": t, "beta": beta, "tau_plus": tau}
        loss, gradient = errors(lambda a, b, o=options: hard(a, b, **o), z1, z2)
        assert loss <= 1e-6, options
        # Measured 1.6e-6 there, where scores of 30 still fit plain sums in float32.
        assert gradient <= (3.2e-6 if (t, beta, tau) == (0.05, 0.5, 0.0) else 1e-6), options


def test_float32_is_right_where_debiasing_cancels():
    """Little is left of the negatives where tau_plus e^p comes near their mean: measured 2.2e-5."""
    z1, z2 = pair(512, 128, noise=3.0)
    for t, beta in itertools.product((0.05, 0.1, 0.5), (0.0, 0.5, 2.0)):
        options = {"temperature": t, "beta": beta, "tau_plus": 0.2}
        loss, gradient = errors(lambda a, b, o=options: hard(a, b, **o), z1, z2)
        assert loss <= 1e-6, options
        assert gradient <= 5e-5, options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_in_are_right_to_1e_2(dtype):
    """All but the gradient's own rounding is in float32."""
    z1, z2 = pair(512, 128, dtype=dtype)
    for t, beta in itertools.product((0.05, 0.1, 0.5), (0.0, 1.0)):
        options = {"temperature": t, "beta": beta, "tau_plus": 0.0}
        scaled = errors(lambda a, b, o=options: 4096 * hard(a, b, **o), z1, z2)  # as in training
        assert max(scaled) <= 1e-2, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "beta"), [(0.01, 0.0), (0.01, 2.0), (0.5, 50.0), (0.01, 50.0)])
def test_any_temperature_and_hardness_is_finite(t, beta, dtype):
    for noise in (0.0, 0.5, 3.0):
        z1, z2 = pair(64, 16, noise=noise, dtype=dtype)
        z2[0] = -z1[0]  # an antipode, of score -1/t
        for tau, debias in ((0.0, "released"), (0.1, "released"), (0.1, "separate")):
            a = z1.clone().requires_grad_()
            options = {"temperature": t, "beta": beta, "tau_plus": tau, "debias": debias}
            loss = hard(a, z2, **options)
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize(
    "function",
    [
        nt_xent,
        hard,
        lambda a, b: hard(a, b, temperature=0.05, beta=2.0),
        lambda a, b: hard_scl(a, b, torch.arange(300) // 7),
        lambda a, b: weighted(a, b, lambda s, i, j: s),
        lambda a, b: hard(a, b, cross_modal=True, queue=b[:50]),
    ],
)
def test_the_same_input_gives_the_same_bits(function):
    z1, z2 = pair(600, 16)
    found = []
    for _ in range(2):
        a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
        loss = function(a, b)
        loss.backward()
        found.append((loss.detach(), a.grad, b.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("t", [0.5, 0.02])
def test_neither_autocast_nor_its_place_changes_a_bit(t):
    z1, z2 = pair(64, 16)
    labels = torch.arange(32) // 4
    for function in (
        lambda a, b: hard(a, b, temperature=t),
        lambda a, b: hard_scl(a, b, labels, temperature=t, queue=b[:5]),
        lambda a, b: weighted(a, b, lambda s, i, j: s, temperature=t),
        lambda a, b: supcon(a, b, labels, temperature=t, cross_modal=True),
    ):
        found = []
        for forward, backward in itertools.product((False, True), repeat=2):
            a = z1.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                loss = function(a, z2)
            with torch.autocast("cpu", torch.bfloat16, enabled=backward):
                loss.backward()
            found.append((loss.detach(), a.grad))
        for loss, grad in found[1:]:
            assert torch.equal(loss, found[0][0])
            assert torch.equal(grad, found[0][1])


def test_precision_is_asked_for_in_torchs_words_and_put_back():
    z1, z2 = pair(64, 16)
    before = torch.get_float32_matmul_precision()
    exact = hard(z1, z2, precision="highest")
    for precision in (None, "highest", "high", "medium"):
        a = z1.clone().requires_grad_()
        loss = hard(a, z2, precision=precision)
        loss.backward()
        torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)
        assert torch.get_float32_matmul_precision() == before


# Around it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 0.02])
@pytest.mark.parametrize("keep", [0, 1 << 19])
def test_backward_twice_and_in_between(t, keep, monkeypatch):
    """A second backward pass, and other losses in the meantime, find what the first found."""
    monkeypatch.setattr(tiles, "KEEP", keep)
    z1, z2 = pair(64, 16)
    a = z1.clone().requires_grad_()
    for function in (
        lambda z: hard(a, z, temperature=t),
        lambda z: hard(a, z, temperature=t, beta=0.5),
        lambda z: hard_scl(a, z, torch.arange(32) // 4, temperature=t),
        lambda z: weighted(a, z, lambda s, i, j: s, temperature=t),
    ):
        loss = function(z2)
        (first,) = torch.autograd.grad(loss, a, retain_graph=True)
        function(-z2).backward()
        (second,) = torch.autograd.grad(3 * loss, a, retain_graph=True)
        (third,) = torch.autograd.grad(loss, a)
        torch.testing.assert_close(second, 3 * first)
        assert torch.equal(first, third)


def test_a_gradient_free_way_through():
    """No gradients, views without gradients, inference mode: the same value."""
    z1, z2 = pair(64, 16)
    wanted = hard(z1.clone().requires_grad_(), z2)
    assert torch.equal(hard(z1, z2), wanted)
    with torch.no_grad():
        assert not hard(z1.clone().requires_grad_(), z2).requires_grad
    with torch.inference_mode():
        assert torch.equal(hard(z1 + 0, z2 + 0), wanted)


def test_inputs_stay_as_they_are_in_any_layout():
    z1, z2 = pair(64, 16)
    queue, synthetic, labels = z1[:7] + 1, torch.randn(64, 3, 16), torch.arange(32) // 3
    given = [z1, z2, queue, synthetic, labels]
    before = [v.clone() for v in given]
    among = {"queue": queue, "synthetic": synthetic}
    for function in (hard, hard_scl, supcon, weighted):
        more = {hard_scl: (labels,), supcon: (labels,)}.get(function, ())
        more = (lambda s, i, j: s,) if function is weighted else more
        for normalized in (True, False):
            a = z1.requires_grad_()
            wanted = function(a, z2, *more, **among, normalize=normalized)
            wanted.backward()
            rows = torch.stack([z1, z2], dim=2)  # (B, d, 2): every second number
            loose = function(rows[:, :, 0], rows[:, :, 1], *more, **among, normalize=normalized)
            torch.testing.assert_close(loose, wanted)
            turned = z1.detach().T.contiguous().T
            assert not turned.is_contiguous()
            torch.testing.assert_close(
                function(turned, z2, *more, **among, normalize=normalized), wanted
            )
            z1.requires_grad_(False).grad = None
    for one, other in zip(given, before, strict=True):
        assert torch.equal(one, other)


def test_one_tensor_may_be_both_views():
    z, _ = pair(64, 16)
    a, b, c = (z.clone().requires_grad_() for _ in range(3))
    hard(a, a, tau_plus=0.0).backward()
    hard(b, c, tau_plus=0.0).backward()
    torch.testing.assert_close(a.grad, b.grad + c.grad)


MEMORY = """
import os, re, torch
from hcl.losses import hard, hard_scl, weighted
torch.set_num_threads(1)

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def step(name, n):
    z1, z2 = (torch.randn(n // 2, {d}, requires_grad=True) for _ in range(2))
    labels = torch.zeros(n // 2, dtype=torch.int64)
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    loss = {{
        "hard": lambda: hard(z1, z2),
        "one class": lambda: hard_scl(z1, z2, labels),
        "weights": lambda: weighted(z1, z2, lambda s, i, j: 1.0 * s),
    }}[name]()
    loss.backward()
    return kilobytes("VmHWM") - before

for name, n in {cases}:
    if not os.fork():  # memory that one case has freed would be there for the next
        try:
            step(name, 64)  # libraries are loaded
            print(step(name, n), flush=True)
        finally:
            os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_matrix_is_in_memory():
    """The matrix would be 256 MiB, and 144 MiB of the smaller batch, and autograd keeps several."""
    d, cases = 128, [("hard", 8192), ("one class", 6144), ("weights", 6144)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(cases=cases, d=d)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = {
        name: int(kilobytes) / 1024
        for (name, _), kilobytes in zip(cases, done.stdout.split(), strict=True)
    }
    allowed = {name: 4 * n * d * 4 / 2**20 + 64 for name, n in cases}
    allowed["one class"] += 24  # its strips are as wide as the batch
    assert all(0 < grown[name] <= allowed[name] for name in grown), (grown, allowed)


@pytest.fixture
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_has_the_same_value_and_gradient():
    """As torch.compile traces and differentiates it; its own kernels take a minute to build here.
    The passes are no part of its graphs, which break around them."""
    z1, z2 = pair(8, 4)
    linear = torch.nn.Linear(4, 4)

    def step(a, b):
        return hard(linear(a), linear(b))

    found = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        linear.weight.grad = None
        loss = function(z1, z2)
        loss.backward()
        found.append((loss.detach(), linear.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [28.6, math.inf])
def test_rows_of_16_bits_are_counted_and_summed_in_32(dtype, bound):
    """More groups than bfloat16 can tell apart, and sums that float16 cannot hold."""
    x = torch.nn.functional.normalize(torch.randn(600, 8), dim=1).to(dtype).requires_grad_()
    own = torch.arange(600) // 2
    rows, _ = logsumexps(x, None, own, None, powers=(2.0, 1.0), scale=1 / 0.07, bound=bound)
    (grad,) = torch.autograd.grad(rows.sum(), x)
    same = x.detach().float().requires_grad_()
    wanted, _ = logsumexps(same, None, own, None, powers=(2.0, 1.0), scale=1 / 0.07, bound=bound)
    torch.testing.assert_close(rows, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), same)[0].to(dtype))


def test_the_backward_pass_releases_what_was_kept():
    """As other operations do: a list of losses must not hold their tiles."""
    x = torch.randn(64, 4, requires_grad=True)
    rows, _ = logsumexps(x, None, torch.arange(64), None, powers=(1.0,), scale=1.0, bound=3.0)
    loss = rows.sum()
    kept = [v for v in loss.grad_fn.next_functions[0][0].saved_tensors if v is not None]
    assert any(v.shape == (64, 64) for v in kept)
    loss.backward()
    with pytest.raises(RuntimeError, match="freed"):
        loss.backward()


def test_torchs_newer_precision_setting_is_no_obstacle():
    code = (
        "import torch; from hcl.losses import hard; z = torch.randn(2, 8, 4);"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'; print(hard(*z).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
