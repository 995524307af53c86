"""What the trainer makes of every method: the loss of a step by hand, options, refusals, resuming.

The losses themselves are tested elsewhere. Here each is written once more, densely and in float64,
and compared with what the trainer computes from the same views and the same model.
"""

import functools
import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from hcl import corpus, methods, runs, sphere, synthetic
from hcl import train as trainer
from hcl.objective import MIXING, Objective
from hcl.run import Run
from hcl.train import build_model, load_data, train

B = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outcome(record):
    return record.metrics, record.history


# The loss of a step, by hand ----------------------------------------------------------------------


def first_step(run, epoch=1):
    """A double model's loss in its first step, its views' outputs, labels, generator's state."""
    data = load_data(run)
    model = build_model(run, data).double()
    objective, rows, g = Objective(run, model, data), torch.arange(B), generator()
    objective.begin(epoch)
    objective.view_data = SimpleNamespace(views=lambda *a: [v.double() for v in data.views(*a)])
    found = objective(rows, g)
    g = generator()
    views = torch.cat(objective.view_data.views(data.x_train[rows], g))
    h = model.encoder(views)
    return SimpleNamespace(
        loss=found.item(), h=h, z=nn.functional.normalize(model.head(h), dim=1), g=g,
        model=model, y=data.y_train[rows].repeat(2), rows=data.x_train[rows], data=data,
    )  # fmt: skip


def anchors(z, t):
    """Of every view: the cosine of its positive, those of its negatives, and who these are."""
    c, n = (z @ z.T).detach().numpy(), len(z)
    for i in range(n):
        mate = (i + n // 2) % n
        others = [j for j in range(n) if j not in (i, mate)]
        yield i, c[i, mate] / t, c[i, others] / t, others


def weighted(z, t, weights, tau=0.0):
    """Mean of -log e^p / (e^p + Ng), Ng of weights that sum to one, debiased and clamped."""
    found = []
    for i, p, s, others in anchors(z, t):
        q = weights(i, s, others)
        assert q.sum() == pytest.approx(1)
        mean = (q @ np.exp(s) - tau * math.exp(p)) / (1 - tau)
        mean = max(mean, math.exp(-1 / t)) if tau else mean
        found.append(math.log1p(len(s) * mean / math.exp(p)))
    return sum(found) / len(found)


def test_the_loss_of_decoupled_weights(tiny):
    step = first_step(tiny(method="decoupled", method_args={"sigma": 0.4}, temperature=0.3))
    c = (step.z @ step.z.T).detach().numpy()
    pairs = np.exp(np.array([c[i, i + B] for i in range(B)]) / 0.4)
    weight = 2 - B * pairs / pairs.sum()
    wanted = [math.log(np.exp(s).sum()) - weight[i % B] * p for i, p, s, _ in anchors(step.z, 0.3)]
    assert step.loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-9)


def test_the_loss_of_a_ring(tiny):
    options = {"inner": 0.2, "outer": 0.5}
    step = first_step(tiny(method="ring", method_args=options, temperature=0.3))

    def band(i, s, others):  # 62 negatives: 31 of them, without the 6 most similar
        order = np.argsort(-s)[6:31]
        return np.isin(np.arange(62), order) / 25

    wanted = 0.0  # a plain sum over the band
    for i, p, s, others in anchors(step.z, 0.3):
        kept = band(i, s, others) > 0
        wanted += math.log1p(np.exp(s[kept]).sum() / math.exp(p)) / (2 * B)
    assert step.loss == pytest.approx(wanted, rel=1e-9)


