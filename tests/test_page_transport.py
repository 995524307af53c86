"""The page on transport: its statements on random batches, its loop, its words on frames."""

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from torch.nn import functional as F

from hcl import losses, transport

PAGE = Page("beyond/transport")
TINY = {
    "epochs": 1,
    "seeds": [0, 1],
    "all_epsilons": [0.5, 2.0],
    "repeats": 1,
    "temperatures": [0.5],
    "epsilons": [0.7],
}


@pytest.fixture(scope="module")
def page():
    """The page up to the embeddings, after one epoch of training."""
    found = PAGE.run("loop", "weights", **TINY)
    return PAGE.run("hubs-figure", into=found)


def views(seed, images=8, d=4):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, images, d, generator=draw, dtype=torch.float64), dim=2)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the statements


def objective(q, cost, eps):
    """eq-plan times n, of rows of weights."""
    on = q > 0
    return (q[on] * cost[on]).sum() + eps * (q[on] * q[on].log()).sum()


@pytest.mark.parametrize("eps", [0.25, 0.7, 3.0])
def test_of_all_rows_the_tilt_is_the_cheapest(eps):
    z1, z2 = views(0)
    cost = transport.squared_distances(z1, z2)
    tilt = losses.negative_weights(z1, z2, temperature=0.3, beta=2 * 0.3 / eps)
    least = objective(tilt, cost, eps)
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = torch.rand(cost.shape, generator=draw, dtype=torch.float64) * cost.isfinite()
        other = 0.9 * tilt + 0.1 * noise / noise.sum(1, keepdim=True)
        assert objective(other, cost, eps) > least
    plan = transport.sinkhorn(cost, eps=eps, tol=1e-10).log_weights.exp()
    assert least <= objective(plan, cost, eps) <= objective(cost.isfinite() / 14.0, cost, eps)


def test_the_column_sums_say_whether_the_two_are_equal():
    for seed, equal in ((1, False), (None, True)):
        angle = 2 * math.pi * torch.arange(8).double() / 8
        polygon = torch.stack([angle.cos(), angle.sin()], dim=1)
        z1, z2 = views(seed) if seed else (polygon, polygon)
        tilt = losses.negative_weights(z1, z2, temperature=0.5, beta=2.0)
        plan = transport.sinkhorn(transport.squared_distances(z1, z2), eps=0.5, tol=1e-10)
        gap = (tilt - plan.log_weights.exp()).abs().max()
        assert ((tilt.sum(0) - 1).abs().max() < 1e-9) == equal
        assert (gap < 1e-9) == equal


@pytest.mark.parametrize("images", [6, 60])
def test_much_entropy_centres_twice(images):
    """The first order solved exactly, as least squares in the factors."""
    z1, z2 = views(2, images=images)
    cost, eps = transport.squared_distances(z1, z2), 1e4
    kept, n = cost.isfinite(), 2 * images
    cosine = torch.where(kept, 1 - cost / 2, 0.0)
    system = kept.double() + torch.diag(kept.sum(1).double())
    f = torch.linalg.lstsq(system, -cosine.sum(1, keepdim=True), driver="gelsd").solution[:, 0]
    exact = transport.sinkhorn(cost, eps=eps, tol=1e-14).log_columns
    torch.testing.assert_close(exact * eps / 2, f - f.mean(), rtol=1e-3, atol=1e-3)
    rough = -cosine.sum(1) / (n - 2)
    rough = rough - rough.mean()
    assert (f - f.mean() - rough).abs().max() <= 3 / (n - 2)  # O(1 / N)


def test_the_released_numbers_are_a_hardness_of_about_1_43():
    assert f"{2 * 0.5 / 0.7:.2f}" == "1.43"
    assert "\\approx1.43" in PAGE.prose
    assert "-2/\\varepsilon+(2t/\\varepsilon)" in PAGE.prose


def test_the_checks_of_the_page():
    found = PAGE.run("check")["checks"]
    assert len(found) == 6
    assert found[["loss", "gradient", "weights"]].to_numpy().max() < 1e-9


