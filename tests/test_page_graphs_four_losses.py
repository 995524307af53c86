"""The page on four losses for graphs: one formula, and sentences that follow their tables."""

import math
import re

import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import compare, losses, runs

PAGE = Page("graphs/four-losses")
LAB = [name for name in PAGE.code if name.startswith("lab-")] + ["majority", "records"]
QUICK = [name for name in PAGE.body if name not in LAB and "solution" not in name]
TINY = {
    "n_graphs": 48, "epochs": 1, "batch": 24, "seeds": [0, 1], "temperatures": [0.5],
    "kinds": ["none"], "hidden_dim": 8, "out_dim": 4,
}  # fmt: skip


@pytest.fixture
def page():
    """The page's variables, with every helper and nothing trained."""
    return PAGE.define(*PAGE.body, beta=1.0)


# --- the formula


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


@pytest.mark.parametrize("t", [0.5, 0.2])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_the_four_losses_are_as_displayed(page, t, beta):
    draw = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 10, 5, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (10,), generator=draw)
    z = torch.cat([z1, z2])
    for of, library in (
        (y, losses.hard_scl(z1, z2, y, temperature=t, beta=beta)),
        (torch.arange(10), losses.hard(z1, z2, temperature=t, beta=beta, tau_plus=0.0)),
    ):
        value, negatives = page["by_hand"](z, of.repeat(2), beta, t)
        assert value == pytest.approx(library.item())
        unit, both = F.normalize(z, dim=1).tolist(), of.tolist() * 2
        s = [[sum(a * b for a, b in zip(u, v, strict=True)) / t for v in unit] for u in unit]
        pairs, count = [], 0
        for i in range(20):
            others = [j for j in range(20) if both[j] != both[i]]
            count += len(others)
            tilt = [math.exp(beta * s[i][j]) for j in others]
            g = sum(w * math.exp(s[i][j]) for w, j in zip(tilt, others, strict=True)) / sum(tilt)
            for p in (p for p in range(20) if p != i and both[p] == both[i]):
                pairs.append(math.log1p(18 * g / math.exp(s[i][p])))
        assert value == pytest.approx(sum(pairs) / len(pairs))
        assert negatives == count / 20


def test_the_factor_of_the_exercise():
    """SCL with the number of negatives in place of 2B - 2, an anchor of the larger class."""
    y = torch.tensor([0, 0, 1])  # p = 2/3
    draw = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    s = F.normalize(torch.cat([z1, z2]), dim=1)
    s, both, pairs = s @ s.T / 0.5, y.repeat(2), []
    for i in range(6):
        negative = both != both[i]
        for p in range(6):
            if p != i and both[p] == both[i]:
                pairs.append(torch.log1p(s[i, negative].exp().sum() / s[i, p].exp()))
    found = losses.scl(z1, z2, y, Q="negatives")
    torch.testing.assert_close(found, torch.stack(pairs).mean())


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9])
def test_the_larger_class_follows_from_the_pairs(page, p):
    assert page["larger_class"](p * p + (1 - p) ** 2) == pytest.approx(p)


def test_the_larger_class_of_mutag_is_the_known_one():
    _, shown = PAGE.outputs("lab-read", "majority")
    assert "MUTAG: the larger class has 66." in shown["majority"].value  # 125 of 188


# --- the sentences


