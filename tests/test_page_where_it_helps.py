"""The page on where hardness helps: its theorem, and that its fits find what was put in."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from scipy import integrate, stats
from torch.nn import functional as F

from hcl import losses, runs

PAGE = Page("hardness/where-it-helps")
FIRST = PAGE.body.index("read")
LAST = PAGE.body.index("predict-words")
RECORDED = [name for name in PAGE.body[FIRST : LAST + 1] if name != "push-table"]  # needs a network


@pytest.fixture(scope="module")
def page():
    return PAGE.define("check-bound", "check-detached", "select", "plane-figure", "chance", "fit",
                       "collapse-figure", "exact", "best-beta", "read")  # fmt: skip


# --- the theorem


def averages(law, t, beta):
    """A of the page for a law of the cosine, by quadrature over its moment generating function."""
    big_k = lambda k: math.log(law(k))  # noqa: E731
    hard = t * (big_k((1 + beta) / t) - big_k(beta / t))
    cold = t / (1 + 2 * beta)
    return hard, cold * big_k(1 / cold)


def uniform(low, high):
    def law(k):
        return integrate.quad(lambda c: math.exp(k * c), low, high)[0] / (high - low)

    return law


def two_point(share, low, high):
    return lambda k: (1 - share) * math.exp(k * low) + share * math.exp(k * high)


LAWS = {
    "uniform": (uniform(-0.4, 0.7), 1.1),
    "rare near": (two_point(0.01, -0.2, 0.9), 1.1),
    "rare far": (two_point(0.9, -1.0, 1.0), 2.0),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("t", "beta"), [(2.0, 1.0), (0.5, 0.5), (0.5, 2.0), (0.2, 1.0)])
def test_the_bound_of_the_theorem(name, t, beta):
    law, width = LAWS[name]
    hard, cold = averages(law, t, beta)
    bound = beta * (1 + beta) / (36 * math.sqrt(3)) * width**3 / t**2
    assert abs(hard - cold) <= bound


def test_normal_cosines_are_equal_and_only_at_that_temperature():
    law = lambda k: math.exp(0.1 * k + 0.04 * k * k / 2)  # noqa: E731
    for t, beta in ((1.0, 0.5), (0.5, 2.0)):
        hard, cold = averages(law, t, beta)
        assert hard == pytest.approx(cold, abs=1e-12)
        other = t / (1 + beta)
        assert abs(hard - other * math.log(law(1 / other))) > 0.005


def test_third_order_is_the_exercise_s():
    share, low, high, beta, t = 0.1, -0.2, 0.8, 1.0, 200.0
    law = two_point(share, low, high)
    skew = share * (1 - share) * (1 - 2 * share) * (high - low) ** 3
    hard, cold = averages(law, t, beta)
    assert (hard - cold) * t**2 == pytest.approx(-beta * (1 + beta) / 6 * skew, rel=0.02)


def test_largest_third_moment_is_a_two_point_law_s():
    share = np.linspace(0, 1, 100_001)
    moment = share * (1 - share) * (1 - 2 * share)
    assert np.abs(moment).max() == pytest.approx(1 / (6 * 3**0.5), rel=1e-8)


def test_averages_of_the_page_are_the_library_s_loss(page):
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(20, 5, generator=generator, dtype=torch.float64), dim=1)
    t, beta = 0.4, 1.5
    p = (z[:10] * z[10:]).sum(1).repeat(2) / t
    log_g = page["tilted_average"](page["negatives_of"](z), t, beta) / t
    mine = torch.log1p(18 * (log_g - p).exp()).mean()
    options = {"temperature": t, "beta": beta, "tau_plus": 0.0}
    torch.testing.assert_close(mine, losses.hard(z[:10], z[10:], **options))


def test_the_proposition_anchor_by_anchor(page):
    """One anchor's gradients in its cosines, weights detached, by autograd on the formulas."""
    generator = torch.Generator().manual_seed(2)
    t, beta, n = 0.5, 1.3, 12
    c = (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1).requires_grad_()
    near = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def gradients(loss):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, (c, near))])

    q = (beta * c / t).softmax(0).detach()
    ng = n * (q * (c / t).exp()).sum()
    hard = gradients(torch.log1p(ng * (-near / t).exp()))
    cold = t / (1 + beta)
    ng_cold = (c / cold).exp().sum()
    plain = gradients(torch.log1p(ng_cold * (-near / cold).exp()))
    push, push_cold = ng / (ng + (near / t).exp()), ng_cold / (ng_cold + (near / cold).exp())
    torch.testing.assert_close(hard, (push / push_cold / (1 + beta)).detach() * plain)


# --- what is made of the Records


