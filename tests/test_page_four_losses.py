"""The page on the four losses: its formulas are the library's, its sentences follow its tables."""

import math
import re

import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import compare, losses, runs, sphere

PAGE = Page("supervised/four-losses")
LAB = [name for name in PAGE.code if name.startswith("lab-")] + ["made-by", "records"]


@pytest.fixture
def page():
    """The page's variables, with every helper and nothing trained."""
    found = PAGE.define(*PAGE.body)
    found["main"] = 0.5
    return found


def views(seed, images=12, labels=4):
    """Unit views, and labels of classes of very different size."""
    draw = torch.Generator().manual_seed(seed)
    z1, z2 = F.normalize(torch.randn(2, images, 6, generator=draw, dtype=torch.float64), dim=2)
    y = torch.randint(labels, (images,), generator=draw)
    return z1, z2, torch.where(torch.rand(images, generator=draw) < 0.4, 0, y)


def scores(z1, z2, y, t):
    """Scores, labels and the pairs of the page's formulas as plain lists."""
    z = torch.cat([z1, z2])
    s, both = (z @ z.T / t).tolist(), y.tolist() * 2
    everyone = range(len(both))
    positives = [[p for p in everyone if p != i and both[p] == both[i]] for i in everyone]
    negatives = [[j for j in everyone if both[j] != both[i]] for i in everyone]
    return s, positives, negatives


# --- the formulas


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


@pytest.mark.parametrize("t", [0.5, 0.2])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_the_four_losses_are_one_formula(page, t, beta):
    for seed in range(3):
        z1, z2, y = views(seed)
        found = page["by_hand"](z1, z2, y, beta, t)
        torch.testing.assert_close(found, losses.hard_scl(z1, z2, y, temperature=t, beta=beta))
        alone = page["by_hand"](z1, z2, torch.arange(len(y)), beta, t)
        args = {"temperature": t, "beta": beta, "tau_plus": 0.0}
        torch.testing.assert_close(alone, losses.hard(z1, z2, **args))


def test_supcon_is_as_displayed():
    z1, z2, y = views(3)
    s, positives, _ = scores(z1, z2, y, 0.5)
    total = 0.0
    for i, mine in enumerate(positives):
        denominator = sum(math.exp(x) for a, x in enumerate(s[i]) if a != i)
        total += sum(-math.log(math.exp(s[i][p]) / denominator) for p in mine) / len(mine)
    assert losses.supcon(z1, z2, y).item() == pytest.approx(total / len(s))


def test_the_threshold_keeps_those_that_reach_it_and_the_nearest():
    """Equation eq-four-threshold put into eq-four."""
    z1, z2, y = views(4)
    t = 0.5
    s, positives, negatives = scores(z1, z2, y, t)
    lonely = 0
    for threshold in (-1.0, 0.2, 0.9):
        pairs = []
        for i, mine in enumerate(positives):
            kept = [s[i][j] for j in negatives[i] if t * s[i][j] >= threshold]
            lonely += not kept
            kept = kept or [max(s[i][j] for j in negatives[i])]
            g = sum(math.exp(x) for x in kept) / len(kept)
            pairs += [math.log1p((len(s) - 2) * g / math.exp(s[i][p])) for p in mine]
        found = losses.hard_scl(z1, z2, y, beta=0.0, threshold=threshold).item()
        assert found == pytest.approx(sum(pairs) / len(pairs))
    assert lonely  # the nearest in any case


def test_the_pulls_are_those_of_the_solution():
    z1, z2, y = views(5)
    s, positives, negatives = scores(z1, z2, y, 0.2)
    pushed = 0
    for i in range(len(s)):
        row = torch.tensor(s[i], dtype=torch.float64, requires_grad=True)
        others = [a for a in range(len(row)) if a != i]
        p, n = positives[i], negatives[i]
        anchor = -(row[p] - row[others].logsumexp(0)).mean()
        (gradient,) = torch.autograd.grad(anchor, row)
        share = row[others].softmax(0).detach()[[others.index(a) for a in p]]
        torch.testing.assert_close(-gradient[p], 1 / len(p) - share)
        pushed += (gradient[p] > 0).sum().item()
        q = (2.0 * row[n]).softmax(0)  # some hardness
        ng = (len(row) - 2) * (q * row[n].exp()).sum()
        own = -(row[p].exp() / (row[p].exp() + ng)).log().mean()
        (gradient,) = torch.autograd.grad(own, row)
        torch.testing.assert_close(-gradient[p], (ng / (row[p].exp() + ng)).detach() / len(p))
        assert (gradient[p] < 0).all()  # always pulled
    assert pushed


