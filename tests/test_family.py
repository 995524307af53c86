"""Every loss against a float64 loop over its anchors, written from the papers' formulas."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hcl import losses, tiles
from hcl.losses import (
    METHODS,
    ContrastiveLoss,
    clamp_share,
    debiased,
    decoupled,
    hard,
    hard_scl,
    nt_xent,
    schane,
    scl,
    supcon,
    weighted,
)

SUPERVISED = ("scl", "hard_scl", "supcon", "schane")
B, D, K, S = 5, 4, 3, 2  # images, dimensions, queue, synthetic negatives of each anchor


# Formulas, anchor by anchor -----------------------------------------------------------------------


class Anchor(NamedTuple):
    own: torch.Tensor  # () score of the other view
    positives: torch.Tensor  # (P,) scores
    negatives: torch.Tensor  # (M,) scores
    others: int  # candidates that are neither the anchor nor its other view
    row: int  # of the anchor in cat([z1, z2])
    columns: list  # (M,) of the negatives: in cat([z1, z2]), queue, synthetic


def anchors(
    z1, z2, t, labels=None, *, unlabelled="negative", normalize=True, cross_modal=False,
    queue=None, synthetic=None,
):  # fmt: skip
    """Who is compared with whom, in plain words: no sorting, no tiles, no symmetry."""

    def unit(row):
        return row / row.square().sum().sqrt() if normalize else row

    b = len(z1)
    images = [i for i in range(b) if unlabelled == "negative" or labels is None or labels[i] >= 0]
    z = {i + v * b: unit(z[i]) for v, z in enumerate((z1, z2)) if z is not None for i in images}
    for row in z:
        candidates = [c for c in z if c != row and not (cross_modal and c // b == row // b)]
        groups = {True: [], False: []}
        for c in candidates:
            named = labels is not None and labels[row % b] >= 0
            same = c % b == row % b or (named and labels[c % b] == labels[row % b])
            groups[bool(same)].append(c)
        columns, rest = list(groups[False]), [z[c] for c in groups[False]]
        if queue is not None:
            rest += [unit(q) for q in queue]
        if synthetic is not None:
            rest += [unit(h) for h in synthetic[row]]
        extra = len(rest) - len(columns)
        others = len([c for c in candidates if c % b != row % b]) + extra
        partner = (row + b) % (2 * b) if z2 is not None else row
        yield Anchor(
            own=z[row] @ z[partner] / t,
            positives=stack([z[row] @ z[c] / t for c in groups[True]]),
            negatives=stack([z[row] @ r / t for r in rest]),
            others=others,
            row=row,
            columns=columns + [b * (1 if z2 is None else 2) + k for k in range(extra)],
        )


def stack(numbers):
    return torch.stack(numbers) if numbers else torch.zeros(0, dtype=torch.float64)


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else torch.zeros((), dtype=torch.float64)


def tilted_mean(u, beta, detach=False):
    """Sum of w u / M with the weights u^beta over their mean; 0 of nothing."""
    if not len(u):
        return torch.zeros((), dtype=torch.float64)
    w = u**beta / (u**beta).mean()
    return ((w.detach() if detach else w) * u).mean()


def nt_xent_by_hand(found, t):
    return mean(-(a.own.exp() / (a.own.exp() + a.negatives.exp().sum())).log() for a in found)


def decoupled_by_hand(found, t, sigma=None):
    found = list(found)
    weights = [1.0] * len(found)
    if sigma is not None:  # of B pairs; each is there twice, as two anchors of one score
        e = torch.stack([(a.own.detach() * t / sigma).exp() for a in found]).detach()
        weights = 2 - len(found) / 2 * e / (e.sum() / 2)
    terms = [a.negatives.exp().sum().log() - w * a.own for a, w in zip(found, weights, strict=True)]
    return mean(terms)


def hard_by_hand(
    found, t, beta=1.0, tau_plus=0.1, detach_weights=False, debias="released", clamp="scaled",
    Q=None,
):  # fmt: skip
    terms = []
    for a in found:
        u, pos = a.negatives.exp(), a.own.exp()
        q, floor = (
            len(u) if Q is None else Q,
            torch.exp(-1 / torch.as_tensor(t, dtype=torch.float64)),
        )
        if debias == "released":
            ng = q * (tilted_mean(u, beta, detach_weights) - tau_plus * pos) / (1 - tau_plus)
        else:
            w, w_pos = u**beta, pos**beta
            if detach_weights:
                w, w_pos = w.detach(), w_pos.detach()
            top = (w * u).mean() - tau_plus * w_pos * pos
            bottom = w.mean() - tau_plus * w_pos
            top = torch.maximum(top, (1 - tau_plus) * floor ** (1 + beta))
            bottom = torch.maximum(bottom, (1 - tau_plus) * floor**beta)
            ng = torch.minimum(q * top / bottom, q / floor)
        if tau_plus > 0:
            ng = torch.maximum(ng, floor * (q if clamp == "scaled" else 1))
        terms.append(-(pos / (pos + ng)).log())
    return mean(terms)


def debiased_by_hand(found, t, **kwargs):
    return hard_by_hand(found, t, beta=0.0, **kwargs)


def hard_scl_by_hand(found, t, beta=1.0, detach_weights=False, Q=None):
    pairs = []
    for a in found:
        q = {None: a.others, "negatives": len(a.negatives)}.get(Q, Q)
        ng = q * tilted_mean(a.negatives.exp(), beta, detach_weights)
        pairs += [-(p / (p + ng)).log() for p in a.positives.exp()]
    return mean(pairs)


def scl_by_hand(found, t, **kwargs):
    return hard_scl_by_hand(found, t, beta=0.0, **kwargs)


def supcon_by_hand(found, t):
    return mean(
        mean(-(p.exp() / (a.positives.exp().sum() + a.negatives.exp().sum())).log()
             for p in a.positives)
        for a in found if len(a.positives)
    )  # fmt: skip


def schane_by_hand(found, t, beta=1.0, detach_weights=False):
    terms = []
    for a in found:
        ng = len(a.negatives) * tilted_mean(a.negatives.exp(), beta, detach_weights)
        terms += [
            mean(-(p / (a.positives.exp().sum() + ng)).log() for p in a.positives.exp())
        ] * bool(len(a.positives))
    return mean(terms)


def by_hand(name, given, options):
    """The formula named, of the inputs that ours gets."""
    who = ("normalize", "cross_modal", "unlabelled")
    among = {k: v for k, v in {**options, **given}.items() if k in (*who, "queue", "synthetic")}
    rest = {k: v for k, v in options.items() if k not in who and k != "labels"}
    t = given["temperature"]
    found = anchors(given["z1"], given["z2"], t, options.get("labels"), **among)
    return globals()[f"{name}_by_hand"](found, t, **rest)


def data(seed=0, noise=0.6, **sizes):
    """Two views of B images, a queue, synthetic negatives, all of lengths that are not one."""
    g = torch.Generator().manual_seed(seed)
    b, d, k, s = (sizes.get(n, v) for n, v in (("b", B), ("d", D), ("k", K), ("s", S)))
    z1 = torch.randn(b, d, generator=g, dtype=torch.float64)
    z2 = z1 + noise * torch.randn(b, d, generator=g, dtype=torch.float64)
    queue = torch.randn(k, d, generator=g, dtype=torch.float64)
    synthetic = torch.randn(2 * b, s, d, generator=g, dtype=torch.float64)
    return {"z1": z1, "z2": z2, "queue": queue, "synthetic": synthetic}


def agree(name, options, given, rtol=1e-9):
    """Value and all gradients of a loss are those of its formula."""
    given = {"temperature": 0.5, **given}
    results = []
    for function in (
        lambda leaves: getattr(losses, name)(**leaves, **options),
        lambda leaves: by_hand(name, leaves, options),
    ):
        leaves = {
            k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in given.items()
        }
        wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor)]
        value = function(leaves)
        grads = [torch.zeros_like(v) for v in wanted]
        if value.requires_grad:
            found = torch.autograd.grad(value, wanted, allow_unused=True)
            grads = [g if f is None else f for f, g in zip(found, grads, strict=True)]
        results.append((value.detach(), grads))
    (ours, our_grads), (wanted, wanted_grads) = results
    assert ours.ndim == 0
    torch.testing.assert_close(ours, wanted, rtol=rtol, atol=1e-12)
    for one, other in zip(our_grads, wanted_grads, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-11)


# Each loss, with each of its options, compared with all sorts of candidates -----------------------

VARIANTS = [
    ("nt_xent", {}),
    ("decoupled", {}),
    ("decoupled", {"sigma": 0.5}),
    ("debiased", {"tau_plus": 0.05}),
    ("debiased", {"tau_plus": 0.4, "clamp": "unscaled", "Q": 3.0}),
    *(
        ("hard", {"beta": beta, "tau_plus": tau, "debias": debias})
        for beta, (tau, debias) in itertools.product(
            (0.0, 0.5, 0.7, 1.0, 2.0),
            ((0.0, "released"), (0.05, "released"), (0.3, "released"), (0.05, "separate"),
             (0.3, "separate")),
        )
    ),
    ("hard", {"beta": 1.0, "tau_plus": 0.05, "detach_weights": True}),
    ("hard", {"beta": 0.7, "tau_plus": 0.0, "detach_weights": True, "Q": 0.3}),
    ("hard", {"beta": 2.0, "tau_plus": 0.3, "clamp": "unscaled"}),
    ("hard", {"beta": 1.0, "tau_plus": 0.4, "clamp": "unscaled", "debias": "separate", "Q": 7}),
    ("scl", {}),
    ("scl", {"Q": "negatives"}),
    *(("hard_scl", {"beta": beta}) for beta in (0.0, 0.5, 0.7, 1.0, 2.0)),
    ("hard_scl", {"beta": 2.0, "Q": "negatives"}),
    ("hard_scl", {"beta": 0.5, "Q": 2.5, "detach_weights": True}),
    ("supcon", {}),
    *(("schane", {"beta": beta}) for beta in (0.0, 0.7, 1.0, 2.0)),
    ("schane", {"beta": 1.0, "detach_weights": True}),
]  # fmt: skip
WAYS = {
    "alone": ({}, ()),
    "cross_modal": ({"cross_modal": True}, ()),
    "queue": ({}, ("queue",)),
    "synthetic": ({}, ("synthetic",)),
    "everything": ({"cross_modal": True, "normalize": False}, ("queue", "synthetic")),
    "any length": ({"normalize": False}, ()),
}
LABELS = torch.tensor([2, 0, 2, 5, 0])


def say(value):
    """The same in every process; sets and functions print in another way in each."""
    if isinstance(value, dict):
        return ",".join(f"{k}={say(v)}" for k, v in value.items()) or "-"
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, set):
        return "+".join(sorted(value)) or "-"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=say)
def test_value_and_gradients_are_the_formulas(name, options, way):
    among, extra = WAYS[way]
    labels = {"labels": LABELS} if name in SUPERVISED else {}
    made = data(seed=len(way))
    if "normalize" in among:  # the clamps assume unit rows: rows near that length
        made = {k: v / v.norm(dim=-1, keepdim=True) * (0.9 + 0.1 * v) for k, v in made.items()}
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    agree(name, {**options, **labels, **among}, given)


GROUPS = {
    "repeat": [0, 0, 1, 1, 1],
    "one class": [3, 3, 3, 3, 3],
    "all distinct": [4, 2, 0, 1, 3],
    "without a label": [0, -1, 0, 1, -1],
    "one labelled": [-1, -1, 7, -1, -1],
    "large numbers": [2**62, 0, 2**62, 2**62 - 1, 0],
}


@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("hard_scl", {"beta": 1.0}), ("hard_scl", {"Q": "negatives", "detach_weights": True}),
     ("scl", {}), ("supcon", {}), ("schane", {}), ("schane", {"beta": 0.0})],
    ids=say,
)  # fmt: skip
def test_labels_of_every_kind(name, options, group, views, unlabelled):
    made = data(seed=3)
    labels = torch.tensor(GROUPS[group])
    given = {"z1": made["z1"], "z2": made["z2"] if views == 2 else None}
    agree(name, {**options, "labels": labels, "unlabelled": unlabelled}, given)


@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
@pytest.mark.parametrize("name", SUPERVISED)
def test_labels_with_a_queue_and_synthetic_negatives(name, unlabelled):
    """These have no label: negatives of every anchor, also of those that have no others."""
    made, labels = data(seed=4), torch.tensor([0, 0, -1, 0, -1])
    agree(name, {"labels": labels, "unlabelled": unlabelled}, made)
    one = {**made, "z2": None, "synthetic": made["synthetic"][:B]}
    agree(name, {"labels": labels, "unlabelled": unlabelled}, one)
    agree(name, {"labels": torch.zeros(B, dtype=torch.int64)}, {**made, "temperature": 0.2})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_labels_of_every_integer_type(dtype):
    made = data()
    labels = torch.tensor([0, 1, 1, 0, 1])
    wanted = hard_scl(made["z1"], made["z2"], labels)
    assert torch.equal(hard_scl(made["z1"], made["z2"], labels.to(dtype)), wanted)


@pytest.mark.parametrize("t", [0.05, 1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [("nt_xent", {}), ("decoupled", {"sigma": 0.2}), ("debiased", {}), ("hard", {}),
     ("hard", {"debias": "separate", "tau_plus": 0.02, "beta": 2.0}), ("hard_scl", {}),
     ("supcon", {}), ("schane", {"beta": 2.0})],
    ids=say,
)  # fmt: skip
def test_other_temperatures(name, options, t):
    labels = {"labels": LABELS} if name in SUPERVISED else {}
    made = data(seed=5)
    given = {"z1": made["z1"], "z2": made["z2"], "temperature": t}
    agree(name, {**options, **labels}, given, rtol=1e-7)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_small_batch_with_a_queue(name, batch):
    made = data(seed=6, b=batch)
    labels = {"labels": torch.zeros(batch, dtype=torch.int64)} if name in SUPERVISED else {}
    agree(name, labels, {k: made[k] for k in ("z1", "z2", "queue")})


# Temperature --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["alone", "cross_modal", "queue", "synthetic", "everything"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("nt_xent", {}), ("decoupled", {"sigma": 0.5}), ("debiased", {"tau_plus": 0.02}),
     ("hard", {"tau_plus": 0.0}), ("hard", {"tau_plus": 0.02, "debias": "separate"}),
     ("hard_scl", {}), ("supcon", {}), ("schane", {})],
    ids=say,
)  # fmt: skip
def test_the_gradient_of_a_temperature_that_learns(name, options, way):
    among, extra = WAYS[way]
    made = data(seed=7)
    labels = {"labels": LABELS} if name in SUPERVISED else {}
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    t = torch.tensor(0.4, dtype=torch.float64)
    agree(name, {**options, **labels, **among}, {**given, "temperature": t})


@pytest.mark.parametrize("debias", ["released", "separate"])
@pytest.mark.parametrize("clamp", ["scaled", "unscaled"])
def test_where_a_clamp_binds_the_temperature_still_learns(debias, clamp):
    """The floors are e^(-1/t) and its powers: they move with t."""
    made = data(seed=8, noise=0.05)
    options = {"tau_plus": 0.3, "debias": debias, "clamp": clamp}
    given = {"z1": made["z1"], "z2": made["z2"]}
    assert clamp_share(**given, **options) > 0
    agree("hard", options, {**given, "temperature": torch.tensor(0.5, dtype=torch.float64)})


def test_a_temperature_of_one_element_in_any_shape_and_type():
    made = data()
    z1, z2 = made["z1"], made["z2"]
    for t in (
        torch.tensor(0.25),
        torch.tensor([0.25], dtype=torch.float64),
        torch.full((1, 1), 0.25),
    ):
        for learns in (False, True):
            t = t.clone().requires_grad_(learns)
            loss = hard(z1, z2, temperature=t)
            torch.testing.assert_close(loss, hard(z1, z2, temperature=0.25), rtol=1e-12, atol=0)
            if learns:
                loss.backward()
                assert t.grad.shape == t.shape


def test_a_module_learns_its_temperature():
    made = data(noise=0.1)
    module = ContrastiveLoss("nt_xent", temperature=torch.nn.Parameter(torch.tensor(0.5)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    before = module(made["z1"], made["z2"])
    before.backward()
    with torch.no_grad():
        module.temperature -= 0.05 * module.temperature.grad.sign()
    assert module(made["z1"], made["z2"]) < before


# Weights of one's own -----------------------------------------------------------------------------


def weighted_by_hand(found, t, log_weights, tau_plus=0.0, clamp="scaled", Q=None):
    terms = []
    for a in found:
        i, j = torch.tensor([a.row]), torch.tensor(a.columns, dtype=torch.int64)
        logs = log_weights(a.negatives[None], i, j)[0]
        some = logs > -math.inf
        if not some.any():
            terms.append(torch.zeros((), dtype=torch.float64))
            continue
        w, u, pos = logs[some].exp(), a.negatives[some].exp(), a.own.exp()
        q, floor = int(some.sum()) if Q is None else Q, math.exp(-1 / t)
        ng = q * ((w * u).sum() / w.sum() - tau_plus * pos) / (1 - tau_plus)
        if tau_plus > 0:
            ng = torch.maximum(ng, torch.tensor(floor * (q if clamp == "scaled" else 1)).to(ng))
        terms.append(-(pos / (pos + ng)).log())
    return mean(terms)


def the_near(s, i, j):
    return (1.5 * s).masked_fill(s < -0.5, -math.inf)


def of_columns(s, i, j):
    return 0.3 * torch.cos(1.0 * j) + 0.0 * s


def of_pairs(s, i, j):
    """Tells anchors from candidates, and masks some pairs."""
    i = i[:, None]
    return (s * torch.sin(1.0 + 3 * i - j)).masked_fill((i + 2 * j) % 3 == 0, -math.inf)


def detached(s, i, j):
    return 2.0 * s.detach()


def nobody_for_some(s, i, j):
    return s.masked_fill(i[:, None] % 3 == 0, -math.inf)


OWN = [the_near, of_columns, of_pairs, detached, nobody_for_some]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("log_weights", OWN, ids=lambda f: f.__name__)
def test_weights_of_ones_own(log_weights, way, monkeypatch):
    monkeypatch.setattr(tiles, "STRIP", {"cpu": 30})  # strips of two or three anchors
    monkeypatch.setattr(tiles, "LEAST", 1)
    among, extra = WAYS[way]
    made = data(seed=9)
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    agree("weighted", {"log_weights": log_weights, **among}, given)


@pytest.mark.parametrize("options", [
    {"tau_plus": 0.02}, {"tau_plus": 0.3, "clamp": "unscaled"}, {"tau_plus": 0.1, "Q": 4.0},
    {"Q": 0.5}, {"clamp": "unscaled"},
], ids=say)  # fmt: skip
def test_weights_of_ones_own_debiased(options):
    made = data(seed=9)
    given = {k: made[k] for k in ("z1", "z2")}
    agree("weighted", {"log_weights": of_pairs, **options}, given)


@pytest.mark.parametrize("options", [
    {}, {"tau_plus": 0.1}, {"Q": 3.0}, {"clamp": "unscaled"}, {"tau_plus": 0.1, "Q": 3.0},
], ids=say)  # fmt: skip
def test_anchors_without_negatives_of_ones_own_count_0(options):
    made = data(seed=10)
    given = {k: made[k] for k in ("z1", "z2")}
    agree("weighted", {"log_weights": nobody_for_some, **options}, given)
    z1 = made["z1"].requires_grad_()
    loss = weighted(z1, made["z2"], lambda s, i, j: torch.full_like(s, -math.inf), **options)
    assert loss.item() == 0.0
    loss.backward()
    assert not z1.grad.any()


@pytest.mark.parametrize("cross_modal", [False, True])
def test_indices_are_those_of_the_rows_and_then_of_queue_and_synthetic(cross_modal):
    made = data(seed=11)
    seen = {}

    def log_weights(s, i, j):
        for a, row in zip(i.tolist(), s, strict=True):
            seen[a] = dict(zip(j.tolist(), row.tolist(), strict=True))
        return s

    weighted(**made, log_weights=log_weights, temperature=0.3, cross_modal=cross_modal)
    z = normalize(torch.cat([made["z1"], made["z2"]]), dim=1)
    queue, synthetic = normalize(made["queue"], dim=1), normalize(made["synthetic"], dim=2)
    assert sorted(seen) == list(range(2 * B))
    for i, row in seen.items():
        known = range(2 * B) if not cross_modal else range(B, 2 * B) if i < B else range(B)
        assert sorted(row) == [*known, *range(2 * B, 2 * B + K + S)]
        more = torch.cat([z, queue, synthetic[i]])
        for j, s in row.items():
            if j % B == i % B and j < 2 * B:  # the anchor and its other view are no negatives
                assert s == -math.inf
                continue
            assert s == pytest.approx((z[i] @ more[j]).item() / 0.3, abs=1e-12)


@pytest.mark.parametrize("way", ["alone", "cross_modal", "queue", "synthetic"])
@pytest.mark.parametrize("beta", [0.0, 0.7, 2.0])
def test_tilted_weights_of_ones_own_are_hard(beta, way):
    among, extra = WAYS[way]
    made = data(seed=12)
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    ours = weighted(**given, log_weights=lambda s, i, j: beta * s, tau_plus=0.05, **among)
    wanted = hard(**given, beta=beta, tau_plus=0.05, **among)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)


def test_wider_log_weights_are_welcome():
    z1, z2 = (data()[k].float() for k in ("z1", "z2"))
    ours = weighted(z1, z2, lambda s, i, j: torch.zeros(s.shape, dtype=torch.float64))
    torch.testing.assert_close(ours, nt_xent(z1, z2))


# Second derivatives -------------------------------------------------------------------------------

TWICE = [
    ("nt_xent", {}, {}),
    ("hard", {"tau_plus": 0.02, "beta": 0.7}, {}),
    ("hard", {"tau_plus": 0.02, "debias": "separate"}, {}),
    ("hard", {"tau_plus": 0.0, "cross_modal": True}, {}),
    ("hard", {}, {"queue"}),
    ("hard", {}, {"synthetic"}),
    ("weighted", {"log_weights": of_pairs, "tau_plus": 0.02}, {}),
    ("weighted", {"log_weights": of_pairs, "cross_modal": True}, {"queue", "synthetic"}),
    ("hard_scl", {"labels": LABELS}, {}),
    ("hard_scl", {"labels": LABELS, "cross_modal": True}, {"queue"}),
    ("supcon", {"labels": LABELS}, {}),
    ("schane", {"labels": LABELS}, {}),
]


@pytest.mark.parametrize(("name", "options", "extra"), TWICE, ids=say)
def test_the_gradient_of_the_gradient(name, options, extra):
    made = data(seed=13, d=3, k=2, s=1)
    made = {k: v.requires_grad_() for k, v in made.items() if k in {"z1", "z2", *extra}}

    def loss(*values):
        return getattr(losses, name)(**dict(zip(made, values, strict=True)), **options)

    assert torch.autograd.gradgradcheck(loss, tuple(made.values()), fast_mode=True)


@pytest.mark.parametrize(("name", "options", "extra"), TWICE, ids=say)
def test_a_gradient_to_be_differentiated_again_is_the_same_gradient(name, options, extra):
    made = data(seed=14)
    made = {k: v.requires_grad_() for k, v in made.items() if k in {"z1", "z2", *extra}}
    loss = getattr(losses, name)
    plain = torch.autograd.grad(loss(**made, **options), list(made.values()))
    again = torch.autograd.grad(loss(**made, **options), list(made.values()), create_graph=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["nt_xent", "hard", "hard_scl", "supcon"])
def test_second_derivatives_are_finite_without_negatives_in_the_batch(name):
    made = data(seed=15, b=1)
    labels = {"labels": torch.zeros(1, dtype=torch.int64)} if name in SUPERVISED else {}
    z1, z2 = made["z1"].requires_grad_(), made["z2"]
    loss = getattr(losses, name)(z1, z2, **labels, queue=made["queue"])
    (grad,) = torch.autograd.grad(loss, z1, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), z1)
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("name", sorted(SUPERVISED))
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]], ids=str)
@pytest.mark.parametrize("views", [1, 2])
def test_second_derivatives_are_finite_without_negatives_or_positives(name, labels, views):
    made = data(seed=16, b=4)
    z1, z2 = made["z1"].requires_grad_(), made["z2"] if views == 2 else None
    loss = getattr(losses, name)(z1, z2, torch.tensor(labels))
    (grad,) = torch.autograd.grad(loss, z1, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum() + 0 * z1.sum(), z1)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(second).all()


# Nothing to compare with, and numbers at the edge -------------------------------------------------


def finite_with_gradient(loss, *leaves):
    assert torch.isfinite(loss)
    for leaf in leaves:
        leaf.grad = None
    if loss.requires_grad:
        loss.backward()
    for leaf in leaves:
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", SUPERVISED)
def test_a_batch_whose_every_image_is_left_out_is_0(name, normalized):
    made = data()
    z1, z2 = made["z1"].requires_grad_(), made["z2"]
    for queue in (None, made["queue"]):
        loss = getattr(losses, name)(
            z1, z2, torch.full((B,), -1), unlabelled="ignore", queue=queue, normalize=normalized
        )
        assert loss.item() == 0.0
        finite_with_gradient(loss, z1)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", SUPERVISED)
def test_one_image_with_a_label(name, views):
    """One view: neither positive nor negative. Two: a positive and no negative."""
    made = data(b=1)
    z1, z2 = made["z1"].requires_grad_(), made["z2"] if views == 2 else None
    loss = getattr(losses, name)(z1, z2, torch.tensor([7]))
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    finite_with_gradient(loss, z1)
    assert z1.grad is None or z1.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_batch_is_0_or_refused_but_not_nan(name):
    made = data()
    z = made["z1"][:0]
    labels = {"labels": torch.zeros(0, dtype=torch.int64)} if name in SUPERVISED else {}
    for queue in (None, made["queue"]):
        try:
            loss = getattr(losses, name)(z, z, **labels, queue=queue)
        except ValueError as refusal:
            assert "z1" in str(refusal)  # noqa: PT017
        else:
            assert loss.item() == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_zeros_and_equal_rows_are_finite(name):
    made = data()
    labels = {"labels": LABELS} if name in SUPERVISED else {}
    zeros = made["z1"].index_fill(0, torch.tensor([2]), 0.0)
    for z1, z2 in ((zeros, made["z2"]), (torch.ones(B, D), torch.ones(B, D)),
                   (made["z1"], -made["z1"])):  # fmt: skip
        z1 = z1.clone().requires_grad_()
        finite_with_gradient(getattr(losses, name)(z1, z2.to(z1), **labels), z1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [0.01, 0.05])
@pytest.mark.parametrize("name", METHODS)
def test_small_temperatures_are_finite_in_every_precision(name, t, dtype):
    made = data(seed=16, b=12, d=8)
    labels = {"labels": torch.arange(12) // 3} if name in SUPERVISED else {}
    z1, z2 = made["z1"].to(dtype).requires_grad_(), made["z2"].to(dtype)
    loss = getattr(losses, name)(z1, z2, **labels, temperature=t)
    assert loss.dtype == torch.float32
    finite_with_gradient(loss, z1)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_weights_of_decoupled_do_not_overflow(sigma, normalized):
    made = data(seed=17)
    length = 1.0 if normalized else 30.0
    z1, z2 = length * made["z1"], -length * made["z1"] + made["z2"]
    ours = decoupled(z1, z2, sigma=sigma, normalize=normalized)
    z1, z2 = (normalize(z, dim=1) if normalized else z for z in (z1, z2))
    p = (z1 * z2).sum(dim=1)
    weight = 2 - B * (p / sigma).softmax(dim=0)
    plain = decoupled(z1, z2, normalize=False)
    torch.testing.assert_close(ours, plain + ((1 - weight) * p / 0.5).mean())


def test_large_rows_that_are_not_normalized_are_finite():
    made = data(seed=18)
    z1, z2 = (100 * made["z1"]).requires_grad_(), 100 * made["z2"]
    for name in METHODS:
        labels = {"labels": LABELS} if name in SUPERVISED else {}
        finite_with_gradient(
            getattr(losses, name)(z1, z2, **labels, normalize=False, temperature=0.1), z1
        )


@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"),
    [(torch.float32, 1e-6, 2e-6), (torch.bfloat16, 1e-6, 4e-3), (torch.float16, 1e-6, 2e-3)],
)
@pytest.mark.parametrize("name", METHODS)
def test_low_precision_stays_near_float64(name, dtype, loss_error, gradient_error):
    """Of the same rounded input: the rounding of the gradients themselves is all that is left."""
    made = data(seed=19, b=16, d=16)
    labels = {"labels": torch.arange(16) // 3} if name in SUPERVISED else {}
    found = []
    for wide in (False, True):
        z1, z2 = (made[k].to(dtype) for k in ("z1", "z2"))
        z1, z2 = (z.double() if wide else z for z in (z1, z2))
        z1.requires_grad_()
        loss = getattr(losses, name)(z1, z2, **labels, temperature=0.2)
        (1024 * loss).backward()  # as gradients of float16 are scaled in training
        found.append((loss.double().item(), z1.grad.double()))
    (ours, grad), (wanted, wanted_grad) = found
    assert ours == pytest.approx(wanted, rel=loss_error, abs=loss_error)
    assert (grad - wanted_grad).norm() <= gradient_error * wanted_grad.norm()


# How they are related -----------------------------------------------------------------------------

relations = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)


@relations
@given(seed=seeds, name=st.sampled_from([v for v in VARIANTS if v[0] != "decoupled"]),
       cross_modal=st.booleans())  # fmt: skip
def test_the_order_of_images_labels_queue_and_synthetic_does_not_matter(seed, name, cross_modal):
    name, options = name
    made, g = data(seed=seed), torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, (B,), generator=g)
    order, queue, kind = (torch.randperm(n, generator=g) for n in (B, K, S))
    renamed = torch.where(labels < 0, labels, 5 * ((labels + 1) % 3))
    moved = {
        "z1": made["z1"][order], "z2": made["z2"][order], "queue": made["queue"][queue],
        "synthetic": made["synthetic"][torch.cat([order, order + B])][:, kind],
    }  # fmt: skip
    one = two = {}
    if name in SUPERVISED:
        one, two = {"labels": labels}, {"labels": renamed[order]}
    function = getattr(losses, name)
    before = function(**made, **one, **options, cross_modal=cross_modal)
    after = function(**moved, **two, **options, cross_modal=cross_modal)
    torch.testing.assert_close(before, after, rtol=1e-11, atol=1e-12)


SHIFTABLE = [
    v for v in VARIANTS
    if not v[1].get("tau_plus", v[0] == "debiased") and not {"clamp", "sigma"} & set(v[1])
]  # fmt: skip


@relations
@given(seed=seeds, constant=st.floats(0, 2), variant=st.sampled_from(SHIFTABLE))
def test_without_a_prior_only_differences_of_scores_count(seed, constant, variant):
    """A coordinate that all rows share adds the same to every score: the gradient sums to 0."""
    made, (name, options) = data(seed=seed), variant
    labels = {"labels": LABELS} if name in SUPERVISED else {}
    shifted = [
        torch.cat([made[k], torch.full((B, 1), constant, dtype=torch.float64)], dim=1)
        for k in ("z1", "z2")
    ]
    function = getattr(losses, name)
    before = function(made["z1"], made["z2"], **labels, **options, normalize=False)
    after = function(*shifted, **labels, **options, normalize=False)
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-10)


@relations
@given(seed=seeds, beta=st.sampled_from([0.0, 0.5, 1.0, 3.0]), detach=st.booleans(),
       tau=st.sampled_from([0.0, 0.01, 0.2]))  # fmt: skip
def test_the_gradient_of_an_anchors_scores_sums_to_the_share_of_its_negatives(
    seed, beta, detach, tau
):
    """d l / d s of a row sums to g = R / D / (1 - tau), 0 where the clamp binds, whatever beta and
    the weights do. The scores are free if the negatives are synthetic: there s moves with h alone.
    """
    made = data(seed=seed, b=1, s=6)
    made = {k: normalize(v, dim=-1) for k, v in made.items() if k != "queue"}
    h = made["synthetic"].requires_grad_()
    t, z = 0.5, torch.cat([made["z1"], made["z2"]])
    options = {"temperature": t, "beta": beta, "tau_plus": tau, "detach_weights": detach}
    hard(**made, **options, normalize=False).mul(2).backward()  # of two anchors
    ours = torch.einsum("nsd,nd->n", h.grad, z) * t  # z are unit rows
    s, p = torch.einsum("nsd,nd->ns", h.detach(), z) / t, (z[0] @ z[1]).item() / t
    # In z's own batch there is no other image, so all the negatives are these six.
    q = (beta * s).softmax(dim=1)
    r = 6 * (q * s.exp()).sum(dim=1)
    ng = (r - tau * 6 * math.exp(p)) / (1 - tau)
    g = r / (math.exp(p) + ng) / (1 - tau)
    g = g.where(ng > 6 * math.exp(-1 / t), torch.zeros(()).to(g))
    torch.testing.assert_close(ours, g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [("hard", {"tau_plus": 0.0}), ("hard", {"tau_plus": 0.02}), ("hard_scl", {}),
     ("hard_scl", {"Q": "negatives"}), ("schane", {})],
    ids=say,
)  # fmt: skip
def test_large_beta_keeps_the_hardest_negative_alone(name, options):
    made = data(seed=20)
    labels = LABELS if name in SUPERVISED else None
    ours = getattr(losses, name)(
        made["z1"], made["z2"], *([labels] if labels is not None else []), beta=1e4, **options
    )
    found = []
    for a in anchors(made["z1"], made["z2"], 0.5, labels):
        found.append(a._replace(negatives=a.negatives.max().expand(len(a.negatives))))
    wanted = globals()[f"{name}_by_hand"](found, 0.5, **options)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0)


@relations
@given(seed=seeds, beta=st.floats(0, 5), t=st.sampled_from([0.05, 0.5, 2.0]),
       debias=st.sampled_from(["released", "separate"]),
       noise=st.sampled_from([0.0, 0.1, 1.0]))  # fmt: skip
def test_without_a_prior_nothing_is_clamped(seed, beta, t, debias, noise):
    made = data(seed=seed, noise=noise)
    made["z1"][1], made["z2"][1] = -made["z1"][0], -made["z1"][0]  # an antipode: s = -1/t
    given = {"z1": made["z1"], "z2": made["z2"]}
    options = {"temperature": t, "beta": beta, "tau_plus": 0.0, "debias": debias}
    assert clamp_share(**given, **options) == 0.0
    agree("hard", {k: v for k, v in options.items() if k != "temperature"},
          {**given, "temperature": t}, rtol=1e-6)  # fmt: skip


@relations
@given(seed=seeds, beta=st.sampled_from([0.0, 0.7, 2.0]), q=st.sampled_from([None, 1.0, 9.0]))
def test_labels_that_are_all_distinct_make_h_scl_hard(seed, beta, q):
    """None and a number mean the same to both; "negatives" is then all others, too."""
    made = data(seed=seed)
    labels = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    for extra in ((), ("queue", "synthetic")):
        given = {k: made[k] for k in ("z1", "z2", *extra)}
        wanted = hard(**given, beta=beta, tau_plus=0.0, Q=q)
        for factor in (q, "negatives") if q is None else (q,):
            ours = hard_scl(**given, labels=labels, beta=beta, Q=factor)
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)
        ours, wanted = scl(**given, labels=labels), nt_xent(**given)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(supcon(**given, labels=labels), wanted, rtol=1e-12, atol=1e-14)


@relations
@given(seed=seeds, beta=st.floats(0, 4))
def test_q_is_a_factor_on_the_negatives(seed, beta):
    """With Q = "negatives", |N(i)|: H-SCL of two classes of half the batch has B of 2B - 2."""
    made = data(seed=seed, b=6)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    given = {"z1": made["z1"], "z2": made["z2"], "labels": labels, "beta": beta}
    torch.testing.assert_close(hard_scl(**given, Q="negatives"), hard_scl(**given, Q=6.0))
    torch.testing.assert_close(hard_scl(**given), hard_scl(**given, Q=10))


@relations
@given(seed=seeds, tau=st.sampled_from([0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5]))
def test_debiased_separately_is_as_released_without_hardness(seed, tau):
    made = data(seed=seed)
    found = []
    for debias in ("released", "separate"):
        z1 = made["z1"].clone().requires_grad_()
        options = {"beta": 0.0, "tau_plus": tau, "debias": debias}
        hard(z1, made["z2"], **options).backward()
        loss = hard(z1, made["z2"], **options).item()
        found.append((loss, clamp_share(z1.detach(), made["z2"], **options), z1.grad))
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-12)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-9, atol=1e-13)


def test_debiased_separately_with_detached_weights_has_no_gradient_of_any_weight():
    """Also the positive's weight e^(beta p), which both sums are debiased by, is one."""
    made = data(seed=21)
    options = {"tau_plus": 0.02, "debias": "separate", "detach_weights": True}
    given = {"z1": made["z1"], "z2": made["z2"]}
    assert clamp_share(**given, tau_plus=0.02, debias="separate") == 0.0
    agree("hard", options, given)


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.3, 0.6])
@pytest.mark.parametrize(("debias", "clamp", "q"), [
    ("released", "scaled", None), ("released", "unscaled", 0.2), ("released", "unscaled", 20.0),
    ("separate", "scaled", None), ("separate", "unscaled", 20.0),
])  # fmt: skip
def test_the_share_of_clamped_anchors(debias, clamp, q, tau):
    """Anchor by anchor: those whose estimate lies below the floor, or one of whose parts does."""
    made, t, beta = data(seed=25, noise=0.8), 0.5, 0.7
    floor, clamped = math.exp(-1 / t), []
    for a in anchors(made["z1"], made["z2"], t):
        u, pos = a.negatives.exp(), a.own.exp()
        weight = len(u) if q is None else q
        least = floor * (weight if clamp == "scaled" else 1)
        ng = weight * (tilted_mean(u, beta) - tau * pos) / (1 - tau)
        bound = False
        if debias == "separate":
            top = (u ** (1 + beta)).mean() - tau * pos ** (1 + beta)
            bottom = (u**beta).mean() - tau * pos**beta
            bound = bool(top < (1 - tau) * floor ** (1 + beta) or bottom < (1 - tau) * floor**beta)
            ng = weight * top / bottom
            bound = bound or bool(ng > weight / floor)
        clamped.append(bound or bool(ng < least))
    share = clamp_share(
        made["z1"], made["z2"], temperature=t, beta=beta, tau_plus=tau, debias=debias,
        clamp=clamp, Q=q,
    )  # fmt: skip
    assert share == pytest.approx(sum(clamped) / len(clamped))


