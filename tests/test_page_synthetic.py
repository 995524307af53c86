"""The page on synthetic negatives: its statements, its counts, and what it says of a table."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import compare, runs, sweeps, synthetic, train
from hcl.runs import Run

PAGE = Page("beyond/synthetic")
STUDY = study("relatives-lab")
LAB = {
    "study": "relatives-lab", "data": "cifar10", "size": 16, "n_train": 10_000, "encoder": "small",
    "epochs": 10, "page_epochs": 1, "batch": 256, "lr": 0.001, "hidden_dim": 512, "out_dim": 128,
    "temperatures": [0.5, 0.2], "beta": 1.0, "tau_plus": 0.1, "hardest": 64, "between": 32,
    "mixings": [[16, 32, 0, 0], [256, 32, 0, 0], [64, 128, 0, 0], [64, 0, 32, 0], [64, 32, 0, 5]],
    "hardest_range": [16, 64, 256], "seeds": [0, 1, 2], "oracle_seeds": [], "metric": "linear",
}  # fmt: skip
OF_PAGE = [
    r for r in STUDY
    if r.method in ("nt_xent", "debiased", "hard")
    and r.temperature in (0.5, 0.2) and r.batch == 256 and r.epochs == 10
]  # fmt: skip
WORDS = (
    "train-grid", "cube-table", "effects", "effects-words", "temperature-table",
    "temperature-words", "sweep", "sweep-words", "oracle-words", "lab-beta", "lab-beta-words",
)  # fmt: skip


@pytest.fixture(scope="module")
def page():
    return PAGE.define(
        "source", "sscl-check", "push", "push-figure", "push-words", "count", "count-words",
        "oracle", *WORDS,
    )  # fmt: skip


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the mathematics


@pytest.mark.parametrize("d", [2, 3, 8])
def test_when_a_mixture_is_harder_than_both(d):
    """prop-syn-between, by trying many shares."""
    rng, shares = np.random.default_rng(d), np.linspace(0, 1, 2001)[1:-1]
    harder = 0
    for q, n, m in zip(*(unit(rng, 200, d) for _ in range(3)), strict=True):
        if q @ n < q @ m:
            n, m = m, n
        u, v, w = q @ n, q @ m, n @ m
        h = shares[:, None] * n + (1 - shares[:, None]) * m
        r = np.linalg.norm(h, axis=1)
        found = h @ q / r
        assert (r < 1).all()
        np.testing.assert_allclose(r**2, 1 - 2 * shares * (1 - shares) * (1 - w))
        if v >= 0:
            assert (found > v).all()
        if abs(v - u * w) > 2e-3:
            assert (found > u).any() == (v > u * w)
            assert (found[-1] > u) == (v > u * w)
        middle = (u + v) / 2 / math.cos(math.acos(w) / 2)
        assert found[1000 - 1] == pytest.approx(middle)
        harder += v > u * w
    assert 40 < harder < 200


def test_of_two_negatives_that_are_far_the_mixture_is_farther():
    q, angle = np.array([1.0, 0.0]), math.radians(160)
    n, m = (np.array([math.cos(a), math.sin(a)]) for a in (angle, -angle))
    assert (n + m) @ q / np.linalg.norm(n + m) < n @ q


def test_a_mixture_with_the_anchor_goes_at_most_half_way():
    rng = np.random.default_rng(0)
    for q, n, a in zip(unit(rng, 100, 4), unit(rng, 100, 4), rng.uniform(0, 0.5, 100), strict=True):
        h = a * q + (1 - a) * n
        theta, mixed = math.acos(q @ n), math.acos(h @ q / np.linalg.norm(h))
        assert theta / 2 < mixed < theta


def test_the_pages_own_checks():
    PAGE.run("theory-check", "sscl-check")


def views(seed, b=6, d=5):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, b, d, generator=draw, dtype=torch.float64), dim=2)


@pytest.mark.parametrize(("between", "with_anchor"), [(7, 0), (0, 5), (6, 3)])
def test_for_the_anchor_mixing_is_weighting(page, between, with_anchor):
    """thm-syn-weighting: slopes of the loss along the sphere by differences, anchor by anchor."""
    t, (z1, z2) = 0.4, views(1)
    family = page["family"](z1, z2, hardest=5, between=between, with_anchor=with_anchor)
    weights, (z, _, _, made) = page["weights"](*family, t), family
    rng = np.random.default_rng(0)
    for i in range(12):
        j = (i + 6) % 12
        real = np.array([z[k].tolist() for k in range(12) if k not in (i, j)])
        rows = np.concatenate([real, made[i].numpy()])
        q, other = z[i].numpy(), z[j].numpy()

        def loss(x, rows=rows, other=other):
            return math.log1p(sum(math.exp((x @ n - x @ other) / t) for n in rows))

        tangent = rng.normal(size=5)
        tangent -= (tangent @ q) * q
        tangent /= np.linalg.norm(tangent)
        steps = [math.cos(e) * q + math.sin(e) * tangent for e in (1e-5, -1e-5)]
        slope = (loss(steps[0]) - loss(steps[1])) / 2e-5
        pull = 1 - 1 / (1 + sum(math.exp((q @ n - q @ other) / t) for n in rows))
        push = weights[i].numpy() @ z.numpy() - pull * other
        assert push @ tangent / t == pytest.approx(slope, rel=1e-6, abs=1e-8)
        assert weights[i, i] == weights[i, j] == 0


def test_the_weights_are_larger_for_the_hardest_alone(page):
    z1, z2 = views(2)
    family = page["family"](z1, z2, hardest=4, between=6)
    z, t = family[0], 0.5
    mixed = page["weights"](*family, t)
    for i in range(12):
        others = [k for k in range(12) if k % 6 != i % 6]
        hardest = sorted(others, key=lambda k: -float(z[i] @ z[k]))[:4]
        scores = [*(z[i] @ z[k] for k in range(12) if k != i), *(family[3][i] @ z[i])]
        total = sum(math.exp(float(s) / t) for s in scores)
        for k in others:
            alone = math.exp(float(z[i] @ z[k]) / t) / total
            if k in hardest:
                assert mixed[i, k] > alone
            else:
                assert mixed[i, k].item() == pytest.approx(alone)


def test_shares_of_the_weight_by_rank(page):
    z = torch.cat(tuple(views(3)))
    weights = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).double()
    found = page["cumulative"](weights, z)
    total = np.zeros(10)
    for i in range(12):
        order = sorted((k for k in range(12) if k % 6 != i % 6), key=lambda k: -float(z[i] @ z[k]))
        mine = np.array([weights[i, k].item() for k in order])
        total += np.cumsum(mine) / mine.sum() / 12
    np.testing.assert_allclose(found, total)


def test_counts_are_those_of_a_loop(page):
    z1, z2 = views(4, b=10, d=4)
    labels = (torch.arange(10) % 3).repeat(2)
    page.update(between=12)
    row = page["census"](z1, z2, labels, 8)
    z, pairs, shares, _ = page["family"](z1, z2, hardest=8, between=12)
    seen = {name: [] for name in ("both", "weaker", "partly", "wholly", "expected", "false")}
    for i in range(20):
        others = [k for k in range(20) if k % 10 != i % 10]
        near = sorted(others, key=lambda k: -float(z[i] @ z[k]))[:8]
        false = [bool(labels[k] == labels[i]) for k in near]
        seen["false"] += false
        some = [a or b for a, b in itertools.combinations(false, 2)]
        seen["expected"].append(sum(some) / len(some))
        for (a, b), (x, y) in zip(pairs[i].tolist(), shares[i].tolist(), strict=True):
            h = x * z[a] + y * z[b]
            c = float(h @ z[i] / h.norm())
            parents = sorted([float(z[a] @ z[i]), float(z[b] @ z[i])])
            seen["weaker"].append(c > parents[0])
            seen["both"].append(c > parents[1])
            same = [bool(labels[k] == labels[i]) for k in (a, b)]
            seen["partly"].append(any(same))
            seen["wholly"].append(all(same))
    mean = {name: np.mean(values) for name, values in seen.items()}
    assert row["above both"] == pytest.approx(mean["both"])
    assert row["above the weaker"] == pytest.approx(mean["weaker"])
    assert row["false of the K"] == pytest.approx(mean["false"])
    assert row["partly false"] == pytest.approx(mean["partly"])
    assert row["wholly false"] == pytest.approx(mean["wholly"])
    assert row["expected"] == pytest.approx(mean["expected"])  # over all pairs of the K


def test_without_labels_nothing_is_false(page):
    page.update(between=4)
    assert "partly false" not in page["census"](*views(5), None, 4)


def test_the_solutions():
    blocks = PAGE.solutions("holds")
    false, anchor, shell = blocks
    found = {"torch": torch}
    exec(false, found)
    said = {100: "\\approx4.1$ for 100", 1000: "\\approx41$ for 1000"}
    for classes, words in said.items():
        assert f"c{words}" in PAGE.text["holds"]
        assert found["enrichment"][classes] == pytest.approx(0.0408 * classes, rel=1e-3)
    exec(anchor, found)
    theta = torch.linspace(0.0, 3.0, 100, dtype=torch.float64)
    for t in (0.1, 0.2, 0.5):
        factors = found["factor"](theta, 0.5, t)
        assert factors[0].item() == pytest.approx(1.5)
        assert (factors.diff() > 0).all()
        torch.testing.assert_close(found["factor"](theta, 1e-9, t), torch.full_like(theta, 2.0))
    assert "beyond/synthetic" in shell


def test_the_factor_of_a_mixture_with_the_anchor_is_that_of_the_theorem(page):
    found = {"torch": torch}
    exec(PAGE.solutions("holds")[1], found)
    z1, z2 = views(6, b=2, d=3)
    z, pairs, shares, made = page["family"](z1, z2, hardest=1, with_anchor=1)
    both = page["weights"](z, pairs, shares, made, 0.3)
    for i in range(4):
        j, theta = pairs[i, 0, 1], (z[i] @ z[pairs[i, 0, 1]]).acos()
        total = sum(math.exp(float(z[i] @ z[k]) / 0.3) for k in range(4) if k != i)
        total += math.exp(float(made[i, 0] @ z[i]) / 0.3)
        plain = math.exp(math.cos(theta) / 0.3) / total
        ratio = found["factor"](theta, shares[i, 0, 0].item(), 0.3).item()
        assert both[i, j].item() / plain == pytest.approx(ratio)


# --- the oracle


def test_the_oracle_has_no_false_parents(page):
    """Views of one label coincide, so any mixture with a false parent would be near."""
    page.update(hardest=4, between=5)
    z = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(4).repeat_interleave(3)
    rows = z[labels]
    made = page["of_true"](rows, rows, labels, torch.Generator().manual_seed(0))
    s = torch.einsum("nd,nsd->ns", rows.repeat(2, 1), made)
    highest = (z @ z.T).fill_diagonal_(-1).amax(1)[labels.repeat(2)]
    assert made.shape == (24, 5, 8)
    assert (s <= highest[:, None].clamp(min=0) / 0.5**0.5 + 0.2).all()
    for i, label in enumerate(labels.repeat(2).tolist()):
        true = z[[k for k in range(4) if k != label]].T.numpy()
        for h in made[i].numpy():
            weights, *_ = np.linalg.lstsq(true, h, rcond=None)
            assert np.linalg.norm(true @ weights - h) < 1e-5


def test_where_every_image_is_a_class_the_oracle_is_the_librarys_mixtures(page):
    page.update(hardest=6, between=5)
    z1, z2 = views(7).float()
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = page["of_true"](z1, z2, torch.arange(6), draws[0])
    theirs = synthetic.mixtures(z1, z2, hardest=6, between=5, generator=draws[1])
    torch.testing.assert_close(ours, theirs)


def test_the_oracle_changes_nothing_but_the_mixtures(page, tmp_path, monkeypatch):
    some = {"hardest": 8, "between": 6}
    run = Run(
        data="sphere", encoder="mlp", epochs=2, batch=64, hidden_dim=16, out_dim=8,
        data_args={"n_train": 300, "n_test": 200}, method="nt_xent", synthetic=some,
    )  # fmt: skip

    def as_trained(z1, z2, labels, generator):
        return synthetic.mixtures(z1, z2, generator=generator, **some)

    trained = train.train(run, store=tmp_path / "plain", progress=False)
    monkeypatch.setitem(page, "of_true", as_trained)
    monkeypatch.setattr(train, "Objective", page["Oracle"])
    assert train.train(run, store=tmp_path, progress=False).metrics == trained.metrics


# --- words on made-up frames


def made_up(run, mixing=0.02, weighting=0.05, both=-0.03):
    """A Record whose accuracy is a sum of effects, the same at all temperatures but for cooling."""
    mixes, weighs = bool(run.synthetic), run.beta > 0
    value = 0.5 + 0.01 * run.seed + mixing * mixes + weighting * weighs + both * mixes * weighs
    value += 0.04 * (run.temperature < 0.5) + 0.01 * (run.tau_plus > 0)
    value += 0.01 * (run.beta == 2) + 0.002 * (run.seed == 1) * mixes
    names = ("loss", "knn", "linear", "alignment", "uniformity", "overlap", "clamp_share")
    return made_up_record(run, dict.fromkeys(names, value))


USUAL = {"beta": 1.0, "tau_plus": 0.1, "temperature": 0.5, "mixing": "K = 64, S = 32"}


@pytest.fixture(scope="module")
def table(page):
    return page["tidy"](compare.frame([made_up(r) for r in OF_PAGE]))


def test_mixtures_and_methods_are_named(table):
    assert set(table["mixing"]) == {
        "none", "K = 64, S = 32", "K = 16, S = 32", "K = 256, S = 32", "K = 64, S = 128",
        "K = 64, S′ = 32", "K = 64, S = 32, after 5",
    }  # fmt: skip
    assert {"SimCLR", "MoCHi", "HCL β=1", "SSCL β=1", "SSCL β=0, τ⁺=0.1", "SSCL β=1, τ⁺=0.1",
            "Debiased, τ⁺=0.1"} <= set(table["label"])  # fmt: skip


def test_effects_are_those_that_were_put_in(page, table):
    found = page["effects"](table, "knn", USUAL).set_index("effect")
    wanted = {
        "mixing": 0.02 - 0.03 / 2 + 0.002 / 3, "weighting": 0.05 - 0.03 / 2, "debiasing": 0.01,
        "mixing × weighting": -0.03, "mixing × debiasing": 0.0, "weighting × debiasing": 0.0,
        "mixing × weighting × debiasing": 0.0,
    }  # fmt: skip
    assert found["difference"].to_dict() == pytest.approx(wanted)
    assert (found["n"] == 3).all()
    assert found.loc["mixing", "se"] == pytest.approx(np.std([0, 0.002, 0], ddof=1) / 3**0.5)
    said = page["effects_words"](table, "knn", USUAL)
    assert said[0].startswith("4 of 7 intervals leave out zero: mixing, weighting, debiasing, mix")
    assert said[1].startswith("mixing: +0.6 points")
    assert "mixing alone: +2.1 points" in said[5]
    assert said[-1].startswith("mixing where there is weighting and debiasing: -0.9 points")


def test_a_seed_without_all_eight_losses_is_left_out(page, table):
    gone = (table["seed"] == 2) & (table["label"] == "SSCL β=0, τ⁺=0.1")
    found = page["effects"](table[~gone], "knn", USUAL)
    assert (found["n"] == 2).all()
    one = table[table["seed"] == 0]
    assert page["effects_words"](one, "knn", USUAL) == ["no two seeds have all eight losses yet"]


def test_temperatures_in_words(page, table):
    said = page["temperature_words"](table, "knn", USUAL)
    text = "\n".join(said)
    assert "MoCHi at t = 0.2 minus SimCLR at t = 0.2: +2.1 points" in text
    assert "SSCL β=1 at t = 0.5 minus HCL β=1 at t = 0.5: -0.9 points" in text
    assert "SimCLR at t = 0.2 minus SimCLR at t = 0.5: +4.0 points" in text
    assert "MoCHi at t = 0.5 minus SimCLR at t = 0.2: -1.9 points" in text
    best = [line for line in said if line.startswith("each at its best temperature")]
    assert len(best) == 3
    assert all("at t = 0.2 minus" in line for line in best)
    high = table[table["temperature"] == 0.5]
    assert all("t = 0.2" not in line for line in page["temperature_words"](high, "knn", USUAL))


def test_sweeps_and_hardness_in_words(page, table):
    sweep = page["sweep_table"](table, "knn", USUAL)
    assert len(sweep) == 6
    assert sweep["difference"].to_numpy() == pytest.approx([0.02 + 0.002 / 3] * 6)
    assert page["sweep_words"](sweep)[0].startswith("of 6 settings, 6 have a 95 % interval above")
    said = page["beta_words"](table, "knn", USUAL)
    assert said[0] == "real: highest at β = 2 of 0, 0.5, 1, 2, 57.0%"
    assert said[2].startswith("each at its best β, mixtures minus none: -0.9 points")


def test_the_oracle_in_words(page, table):
    mochi = (table["label"] == "MoCHi") & (table["mixing"] == USUAL["mixing"])
    oracle = table[mochi & (table["temperature"] == 0.5)].assign(label="MoCHi, true parents")
    oracle["knn"] += 0.03
    said = page["oracle_words"](oracle, table, "knn", 0.5)
    assert said[0].startswith("MoCHi, true parents, minus MoCHi: +3.0 points")
    assert said[1].startswith("MoCHi, true parents, minus SimCLR: +5.1 points")
    assert len(said) == 2
    assert page["oracle_words"](oracle[:0], table, "knn", 0.5) == ["not in this form of the page"]


def test_counts_in_words(page):
    rows = [{"embedding": "trained", "K": k, "above both": 0.6 - k / 100, "above the weaker": 1.0,
             "false of the K": 0.2, "partly false": 0.36 - k / 1000, "wholly false": 0.04}
            for k in (8, 32)]  # fmt: skip
    said = page["count_words"](pd.DataFrame(rows), 30, 0.02)
    assert said[0].startswith(
        "trained, K = 32: 28% of the mixtures are harder than both parents (mo"
    )
    assert "**not**" in said[0]
    assert "most are)" in page["count_words"](pd.DataFrame(rows), 9, 0.02)[0]
    assert said[2] == "partly false over all K: 32.8% to 35.2%"


def test_shares_in_words(page):
    share = torch.linspace(0.01, 1, 100)
    (said,) = page["push_words"]({"x": share}, 20)
    assert said == (
        "x: 20% of the weight is on the 20 hardest negatives, 10% of that on the 2 hardest"
    )


# --- the recorded part, and the lab form


RECORDED = [name for name in PAGE.body if name.startswith("lab-")] + ["records"]


def read(monkeypatch, store, some):
    """The recorded part of the page with a store of some of the study's Records."""
    monkeypatch.setenv("HCL_RUNS", str(store))
    for run in some:
        runs.save(made_up(run), store=store)
    found = PAGE.define(*WORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return PAGE.outputs(*RECORDED, into=found)


@pytest.mark.parametrize("number", [0, 1, 4, 20, 40])
def test_the_recorded_part_takes_what_is_there(monkeypatch, tmp_path, number):
    _, shown = read(monkeypatch, tmp_path, OF_PAGE[:number])
    assert shown["lab-read"].value.startswith(f"{number} of {len(OF_PAGE)} are recorded")
    if not number:
        assert "Nothing is recorded yet" in shown["lab-cube"].value
        assert "no two seeds have all eight" in shown["lab-effects-words"].value


def test_the_recorded_part_tells_what_is_there(monkeypatch, tmp_path):
    found, shown = read(monkeypatch, tmp_path, OF_PAGE)
    assert len(found["lab"]) == len(OF_PAGE) == 63
    assert found["usual_lab"] == USUAL
    assert shown["lab-effects-words"].value.count("mixing × weighting") == 2
    assert "MoCHi at t = 0.5 minus SimCLR at t = 0.2: -1.9" in shown["lab-temperature-words"].value
    assert shown["lab-sweep-words"].value.count("of 6 settings") == 2
    assert shown["lab-sweep"].text.count("after 5") == 2
    assert shown["lab-beta"].drawn


def test_the_lab_form_reads_records_and_trains_none(monkeypatch):
    asked = []

    def record(wanted, **_):
        asked.extend(wanted)
        return [made_up(r) for r in wanted]

    monkeypatch.setattr(sweeps, "record", record)
    found = PAGE.run(**LAB)
    base = PAGE.code["network"].split("of_page")[0]  # the settings, without the network
    exec(base, found)
    PAGE.run("train-grid", into=found)
    assert {r.digest for r in asked} == {r.digest for r in OF_PAGE if r.beta in (0, 1)}
    assert {r.study for r in asked} == {"relatives-lab"}
