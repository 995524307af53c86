"""The page on what debiasing assumes: its theorem, its losses and its sentences."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import losses, runs

PAGE = Page("foundations/debiasing")
READ = ["recorded", "recorded-figure", "recorded-words"]


@pytest.fixture(scope="module")
def page():
    found = PAGE.define("check", "worlds", "embed", "prior-figure", "prior-words", "view-words",
                       "unequal", "losses", "training", "training-words")  # fmt: skip
    found["draw"] = torch.Generator().manual_seed(0)  # the functions look for it there
    return found


def points(n=24, d=4, classes=3, seed=0, spread=0.5):
    """Two views (n, d) of unit points in classes, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    y = torch.arange(n) % classes
    u = normal(classes, d)[y] + spread * normal(n, d)
    return *(F.normalize(u + spread / 2 * normal(n, d), dim=1) for _ in range(2)), y


# --- the theorem


def test_means_by_a_loop(page):
    z1, z2, y = points()
    found = page["means"](z1, z2, y, 0.5)
    for i in range(len(y)):
        u = [math.exp(float(z1[i] @ z2[j]) / 0.5) for j in range(len(y))]
        mates = [u[j] for j in range(len(y)) if y[j] == y[i] and j != i]
        others = [u[j] for j in range(len(y)) if y[j] != y[i]]
        assert found["m+"][i].item() == pytest.approx(np.mean(mates))
        assert found["m-"][i].item() == pytest.approx(np.mean(others))
        assert found["m"][i].item() == pytest.approx(np.mean(mates + others))
        assert found["view"][i].item() == pytest.approx(u[i])
        assert found["tau"][i].item() == pytest.approx(len(mates) / (len(y) - 1))


@pytest.mark.parametrize("positives", ["m+", "view"])
@pytest.mark.parametrize("pi", [0.0, 0.05, 0.3, 0.6])
def test_the_bias_is_that_of_the_estimate(page, positives, pi):
    found = page["means"](*points(seed=1), 0.4)
    mean_of_estimate = (found["m"] - pi * found[positives]) / (1 - pi)
    formula = page["bias_formula"](found, pi, positives)
    torch.testing.assert_close(formula, mean_of_estimate - found["m-"])


def test_class_mates_and_the_true_prior_are_unbiased(page):
    found = page["means"](*points(seed=2), 0.3)
    assert page["bias_formula"](found, found["tau"], "m+").abs().max() < 1e-12
    assert (page["bias_formula"](found, found["tau"], "view") < 0).double().mean() > 0.8


def test_prior_without_bias_is_the_page_s_formula(page):
    page["learned"] = {1 / 3: points(seed=3)}
    found = {
        name: v.mean().item() for name, v in page["means"](*page["learned"][1 / 3], 0.5).items()
    }
    star = page["crossing"](1 / 3, 0.5, "view")
    expected = found["tau"] * (found["m+"] - found["m-"]) / (found["view"] - found["m-"])
    assert star == pytest.approx(expected, rel=1e-9)
    assert star < found["tau"]
    at_star = page["bias_formula"](page["means"](*page["learned"][1 / 3], 0.5), star, "view")
    assert at_star.mean().item() == pytest.approx(0, abs=1e-9)
    assert page["crossing"](1 / 3, 0.5, "m+") == pytest.approx(found["tau"], rel=1e-9)


