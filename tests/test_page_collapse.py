"""The page on neural collapse: theorems against the library, sentences on made-up numbers."""

import math

import pandas as pd
import pytest
import torch
from cells import Page
from torch.nn import functional as F

from hcl import collapse, compare, packing, project_root, runs, sweeps
from hcl.runs import Record

PAGE = Page("supervised/collapse")
STUDY = project_root() / "book" / "profiles" / "collapse-lab.yml"
LAB = {  # the lab form: Records of the study are read, and none is trained
    "study": "collapse-lab", "data": "cifar10", "size": 16, "coarse": 0, "fine": 0,
    "n_train": 10000, "n_test": 0, "encoder": "small", "epochs": 10, "eval_every": 2, "batch": 256,
    "lr": 0.001, "hidden_dim": 512, "out_dim": 9, "betas": [0.0, 1.0, 2.0, 5.0, 30.0],
    "cooler_betas": [0.0], "placements": [], "longer": 0,
}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The theorems -------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["other", "all"])
def test_the_pages_formula_is_the_librarys_loss(negatives):
    by_hand = PAGE.define("check")["by_hand"]
    z = F.normalize(torch.randn(5, 12, 4, generator=generator(), dtype=torch.float64), dim=2)
    y = torch.arange(4).repeat_interleave(3)
    for beta, t in ((0.0, 1.0), (3.0, 0.5)):
        wanted = [
            collapse.latent_class_loss(x, y, negatives=negatives, beta=beta, temperature=t)
            for x in z
        ]
        torch.testing.assert_close(by_hand(z, y, beta, negatives, t), torch.stack(wanted))


@pytest.mark.parametrize(("n_classes", "t"), [(2, 1.0), (5, 0.3), (10, 2.0)])
def test_the_frame_attains_both_bounds(n_classes, t):
    bound = PAGE.define("check")["bound"]
    z, y = packing.simplex(n_classes, n_classes), torch.arange(n_classes)
    for negatives in ("other", "all"):
        loss = collapse.latent_class_loss(z, y, negatives=negatives, temperature=t)
        assert loss.item() == pytest.approx(bound(n_classes, t, negatives), rel=1e-12)


def test_no_random_embedding_is_below_a_bound():
    page, shown = PAGE.show("two-collapses", "check", "check-words", random_draws=900)
    assert (page["checked"].filter(like="least") > -1e-12).all(axis=None)
    assert "one out of order: 0." in shown["check-words"]


def test_the_proposition_on_smaller_frames_is_what_the_loss_says():
    """H-UCL of a frame scaled by r, in the library, is least where the page's equation says."""
    page = PAGE.define("gap")
    for n_classes, beta in ((3, 4.0), (10, 2.0), (10, 10.0)):
        frame, y = packing.simplex(n_classes, n_classes - 1), torch.arange(n_classes)
        u = torch.linspace(0.01, 2, 400, dtype=torch.float64)
        loss = torch.stack([
            collapse.latent_class_loss(
                frame * (gap * (n_classes - 1) / n_classes) ** 0.5, y, negatives="all", beta=beta
            )
            for gap in u
        ])  # fmt: skip
        ratio = (1 + (n_classes - 1) * torch.exp(-(1 + beta) * u)) / (
            1 + (n_classes - 1) * torch.exp(-beta * u)
        )
        torch.testing.assert_close(loss, torch.log1p(ratio))
        assert u[loss.argmin()].item() == pytest.approx(page["best_gap"](n_classes, beta), abs=0.01)
        assert (loss.diff().sign().diff() != 0).sum() == 1  # falls, then rises


def test_the_largest_beta_of_the_full_frame_is_where_the_gap_is_full():
    page = PAGE.define("gap")
    for n_classes, t in ((10, 1.0), (100, 1.0), (20, 0.5)):
        full = n_classes / (n_classes - 1) / t
        beta = page["largest_beta"](n_classes, t)
        assert (
            page["best_gap"](n_classes, 0.9 * beta) > full > page["best_gap"](n_classes, 1.1 * beta)
        )
        assert beta * math.expm1(full) == pytest.approx(
            1 + (n_classes - 1) * math.exp(-beta * full)
        )


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 4, 2)])
@pytest.mark.parametrize("detach", [False, True])
def test_frames_at_right_angles_are_at_rest_and_above_the_bound(sizes, detach):
    page = PAGE.define("saddle", "check")
    z = page["grouped"](sizes).repeat_interleave(2, dim=0)
    y = torch.arange(sum(sizes)).repeat_interleave(2)
    assert collapse.dimensions(collapse.class_means(z, y)) == sum(sizes) - len(sizes)
    for beta, t in ((0.0, 1.0), (4.0, 0.7), (20.0, 1.0)):
        free = z.clone().requires_grad_()
        loss = collapse.latent_class_loss(
            F.normalize(free, dim=1), y, beta=beta, temperature=t, detach_weights=detach
        )
        assert torch.autograd.grad(loss, free)[0].abs().max() < 1e-12
        assert loss > page["bound"](sum(sizes), t) + 1e-4