def made_up(run):
    """Accuracy rises with the logarithm of the concentration that the page predicts, alone."""
    power = 1 if run.detach_weights else 2
    value = 0.4 + 0.05 * math.log((1 + power * run.beta) / run.temperature) + 0.01 * run.seed
    value += int(run.digest[:4], 16) / 65535 * 1e-5
    names = ("loss", "knn", "linear", "alignment", "uniformity", "overlap", "clamp_share")
    return made_up_record(run, dict.fromkeys(names, value))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The recorded half of the page, run on a made-up study."""
    store = tmp_path_factory.mktemp("runs")
    for run in study("sphere-plane"):
        if run.seed < 3:
            runs.save(made_up(run), store=store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(store))
        return PAGE.outputs(*RECORDED, resamples=50)


def test_the_fit_finds_the_powers_that_were_put_in(whole):
    text = whole[1]["fit"].text
    assert text.count("k = 2.00 fits best") == 2
    assert text.count("k = 1.00 fits best") == 2


def test_cells_of_one_concentration_do_not_differ(whole):
    variables, _ = whole
    for df, power in ((variables["attached"], 2), (variables["detached"], 1)):
        found = variables["at_equal"](df, "knn", power)
        assert len(found) == 8
        assert found["difference"].abs().max() < 1e-4
    assert variables["at_equal"](variables["attached"], "knn", 1)["difference"].max() > 0.005


def test_the_prediction_leaves_nothing(whole):
    variables, outputs = whole
    predicted = variables["predicted"]
    assert len(predicted) > 60
    assert predicted["miss"].abs().max() < 1e-3
    gain = 0.05 * np.log(1 + 2 * predicted["beta"])
    np.testing.assert_allclose(predicted["measured"], gain, atol=1e-3)
    assert "leaves 0% of the mean square gain" in outputs["predict-words"].text


def test_every_gain_is_counted_and_none_is_lost(whole):
    assert "Of 48 cells, hardness helps in 48 and hurts in 0" in whole[1]["chance"].text


def test_the_batch_decides_nothing_where_nothing_was_put_in(whole):
    found = whole[0]["by_batch"]
    cells = found.groupby("batch").apply(
        lambda part: set(zip(part["beta"], part["temperature"], strict=True)), include_groups=False
    )
    assert len(cells) == 3
    assert len(set(map(frozenset, cells))) == 1
    assert found["difference"].abs().max() < 1e-4


def test_best_hardness_of_a_rising_curve_is_the_largest(whole):
    table = whole[0]["best_betas"](whole[0]["attached"], "knn")
    assert (table["β found"] == 4).all()


def test_every_figure_is_drawn_and_every_arm_is_there(whole):
    variables, outputs = whole
    assert all(outputs[name].drawn for name in RECORDED if "figure" in name)
    assert len(variables["arm_table"]("knn")) == len(variables["ARMS"])
    assert "not recorded" not in outputs["arms-words"].text


@pytest.mark.parametrize("some", [0, 40], ids=["nothing", "SimCLR alone"])
def test_a_store_with_little_or_nothing(some, tmp_path, monkeypatch):
    for run in study("sphere-plane")[:some]:
        runs.save(made_up(run), store=tmp_path)
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    _, outputs = PAGE.outputs(*RECORDED, resamples=20)
    assert f"{some} of 1050 are recorded" in outputs["read"].text
    assert "othing is recorded yet" in outputs["predict-words"].text
    assert "othing is recorded yet" in outputs["chance"].text


# --- helpers, on frames made by hand


def test_expected_number_of_false_alarms(page):
    gains = pd.DataFrame({"difference": [0.01, -0.03, 0.001], "se": [0.004, 0.01, 0.01],
                          "n": [10, 5, 5]})  # fmt: skip
    lines = page["counted"]({"one": gains})
    chance = 2 * (stats.t.sf(2, 9) + 2 * stats.t.sf(2, 4))
    assert "Of 3 cells, hardness helps in 1 and hurts in 1" in lines[0]
    assert "1 are undecided" in lines[0]
    assert f"{chance:.1f} of them" in lines[1]


def test_gains_over_the_best_simclr(page):
    rows = [("nt_xent", 0.0, t, seed, level + 0.01 * seed)
            for t, level in ((0.5, 0.5), (0.2, 0.6)) for seed in (0, 1)]  # fmt: skip
    rows += [("hard", 1.0, 0.5, seed, 0.65 + 0.01 * seed) for seed in (0, 1)]
    df = pd.DataFrame(rows, columns=["method", "beta", "temperature", "seed", "knn"])
    df["detach_weights"] = False
    assert page["gains_over"](df, "knn")["difference"].item() == pytest.approx(0.15)
    assert page["gains_over_best"](df, "knn")["difference"].item() == pytest.approx(0.05)


def test_the_usual_setting(page):
    rows = [{"coarse": 10, "fine": 5, "noise": 0.3, "batch": b, "epochs": e}
            for b, e in ((32, 4), (32, 15), (128, 15), (512, 75))]  # fmt: skip
    df = pd.DataFrame([*rows, {**rows[2], "coarse": 2}])
    assert page["of"](df)["batch"].tolist() == [128]
    assert page["of"](df, batch=32)["epochs"].tolist() == [4]
    assert page["of"](df, batch=32, epochs=15)["epochs"].tolist() == [15]


def test_study_shares_its_setting_with_the_page_on_hardness():
    run = next(r for r in study("sphere-plane") if r.method == "hard" and r.batch == 128)
    hardness = Page("images/hardness").define()
    for name in ("data", "encoder", "epochs", "batch", "lr", "hidden_dim", "out_dim"):
        assert getattr(run, name) == hardness[name] == PAGE.define()[name]


def test_updates_are_about_equal(page):
    updates = [2000 // batch * epochs for batch, epochs in page["UPDATES"].items()]
    assert updates == [248, 225, 225]
    assert "248, 225 and 225" in PAGE.prose


def test_parameters_are_used():
    assert PAGE.unused_parameters() == set()


def test_the_code_of_the_exercise_is_code():
    (block,) = [b for b in PAGE.solutions("next") if "room" in b]
    compile(block, "exercise", "exec")