def test_the_attached_form_has_the_value_and_not_the_gradient():
    z1, z2 = (z.clone().requires_grad_() for z in views(3))
    found = PAGE.run()
    (source,) = PAGE.solutions("next")
    exec(source, found)
    ours, plain = found["attached"](z1, z2), transport.transported(z1, z2)
    torch.testing.assert_close(ours, plain)
    slopes = [torch.autograd.grad(x, z1)[0] for x in (ours, plain)]
    assert (slopes[0] - slopes[1]).abs().max() > 1e-4


def test_the_other_cost_is_a_hardening_function_of_that_slope():
    c = torch.linspace(-1, 1, 50, dtype=torch.float64, requires_grad=True)
    log_eta = -torch.exp(2 - 2 * c - 1) / 0.7
    assert (log_eta.diff() > 0).all()
    (slope,) = torch.autograd.grad(log_eta.sum(), c)
    torch.testing.assert_close(slope, 2 / 0.7 * torch.exp(2 - 2 * c - 1).detach())


# --- the cells


def test_the_loop_is_the_trainers_and_takes_any_loss(page):
    """The cell itself asserts that both end at one accuracy; here the weights, too."""
    run = replace(page["first"], epochs=1)
    model, _ = page["fit"](run, lambda a, b: losses.nt_xent(a, b, temperature=run.temperature))
    for mine, theirs in zip(model.parameters(), page["trainers"].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    other, _ = page["fit"](run, lambda a, b: transport.transported(a, b))
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


def test_side_by_side_is_what_it_says(page):
    z1, z2 = views(4)
    row = page["side_by_side"](z1, z2, 0.5)
    tilt = losses.negative_weights(z1, z2, temperature=0.2, beta=0.8)  # only beta / t matters
    plan = transport.sinkhorn(transport.squared_distances(z1, z2), eps=0.5, tol=1e-9)
    q = plan.log_weights.exp()
    assert row["β at t = 0.5"] == 2
    assert row["largest difference"] == pytest.approx((q - tilt).abs().max().item())
    moved = (q - tilt).clamp(min=0).sum(1).mean().item()  # what one row gains another loses
    assert row["weight moved"] == pytest.approx(moved)
    assert row["largest column"] == pytest.approx(tilt.sum(0).max().item())
    kept = tilt > 0
    assert row["correlation"] == pytest.approx(np.corrcoef(q[kept], tilt[kept])[0, 1])


def test_mean_cosines_leave_out_the_own_image(page):
    z1, z2 = views(5)
    z = torch.cat([z1, z2])
    found = page["mean_cosine"](z1, z2)
    for i in range(16):
        others = [(z[i] @ z[j]).item() for j in range(16) if j % 8 != i % 8]
        assert found[i].item() == pytest.approx(sum(others) / 14)


def test_cells_after_the_embedding_run_in_a_tiny_form(page):
    page["draw"] = torch.Generator().manual_seed(0)
    PAGE.run("centred", "false", "ends", "ends-figure", "chain", "training", into=page)
    PAGE.run("cost", "no-plan", into=page)
    trained = page["accuracies"]
    assert trained.groupby("label").size().to_dict() == {"HCL": 2, "SimCLR": 2, "plan": 2}
    assert (page["ratios"]["ratio"] > 1).all()
    slopes = page["centred"]["slope"]
    assert abs(slopes.iloc[-1] - 1) < 0.02  # O(1 / N), with N = 254
    plan = page["ends"][page["ends"]["weights"] == "plan"]
    assert plan["mean cost"].is_monotonic_decreasing  # as epsilon falls
    assert plan["mean cost"].iloc[-1] >= page["assigned"] - 1e-3 >= page["nearest"] - 1e-3
    epsilon = plan["ε"].iloc[-1]
    assert plan["mean cost"].iloc[-1] <= page["assigned"] + epsilon * math.log(22) + 1e-3
    hcl = page["ends"][page["ends"]["weights"] == "HCL"]
    assert hcl["mean cost"].iloc[-1] == pytest.approx(page["nearest"], abs=0.05)


def test_with_the_plan_an_anchors_loss_may_drop_and_with_the_tilt_it_may_not():
    dropping = PAGE.define("chain", all_epsilons=[0.1, 0.4, 2.0])["dropping"]
    found = pd.DataFrame(dropping(*views(seed, images=6, d=3), 0.5) for seed in range(6))
    assert (found["HCL"] == 0).all()
    assert found["plan"].max() > 0


def test_a_body_has_no_docstring():
    found = PAGE.define("source")["body"](transport.sinkhorn)
    assert '"""' not in found
    assert "logsumexp" in found
    assert found.startswith("@torch.no_grad()\ndef sinkhorn(")
    compile(found, "body", "exec")


def test_the_hub_is_used_as_often_as_any_under_the_plan():
    found = PAGE.run("solution-hub", into=PAGE.run() | {"draw": torch.Generator().manual_seed(0)})[
        "hubs"
    ]
    assert (found["plan's column sum"] - 1).abs().max() < 1e-6
    assert found["HCL's column sum"].idxmax() in (31, 63)
    assert found["v"].idxmin() in (31, 63)


# --- words on made-up frames


def accuracies(plan=0.02):
    rows = [
        {"label": name, "temperature": t, "eps": eps, "seed": seed,
         "knn": 0.5 + 0.01 * seed + t / 10 + gain * (1 + 0.1 * seed)}
        for t in (0.5, 0.2)
        for name, eps, gain in (
            ("SimCLR", math.inf, 0.0), ("HCL", 0.7, 0.05), ("plan", 0.7, 0.05 + plan),
            ("HCL", 0.25, 0.03), ("plan", 0.25, 0.03 + plan),
        )
        for seed in range(5)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_training_in_words():
    found = PAGE.define("training-table", "training-paired", "training-words")
    settings = found["cell_names"](accuracies())["setting"].unique().tolist()
    assert settings[:3] == ["no weights", "ε = 0.7, β = 1.43", "ε = 0.25, β = 4"]
    gains = found["paired"](accuracies())
    assert len(gains) == 4
    assert (gains["difference"] - 0.024).abs().max() < 1e-9
    said = found["training_words"](accuracies())
    assert "in 4 of 4 settings" in said[0]
    assert "+2.4 points" in said[0]
    assert said[3].startswith("each at its best, plan (t = 0.5, ε = 0.7) minus HCL: +2.4 points")
    frame = accuracies(plan=0.0)
    noise = np.random.default_rng(0).normal(0, 0.02, len(frame))
    said = found["training_words"](frame.assign(knn=frame["knn"] + noise))
    assert re.match(r"plan minus HCL: in [01] of 4 settings", said[0])


def test_weights_in_words():
    rows = [
        {"embedding": "x", "ε": e, "correlation": c, "weight moved": 0.05,
         "log v with mean cosine": sign}
        for e, c, sign in ((0.7, 0.9, -0.5), (2.0, 0.99, 0.1))
    ]  # fmt: skip
    said = PAGE.define("weights-words")["weights_words"](pd.DataFrame(rows), 0.7)
    assert said[0].startswith("x: at ε = 0.7 the weights correlate by 0.900, and 5.0%")
    assert said[0].endswith("0.900 to 0.990.")
    assert said[1].endswith("at 1 of 2 ε.")


def test_ends_in_words():
    rows = [
        {"weights": w, "ε": e, "mean cost": m, "effective negatives": 1.5, "converged": e > 0.1}
        for w, m in (("HCL", 0.4), ("plan", 0.6))
        for e in (1.0, 0.1)
    ]
    found = PAGE.define("ends-words") | {"assigned": 0.59, "favourites": 7, "nearest": 0.39}
    say = found["ends_words"]
    say.__globals__.update(found)
    said = say(pd.DataFrame(rows))
    assert said.startswith("Of 24 views, 7 are somebody's nearest negative. At ε = 0.1 the plan")
    assert f"allows {0.59 + 0.1 * math.log(22):.3f}" in said
    assert said.endswith("did not reach its tolerance at ε = 0.1.")
