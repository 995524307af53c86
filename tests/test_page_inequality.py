"""The page on the inequality: theorem and bounds on random input, helpers on made-up frames."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from hcl import ordering, runs

PAGE = Page("supervised/inequality")
LAB = [name for name in PAGE.code if name.startswith("lab-")] + ["made-by", "records"]
LOSSES = ("ucl", "h_ucl", "scl", "h_scl")


@pytest.fixture
def page():
    """The page's variables, with every helper and nothing trained."""
    found = PAGE.define(*PAGE.body)
    found |= {"main": 0.5, "batch": 40, "betas": [0.0, 1.0, 8.0]}
    return found


def views(seed, images=10, classes=3, d=4):
    draw = torch.Generator().manual_seed(seed)
    z1, z2 = F.normalize(torch.randn(2, images, d, generator=draw, dtype=torch.float64), dim=2)
    return z1, z2, torch.randint(classes, (images,), generator=draw)


def sides(z1, z2, y):
    """For each anchor: its score with the other view, those of S and those of D, at t = 1."""
    z, both, images = torch.cat([z1, z2]), y.repeat(2).tolist(), len(y)
    s = (z @ z.T).tolist()
    for i, row in enumerate(s):
        mate = (i + images) % (2 * images)
        rest = [j for j in range(2 * images) if j not in (i, mate)]
        same, other = ([row[j] for j in rest if (both[j] == both[i]) is k] for k in (True, False))
        yield row[mate], same, other


def tilted(cosines, t, beta):
    """Equation eq-order-tilted and its Z."""
    weights = [math.exp(beta * c / t) for c in cosines]
    terms = (w * math.exp(c / t) for w, c in zip(weights, cosines, strict=True))
    return sum(terms) / sum(weights), sum(weights)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the mathematics


@pytest.mark.parametrize("t", [1.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 1.0, 5.0])
def test_theorem_and_corollary_hold_at_every_anchor(page, t, beta):
    kinds = set()
    for seed in range(4):
        z1, z2, y = views(seed)
        h_ucl, h_scl = page["both_losses"](z1, z2, y, t, beta)
        for i, (p, same, other) in enumerate(sides(z1, z2, y)):
            weight = (2 * len(y) - 2) / math.exp(p / t)
            everyone, _ = tilted(same + other, t, beta)
            g_d, z_d = tilted(other, t, beta)
            assert h_ucl[i].item() == pytest.approx(math.log1p(weight * everyone))
            assert h_scl[i].item() == pytest.approx(math.log1p(weight * g_d))
            if not same:
                assert h_ucl[i].item() == pytest.approx(h_scl[i].item())
                continue
            g_s, z_s = tilted(same, t, beta)
            w = z_s / (z_s + z_d)
            assert everyone == pytest.approx(w * g_s + (1 - w) * g_d)  # the mixture
            kinds.add(g_s >= g_d)
            assert (h_scl[i] <= h_ucl[i]).item() == (g_s >= g_d)
            assert h_scl[i] - h_ucl[i] <= -math.log(1 - w)  # the price of a failure
    assert kinds == {True, False}


@pytest.mark.parametrize("beta", [0.5, 4.0, 30.0])
def test_the_proposition_on_the_ends(beta):
    t, decided = 0.5, 0
    for seed in range(6):
        z1, z2, y = views(seed)
        for _, same, other in sides(z1, z2, y):
            if not same:
                continue
            logs = []
            for cosines in (same, other):
                log_g, nearest = math.log(tilted(cosines, t, beta)[0]), max(cosines) / t
                assert nearest - math.log(len(cosines)) / beta <= log_g + 1e-12
                assert log_g <= nearest + 1e-12
                logs.append(log_g)
            lead = (max(same) - max(other)) / t
            if abs(lead) > math.log(2 * len(y) - 2) / beta:
                decided += 1
                assert (logs[0] > logs[1]) == (lead > 0)
    assert decided or beta < 1