def test_draws_have_the_variance_of_the_theorem(page):
    z1, z2, y = points(n=60, seed=4)
    u, same = (z1[:2] @ z2.T / 0.5).exp(), y[:2, None] == y
    n, m, tau = 8, 2, 1 / 3
    drawn = page["estimates"](u, same, tau, n, m, 20_000)
    truth = (u * ~same).sum(1) / (~same).sum(1)
    mates = u[same].view(2, -1)
    variance = (u.var(1, correction=0) / n + tau**2 * mates.var(1, correction=0) / m) / (
        1 - tau
    ) ** 2
    torch.testing.assert_close(drawn.mean(1), truth, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(1), variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("t", [1.0, 0.5, 0.2])
def test_steps_of_the_bound(t):
    """h is 1/a-Lipschitz from a on, and no law on [a, b] has a larger deviation than sinh(1/t)."""
    a, b = math.exp(-1 / t), math.exp(1 / t)
    x = np.linspace(a, b, 2001)
    for n in (2, 254, 10_000):
        for s_pos in (-1 / t, 0.0, 1 / t):
            h = np.log1p(n * x * math.exp(-s_pos))
            assert (np.diff(h) <= np.diff(x) / a).all()
            assert (np.diff(h, 2) <= 1e-12).all()  # concave
    assert np.std([a, b]) == pytest.approx(math.sinh(1 / t))


def test_ends_of_jensen(page):
    """The clamp raises the mean, the logarithm lowers the loss at that mean."""
    generator = torch.Generator().manual_seed(5)
    theta = 0.3 + 0.5 * torch.randn(1, 100_000, generator=generator, dtype=torch.float64)
    clamped = theta.clamp(min=math.exp(-2))
    assert clamped.mean() > theta.mean()
    s_pos = torch.tensor([1.5], dtype=torch.float64)
    of_draws = page["loss_of"](theta, 10, s_pos, 0.5).mean()
    at_mean = page["loss_of"](clamped.mean().view(1, 1), 10, s_pos, 0.5)
    assert of_draws < at_mean.item()


def test_check_cell_has_ten_thousand_anchors():
    variables = PAGE.run("check")
    assert variables["checked"] >= 10_000
    assert 0 < max(variables["ratios"]) <= 1


def test_the_limit_of_the_exercise():
    """With infinitely many negatives and one positive the deviation stays."""
    z1, z2, y = points(n=30, seed=6)
    mates = (y[:, None] == y) & ~torch.eye(30, dtype=torch.bool)
    tau = mates.sum(1)[0].item() / 29
    u = (z1 @ z2.T / 0.5).exp()
    v = u[0][mates[0]]
    limit = (u[0][~torch.eye(30, dtype=torch.bool)[0]].mean() - tau * v) / (1 - tau)
    assert limit.std().item() == pytest.approx(tau * v.std().item() / (1 - tau))
    assert limit.mean().item() == pytest.approx(u[0][y != y[0]].mean().item())


# --- the losses


def loop(z1, z2, y, t, tau, positives):
    """The page's losses, anchor by anchor."""
    z, both, n = torch.cat([z1, z2]), y.repeat(2), len(z1)
    total = 0.0
    for i in range(2 * n):
        scores = {j: float(z[i] @ z[j]) / t for j in range(2 * n) if j % n != i % n}
        s_pos = float(z[i] @ z[(i + n) % (2 * n)]) / t
        same = [math.exp(s) for j, s in scores.items() if both[j] == both[i]]
        other = [math.exp(s) for j, s in scores.items() if both[j] != both[i]]
        if positives == "oracle":
            g = np.mean(other)
        else:
            v = np.mean(same) if same and positives == "mates" else math.exp(s_pos)
            g = max((np.mean(same + other) - tau * v) / (1 - tau), math.exp(-1 / t))
        total += math.log1p((2 * n - 2) * g * math.exp(-s_pos))
    return total / (2 * n)


@pytest.mark.parametrize("positives", ["view", "mates", "oracle"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.4])
def test_losses_by_a_loop(page, positives, tau):
    z1, z2, y = points(n=9, classes=4, seed=7)  # a class of three: all have mates
    found = page["with_labels"](z1, z2, y, t=0.3, tau=tau, positives=positives)
    assert found.item() == pytest.approx(loop(z1, z2, y, 0.3, tau, positives))


def test_an_anchor_without_mates_takes_its_view(page):
    z1, z2, _ = points(n=5, seed=8)
    y = torch.arange(5)
    mates = page["with_labels"](z1, z2, y, t=0.5, tau=0.1, positives="mates")
    torch.testing.assert_close(mates, losses.debiased(z1, z2, temperature=0.5, tau_plus=0.1))
    oracle = page["with_labels"](z1, z2, y, t=0.5, tau=0.1, positives="oracle")
    torch.testing.assert_close(oracle, losses.nt_xent(z1, z2, temperature=0.5))


def test_gradients_are_finite_without_class_mates(page):
    z1, z2, _ = points(n=5, seed=9)
    z1.requires_grad_()
    loss = page["with_labels"](z1, z2, torch.arange(5), t=0.2, tau=0.1, positives="mates")
    (slope,) = torch.autograd.grad(loss, z1)
    assert slope.isfinite().all()


def test_thinned_frequencies(page):
    y = torch.arange(1000) % 10
    kept = page["thinned"](y)
    assert y[kept].bincount().tolist() == [round(100 / (1 + c)) for c in range(10)]
    assert len(kept.unique()) == len(kept)


# --- tables and sentences


def test_share_of_the_oracle_s_gain(page):
    rows = [(0.1, 0.5, label, gain, 0.001, 3) for label, gain in (
        ("debiased, true prior", 0.01), ("debiased, half the prior", -0.01),
        ("class-mates", 0.04), ("oracle", 0.05))]  # fmt: skip
    columns = ["true prior", "temperature", "label", "difference", "se", "n"]
    (line,) = page["recovered"](pd.DataFrame(rows, columns=columns))
    assert "oracle gains +5.0 ± 0.1" in line
    assert "true prior +20%, debiased, half the prior -20%, class-mates +80%" in line
    rows[-1] = (0.1, 0.5, "oracle", 0.001, 0.001, 3)
    (line,) = page["recovered"](pd.DataFrame(rows, columns=columns))
    assert "reach" not in line


def made_up(run):
    value = 0.5 + 0.01 * run.seed + 0.1 * run.tau_plus * (1 + 0.001 * run.seed)
    names = ("loss", "knn", "linear", "alignment", "uniformity", "overlap", "clamp_share")
    return made_up_record(run, dict.fromkeys(names, value))


@pytest.mark.parametrize("share", [0, 1])
def test_recorded_priors(share, tmp_path, monkeypatch):
    for run in study("sphere-plane"):
        if share and run.method in ("nt_xent", "debiased"):
            runs.save(made_up(run), store=tmp_path)
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    variables, outputs = PAGE.outputs(*READ)
    assert f"{50 * share} of 50 are recorded" in outputs["recorded"].text
    assert outputs["recorded-figure"].drawn == bool(share)
    found = variables["swept_gains"]
    assert len(found) == 8 * share
    if share:
        np.testing.assert_allclose(found["difference"], 0.1 * found["tau_plus"], rtol=0.01)
        assert set(found["true prior"].round(3)) == {0.02, 0.1}
    else:
        assert "Nothing is recorded" in outputs["recorded-words"].text


def test_worlds_have_the_priors_of_the_text(page):
    worlds = PAGE.run("worlds")["worlds"]
    assert [round(1 / tau) for tau in worlds] == [4, 10, 50]
    assert "1/4, 1/10 and 1/50" in PAGE.prose


def test_parameters_are_used():
    assert PAGE.unused_parameters() == set()
