"""The page on UnReMix: its statements on random batches, its tables on made-up frames."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import runs, sweeps, unremix

PAGE = Page("beyond/unremix")
LAB = [
    name for name in PAGE.code if name.startswith(("lab-", "records", "graphs-lab", "graphs-rec"))
]
TINY = {
    "n_train": 64, "epochs": 1, "batch": 32, "hidden_dim": 8, "out_dim": 4, "seeds": [0, 1],
    "page_epochs": [0, 1], "looks": 1, "top": 3, "graph_seeds": [], "repeats": 1,
}  # fmt: skip
HARD = "HCL β=1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page in a tiny form, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield PAGE.outputs(*PAGE.body, **TINY)


@pytest.fixture(scope="module")
def defined():
    return PAGE.define(*PAGE.body)


def views(seed, images=6, d=4):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, images, d, generator=draw, dtype=torch.float64), dim=2)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the statements


def test_the_closed_form_is_the_inner_product_of_gradients():
    """prop-unremix-gradient with other inputs h: whole gradients by autograd."""
    z1, z2 = views(0)
    z, n = torch.cat([z1, z2]), 12
    h = torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = (z @ z.T / 0.3).masked_fill(torch.eye(n, dtype=torch.bool), -math.inf)
    # a layer that has these logits at h; h is invertible on the rows with a pseudo-inverse only,
    # so take the gradient with respect to an addition to its matrix, at 0
    added = torch.zeros(n, 5, dtype=torch.float64, requires_grad=True)
    losses = F.cross_entropy(logits + h @ added.T, logits.argmax(1), reduction="none")
    g = torch.stack([torch.autograd.grad(x, added, retain_graph=True)[0].flatten() for x in losses])
    found = unremix.scores(z1, z2, temperature=0.3, features=h).uncertainty
    torch.testing.assert_close(found, g @ g.T)


@pytest.mark.parametrize("normalisation", ["minmax", "sum"])
def test_the_anchor_score_alone_is_hcl_less_a_floor(normalisation):
    z1, z2 = views(1)
    z = torch.cat([z1, z2])
    w = unremix.weights(
        z1, z2, temperature=0.4, uncertainty=0.0, representativeness=0.0,
        normalisation=normalisation,
    )  # fmt: skip
    for i in range(12):
        negatives = [j for j in range(12) if j % 6 != i % 6]
        tilt = [math.exp((z[i] @ z[j]).item() / 0.4) for j in negatives]
        row = [x - min(tilt) for x in tilt]
        expected = torch.tensor([x / sum(row) for x in row], dtype=torch.float64)
        torch.testing.assert_close(w[i, negatives], expected)
        nearest = (torch.tensor(x, dtype=torch.float64) for x in (tilt, row))
        hcl, less = ((x / x.sum()).sort(descending=True)[0].cumsum(0) for x in nearest)
        assert (less >= hcl - 1e-12).all()  # it leans more on the near ones


def test_the_parts_of_the_uncertainty_and_the_mean():
    z1, z2 = views(2)
    z = torch.cat([z1, z2])
    _, u, r = unremix.scores(z1, z2, temperature=0.5)
    p = np.zeros((12, 12))
    for i in range(12):
        e = {k: math.exp((z[i] @ z[k]).item() / 0.5) for k in range(12) if k != i}
        for k, x in e.items():
            p[i, k] = x / sum(e.values())
    y = p.argmax(1)
    for i, j in itertools.product(range(12), repeat=2):
        bracket = p[i] @ p[j] - p[i, y[j]] - p[j, y[i]] + (y[i] == y[j])
        assert u[i, j].item() == pytest.approx((z[i] @ z[j]).item() * bracket)
    mean = sum(z) / 12
    for j in range(12):
        assert r[j].item() == pytest.approx(12 / 11 * (1 - (z[j] @ mean).item()))


def test_the_page_checks_itself_and_says_so():
    found = PAGE.run("check")["gaps"]
    assert len(found) == 4
    assert max(found.values()) < 1e-12
    assert "our reading" in PAGE.prose
    assert "unknown to us" in PAGE.prose


# --- all of it, tiny


def test_a_tiny_form_runs_where_nothing_is_recorded(whole):
    page, shown = whole
    assert set(page["embeddings"]) == {
        (*cell, seed) for cell in (("SimCLR", 0), ("SimCLR", 1), ("UnReMix", 1)) for seed in (0, 1)
    }
    assert len(page["df"]) == 2 * (2 + 2 + 7 + 1)
    assert page["df"].groupby("label").size().loc["UnReMix"] == 4
    for name in ("circle", "scatter", "who-figure", "paired-figure"):
        assert shown[name].drawn or shown[f"{name}-figure"].drawn
    assert shown["lab-read"].value.startswith("0 of 48 are recorded")
    assert shown["lab-verdict"].value == "Nothing is recorded yet."
    assert "No synthetic graphs" in shown["graphs-quick"].value
    assert "main effect of uncertainty" in shown["verdict"].value.lower()


def test_false_negatives_are_counted(whole):
    """The share and the weight of one batch by loops over its pairs."""
    page, _ = whole
    v = page["embeddings"]["SimCLR", 1, 0][0]
    negative, false = page["negatives_of"](v)
    n = 2 * len(v.y)
    for i, j in itertools.product(range(n), repeat=2):
        other = i % len(v.y) != j % len(v.y)
        assert negative[i, j].item() == other
        alike = v.y[i % len(v.y)] == v.y[j % len(v.y)]
        assert false[i, j].item() == bool(other and alike)
    q = page["WEIGHTS"]["UnReMix"](v, 0.5)
    found = page["counts"](v, q, lambda y: y // 5)
    weight = sum(q[i, j].item() for i, j in false.nonzero().tolist()) / n
    assert found["weight"] == pytest.approx(weight)
    assert 1 <= found["left"] <= n - 2
    plain = page["counts"](v, page["WEIGHTS"]["random"](v, 0.5), lambda y: y // 5)
    assert plain["left"] == pytest.approx(n - 2)
    assert plain["share"] == pytest.approx(plain["weight"], rel=1e-4)  # the prior


def test_hcl_and_the_anchor_score_have_one_order(whole):
    who = whole[0]["who"]
    wide = who.pivot_table("share", ["encoder", "epoch", "seed"], "label")
    assert wide["anchor"].to_numpy() == pytest.approx(wide[HARD].to_numpy(), abs=1e-6)


def test_the_solutions_run(whole, tmp_path, monkeypatch):
    page, _ = whole
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    blocks = PAGE.solutions("paper")
    assert len(blocks) == 4
    for block in blocks:
        exec(block, page)


# --- words on made-up frames


def ablation(page, gains, seeds=(0, 1, 2), t=0.5):
    """Accuracies that are sums of what each score gains, the same for all seeds but a shift."""
    cells = {"SimCLR": 0.0, HARD: 0.05}
    for label, some in page["SUBSETS"].items():
        cells[label] = sum(gain * some[name] for name, gain in gains.items())
    return pd.DataFrame(
        {"label": label, "temperature": t, "seed": s, "knn": 0.5 + 0.01 * s + x + 0.001 * s * x}
        for label, x in cells.items()
        for s in seeds
    )


def test_the_seven_subsets(defined):
    some = {tuple(x.values()) for x in defined["SUBSETS"].values()}
    assert some == set(itertools.product((0.0, 1.0), repeat=3)) - {(0.0, 0.0, 0.0)}


def test_main_effects_of_sums_are_their_parts(defined):
    gains = {"anchor": 0.04, "uncertainty": -0.02, "representativeness": 0.01}
    df = ablation(defined, gains)
    found = defined["main_effects"](df, "knn")
    for name, gain in gains.items():
        assert found.loc[name, "difference"] == pytest.approx(gain * 1.001)  # mean seed is 1
    assert not len(defined["main_effects"](df[df["label"] != "uncertainty"], "knn"))
    said = defined["verdict"](df, "knn", 0.5)
    assert said[-3].startswith("main effect of anchor: +4.0")
    assert "highest mean is anchor + representativeness, the lowest uncertainty" in said[-4]
    assert defined["verdict"](df.iloc[:0], "knn", 0.5) == ["there is nothing to compare yet"]


def test_the_best_temperature_of_each(defined):
    gains = {"anchor": 0.04, "uncertainty": -0.02, "representativeness": 0.01}
    warm = ablation(defined, gains)
    cool = warm.assign(temperature=0.2, knn=warm["knn"] + 0.1 * (warm["label"] == "SimCLR"))
    said = defined["cooler"](pd.concat([warm, cool]), "knn")
    assert len(said) == 3
    assert "HCL β=1 (t = 0.5) minus SimCLR (t = 0.2): -5.0" in said[0]
    assert "not two temperatures" in defined["cooler"](warm, "knn")[0]


def test_labels_name_scores_and_departures(defined):
    options = [
        {},
        {"method_args": {"anchor": 0.0}},
        {"method_args": {"normalisation": "sum"}},
        {"method_args": {"nearness": "near"}, "tau_plus": 0.1},
        {"detach_weights": False},
    ]
    usual = {"data": "sphere", "encoder": "mlp", "epochs": 1, "method": "unremix"}
    usual |= {"detach_weights": True, "tau_plus": 0.0}
    made = [made_up_record(runs.Run(**{**usual, **some}), {"knn": 0.5}) for some in options]
    found = defined["named"](defined["compare"].frame(made))["label"].tolist()
    assert found == [
        "UnReMix",
        "uncertainty + representativeness",
        "UnReMix, sum",
        "UnReMix, near, τ⁺=0.1",
        "UnReMix, attached",
    ]


def test_who_in_words(defined):
    share = {"random": 0.1, HARD: 0.4, "UnReMix": 0.3, "anchor": 0.4, "uncertainty": 0.2,
             "representativeness": 0.05}  # fmt: skip
    rows = [
        {"encoder": "SimCLR", "epoch": 9, "seed": s, "label": k, "share": x * (1 + 0.01 * s)}
        for k, x in share.items()
        for s in range(3)
    ]
    defined["top"] = 10
    said = defined["who_words"](pd.DataFrame(rows))
    assert "4.0 times the prior of 10.1%" in said[0]
    assert "UnReMix has fewer than HCL, 30.3%" in said[1]
    assert "representativeness has the fewest (5.1%) and anchor the most (40.4%)" in said[2]
    more = pd.DataFrame(rows)
    more.loc[more["label"] == "UnReMix", "share"] = 0.5
    assert "**not** fewer" in defined["who_words"](more)[1]


def test_a_step_in_words(defined):
    assert "no whole step was measured" in defined["step_words"]({}, 7.0)
    assert "takes 1.05 times as long" in defined["step_words"]({"UnReMix_ratio": 1.05}, 7.0)


# --- Records


def of_page():
    methods = ("nt_xent", "hard", "unremix")
    return [
        r for r in study("relatives-lab")
        if r.method in methods and not r.synthetic and r.temperature in (0.5, 0.2)
        and not (r.method == "hard" and (r.tau_plus or r.beta != 1.0)) and not r.cross_entropy
    ]  # fmt: skip


def invent(run, keep=0):
    draw = np.random.default_rng(int(run.digest[:6], 16))
    names = ("knn", "linear", "svc", "svc_scaled")
    metrics = dict(zip(names, draw.uniform(0.3, 0.6, 4).tolist(), strict=True))
    z = draw.normal(size=(keep, 8))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16)
    arrays = {"z": z, "labels": np.arange(keep) % 10, "of": keep} if keep else None
    runs.save(made_up_record(run, metrics), arrays=arrays)


@pytest.mark.parametrize("seeds", [(0,), (0, 1), range(5)])
def test_the_page_can_do_with_some_and_all(whole, seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    wanted = [r for r in of_page() if r.seed in seeds]
    for run in wanted:
        invent(run, keep=260 if run.method == "nt_xent" and run.data == "cifar10" else 0)
    page, shown = PAGE.outputs(*LAB, into=dict(whole[0]))
    images = sum(r.data == "cifar10" for r in wanted)
    assert shown["lab-read"].value.startswith(f"{images} of 48 are recorded")
    assert len(page["lab"]) + len(page["lab_open"]) == images
    assert set(page["lab_open"]["label"]) == {
        "UnReMix, sum", "UnReMix, near", "UnReMix, τ⁺=0.1", "UnReMix, attached",
    }  # fmt: skip
    assert len(page["molecules"]) == len(wanted) - images
    assert "main effect of anchor" in shown["lab-verdict"].value.lower()
    assert shown["lab-open-words"].value.count("of 4 options") == 2
    kept = page["shares"].groupby("label")["share"].mean()
    assert kept["random"] == pytest.approx(25 / 255, abs=0.003)
    assert "minus SimCLR" in shown["graphs-lab-words"].value


def test_shares_of_kept_embeddings_by_a_loop(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    run = next(r for r in of_page() if r.method == "nt_xent" and r.data == "cifar10")
    invent(run, keep=256)
    record = runs.get(run)
    found = whole[0]["kept_shares"]([record]).set_index("label")["share"]
    z, y = record.embeddings()
    top = whole[0]["top"]
    near = []
    for i in range(256):
        order = np.argsort(np.where(np.arange(256) == i, -9, z @ z[i]))[::-1][:top]
        near.append((y[order] == y[i]).mean())
    assert found["anchor"] == pytest.approx(np.mean(near), abs=1e-3)


def test_the_lab_form_asks_for_runs_of_the_study(monkeypatch):
    asked = []
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: asked.extend(wanted) or [])
    lab = {
        "study": "relatives-lab", "data": "cifar10", "size": 16, "n_train": 10000,
        "encoder": "small", "epochs": 10, "batch": 256, "lr": 0.001, "hidden_dim": 512,
        "out_dim": 128,
    }  # fmt: skip
    page = PAGE.define("circle", "embed", **lab)
    source = PAGE.code["embed"].split("main = ")[0] + "\nmain = temperatures[0]\n"
    exec(source, page)
    exec(PAGE.code["circle"], page)
    with pytest.raises(ValueError, match="none given"):
        exec(PAGE.code["train-grid"], page)
    assert len(asked) == 36
    assert {r.digest for r in asked} <= {r.digest for r in study("relatives-lab")}
    assert all(replace(r, seed=0).study == "relatives-lab" for r in asked)