def test_at_the_end_no_anchor_is_out_of_order(page):
    z1, z2, y = views(7)
    h_ucl, h_scl = page["both_losses"](z1, z2, y, 0.5, 1e6)
    assert (h_scl <= h_ucl + 1e-12).all()


def test_the_checks_of_the_page_find_no_exception(page):
    _, shown = PAGE.show("check", "harris-check", into=page)
    assert (page["checked"]["both agree"] == page["checked"]["of"]).all()
    assert (page["checked"]["assumption holds"] == page["checked"]["H-SCL ≤ H-UCL"]).all()
    assert shown["harris-check"] == "In 12 of 12 batches no anchor is out of this order."


def test_antipodes_fail_at_every_anchor(page):
    page["draw"] = torch.Generator().manual_seed(1)
    table = PAGE.show("solution-antipodes", into=page)[1]["solution-antipodes"]
    assert (table["share"] == 0).all()
    gaps = table["H-SCL − H-UCL"]
    assert gaps.iloc[0] > 0
    assert gaps.is_monotonic_decreasing  # largest at beta = 0
    assert gaps.iloc[0] < -math.log(1 - 2 / 126)  # w, the share of the two companions


def test_the_numbers_of_the_last_solution():
    text = PAGE.text["solution-antipodes-end"]
    assert math.log(1 / 0.9) == pytest.approx(0.105, abs=5e-4)
    assert math.log(0.9 + 0.1 * math.e**2) == pytest.approx(0.49, abs=5e-3)
    assert -math.log(0.9 + 0.1 * 0.96) == pytest.approx(0.004, abs=5e-5)
    for number in ("9\\cdot0.105=0.95", "=0.49$", "lose $0.004$", "0.96\\,g_D"):
        assert number in text


# --- the helpers


def test_the_nearest_share_is_that_of_a_classifier(page):
    z, _, y = views(8, images=60, classes=5)
    model = KNeighborsClassifier(1)
    right = [
        model.fit(np.delete(z, i, 0), np.delete(y, i)).predict(z[i : i + 1])[0] == y[i]
        for z, y in [(z.numpy(), y.numpy())]
        for i in range(60)
    ]
    assert page["nearest_share"](z, y) == pytest.approx(np.mean(right))
    y[0] = 9  # without a companion it does not count
    others = [r for r, label in zip(right, y.tolist(), strict=True) if label != 9]
    assert abs(page["nearest_share"](z, y) - np.mean(others)) <= 2 / 59


def test_share_and_gap_are_the_librarys(page):
    z, _, y = views(9, images=40, classes=4)
    found = page["share_and_gap"](z, y, 0.5, 1.0)
    assert found["share"] == ordering.assumption_share(z, z, y, temperature=0.5, beta=1.0)
    losses = ordering.four_losses(z, z, y, temperature=0.5, beta=1.0)
    assert found["gap"] == pytest.approx(losses["h_ucl"] - losses["h_scl"])
    end = page["share_and_gap"](z, y, 0.5, torch.inf)
    assert end["share"] == page["nearest_share"](z, y)
    near = page["share_and_gap"](z, y, 0.5, 5000.0)  # it is the limit of the finite ones
    assert near["share"] == pytest.approx(end["share"])
    assert near["gap"] == pytest.approx(end["gap"], abs=1e-3)