def test_the_loss_of_bayesian_weights(tiny):
    alpha, b, tau = 0.7, 0.8, 0.2
    run = tiny(
        method="bayesian", method_args={"alpha": alpha, "concentration": b}, tau_plus=tau,
        temperature=0.3,
    )  # fmt: skip
    step = first_step(run)

    def posterior(F):
        """By the densities of the smaller and of the larger of two draws."""

        def of_both(x):
            true = alpha * (2 * x - x**2) + (1 - alpha) * x**2
            false = (1 - alpha) * (2 * x - x**2) + alpha * x**2
            return (1 - tau) * true + tau * false - F

        x = brentq(of_both, 0, 1, xtol=1e-15)
        small, large = 2 * (1 - x), 2 * x
        true, false = alpha * small + (1 - alpha) * large, (1 - alpha) * small + alpha * large
        chosen = alpha * (1 - b) * small + (1 - alpha) * b * large
        return chosen / ((1 - tau) * true + tau * false)

    def weights(i, s, others):
        w = np.array([posterior((s <= x).mean()) for x in s])
        return w / w.sum()

    assert step.loss == pytest.approx(weighted(step.z, 0.3, weights), rel=1e-6)


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_the_loss_of_a_transport_plan(tiny, tau):
    run = tiny(method="transport", method_args={"eps": 0.5}, tau_plus=tau, temperature=0.3)
    step = first_step(run)
    z = step.z.detach().numpy()
    kernel = np.exp(-((z[:, None] - z) ** 2).sum(axis=2) / 0.5)
    image = np.arange(2 * B) % B
    kernel[image[:, None] == image] = 0
    v = np.ones(2 * B)
    for _ in range(5000):
        u = 1 / (kernel @ v)
        v = 1 / (kernel.T @ u)
    plan = kernel * u[:, None] * v
    plan /= plan.sum(axis=1, keepdims=True)
    wanted = weighted(step.z, 0.3, lambda i, s, others: plan[i, others], tau)
    assert step.loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"anchor": 3.0, "nearness": "near"}], ids=str)
def test_the_loss_of_unremix(tiny, options):
    """Anchor score, agreement of the gradients, distance from all others, each from 0 to 1."""
    run = tiny(method="unremix", method_args=options, tau_plus=0.1, temperature=0.3)
    step = first_step(run)
    z = step.z.detach()
    c = z @ z.T
    p = (c / 0.3).fill_diagonal_(-math.inf).softmax(dim=1)
    last = torch.zeros(2 * B, *z.shape[::-1], dtype=torch.float64)  # gradients, (n, d, n)
    for i in range(2 * B):
        layer = z.clone().requires_grad_()  # the views as the rows of a last layer
        scores = (layer @ z[i] / 0.3).masked_fill(torch.arange(2 * B) == i, -math.inf)
        ce = nn.functional.cross_entropy(scores[None], p[i].argmax()[None])
        last[i] = torch.autograd.grad(ce, layer)[0].T
    u = (last.flatten(1) @ last.flatten(1).T).numpy()
    apart = (1 - c.numpy()).sum(axis=1)  # of a view from all others; with itself it is 0
    apart = -apart if options else apart

    def weights(i, s, others):
        mixed = 0.0
        share = options.get("anchor", 1.0)
        for lam, x in ((share, np.exp(s)), (1.0, u[i, others]), (1.0, apart[others])):
            mixed = mixed + lam * (x - x.min()) / (x.max() - x.min())
        return mixed / mixed.sum()

    assert run.detach_weights is False
    assert step.loss == pytest.approx(weighted(step.z, 0.3, weights, 0.1), rel=1e-6)


def by_labels(step, t, beta, cross_entropy):
    """SCHaNe's term, and the cross-entropy of the classifier, both by hand."""
    s, y = (step.z @ step.z.T).detach().numpy() / t, step.y.numpy()
    found = []
    for i in range(2 * B):
        same = np.array([j != i and y[j] == y[i] for j in range(2 * B)])
        u = np.exp(s[i][y != y[i]])
        ng = len(u) * (u ** (1 + beta)).sum() / (u**beta).sum()
        found.append(math.log(np.exp(s[i][same]).sum() + ng) - s[i][same].mean())
    logits = (step.h @ step.model.classifier.weight.T + step.model.classifier.bias).detach().numpy()
    ce = [math.log(np.exp(row).sum()) - row[k] for row, k in zip(logits, y, strict=True)]
    return (1 - cross_entropy) * np.mean(found) + cross_entropy * np.mean(ce), np.mean(ce)


def test_the_loss_of_schane_and_cross_entropy(tiny):
    step = first_step(tiny(method="schane", beta=2.0, temperature=0.3, cross_entropy=0.3))
    assert step.loss == pytest.approx(by_labels(step, 0.3, 2.0, 0.3)[0], rel=1e-6)  # float32


def test_the_loss_of_cross_entropy_alone(tiny):
    step = first_step(tiny(method="cross_entropy"))
    assert step.loss == pytest.approx(by_labels(step, 1.0, 0.0, 1.0)[1], rel=1e-6)


