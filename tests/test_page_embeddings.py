"""The page on embeddings: its mathematics, its helpers by hand, any state of the store."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import geometry, runs, sweeps

PAGE = Page("images/embeddings")
NAMES = [name for name in PAGE.body if not name.endswith("umap")]  # UMAP compiles itself for long
LAB = NAMES[NAMES.index("lab-read") :]
TINY = {"epochs": 1, "seeds": [0, 1], "betas": [1.0, 2.0], "temperatures": [0.5]}


def execute(*names, **given):
    """Cells in order; hands back their variables and what each showed as text."""
    page, shown = PAGE.outputs(*names, **given)
    return page, {name: output.text for name, output in shown.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page with tiny runs, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a linear probe after one epoch need not converge
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        return execute(*NAMES, **TINY)


@pytest.fixture
def page(whole):
    return dict(whole[0])


# --- the mathematics


def test_no_rule_on_the_cosine_beats_half_the_overlap(page):
    """The first exercise, on random rules, and its code."""
    rng = np.random.default_rng(0)
    [(_, edges, same, different)] = page["panels"](page["z_quick"], [("SimCLR", 0.5)])
    width = np.diff(edges)
    least = geometry.overlap(same, different, edges) / 2
    for _ in range(200):
        says_same = rng.random(len(width)) < rng.random()
        error = (same * width)[~says_same].sum() / 2 + (different * width)[says_same].sum() / 2
        assert error >= least - 1e-12
    best = same >= different
    assert ((same * width)[~best].sum() + (different * width)[best].sum()) / 2 == pytest.approx(
        least
    )


@pytest.mark.parametrize("dim", [2, 8])
def test_different_class_pairs_cannot_lie_below_the_bound(dim):
    """The equation of the page, each point with itself among its class."""
    classes, n = 5, 20
    labels = torch.arange(classes).repeat_interleave(n)
    z = F.normalize(torch.randn(classes * n, dim, dtype=torch.float64), dim=1)
    for points in (z, z - z.mean(0)):
        cosine = points @ points.T
        same = labels[:, None] == labels
        s, d = cosine[same].mean(), cosine[~same].mean()
        assert ((s + (classes - 1) * d) / classes).item() == pytest.approx(
            points.mean(0).square().sum().item()
        )
        assert d >= -s / (classes - 1) - 1e-12


def solution(start, page):
    """Run the block of code among the solutions that starts so."""
    (block,) = (block for block in PAGE.solutions() if block.startswith(start))
    exec(block, page)
    plt.close("all")


def test_a_threshold_comes_near_the_bound(page, capsys):
    solution("[(_, edges, same, different)] = panels(", page)
    threshold, bound = map(float, capsys.readouterr().out.split())
    assert bound - 1e-9 <= threshold < bound + 0.1


def test_the_islands_of_the_second_exercise_do_what_it_says(page):
    solution("g = torch.Generator()", page)
    assert page["near_share"](page["z"], page["labels"]) > 0.99
    same, different = geometry.similarity_histograms(page["z"], page["labels"])[1:]
    assert geometry.overlap(same, different, np.linspace(-1, 1, 51)) > 0.8


# --- helpers on what is made by hand


def test_the_near_share_is_that_of_scikit_learn(page):
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(60, 5, generator=generator), dim=1)
    labels = torch.randint(3, (60,), generator=generator)
    found = neighbors.NearestNeighbors(n_neighbors=7).fit(z).kneighbors(return_distance=False)
    truth = (labels.numpy()[found] == labels.numpy()[:, None]).mean()
    assert page["near_share"](z, labels, k=7) == pytest.approx(truth)


def test_mean_cosines_are_those_of_a_loop(page):
    z = F.normalize(torch.randn(12, 4, dtype=torch.float64), dim=1)
    labels = torch.arange(12) % 3
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(12):
        for j in range(i):
            kinds[bool(labels[i] == labels[j])].append(float(z[i] @ z[j]))
    assert page["mean_cosines"](z, labels) == pytest.approx(
        (np.mean(kinds[True]), np.mean(kinds[False]))
    )


def frame(overlaps, accuracies):
    labels = [f"loss {i}" for i in range(len(overlaps))]
    columns = {"label": labels, "overlap": overlaps, "knn": accuracies}
    return pd.concat([pd.DataFrame({**columns, "seed": seed}) for seed in (0, 1)])


@pytest.mark.parametrize(
    ("overlaps", "says"),
    [
        ([0.5, 0.4, 0.3, 0.2, 0.1], "goes with more accuracy"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], "goes with **less** accuracy"),
        ([0.3, 0.1, 0.5, 0.2, 0.4], "no clear order"),
        ([0.1, 0.2], "fewer than four"),
    ],
)
def test_the_order_is_said_as_it_is(page, overlaps, says):
    accuracies = [0.1, 0.2, 0.3, 0.4, 0.5][: len(overlaps)]
    assert says in page["order"](frame(overlaps, accuracies), "knn")


def test_a_claim_is_answered_by_its_sign_and_its_error(page):
    def overlaps(a, b, sign):
        seeds = {"seed": [0, 1, 2], "temperature": 0.5}
        rows = [
            pd.DataFrame({"label": name, "overlap": x, **seeds}) for name, x in (("a", a), ("b", b))
        ]
        return page["overlaps"](pd.concat(rows), "a", "b", sign)

    assert overlaps([0.5, 0.5, 0.5], [0.4, 0.41, 0.39], -1).startswith("yes, -10.0 ± 0.6 points")
    assert overlaps([0.5, 0.5, 0.5], [0.4, 0.41, 0.39], 1).startswith("no, ")
    assert overlaps([0.5, 0.4, 0.6], [0.5, 0.6, 0.4], 1).startswith("undecided")
    near, far = (torch.eye(4)[[0, 0, k, k]] for k in (1, 0))
    kept = {
        ("a", 0.5): (far, torch.tensor([0, 0, 1, 1])),
        ("b", 0.5): (near, torch.tensor([0, 0, 1, 1])),
    }
    assert page["moves"](kept, 1, "a", "b", -1) == "yes, 1.00 → 0.00"
    assert page["moves"](kept, 1, "a", "c", -1) == "not recorded"


def test_labels_say_the_prior_of_hcl_alone(page):
    df = pd.DataFrame(
        {
            "method": ["hard", "hard", "debiased"],
            "tau_plus": [0.1, 0.0, 0.1],
            "label": ["H", "H", "D"],
        }
    )
    assert page["named"](df)["label"].tolist() == ["H, τ⁺=0.1", "H", "D"]


# --- the page, whatever is recorded


def test_the_page_runs_where_nothing_is_recorded(whole):
    page, said = whole
    assert said["lab-read"].startswith("0 of ")
    assert "Nothing is recorded yet" in said["lab-read"]
    assert "Not recorded yet" in said["lab-labels"]
    assert said["order"].count("fewer than four losses") >= 4
    assert len(page["df"]) == 2 * 5  # SimCLR, debiased, two of beta, one with a prior


def test_the_page_runs_where_some_is_recorded(page, tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    listed = study()
    base = {name: value for name, value in vars(listed[0]).items() if name != "seed"}
    arms = [
        {"method": "nt_xent", "temperature": [0.5, 0.2]},
        {"method": "hard", "beta": [1.0, 2.0, 8.0], "tau_plus": 0.0},
        {"method": "hard", "beta": 1.0, "tau_plus": 0.1},
        {"method": "scl"},
    ]
    wanted = sweeps.expand(base, [{**arm, "seed": [0, 1]} for arm in arms])
    assert {run.digest for run in wanted} <= {run.digest for run in listed}
    for run in wanted:
        record(run, keep=run.seed == 0)
    found, said = execute(*LAB, into=page)
    assert said["lab-read"].startswith(f"{len(wanted)} of ")
    assert len(found["z_lab"]) == 7
    assert "over 10 runs" in said["order"]  # at one temperature, without labels
    assert "over 12 runs" in said["order"]  # and with them


def record(run, *, keep, n=60):
    generator = torch.Generator().manual_seed(int(run.digest[:4], 16))
    z = F.normalize(torch.randn(n, 8, generator=generator), dim=1).numpy()
    names = ("knn", "linear", "overlap", "alignment", "uniformity")
    metrics = dict(zip(names, torch.rand(5, generator=generator).tolist(), strict=True))
    arrays = {"z": z.astype(np.float16), "labels": np.arange(n) % 10, "of": n}
    runs.save(made_up_record(run, metrics), arrays=arrays if keep else None)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()