def table(level, *, metric="svc_scaled", seeds=3, t=0.5):
    """A frame of some seeds from each label's mean; seeds differ by what is common to all."""
    methods = {v: k for k, v in compare.LABELS.items()}
    rows = [
        {"label": label, "method": methods.get(label.split(" ")[0], "nt_xent"), "temperature": t,
         "seed": seed, metric: value + 0.05 * seed + 0.002 * (seed == number % 3)}
        for number, (label, value) in enumerate(level.items())
        for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


LEVELS = {"SimCLR": 0.5, "HCL β=1": 0.55, "SCL": 0.7, "H-SCL β=1": 0.6}


def test_each_switch_is_judged_by_itself(page):
    found = page["effects"](table(LEVELS), "svc_scaled").set_index("effect")
    expected = {
        "hardness, no labels": 0.05, "hardness, with labels": -0.1, "labels, no hardness": 0.2,
        "labels, with hardness": 0.05, page["BOTH"]: -0.15,
    }  # fmt: skip
    assert list(found.index) == list(expected)
    for name, value in expected.items():
        assert found.loc[name, "difference"] == pytest.approx(value, abs=0.003)
    assert (found["low"] <= found["difference"]).all()
    assert (found["n"] == 3).all()
    points = page["in_points"](found)
    assert points["difference"].iloc[0] == pytest.approx(5, abs=0.3)


def test_what_is_missing_is_left_out(page):
    some = table({"SimCLR": 0.5, "SCL": 0.7})
    assert page["effects"](some, "svc_scaled")["effect"].tolist() == ["labels, no hardness"]
    assert page["effects"](table({"SCL": 0.5}), "svc_scaled").empty
    assert "nothing to compare" in page["claim"](some, "svc_scaled", "here")[0]
    assert "nothing to compare" in page["at_best"](some, "svc_scaled")[0]
    assert page["overlap_words"](some.assign(overlap=0.5), "svc_scaled")[0].startswith("labels")
    assert (
        "nothing" in page["overlap_words"](table({"SCL": 0.5}).assign(overlap=1), "svc_scaled")[0]
    )
    assert page["count"](some.assign(set="A"), "svc_scaled").startswith("No data set")


def test_the_claim_is_judged_by_the_intervals(page):
    said = page["claim"](table(LEVELS), "svc_scaled", "t = 0.5")
    assert len(said) == 4
    assert "the higher mean against 2 of 3" in said[-1]
    assert (
        "on its side against SimCLR and HCL β=1, and wholly on the other's against SCL" in said[-1]
    )
    one = page["claim"](table(LEVELS, seeds=1), "svc_scaled", "t = 0.5")
    assert "on its side against none, and wholly on the other's against none" in one[-1]


def test_each_loss_may_choose(page):
    cool = table({**LEVELS, "SCL": 0.4, "H-SCL β=1": 0.8, "H-SCL β=4": 0.75}, t=0.2)
    said = page["at_best"](pd.concat([table(LEVELS), cool]), "svc_scaled")
    assert any(
        line.startswith("Best of each, SCL at t = 0.5 minus H-SCL β=1 at t = 0.2") for line in said
    )
    assert said[-1].count("at t = ") == 3


def test_all_are_compared_with_the_untrained_network(page):
    zero = table({"untrained encoder": 0.58})
    said = page["over_untrained"](table(LEVELS), zero, "svc_scaled")
    assert [line.split(" minus")[0] for line in said] == list(LEVELS)
    assert "-8.0" in said[0]
    assert (
        "no untrained network"
        in page["over_untrained"](table(LEVELS), zero.iloc[:0], "svc_scaled")[0]
    )


def test_views_are_compared_with_the_mixture(page):
    one = table({"SimCLR": 0.5}).assign(views="mixed")
    other = table({"SimCLR": 0.6}).assign(views="nodes")
    other["svc_scaled"] += [0.0, 0.001, 0.0]
    said = page["views_words"](pd.concat([one, other]), "svc_scaled")
    assert said[0].startswith("nodes minus mixed: +10.0")
    assert said[-1].startswith("The highest mean is that of nodes")
    assert said[-1].endswith("from the mixture: nodes.")
    assert "Only one kind" in page["views_words"](one, "svc_scaled")[0]


def test_overlap_and_accuracy_may_disagree(page):
    df = table(LEVELS)
    df["overlap"] = table({"SimCLR": 0.5, "HCL β=1": 0.6, "SCL": 0.4, "H-SCL β=1": 0.45},
                          metric="overlap")["overlap"]  # fmt: skip
    said = page["overlap_words"](df, "svc_scaled")
    assert "hardness, no labels, overlap: +10.0" in said[0]
    assert said[0].endswith("goes the **other** way.")
    assert said[2].endswith("goes the same way.")


def test_sets_are_counted(page):
    on_top = table({**LEVELS, "H-SCL β=1": 0.9}).assign(set="A")
    found = page["count"](pd.concat([on_top, table(LEVELS).assign(set="B")]), "svc_scaled")
    assert "highest mean on 1 of 2 data sets; 5 of 6 comparisons" in found


# --- the page, whatever is recorded


def test_a_tiny_form_runs():
    page, shown = PAGE.outputs(*QUICK, **TINY)
    assert len(page["df"]) == 4 * 2
    assert len(page["viewed"]) == 2 * 2
    drawn = {name for name, output in shown.items() if output.drawn}
    assert drawn == {"effects-figure", "picture"}
    assert len(page["apart"]) == 5
    assert not any("nothing to compare" in output.text for output in shown.values())
    assert set(page["zero"]["epochs"]) == {0}
    for block in PAGE.solutions():
        if "assert" in block:
            exec(block, page)


def invent(wanted):
    """Records of Runs, as if they had been trained."""
    for number, wish in enumerate(wanted):
        names = ("svc_scaled", "svc", "knn", "linear", "overlap")
        runs.save(made_up_record(wish, dict.fromkeys(names, 0.5 + number / 5000)))


def of_page():
    return [r for r in study("tu-lab") if r.method != "infograph"]


def test_the_page_can_do_without_records():
    _, shown = PAGE.outputs("effects", *LAB, into=PAGE.define(*PAGE.body) | nothing())
    assert re.match(r"0 of \d+ are recorded\.", shown["lab-read"].value)
    assert shown["lab-claim"].value == "Nothing is recorded yet."
    assert shown["lab-count"].value.startswith("No data set")
    assert shown["majority"].value.count("no rows yet") == 3
    assert not any(output.drawn for output in shown.values())


def nothing():
    """What the cell effects reads of the quick form."""
    return {"df": table(LEVELS)}


@pytest.mark.parametrize("methods", [["scl"], ["nt_xent", "hard"], ["scl", "hard_scl"]])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_the_page_can_do_with_some_records(methods, seeds):
    invent([r for r in of_page() if r.method in methods and r.seed in seeds and r.data != "mutag"])
    page, shown = PAGE.outputs("effects", *LAB, into=PAGE.define(*PAGE.body) | nothing())
    assert set(page["lab"]["set"]) == {"PTC_MR", "PROTEINS"}
    assert "Nothing" not in shown["lab-claim"].value
    assert "MUTAG" not in shown["lab-claim"].value


def test_with_all_records_no_cell_is_a_mixture():
    """A filter that is forgotten lets two kinds of runs of one seed into one cell."""
    invent(of_page())
    page, shown = PAGE.outputs("effects", *LAB, into=PAGE.define(*PAGE.body) | nothing())
    found, wanted = map(int, re.findall(r"\d+", shown["lab-read"].value)[:2])
    assert found == wanted == len(of_page())
    assert not page["lab"].duplicated(["data", "label", "seed"]).any()
    assert set(page["per_set"]) == {"MUTAG", "PTC_MR", "PROTEINS"}
    assert all(len(rows) == 5 for rows in page["per_set"].values())
    assert shown["lab-figure"].drawn
    assert "on 3 of 3 data sets" in shown["lab-count"].value  # as the study file has them in order
    assert "untrained" in shown["lab-claim"].value


def test_the_lab_form_is_read_and_not_trained(monkeypatch):
    """With the study's settings all runs of the grid are recorded ones, kept without embeddings."""
    lab = {
        "study": "tu-lab", "data": "mutag", "n_graphs": 0, "held_out": 0.3, "epochs": 100,
        "batch": 64, "lr": 0.001, "hidden_dim": 512, "out_dim": 128, "temperatures": [0.5],
        "betas": [4.0], "kinds": [], "seeds": list(range(10)),
    }  # fmt: skip
    page = PAGE.define(*PAGE.body, **lab)
    listed = {r.digest for r in of_page()}
    first = ("one-batch", "train-grid", "picture", "overlap", "views-runs", "views-words")
    source = PAGE.code["one-batch"].split("first =")[0]  # the rest reads MUTAG itself
    exec(source, page)
    invent(of_page())
    monkeypatch.setattr("hcl.train.train", None)
    page, shown = PAGE.outputs("effects", into=page | nothing())
    page, shown = PAGE.outputs(*first[1:], into=page)
    assert {r.run.digest for r in page["kept"]} <= listed
    assert set(page["every"]["digest"]) <= listed
    assert len(page["every"]) == 10 * 7
    assert not shown["picture"].drawn
    assert "Only one kind" in shown["views-words"].value