def test_the_solution_on_pushes_runs_and_finds_some(page, capsys):
    PAGE.run("by-hand", "solution-pull", into=page)
    said = dict(re.findall(r"(\w+): (\d+)%", capsys.readouterr().out))
    assert int(said["SupCon"]) > 0
    assert int(said["SCL"]) == 0


@pytest.mark.parametrize("n", [2, 50])
def test_large_classes_have_the_share_of_pairs_that_the_solution_says(n):
    y = torch.cat([torch.zeros(3 * n), torch.ones(n)]).long().repeat(2)
    pairs = (y[:, None] == y).sum(1) - 1
    share = pairs[y == 0].sum() / pairs.sum()
    large, small = 6 * n * (6 * n - 1), 2 * n * (2 * n - 1)
    assert share.item() == pytest.approx(large / (large + small))
    assert n < 50 or share.item() == pytest.approx(0.9, abs=0.005)
    assert "tends to $9/10$, against" in PAGE.text["solution-pull-end"]


@pytest.mark.parametrize(("coarse", "share"), [(10, "4/49"), (2, "4/9")])
def test_the_share_of_hard_negatives_is_the_one_in_the_text(coarse, share):
    world = sphere.load(n_train=50 * coarse, n_test=50 * coarse, coarse=coarse, fine=5)
    other = world.y_train[:, None] != world.y_train
    group = world.coarse_train[:, None] == world.coarse_train
    top, bottom = map(int, share.split("/"))
    assert ((other & group).sum() / other.sum()).item() == pytest.approx(top / bottom)
    assert f"${share}$" in PAGE.text["groups-intro"]


# --- the sentences


def table(knn, t=0.5):
    """A frame of three seeds, from each label's mean, with what the helpers look at."""
    methods = {v: k for k, v in reversed(compare.LABELS.items())}  # of two, the first
    rows = [
        {
            "label": label, "method": methods[label.split(" ")[0]], "temperature": temperature,
            "seed": seed, "knn": value + 0.001 * seed + 0.002 * (seed == number % 3),
            "beta": 1.0 if "β" in label else 0.0, "threshold": 0.0, "hardening": "exponential",
        }
        for number, ((label, temperature), value) in enumerate(knn.items())
        for seed in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows)


EVEN = {
    ("SimCLR", 0.5): 0.5, ("HCL β=1", 0.5): 0.6, ("SCL", 0.5): 0.6, ("SupCon", 0.5): 0.7,
    ("H-SCL β=1", 0.5): 0.8, ("SimCLR", 0.2): 0.6, ("HCL β=1", 0.2): 0.6, ("SCL", 0.2): 0.8,
    ("SupCon", 0.2): 0.7, ("H-SCL β=1", 0.2): 0.7,
}  # fmt: skip


def test_the_claim_is_judged_at_each_temperature(page):
    df = table(EVEN)
    first = page["claim"](df, "knn", 0.5)
    assert len(first) == 5
    assert "against 3 of 3, SupCon not counted" in first[-1]
    assert all(f" {name}" in first[-1] for name in ("SimCLR", "HCL β=1", "SCL"))
    second = page["claim"](df, "knn", 0.2)
    assert "against 2 of 3" in second[-1]
    assert "SCL" not in second[-1].split("on its side against")[1].replace("H-SCL", "")