@pytest.mark.parametrize("method", ["nt_xent", "hard"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_loss_with_synthetic_negatives(tiny, method, share):
    """MoCHi and SSCL: the mixtures stand beside the anchor's real negatives."""
    kinds = {"hardest": 20, "between": 8, "with_anchor": 4}
    run = tiny(method=method, synthetic=kinds, temperature=0.3, cross_entropy=share)
    step = first_step(run)
    z1, z2 = step.z.detach().chunk(2)
    drawn = torch.Generator().manual_seed(run.seed * 1_000_003 + 1 + MIXING)
    made = synthetic.mixtures(z1, z2, **kinds, generator=drawn).numpy()
    assert made.shape == (2 * B, 12, 8)
    beta, tau, found = run.beta, run.tau_plus, []
    assert (beta, tau) == ((1.0, 0.1) if method == "hard" else (0.0, 0.0))
    for i, p, s, _ in anchors(step.z, 0.3):
        u = np.exp(np.concatenate([s, made[i] @ step.z[i].detach().numpy() / 0.3]))
        mean = ((u ** (1 + beta)).sum() / (u**beta).sum() - tau * math.exp(p)) / (1 - tau)
        found.append(math.log1p(len(u) * max(mean, math.exp(-1 / 0.3)) / math.exp(p)))
    wanted = np.mean(found)
    if share:
        wanted = (1 - share) * wanted + share * by_labels(step, 1.0, 0.0, 1.0)[1]
    assert step.loss == pytest.approx(wanted, rel=1e-6)


def test_runs_with_and_without_mixtures_have_the_same_views(tiny):
    states = []
    for kinds in ({}, {"hardest": 20, "between": 8}):
        run = tiny(method="nt_xent", synthetic=kinds)
        data, generator = load_data(run), torch.Generator().manual_seed(0)
        step = Objective(run, build_model(run, data), data)
        step.begin(1)
        step(torch.arange(B), generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_a_loss_without_a_head_is_of_the_encoders_output(tiny):
    run = tiny(head="none", method="nt_xent")
    step = first_step(run)
    z = nn.functional.normalize(step.h, dim=1)
    assert z.shape == (2 * B, 32)
    wanted = [math.log1p(np.exp(s).sum() / math.exp(p)) for _, p, s, _ in anchors(z, 0.5)]
    assert step.loss == pytest.approx(np.mean(wanted), rel=1e-9)
    assert not list(step.model.head.parameters())
    assert tiny(head="none", hidden_dim=7, out_dim=3) == tiny(head="none")
    assert train(run, progress=False).metrics["loss"] > 0


# Options ------------------------------------------------------------------------------------------

OWN = {
    "unremix": {"anchor": 1.0, "uncertainty": 1.0, "representativeness": 1.0,
                "normalisation": "minmax", "nearness": "far"},
    "ring": {"inner": 0.1, "outer": 0.1},
    "bayesian": {"alpha": 0.9, "concentration": 0.5},
    "transport": {"eps": 0.7},
    "decoupled": {"sigma": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("method", methods.ARGUMENTS)
def test_options_that_are_not_given_are_at_their_defaults(tiny, method):
    assert methods.defaults(method) == OWN.get(method, {})
    if method == "infograph" or method in methods.NEIGHBOURS:
        return
    plain, own = tiny(method=method), OWN.get(method, {})
    assert plain == tiny(method=method, method_args=own)
    for name, value in own.items():
        assert tiny(method=method, method_args={name: value}).digest == plain.digest
    with pytest.raises(ValueError, match=rf"method_args=.*\['q'\]: '{method}' takes "):
        tiny(method=method, method_args={**own, "q": 1})


def test_a_whole_number_is_the_same_option(tiny):
    one, other = (tiny(method="unremix", method_args={"anchor": x}) for x in (4, 4.0))
    assert one == other
    assert one.digest == other.digest
    assert one.digest != tiny(method="unremix").digest
    assert tiny(method="decoupled", method_args={"sigma": 0}).method_args == {}
    few, all_ = {"hardest": 4, "between": 2}, {"with_anchor": 0, "after": 0}
    assert tiny(synthetic=few).digest == tiny(synthetic={**all_, **few}).digest
    assert tiny(synthetic=few).digest != tiny().digest


def test_what_a_method_does_not_have_does_not_make_another_run(tiny):
    for method in ("ring", "cross_entropy"):
        assert tiny(method=method, beta=3.0, tau_plus=0.3) == tiny(method=method)
    assert tiny(method="unremix", beta=3.0) == tiny(method="unremix")
    assert tiny(method="unremix", tau_plus=0.3) != tiny(method="unremix")
    alone = tiny(method="cross_entropy", temperature=0.1, out_dim=4, head="mlp")
    assert alone == tiny(method="cross_entropy", cross_entropy=0.5)
    assert (alone.cross_entropy, alone.head) == (1.0, "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthetic": {"hardest": 8, "between": 29}}, "29: more synthetic .* the 28 pairs"),
        ({"synthetic": {"hardest": 63, "between": 2}}, "62 negatives in a batch of 32"),
        ({"method": "unremix", "method_args": dict.fromkeys(list(OWN["unremix"])[:3], 0.0)},
         "method_args=.*anchor"),
        ({"method": "unremix", "method_args": {"anchor": -1.0}}, "method_args=.*anchor=-1"),
        ({"method": "decoupled", "method_args": {"sigma": -0.5}}, "method_args=.*sigma=-0.5"),
        ({"method": "ring", "method_args": {"outer": 1.5}}, "method_args=.*outer=1.5"),
        ({"method": "ring", "normalize": "none", "tau_plus": 0.0}, "normalize='none'"),
        ({"method": "ring", "queue": 8}, "queue=8: goes with"),
        ({"method": "hard_scl", "cross_entropy": 0.5, "positives": "class"}, "positives='class'"),
        ({"cross_entropy": 0.5, "queue": 8}, "queue=8: does not go with cross_entropy=0.5"),
        ({"method": "quick_thoughts", "watch": "losses"}, "watch='losses': does not go with"),
        ({"method": "quick_thoughts", "cross_entropy": 0.5}, "cross_entropy=0.5: does not go with"),
        ({"method": "unremix", "synthetic": {"hardest": 4, "between": 2}}, "goes with the methods"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_as_many_as_there_are_will_do(tiny):
    assert tiny(synthetic={"hardest": 8, "between": 28})
    assert tiny(synthetic={"hardest": 62, "between": 2})


@pytest.mark.parametrize(
    "changes",
    [{"method": "unremix", "method_args": {"anchor": 4, "nearness": "near"}},
     {"method": "decoupled", "method_args": {"sigma": 0.5}}, {"method": "cross_entropy"},
     {"synthetic": {"hardest": 8, "between": 3, "after": 1}, "head": "none"},
     {"cross_entropy": 0.25, "start": {"epochs": 2, "temperature": 0.2}}],
    ids=str,
)  # fmt: skip
def test_a_run_with_younger_options_comes_back_from_json_as_it_was(tiny, changes):
    run = tiny(**changes)
    back = Run(**json.loads(json.dumps(asdict(run))))
    assert back == run
    assert back.digest == run.digest
    assert replace(run, study="other").digest == run.digest


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nt_xent", "debiased", "hard"])
def test_synthetic_negatives_come_after_the_first_epochs(tiny, method):
    kinds = {"hardest": 16, "between": 8}
    watched = {"method": method, "epochs": 4, "eval_every": 1}
    plain = train(tiny(**watched), progress=False)
    late = train(tiny(**watched, synthetic={**kinds, "after": 2}), progress=False)
    at_once = train(tiny(**watched, synthetic=kinds), progress=False)
    assert late.history[:3] == plain.history[:3]
    assert late.history[3]["loss"] > plain.history[3]["loss"]  # more negatives
    assert at_once.history[0] == plain.history[0]  # before training
    assert at_once.history[1]["loss"] > plain.history[1]["loss"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_classifier_is_there_and_trained_where_the_run_has_one(tiny, monkeypatch, share):
    changes = {"method": "cross_entropy"} if share == 1 else {"cross_entropy": share}
    models, measure = [], trainer.measure
    monkeypatch.setattr(
        trainer, "measure", lambda run, model, *a: models.append(model) or measure(run, model, *a)
    )
    run = tiny(**changes, epochs=30, lr=0.01)
    record, (model,) = train(run, progress=False), models
    if not share:
        assert model.classifier is None
        assert "top1" not in record.metrics
        return
    data = load_data(run)
    before = build_model(run, data).classifier
    assert before.out_features == len(data.classes)
    assert not torch.equal(before.weight, model.classifier.weight)
    model.eval()
    with torch.no_grad():
        logits = model.encoder(data.inputs(data.x_test)) @ model.classifier.weight.T
        right = (logits + model.classifier.bias).argmax(dim=1) == data.y_test
    assert record.metrics["top1"] == pytest.approx(right.double().mean().item(), abs=1e-12)
    assert record.metrics["top1"] > 0.3  # of eight classes


def test_the_classifier_does_not_change_how_the_encoder_begins(tiny):
    data = load_data(tiny())
    one, two = (build_model(tiny(cross_entropy=c), data) for c in (0.0, 0.5))
    for a, b in zip(one.parameters(), two.parameters(), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes",
    [{"method": "unremix"}, {"method": "transport"}, {"method": "schane", "cross_entropy": 0.5},
     {"synthetic": {"hardest": 16, "between": 8, "after": 1}}],
    ids=str,
)  # fmt: skip
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(tiny, tmp_path, changes):
    run = tiny(**changes, eval_every=1)
    whole = train(run, store=tmp_path / "whole", progress=False)
    assert outcome(interrupted(run, tmp_path / "cut")) == outcome(whole)


def interrupted(run, store):
    """Its Record, with an end after the second epoch and another call."""
    begun, begin = [], Objective.begin

    def dying(self, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        begun.append(epoch)
        begin(self, epoch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Objective, "begin", dying)
        with pytest.raises(KeyboardInterrupt):
            train(run, store=store, checkpoint_every=0.0, progress=False)
    assert begun == [1, 2]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Objective, "begin", lambda s, e: begun.append(e) or begin(s, e))
        record = train(run, store=store, progress=False)
    assert begun[2:] == list(range(3, run.epochs + 1))
    return record


@pytest.mark.parametrize("method", [*methods.WEIGHTED, "decoupled", "cross_entropy", "schane"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_that_diverges_says_so_and_leaves_no_record(tiny, method, share):
    share = 0.0 if method == "cross_entropy" else share
    with pytest.raises(FloatingPointError, match=r"diverged in epoch 1|loss (nan|inf) in epoch 1"):
        train(tiny(method=method, lr=1e30, cross_entropy=share), progress=False)
    assert list(runs.store_root().glob("*/*.json")) == []


MIXED = {"synthetic": {"hardest": 16, "between": 8}}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_with_synthetic_negatives_that_diverges_says_so(tiny, share):
    with pytest.raises(FloatingPointError, match="diverged in epoch 1"):
        train(tiny(**MIXED, lr=1e30, cross_entropy=share), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"method": "ring", "batch": 4}, "outer=0.1 of 6 negatives leaves none"),
     ({"data": "pydoc", "data_args": {"n_train": 60}, "encoder": "bag", "batch": 3,
       "method": "hard_neighbours"}, "no negatives")],
    ids=["band", "neighbours"],
)  # fmt: skip
def test_a_batch_too_small_for_its_loss_is_no_divergence(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes), progress=False)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [("bayesian", "alpha", "high"), ("decoupled", "sigma", True), ("unremix", "anchor", True)],
)
def test_an_option_of_another_type_is_a_bad_value_of_its_field(tiny, method, option, value):
    with pytest.raises(ValueError, match=f"method_args=.*{option}"):
        tiny(method=method, method_args={option: value})


@pytest.mark.parametrize(
    ("one", "other"),
    [({"start": {"epochs": 1, "temperature": 1}}, {"start": {"epochs": 1, "temperature": 1.0}}),
     ({"method": "unremix", "method_args": {"anchor": -0.0}},
      {"method": "unremix", "method_args": {"anchor": 0.0}})],
    ids=["start", "method_args"],
)  # fmt: skip
def test_equal_runs_have_equal_digests(tiny, one, other):
    one, other = tiny(**one), tiny(**other)
    assert one == other
    assert one.digest == other.digest


@pytest.mark.parametrize("changes", [{"method": "cross_entropy"}, {"cross_entropy": 0.5}], ids=str)
def test_cross_entropy_needs_every_label(tiny, monkeypatch, changes):
    @functools.wraps(sphere.load)
    def load(*args, **options):
        data = sphere.load(*args, **options)
        data.x_probe, data.y_probe = data.x_train, data.y_train.clone()
        data.y_train[::4] = -1
        return data

    monkeypatch.setitem(trainer.LOADERS, "sphere", load)
    with pytest.raises(ValueError, match=r"cross_entropy.*50 of sphere's 200 have none.*labelled"):
        train(tiny(**changes), progress=False)
    assert "top1" in train(tiny(**changes, epochs=0), progress=False).metrics  # nothing to train


# Sentences ----------------------------------------------------------------------------------------

BOOK = {
    "data": "pydoc",
    "data_args": {"n_train": 200, "n_test": 250, "held_out": 0.3, "vocabulary": 500},
    "encoder": "quickthoughts", "encoder_args": {"width": 8, "hidden": 4}, "epochs": 3, "batch": 40,
    "normalize": "none", "temperature": 1.0, "method": "quick_thoughts", "lr": 0.01,
}  # fmt: skip


WORDS = (
    "captain", "sailor", "whale", "harbour", "island", "storm", "anchor", "mast", "rope", "deck",
    "crew", "gull", "wave", "tide", "coast", "compass", "chart", "lantern", "barrel", "cabin",
    "ladder", "bell", "flag", "oar", "net",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def pydoc_is_split_into_sentences_once():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus, "_pydoc", functools.cache(corpus._pydoc))
        yield


def sentences(**changes):
    return Run(**{**BOOK, **changes})


@pytest.mark.parametrize("method", methods.NEIGHBOURS)
@pytest.mark.parametrize("encoder", ["quickthoughts", "bag"])
def test_a_step_on_sentences_compares_consecutive_ones(method, encoder):
    args = {"width": 8}
    run = sentences(method=method, encoder=encoder, encoder_args=args, tau_plus=0.0, beta=2.0)
    data = load_data(run)
    model = build_model(run, data).double()
    objective, g = Objective(run, model, data), generator()
    objective.begin(1)
    blocks = list(objective.batches(g))
    assert len(blocks) == 5
    for rows in blocks:
        assert torch.equal(rows, torch.arange(rows[0], rows[0] + 40))
    rows = blocks[0]
    z = model(data.inputs(data.x_train[rows])).detach()
    f, w = z.chunk(2, dim=1) if encoder == "quickthoughts" else (z, z)
    s, book, found = (f @ w.T).numpy(), data.y_train[rows].tolist(), []
    for i in range(40):
        near = [j for j in (i - 1, i + 1) if 0 <= j < 40 and book[j] == book[i]]
        far = [j for j in range(40) if j != i and j not in near]
        if not near:
            continue
        u = np.exp(s[i, far])
        if method == "quick_thoughts":
            total = math.log(u.sum() + np.exp(s[i, near]).sum() + 1)
            found.append(total - s[i, near].mean())
        else:
            ng = len(far) * (u**3).sum() / (u**2).sum()
            found.append(np.mean([math.log1p(ng / math.exp(s[i, j])) for j in near]))
    assert objective(rows, g).item() == pytest.approx(np.mean(found), rel=1e-9)


def test_only_other_encoders_than_quickthoughts_have_a_head():
    assert sentences().head == "none"
    data = load_data(sentences())
    assert not list(build_model(sentences(), data).head.parameters())
    assert sentences(head="mlp") == sentences()
    small = sentences(encoder="bag", encoder_args={"width": 8}, out_dim=6)
    assert build_model(small, data)(data.inputs(data.x_train[:3])).shape == (3, 6)


def test_a_run_on_sentences_learns_and_is_measured_by_its_neighbours():
    """Retrieval by hand: in blocks of 100 held-out sentences, the best other one is beside it."""
    run, models, measure = sentences(epochs=8), [], trainer.measure
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "measure", lambda r, m, *a: models.append(m) or measure(r, m, *a))
        record, (model,) = train(run, progress=False), models
    data = load_data(run)
    assert len(data.x_test) == 250
    assert set(record.metrics) == {"loss", "retrieval", "alignment", "uniformity"}
    assert record.metrics["loss"] < math.log(40)
    with torch.no_grad():
        f, g = model.eval()(data.inputs(data.x_test)).chunk(2, dim=1)
    shares = []
    for start in (0, 100):
        found = []
        for i in range(100):
            s = f[start + i] @ g[start : start + 100].T
            s[i] = -math.inf
            book = data.y_test[start : start + 100].tolist()
            near = [j for j in (i - 1, i + 1) if 0 <= j < 100 and book[j] == book[i]]
            found += [int(s.argmax()) in near] if near else []
        shares.append(np.mean(found))
    assert record.metrics["retrieval"] == pytest.approx(np.mean(shares), abs=1e-9)


def test_an_interrupted_run_on_sentences_ends_as_if_it_had_not_been(tmp_path):
    for method in ("quick_thoughts", "hard_neighbours"):
        run = sentences(method=method, eval_every=1, tau_plus=0.0)
        whole = train(run, store=tmp_path / f"{method} whole", progress=False)
        assert [set(row) for row in whole.history[1:]] == [{"epoch", "loss", "retrieval"}] * 3
        assert outcome(interrupted(run, tmp_path / f"{method} cut")) == outcome(whole)


def test_other_methods_pair_a_sentence_with_the_next():
    """HCL on pydoc: two views are two sentences side by side."""
    run = sentences(method="hard", tau_plus=0.0, encoder="bag", encoder_args={}, epochs=1)
    assert train(run, progress=False).metrics["loss"] > 0


def test_folders_of_books_and_the_six_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    (tmp_path / "shelf").mkdir()
    for book in range(3):
        lines = [f"The {w} of book {book} saw the sea." for w in WORDS]
        (tmp_path / "shelf" / f"{book}.txt").write_text("\n".join(lines))
    files = {
        "MR/rt-polarity.neg": 20, "MR/rt-polarity.pos": 20, "CR/custrev.neg": 20,
        "CR/custrev.pos": 20, "SUBJ/subj.objective": 20, "SUBJ/subj.subjective": 20,
        "MPQA/mpqa.neg": 20, "MPQA/mpqa.pos": 20,
    }  # fmt: skip
    texts = {name: [f"{w} {name[-3:]} sea" for w in WORDS[:n]] for name, n in files.items()}
    for part in ("train_5500", "TREC_10"):
        texts[f"TREC/{part}.label"] = [f"{'HUM:ind' if k % 2 else 'LOC:city'} {w} of book {k % 2}"
                                       for k, w in enumerate(WORDS)]  # fmt: skip
    for part in ("train", "test"):
        rows = [f"{k % 2}\t1\t2\t{w} saw\tthe {w if k % 2 else 'sea'}"
                for k, w in enumerate(WORDS)]  # fmt: skip
        texts[f"MRPC/msr_paraphrase_{part}.txt"] = ["Quality\tA\tB\tC\tD", *rows]
    for name, lines in texts.items():
        path = tmp_path / "sentences" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    run = sentences(data="books/shelf", data_args={"tasks": 1}, batch=10, epochs=1)
    metrics = train(run, progress=False).metrics
    six = {"MR", "CR", "SUBJ", "MPQA", "TREC", "MSRP"}
    assert set(metrics) - {"loss", "retrieval", "alignment", "uniformity"} == six | {"MSRP F1"}
    assert all(0 <= metrics[name] <= 1 for name in six)
    without = sentences(data="books/shelf", data_args={}, batch=10, epochs=1)
    assert not six & set(train(without, progress=False).metrics)
    with pytest.raises(FileNotFoundError, match="no such shelf"):
        train(sentences(data="books/no such shelf", data_args={}), progress=False)


@pytest.mark.parametrize("method", methods.NEIGHBOURS)
@pytest.mark.parametrize("data", ["sphere", "digits"])
def test_neighbours_are_of_sentences_alone(tiny, monkeypatch, method, data):
    monkeypatch.setattr(trainer, "fit", None)
    with pytest.raises(ValueError, match=f"method='{method}'.*{data} has no texts"):
        train(tiny(method=method, data=data, data_args={}), progress=False)


def test_sentences_that_diverge_say_so():
    with pytest.raises(FloatingPointError, match=r"diverged in epoch|loss (nan|inf) in epoch"):
        train(sentences(lr=1e30), progress=False)