def test_labellings_merge_as_the_text_says(page):
    y = torch.arange(50)
    found = page["labellings"](y)
    assert found["groups"].tolist() == [k // 5 for k in range(50)]
    assert found["across groups"].tolist() == [k % 5 for k in range(50)]
    assert sorted(found["random"].tolist()) == y.tolist()
    assert found["random"].tolist() != y.tolist()


def test_an_anchor_is_described(page):
    """Two pairs on the axes and one point of the first label that lies with the strangers."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.1, 0.995]])
    y = torch.tensor([0, 0, 1, 1, 0])
    each = page["anchors"](F.normalize(z, dim=1), y, 0.5, 1.0)
    assert each["nearest has its label"].tolist() == [1, 1, 1, 1, 0]
    assert each["margin"][4] < 0 < each["margin"][0]
    assert each["cosine with nearest stranger"][4] == pytest.approx(0.995, abs=1e-3)
    assert each["mean cosine with companions"][0] == pytest.approx((1 + 0.1) / 2, abs=1e-3)


def seen(assumption, h_scl=4.0):
    rows = [
        {"temperature": 0.5, "seed": s, "epoch": e, "knn": 0.1 + e / 10, "ucl": 3.0, "scl": 2.9}
        | {"h_ucl": 4.1, "h_scl": h_scl if e else 4.0, "assumption": assumption if e else 0.6}
        for s in (0, 1)
        for e in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def test_the_verdict_counts(page):
    said = page["verdict"](seen(0.9))
    assert "6 of 6 looks H-SCL is at most H-UCL; at the end it is lower by 0.100" in said[0]
    assert "for 60.0% of the anchors before training and for 90.0% at the end" in said[1]
    assert "in 2 of 2 runs" in said[2]
    assert "2 of 6 looks" in page["verdict"](seen(0.9, h_scl=4.2))[0]


def test_what_is_said_beside_the_paper(page):
    said = page["beside"](seen(0.9), "these")
    assert said[0] == "these: the inequality of the means holds at every look."
    assert "does **not** hold for every anchor; its share is 60.0% at the lowest" in said[1]
    assert "**broken** at 4 of 6 looks" in page["beside"](seen(0.9, h_scl=4.2), "these")[0]
    assert "holds for every anchor" in page["beside"](seen(1.0)[lambda d: d["epoch"] > 0], "x")[1]


def test_shares_in_words(page):
    values = {0.0: (0.9, 0.1), 1.0: (0.8, -0.1), torch.inf: (0.4, 0.0)}
    found = pd.DataFrame([{"beta": b, "share": s, "gap": g} for b, (s, g) in values.items()])
    said = page["in_words"](found)
    assert said.startswith("80.0% of the anchors at β = 1, 40.0% at ∞")
    assert said.endswith("at 1 of 3 β")


# --- the recorded study


def invent(wanted):
    """Records of Runs, as if they had been trained."""
    draw = np.random.default_rng(0)
    for wish in wanted:
        if wish.epochs > 5 and wish.watch == "none":
            continue  # the page does not look at them
        values = dict(zip(("assumption", "knn", *LOSSES), draw.random(6), strict=True))
        z = draw.normal(size=(90, 4))
        z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16)
        looks = [{"epoch": e, **values} for e in (0, 5) if wish.watch == "losses"]
        runs.save(
            made_up_record(wish, {"knn": 0.5, "linear": 0.5}, looks),
            arrays={"z": z, "labels": draw.integers(10, size=90), "of": 90},
        )


def test_the_page_can_do_without_records(page):
    _, shown = PAGE.outputs(*LAB, into=page)
    assert re.fullmatch(r"0 of \d+ are recorded\.", shown["lab-read"].value)
    for name in ("lab-verdict", "lab-shares-words"):
        assert shown[name].value == "- Nothing is recorded yet."
    assert not any(output.drawn for output in shown.values())


@pytest.mark.parametrize(
    "part", [{"watch": "losses"}, {"method": "hard_scl"}, {"seed": 0}, {}], ids=str
)
def test_the_page_can_do_with_some_records(page, part):
    wanted = [r for r in study() if all(getattr(r, k) == v for k, v in part.items())]
    invent(wanted)
    _, shown = PAGE.show(*LAB, into=page)
    watched = [r for r in wanted if r.watch == "losses"]
    assert shown["lab-read"].startswith(f"{len(watched)} of ")
    assert ("Nothing" in shown["lab-verdict"]) == (not watched)
    df = page["labelled"]
    assert not df.duplicated(["label", "seed"]).any()
    assert set(page["watched_df"]["method"]) <= {"hard"}
    page |= {"seen": seen(0.9), "trained": [1]}
    _, shown = PAGE.show("paper-words", into=page)
    assert ("CIFAR-10" in shown["paper-words"]) == bool(watched)