def test_the_pages_rest_points_are_saddles():
    page, shown = PAGE.show("saddle", "saddle-words", betas=[0.0, 5.0])
    assert (page["rest"] < 0).all(axis=None)
    assert "All of these are saddles" in shown["saddle-words"]


def test_each_dropped_assumption_moves_the_minimum():
    page, _ = PAGE.show("two-collapses", "check", "limits", random_draws=9, free_steps=150)
    assert page["limits"]["found is"].tolist() == ["equal", "below", "above", "below", "below"]


def test_free_embeddings_of_h_ucl_follow_the_proposition():
    page, shown = PAGE.show(
        "two-collapses", "check", "gap", "free", "free-figure", "free-words", "fading",
        betas=[0.0, 10.0], free_seeds=[0], free_classes=4, random_draws=9, free_steps=200,
    )  # fmt: skip
    assert "UCL, with gradient: the gap follows" in shown["free-words"]
    assert set(page["free"]["losses"]) == set(page["ARMS"])


# The sentences ------------------------------------------------------------------------------------


def looked(method, beta, seed, t=1.0, placed="ball", **numbers):
    """A made-up last look at a run."""
    page = PAGE.define("train")
    plain, hardened = page["FAMILIES"][method]
    name = f"{hardened} β={beta:g}" if beta else plain
    usual = {"zero_sum": 0.0, "unit_norm": 0.0, "equal_angle": 0.0, "within_class": 0.0,
             "dimensions": 9, "nearest_mean": 0.9}  # fmt: skip
    return {
        "digest": f"{method}{beta}{seed}{t}", "negatives": f"{plain} and {hardened}", "name": name,
        "epochs": 3, "epoch": 3, "placed": placed, "method": method, "beta": beta, "seed": seed,
        "temperature": t, "cell": f"{name}, t = {t:g}", "(1 + β) / t": round((1 + beta) / t),
        **usual, **numbers,
    }  # fmt: skip


def as_the_paper(h_scl_last=0.89):
    """Three betas, two seeds, in which all of the claims hold, or H-SCL falls off."""
    rows = []
    for seed in (0, 1):
        off = 0.01 * seed
        for method, last in (("hard_scl", h_scl_last), ("hard", 0.7)):
            centre = 0.05 if method == "hard_scl" else 0.8
            rows += [
                looked(method, 0.0, seed, dimensions=3, nearest_mean=0.3 + off),
                looked(method, 5.0, seed, nearest_mean=0.9 + off),
                looked(method, 30.0, seed, nearest_mean=last + off, zero_sum=centre),
            ]
    return pd.DataFrame(rows)


def test_the_claims_are_judged_by_the_numbers():
    page = PAGE.define("train", "claims")
    lines = page["judged"](as_the_paper())
    assert len(lines) == 5
    assert all(line.endswith(": yes") for line in lines)
    fallen = page["judged"](as_the_paper(h_scl_last=0.5))
    assert [line.endswith("**no**") for line in fallen] == [False, True, False, False, False]
    one = as_the_paper()
    assert "cannot be judged" in page["judged"](one[one["method"] == "hard"])[0]


def test_changes_are_paired_and_have_their_interval():
    page = PAGE.define("train", "claims")
    df = as_the_paper()
    said = page["change"](df, "nearest_mean", "SCL, t = 1", "H-SCL β=5, t = 1")
    assert said == "+0.60 (95 % interval +0.60 to +0.60)"
    assert page["change"](df, "nearest_mean", "SCL, t = 1", "nowhere") == "nothing to compare"
    one = df[df["seed"] == 0]
    said = page["change"](one, "dimensions", "SCL, t = 1", "H-SCL β=5, t = 1")
    assert said == "+6.00 (1 seed)"
    lines = page["claims"](df)
    assert len(lines) == 4
    assert "the most accurate is β = 5" in lines[0]
    assert "zero sum by +0.80" in lines[3]


def test_a_lower_temperature_is_compared_with_hardness_of_the_same_ranking():
    page = PAGE.define("train", "claims", "two-collapses", "cooler-words")
    df = pd.concat([as_the_paper(), pd.DataFrame([
        looked("hard_scl", 2.0, s, nearest_mean=0.8) for s in (0, 1)
    ] + [looked("hard_scl", 0.0, s, t=0.33, nearest_mean=0.6) for s in (0, 1)])])  # fmt: skip
    lines = page["cured"](df, 1.0)
    assert [line.split(" minus ")[0] for line in lines] == ["SCL, t = 0.33", "H-SCL β=2, t = 1"]
    best = page["best_of_each"](df)
    assert best[0].startswith(
        "SCL and H-SCL, best over temperature: H-SCL β=5, t = 1 minus SCL, t = 0.33"
    )


