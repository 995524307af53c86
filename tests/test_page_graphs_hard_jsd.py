"""The page on InfoGraph with hard negatives: formulas, helpers, and what it says of Records."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import compare, graphs, notebooks, runs, sweeps

PAGE = Page("graphs/hard-jsd")
STUDY = study("tu-lab")
TINY = {
    "n_graphs": 120, "epochs": 1, "batch": 60, "betas": [10.0], "betas_equation": [1.0],
    "betas_debiased": [], "seeds": [0, 1], "fold_draws": 1, "held_out": 0.5,
}  # fmt: skip
FUNCTIONS = ("train-grid", "table", "paired-table", "quick-figure", "chance", "verdict", "overview")


def sp(a):
    return max(a, 0.0) + math.log1p(math.exp(-abs(a)))


def fill(store, accuracy):
    """Records of the study, or those for which accuracy(run) is no None."""
    for run in STUDY:
        if run.method == "infograph" and (value := accuracy(run)) is not None:
            spread = 0.0002 * (int(run.digest, 16) % 5)
            metrics = dict.fromkeys(compare.METRICS, 0.1)
            metrics |= {"svc": value + spread, "svc_scaled": value + spread}
            runs.save(made_up_record(run, metrics), store=store)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def helpers():
    return PAGE.define(*FUNCTIONS, "lab-verdict", "lab-settings", "lab-table")


LAB = [name for name in PAGE.body if name.startswith("lab-")]


def lab(helpers, **given):
    start = PAGE.run(**given) | {k: v for k, v in helpers.items() if callable(v) or k.isupper()}
    return PAGE.outputs(*LAB, "published", into=start)


# --- the whole page


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        return PAGE.outputs(*PAGE.body, **TINY)


def test_the_page_runs_where_nothing_is_recorded(whole):
    page, shown = whole
    assert set(page["measured"]) == {f"G{k}" for k in range(1, 8)}
    assert not page["overview"].drop(columns="accuracy").isna().any(axis=None)
    assert "0 of" in shown["lab-read"].text
    assert "Nothing is recorded yet" in shown["lab-verdict"].text
    drawn = {name for name, output in shown.items() if output.drawn}
    assert drawn == {"gradient-figure", "prior-figure", "quick-figure", "picture"}
    assert "nan" not in "\n".join(o.text for o in shown.values()).lower()


def test_every_parameter_is_used():
    assert PAGE.unused_parameters() == set()


# --- formulas


def test_the_printed_example():
    page, _ = PAGE.outputs("example")
    assert page["easy"].round(2).tolist() == [3.36, 0.89, 0.46, 0.23, 0.06]
    assert page["hard"].round(2).tolist() == [0.06, 0.23, 0.46, 0.89, 3.36]
    v = torch.tensor(page["q"])[:, None]
    found = graphs.local_global_released(torch.ones(1, 1).double(), v, torch.tensor([2]), beta=1.0)
    negative = sum(
        w * sp(s) / 0.5 - math.log(2) for w, s in zip(page["easy"], page["q"], strict=True)
    )
    assert found.item() == pytest.approx(negative / 4 + 5 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(("beta", "tau"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.3), (3.0, 0.3)])
def test_the_displayed_estimate_is_the_librarys(beta, tau):
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (7, 4))
    graph = torch.tensor([0, 0, 1, 1, 2, 3, 3])
    total = 0.0
    for n, own in enumerate(graph.tolist()):
        s = [float(u[n] @ v[g]) for g in range(4)]
        rest = [s[g] for g in range(4) if g != own]
        z = sum(math.exp(beta * x) for x in rest)
        mean = sum(math.exp(beta * x) / z * sp(x) for x in rest)
        total += sp(-s[own]) + max(0.0, (mean - tau * sp(s[own])) / (1 - tau))
    found = graphs.local_global(u, v, graph, beta=beta, tau_plus=tau).item()
    assert found == pytest.approx(total / 7, abs=1e-12)


def test_stationary_scores_are_those_of_the_proposition():
    settled = PAGE.define("optimum")["settled"]
    p_own, p_all = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    for beta in (0.0, 1.5):
        s = settled(p_own, p_all, beta)
        z = (p_all ** (1 / (1 + beta)) * p_own ** (beta / (1 + beta))).sum() ** (1 + beta)
        np.testing.assert_allclose(s, (np.log(p_own / p_all) + math.log(z)) / (1 + beta), atol=1e-6)
        np.testing.assert_allclose((p_all * np.exp(beta * s)).sum(), z, rtol=1e-5)


def test_forces_are_derivatives_and_weights_have_mean_one():
    page, _ = PAGE.outputs("gradient-run")
    s = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    q = s.softmax(0)
    wanted = q * (s.sigmoid() + F.softplus(s) - (q * F.softplus(s)).sum())  # as displayed, beta 1
    torch.testing.assert_close(page["forces"](*page["kinds"]["equation, β = 1"], s), 3 * wanted)
    plain = page["forces"](*page["kinds"]["InfoGraph"], s)
    torch.testing.assert_close(plain, s.sigmoid())
    for _, options in page["kinds"].values():
        assert page["weights"](options, s).mean().item() == pytest.approx(1)


def test_without_masked_entries_the_negative_part_is_a_weighted_mean():
    part = PAGE.define("switches")["negative_part"]
    s = torch.tensor([[4.0, -3.0, 1.0], [0.5, 9.0, -2.0]], dtype=torch.float64)
    own = torch.tensor([[True, False, False], [False, True, False]])
    total = 0.0
    for row in ([-3.0, 1.0], [0.5, -2.0]):
        weights = [math.exp(-2 * 0.7 * x / 3) for x in row]
        total += 2 * sum(w * sp(x) for w, x in zip(weights, row, strict=True)) / sum(weights)
    found = part(s, own, -0.7, entry=False, mean=False).item()
    assert found == pytest.approx(total / 0.5 / (2 * 2), abs=1e-12)


def test_the_table_of_targets():
    values = [math.log((1 - t) / t) for t in (1 / 6, 1 / 3, 1 / 2, 0.9)]
    assert (
        "| $p^*$ | {:.2f} | {:.2f} | {:.0f} | −{:.2f} |".format(*values[:3], -values[3])
        in PAGE.prose
    )


def test_solutions_run_and_agree():
    page, _ = PAGE.outputs("example")
    first, second = PAGE.solutions()[:2]
    exec(first, page)
    assert all(mine == pytest.approx(wanted, abs=3e-3) for mine, wanted in page["targets"].values())
    exec(second, page)
    assert page["by_library"] == pytest.approx(page["share"])


# --- chance and counting


def test_chance_against_all_orders(helpers):
    ranks = list(itertools.permutations(range(4)))
    above = [sum(x > order[0] for x in order[1:]) for order in ranks]
    law = [sum(a + b == k for a in above for b in above) / len(ranks) ** 2 for k in range(7)]
    np.testing.assert_allclose(helpers["chance"]([3, 3]), law)


def table_of(differences, arm="equation"):
    rows = [
        {"data": f"set {k}", "arm": arm, "beta": b, "difference": d, "se": 0.001, "n": 5,
         "low": d - 0.002, "high": d + 0.002}
        for k, row in enumerate(differences) for b, d in zip((1.0, 2.0, 10.0), row, strict=False)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("difference", "kind", "best"),
    [(0.01, ": more than chance gives", "as good as β = 0 on 4 of 4 data sets and above it on 4"),
     (-0.01, "**fewer** than chance", "as good as β = 0 on 0 of 4 data sets and above it on 0")],
)  # fmt: skip
def test_counts_in_both_directions(helpers, difference, kind, best):
    said = helpers["counted"](table_of([[difference] * 3] * 4), "equation")
    assert kind in said
    assert best in said
    assert "by chance 3.0" in said
    assert "by chance 6," in said
    up = 12 if difference > 0 else 0
    assert f"{up} of 12 cells" in said
    assert f"above zero: {up}, below: {12 - up}" in said


def test_no_more_than_chance(helpers):
    said = helpers["counted"](table_of([[0.01, -0.01, 0.01], [-0.01, 0.01, 0.0]]), "equation")
    assert "4 of 6 cells" in said  # a tie is "at or above"
    assert "no more than chance may give" in said
    assert "nothing to compare yet" in helpers["counted"](table_of([[0.1]]), "debiased")


# --- Records


def test_labels_and_arms(helpers):
    settings = {"data": "graphs", "encoder": "gin", "method": "infograph", "epochs": 1}
    grid = [
        {"tau_plus": 0.0, "beta": [0.0, 1.0]}, {"tau_plus": 0.2, "beta": 0.0},
        {"protocol": "released", "beta": [0.0, 2.0], "sign": ["easy", "hard"]},
        {"epochs": 0}, {"epochs": 0, "encoder": "raw"},
    ]  # fmt: skip
    frame = compare.frame(
        [made_up_record(run, {"svc": 0.5}) for run in sweeps.expand(settings, grid)]
    )
    df = helpers["named"](frame)
    assert df["label"].tolist() == [
        "InfoGraph", "equation, β = 1", "equation, debiased, β = 0", "released, β = 0",
        "released, easy, β = 2", "released, hard, β = 2", "untrained network",
        "sums of node features",
    ]  # fmt: skip
    arms = helpers["in_arms"](df).groupby("arm")["beta"].apply(sorted).to_dict()
    assert arms == {
        "released, easy": [0, 2], "released, hard": [0, 2], "equation": [0, 1],
        "equation, debiased": [0],
    }  # fmt: skip


def test_recorded_hardness_that_helps_under_one_sign(store, helpers):
    def accuracy(run):
        if run.protocol != "released" or not run.beta:
            return 0.6
        return 0.6 + (0.05 if run.sign == "hard" else -0.05)

    fill(store, accuracy)
    page, shown = lab(helpers)
    said = shown["lab-verdict"].text
    assert "helps under 'released, hard' and hurts under 'released, easy'" in said
    assert "18 of 18 cells" in said
    assert "0 of 18 cells" in said
    assert shown["lab-panels"].drawn
    assert shown["lab-differences"].drawn
    wanted = sum(run.method == "infograph" for run in STUDY)
    assert f"{wanted} of {wanted} are recorded" in shown["lab-read"].text
    assert "enzymes, imdb-binary, proteins, imdb-multi" in shown["lab-settings"].text
    assert "mutag, β = 10, hard minus easy: +10." in shown["lab-beside"].text
    assert len(page["lab"].columns) > 20


def test_recorded_hardness_without_effect(store, helpers):
    fill(store, lambda run: {0.0: 0.6, 1.0: 0.61, 2.0: 0.59, 10.0: 0.61}[run.beta])
    _, shown = lab(helpers)
    said = shown["lab-verdict"].text
    assert "helps under no arm" in said or "helps under 'equation'" in said
    assert "12 of 18 cells" in said
    assert "no difference from chance under 'released, easy', 'released, hard'" in said


@pytest.mark.parametrize(
    "there",
    [lambda run: run.data == "mutag" and run.seed == 0,
     lambda run: run.epochs == 0,
     lambda run: run.data == "ptc_mr" and run.protocol == "released" and run.beta > 0,
     lambda run: run.encoder == "raw",
     lambda run: run.seed < 2 and run.data in ("mutag", "imdb-multi")],
    ids=["one seed", "untrained", "no baseline", "raw", "two sets"],
)  # fmt: skip
def test_parts_of_the_study_do_not_stop_the_page(store, helpers, there):
    fill(store, lambda run: 0.6 if there(run) else None)
    _, shown = lab(helpers)
    assert "nan" not in "\n".join(o.text for o in shown.values()).lower()


def test_embeddings_are_read_where_they_are_kept(store):
    z = torch.randn(20, 6).half().numpy()
    for run in STUDY:
        if run.data == "mutag" and run.seed == 0 and run.epochs == 200:
            record = made_up_record(run, {"svc": 0.5})
            runs.save(record, store=store, arrays={"z": z, "labels": np.arange(20) % 2, "of": 20})
    page = PAGE.define("picture-data")
    page["seeds"] = [0]
    for changes in (
        {"protocol": "sound", "beta": 0.0, "tau_plus": 0.0},
        {"protocol": "released", "beta": 10.0, "sign": "easy"},
    ):
        assert page["kept"]("mutag", changes)[0].shape == (20, 6)
    assert page["kept"]("enzymes", {"beta": 0.0, "tau_plus": 0.0}) is None


def test_the_lab_form_asks_for_runs_of_the_study():
    given = notebooks.parameters(PAGE.path) | {
        "study": "tu-lab", "data": "mutag", "n_graphs": 0, "epochs": 200, "batch": 128,
        "betas_equation": [1.0, 2.0, 10.0], "tau_plus": 0.554, "held_out": 0.0,
    }  # fmt: skip
    known = {run.digest for run in STUDY}
    wanted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "record", lambda asked: wanted.extend(asked) or [])
        page = PAGE.run(**{k: v for k, v in given.items() if k in given})
        page["fitted"] = page["one_batch"] = None
        source = PAGE.code["batches"].split("networks =")[0]
        exec(source, page)
        with pytest.raises(ValueError, match="records: none given"):
            PAGE.run("train-grid", into=page)
    assert {run.digest for run in wanted} <= known
    assert len(wanted) == 5 * (4 + 2 + 7 + 1) + 1