def classes(n, per_class, d, spread, seed=0):
    """Unit rows of n latent classes, (n * per_class, d), and labels; spread 0 is collapsed."""
    g = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)
    labels = torch.arange(n).repeat_interleave(per_class)
    noise = torch.randn(n * per_class, d, generator=g, dtype=torch.float64)
    return normalize(centres[labels] + spread * noise, dim=1), labels


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_collapsed_classes_are_debiased_exactly_by_the_separate_formula(beta):
    """The views of a class coincide, and a known share of the negatives is false. Then the true
    negatives' tilted mean is what H-SCL takes, which knows the labels."""
    z, labels = classes(5, 4, 3, spread=0.0)
    share = 3 / 19  # of the other images, those of the anchor's class
    truth = hard_scl(z, z, labels, beta=beta).item()
    ours = hard(z, z, beta=beta, tau_plus=share, debias="separate").item()
    released = hard(z, z, beta=beta, tau_plus=share).item()
    assert ours == pytest.approx(truth, abs=1e-9)
    assert released == pytest.approx(truth, abs=1e-9) if beta == 0 else released > truth + 0.05


@pytest.fixture(scope="module")
def latent():
    """Ten classes with spread (kappa about 30), 510 negatives of all alike, 150 pairs of a class,
    and the many rows that the truth is made of."""
    size, d = 1000, 32
    many, of = classes(10, size, d, spread=1 / math.sqrt(30))
    g = torch.Generator().manual_seed(1)
    pick = torch.randint(0, 10 * size, (150,), generator=g)
    mate = pick // size * size + torch.randint(0, size, (150,), generator=g)
    queue = many[torch.arange(510) * 10 * size // 510]
    rows = torch.cat([many[pick], many[mate]])
    s = rows @ many.T / 0.5
    return rows, queue, s, (pick // size).repeat(2)[:, None] == of


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_latent_classes_on_the_sphere_are_debiased_better_by_the_separate_formula(beta, latent):
    """The tilted mean over true negatives, and its estimates with the true class prior."""
    rows, queue, s, false = latent
    q = (beta * s).masked_fill(false, -math.inf).softmax(dim=1)
    truth = (q * s.exp()).sum(dim=1).mean().item()

    def estimate(**options):
        """Of a small weight Q, the loss of one pair and a queue is Q e^(-p) times the mean g."""
        total = 0.0
        for z1, z2 in zip(*rows[:, None].chunk(2), strict=True):
            loss = hard(z1, z2, queue=queue, beta=beta, Q=1e-9, **options)
            total += (loss * torch.exp((z1 * z2).sum() / 0.5)).item() / 1e-9 / 150
        return total - truth

    biased, released = estimate(tau_plus=0.0), estimate(tau_plus=0.1)
    separate = estimate(tau_plus=0.1, debias="separate")
    errors = f"truth {truth:.3f}: {biased:+.3f}, {released:+.3f}, separate {separate:+.3f}"
    assert abs(separate) < 0.03 * (1 + beta) * truth, errors
    assert biased > 0.1 * truth, errors
    if beta == 0:
        assert released == pytest.approx(separate, abs=1e-9), errors
    else:
        assert released > 0.05 * truth, errors
        assert released > 4 * abs(separate), errors


# The module ---------------------------------------------------------------------------------------

MODULES = {
    "nt_xent": {}, "decoupled": {"sigma": 0.7},
    "debiased": {"tau_plus": 0.05, "clamp": "unscaled", "Q": 3.0},
    "hard": {"beta": 0.7, "tau_plus": 0.01, "detach_weights": True, "debias": "separate",
             "clamp": "unscaled", "Q": 3.0},
    "scl": {"Q": "negatives", "unlabelled": "ignore"},
    "hard_scl": {"beta": 0.7, "detach_weights": True, "Q": "negatives", "unlabelled": "ignore"},
    "supcon": {"unlabelled": "ignore"},
    "schane": {"beta": 0.7, "detach_weights": True, "unlabelled": "ignore"},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_module_is_its_function_with_a_queue_for_the_call(method):
    made, options = data(seed=22), MODULES[method]
    labels = torch.tensor([0, -1, 1, 0, -1])
    named = {"labels": labels} if method in SUPERVISED else {}
    module = ContrastiveLoss(method, temperature=0.3, cross_modal=True, **options)
    for extra in ((), ("queue",), ("queue", "synthetic")):
        more = {k: made[k] for k in extra}
        wanted = getattr(losses, method)(
            made["z1"], made["z2"], **named, temperature=0.3, cross_modal=True, **options, **more
        )
        assert torch.equal(module(made["z1"], made["z2"], labels, **more), wanted)
    for changed, value in {"beta": 2.0, "tau_plus": 0.3, "sigma": 0.2}.items():
        other = ContrastiveLoss(method, temperature=0.3, cross_modal=True,
                                **{**options, changed: value})  # fmt: skip
        same = torch.equal(other(made["z1"], made["z2"], labels),
                           module(made["z1"], made["z2"], labels))  # fmt: skip
        assert same != (changed in options)


@pytest.mark.parametrize("gather", ["averaged", "summed"])
@pytest.mark.parametrize("method", METHODS)
def test_gathering_without_other_processes_changes_nothing(method, gather):
    made = data(seed=23)
    found = []
    for way in (False, gather):
        z1 = made["z1"].clone().requires_grad_()
        loss = ContrastiveLoss(method)(z1, made["z2"], LABELS, gather=way, queue=made["queue"])
        loss.backward()
        found.append((loss.detach(), z1.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_debiased_takes_all_options_of_hard():
    made = data(seed=24)
    options = {"tau_plus": 0.3, "clamp": "unscaled", "Q": 3.0, "cross_modal": True}
    assert torch.equal(debiased(**made, **options), hard(**made, beta=0.0, **options))
    assert torch.equal(
        scl(**made, labels=LABELS, Q=2.0), hard_scl(**made, labels=LABELS, beta=0, Q=2.0)
    )
    assert torch.equal(schane(**made, labels=LABELS), schane(**made, labels=LABELS, beta=1.0))