def test_without_records_the_claim_is_left_open(page):
    df = table({("SCL", 0.5): 0.5, ("SupCon", 0.5): 0.5})
    assert "nothing to compare" in page["claim"](df, "knn", 0.5)[0]
    assert "not all recorded" in page["best_words"](df, "knn")[0]
    one = table(EVEN)[lambda d: d["seed"] == 0]
    assert "one seed" in page["claim"](one, "knn", 0.5)[0]
    assert page["claim"](one, "knn", 0.5)[-1].endswith("none of them.")
    assert "one seed has no interval" in page["best_words"](one, "knn")[-1]


def test_each_loss_is_taken_at_its_best(page):
    df = table(EVEN)
    best = page["at_best"](df, "knn")
    assert best["t"].to_dict() == {
        "SimCLR": 0.2, "HCL β=1": 0.5, "SCL": 0.2, "SupCon": 0.5, "H-SCL β=1": 0.5
    }  # fmt: skip
    assert (best["settings"] == 2).all()
    assert best.loc["H-SCL β=1", "95 % interval"] == ""
    assert best.loc["SCL", "minus H-SCL"].startswith(("+0.0", "-0.0", "+0.1", "-0.1"))
    said = page["best_words"](df, "knn")
    assert said[-1] == "By 95 % intervals, H-SCL above the others is **not** shown against SCL."
    alone = page["best_words"](df[df["temperature"] == 0.5], "knn")
    assert alone[-1] == "By 95 % intervals, H-SCL above the others shows against all."


def test_hardening_is_compared_with_the_own_loss(page):
    found = page["hardening"](table(EVEN)[lambda d: d["temperature"] == 0.5], "knn")
    assert found["minus"].to_dict() == {"HCL β=1": "SimCLR", "H-SCL β=1": "SCL"}
    assert found.loc["H-SCL β=1", "difference ± se"].startswith(("+20.0", "+19.9", "+20.1"))
    assert page["hardening"](table({("SCL", 0.5): 0.5}), "knn").empty


def test_the_gain_is_a_share_of_the_errors(page):
    page["metric"] = "knn"
    said, share = page["gain"](table(EVEN))
    assert share == pytest.approx(0.5, abs=0.01)  # 20 points of 40
    assert said.startswith("SCL 60.2%")
    assert said.endswith("% of SCL's errors.")


# --- the recorded study


def invent(wanted):
    """Records of Runs, as if they had been trained."""
    for number, wish in enumerate(wanted):
        metrics = {"knn": 0.4 + number / 1000, "linear": 0.5 + number / 1000, "loss": 1.0}
        runs.save(made_up_record(wish, metrics))


def test_the_page_can_do_without_records(page):
    _, shown = PAGE.outputs(*LAB, into=page)
    assert re.fullmatch(r"0 of \d+ are recorded\.", shown["lab-read"].value)
    assert shown["lab-claim"].value == "Nothing is recorded yet."
    assert not any(output.drawn for output in shown.values())


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("methods", [["scl"], ["nt_xent", "hard"], ["scl", "hard_scl", "supcon"]])
def test_the_page_can_do_with_some_records(page, seeds, methods):
    invent([r for r in study() if r.seed in seeds and r.method in methods and r.epochs == 5])
    _, shown = PAGE.show(*LAB, into=page)
    assert not shown["lab-read"].startswith("0 of")
    assert set(page["lab"]["method"]) == set(methods)
    assert "Nothing" not in shown["lab-claim"]


def test_with_all_records_no_cell_is_a_mixture(page):
    """A filter that is forgotten lets two kinds of runs of one seed into one cell."""
    invent(study())
    _, shown = PAGE.show(*LAB, into=page)
    found, wanted = map(int, re.findall(r"\d+", shown["lab-read"]))
    assert found == wanted
    df = page["lab_trained"]
    assert not df.duplicated(["label", "temperature", "seed"]).any()
    assert {"SimCLR", "HCL β=1", "SCL", "H-SCL β=1", "SupCon"} <= set(df["label"])
    assert set(df["data"]) == {"cifar10"}
    assert (df[["epochs", "batch"]] == [5, 256]).all().all()
    assert any(label.startswith("H-SCL cos≥") for label in df["label"])
    assert "H-SCL has the higher mean" in shown["lab-claim"]