def test_agreement_with_the_paper_counts_pairs():
    page = PAGE.define("train", "two-collapses", "paper-table", "paper-words")
    lines = page["alike"](as_the_paper(), "here")
    assert lines[0] == "here, H-SCL, accuracy: 3 of 3 pairs of β are in the paper's order"
    shown = page["beside"](as_the_paper())
    assert shown["hard", 30][0] == "70.5"
    assert shown["hard_scl", 0][3] == "3"


def test_the_exact_accuracies_are_those_of_the_released_notebooks():
    paper = PAGE.define("paper-table")["PAPER"]
    exact = [row[0] for (method, _), row in paper.items() if method == "hard_scl"]
    assert exact == ["10.38", "31.86", "58.39", "57.07", "54.57"]
    rest = [v for (m, _), row in paper.items() for v in row[(m == "hard_scl") :]]
    assert all("≈" in v or v == "slow decay" for v in rest)  # read off a figure, and said so


# The runs -----------------------------------------------------------------------------------------


def test_the_quick_form_trains_what_it_says(own_store):
    page = PAGE.run("train-grid")
    groups = [page[name] for name in ("main", "cooler", "placed", "going_on")]
    wanted = [run for group in groups for run in group]
    assert f"({len(wanted)} short runs" in PAGE.prose
    assert len({run.digest for run in wanted}) == len(wanted)
    for run in wanted:
        assert (run.out_dim, run.Q, run.watch, run.tau_plus) == (19, "1", "collapse", 0)
        assert run.detach_weights == (run.beta > 0)
        assert run.positives == ("class" if run.method == "hard" else "views")
    assert {run.normalize for run in page["main"]} == {"ball"}


def test_the_lab_form_is_the_study():
    page = PAGE.run("train-grid", **LAB)
    wanted = {run.digest for name in ("main", "cooler", "placed", "going_on") for run in page[name]}
    assert wanted == {run.digest for run in sweeps.load_study(STUDY)}
    assert len(wanted) == 36


def test_a_tiny_form_of_the_page_runs(own_store):
    names = ["two-collapses", "train-grid", "train", "table", "figure", "spectra", "epochs-figure",
             "claims", "longer", "longer-words", "placed", "placed-words", "cooler",
             "cooler-words", "lab-read", "lab-table", "lab-figure", "lab-spectra", "lab-claims",
             "paper-table", "paper-words", "records"]  # fmt: skip
    tiny = {"coarse": 4, "n_train": 128, "n_test": 60, "epochs": 1, "eval_every": 1, "out_dim": 3,
            "betas": [0.0, 5.0], "cooler_betas": [0.0], "longer": 2, "seeds": [0]}  # fmt: skip
    page, shown = PAGE.show(*names, **tiny)
    assert shown["lab-read"].startswith("0 of 36 are recorded.")
    assert len(page["every"]) == len(list((own_store / "quick").glob("*.json")))
    assert shown["table"].index.tolist() == ["SCL", "H-SCL β=5", "UCL", "H-UCL β=5"]


@pytest.mark.parametrize("recorded", [1, 7, 36])
def test_whatever_is_recorded_is_shown(own_store, recorded):
    """Some of the study's Records, made up: the page says how many, and does not fail."""
    provenance = {"code": "0" * 12, "date": "2026-01-01T00:00:00", "device": "CPU"}
    for k, run in enumerate(sweeps.load_study(STUDY)[:recorded]):
        history = [
            {"epoch": e, "zero_sum": 0.1, "unit_norm": 0.1, "equal_angle": 0.1 + 0.001 * k,
             "within_class": 0.2, "dimensions": 5, "nearest_mean": 0.3 + 0.001 * k, "knn": 0.4,
             **{f"singular_{j}": 1 / j for j in range(1, 10)}}
            for e in (0, 10)
        ]  # fmt: skip
        metrics = dict.fromkeys(compare.METRICS, 0.5)
        cost = {"seconds": 40.0, "images_per_second": 1.0, "peak_memory_bytes": 1}
        runs.save(Record(run=run, metrics=metrics, history=history, cost=cost,
                         provenance=provenance))  # fmt: skip
    page = PAGE.define("two-collapses", "train", "table", "figure", "spectra", "claims",
                       "cooler-words", "paper-table", "paper-words")  # fmt: skip
    page["ends"] = pd.DataFrame([looked("hard_scl", 0.0, 0)])
    page, shown = PAGE.show("lab-read", "lab-table", "lab-figure", "lab-spectra", "lab-claims",
                            "paper-words", into=page)  # fmt: skip
    assert shown["lab-read"].startswith(f"{recorded} of 36 are recorded. {recorded} Record")
    assert len(shown["lab-table"]) == min(recorded, 12)
    assert shown["lab-claims"].startswith("- ")


def test_every_parameter_is_used():
    code = "\n".join(source for name, source in PAGE.code.items() if name != "parameters")
    for line in PAGE.code["parameters"].splitlines():
        name = line.split(" = ")[0]
        assert code.count(name), name
