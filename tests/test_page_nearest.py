"""The page on the hardest negatives: its formulas, its counting, and what it says of any store."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import probe, runs, sweeps, train

PAGE = Page("images/nearest")
LAB = PAGE.body[PAGE.body.index("lab-read") :]
TINY = {"epochs": 1, "seeds": [0, 1], "betas": [1.0], "anchors": 1, "crowd": 64}
TINY |= {"ks": [1, 10, 50], "weight_betas": [0.0, 1.0]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page on digits, with nothing recorded and no data on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("HCL_DATA", str(tmp_path_factory.mktemp("data")))
        return PAGE.outputs(*PAGE.body, **TINY)


@pytest.fixture
def page(whole):
    return dict(whole[0])


def crowd_of(n=40, classes=4, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)
    return z, torch.randint(classes, (n,), generator=generator)


# --- the mathematics


def by_hand(z, labels, t, beta):
    """f(k) and w(beta) of every anchor, from the definition, in loops."""
    f, w = [], []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        scores = {j: float(z[i] @ z[j]) / t for j in others}
        order = sorted(others, key=lambda j, s=scores: -s[j])
        y = [int(labels[j] == labels[i]) for j in order]
        f.append([sum(y[: k + 1]) / (k + 1) for k in range(len(y))])
        mass = [math.exp(beta * scores[j]) for j in order]
        w.append(sum(m * one for m, one in zip(mass, y, strict=True)) / sum(mass))
    return np.array(f), np.array(w)


@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0, 8.0])
def test_count_weight_and_mixture_are_the_formulas(page, beta):
    z, labels = crowd_of()
    f, w = by_hand(z, labels, 0.5, beta)
    np.testing.assert_allclose(page["false_among"](z, labels), f)
    assert page["weight_on_false"](z, labels, 0.5, beta) == pytest.approx(w.mean())
    assert page["mixture"](z, labels, 0.5, beta) == pytest.approx(w.mean())


def test_the_mixture_has_weights_that_sum_to_one_and_move_to_the_first():
    s = torch.linspace(2, -2, 30, dtype=torch.float64)
    for beta, near in ((0.0, 0.0), (1.0, None), (300.0, 1.0)):
        q = F.pad((beta * s).softmax(0), (0, 1))
        m = torch.arange(1, 31) * (q[:-1] - q[1:])
        assert (m >= 0).all()
        assert m.sum().item() == pytest.approx(1)
        if near is not None:
            assert m[0].item() == pytest.approx(near, abs=1e-3)  # all alike, or the hardest alone
    assert PAGE.code["weigh"].count("torch.arange(1, len(z)) * (q[:, :-1] - q[:, 1:])") == 1


def test_the_order_ignores_the_temperature_and_the_weight_knows_the_ratio(page):
    z, labels = crowd_of(seed=1)
    found = {page["weight_on_false"](z, labels, t, 2 * t) for t in (1.0, 0.5, 0.25)}
    assert max(found) == pytest.approx(min(found))
    assert page["weight_on_false"](z, labels, 0.5, 2.0) > page["weight_on_false"](z, labels, 1, 2.0)
    assert torch.equal(page["by_hardness"](z), (z @ z.T / 0.1).fill_diagonal_(-99).argsort(
        dim=1, descending=True)[:, :-1])  # fmt: skip


def test_the_gradient_of_simclr_goes_with_the_weights_at_beta_one():
    """As the page says of q_j e^s: with the weights held fixed the share is q at beta + 1."""
    s = torch.randn(20, dtype=torch.float64, requires_grad=True)
    q = (1.5 * s).softmax(0).detach()
    (gradient,) = torch.autograd.grad((q * s.exp()).sum().log(), s)
    torch.testing.assert_close(gradient / gradient.sum(), (2.5 * s).softmax(0).detach())


def test_the_solution_on_the_slope_runs_and_the_other_one_too(page):
    blocks = PAGE.solutions()
    assert len(blocks) == 2
    for block in blocks:
        exec(block, page)


# --- what the page counts


def test_row_i_of_the_embeddings_is_test_picture_i(page):
    record, world = page["untrained"], page["world"]
    assert world is None  # the last one is CIFAR-10's, which is not here
    world = train.load_data(record.run)
    model = train.build_model(record.run, world)
    z, labels = page["embedded"](record)
    again = F.normalize(probe.features(model, world.inputs(world.x_test), lambda x: x), dim=1)
    torch.testing.assert_close(z, again[: len(z)], atol=2e-3, rtol=0)
    assert (z - again.roll(1, 0)[: len(z)]).abs().max() > 0.02  # and not of its neighbour
    assert torch.equal(labels, world.y_test[: len(z)])


def test_an_anchor_is_not_among_its_negatives(page):
    z, _ = crowd_of()
    everybody = torch.arange(len(z))
    order = page["by_hardness"](z)
    assert (order != everybody[:, None]).all()
    assert torch.equal(order.sort(dim=1).values, torch.stack([
        everybody[everybody != i] for i in everybody]))  # fmt: skip
    assert (page["at_random"] != torch.arange(page["crowd"])[:, None]).all()


def test_the_counts_end_at_the_base_rate(page):
    z, labels = page["crowds"](page["simclr"])[0]
    same = (labels[:, None] == labels).sum(1) - 1
    f = page["false_among"](z, labels)[:, -1]
    np.testing.assert_allclose(f, same / (len(z) - 1))
    assert page["weight_on_false"](z, labels, 0.5, 0.0) == pytest.approx(f.mean().item())


def test_the_words_on_a_frame_made_by_hand(page):
    rows = [
        {"embedding": e, "seed": s, "k": k, "share": share + 0.001 * s * (k == 10)}
        for e, shares in {"SimCLR": (0.8, 0.6), "HCL β=4": (0.8, 0.5)}.items()
        for s in (0, 1, 2)
        for k, share in zip((1, 10, page["EVERY"]), (*shares, 0.1), strict=True)
    ]
    first, second = page["verdict"](pd.DataFrame(rows))
    assert first == (
        "SimCLR: false negatives are 6.0 times as frequent among the ten hardest as among all, "
        "8.0 times at the very hardest"
    )
    assert second.startswith("HCL β=4 minus SimCLR, ten hardest: -10.0 ± 0.0 points, n = 3")


@pytest.mark.parametrize(
    ("shares", "says"),
    [([0.1, 0.2, 0.3, 0.4, 0.5], "with more"), ([0.5, 0.4, 0.3, 0.2, 0.1], "with **less**"),
     ([0.3, 0.1, 0.4, 0.5, 0.2], "no clear order")],
)  # fmt: skip
def test_the_order_is_read_off_its_sign(page, shares, says):
    names = ["SimCLR", "Debiased", "HCL β=1", "HCL β=2", "HCL β=4"]
    page["lab_counts"] = pd.DataFrame({"embedding": names, "k": 10, "share": shares, "crowd": 0})
    accuracy = [0.1, 0.2, 0.3, 0.4, 0.5]
    page["lab_shares"] = pd.DataFrame({page["NAMES"]["knn"]: accuracy}, index=names)
    for name in ("order", "order_words"):
        source = PAGE.code["lab-order"].split(f"def {name}(")[1].split("\n\n\n")[0]
        exec(f"def {name}({source}", page)
    assert says in page["order_words"](10)


# --- the page, whatever is there


def test_the_page_runs_where_nothing_is_recorded(whole):
    _, shown = whole
    assert shown["lab-read"].text.startswith("0 of ")
    assert "Nothing is recorded yet" in shown["lab-read"].text
    assert "too few" in shown["lab-order"].text
    assert "base rate" in shown["tally"].text


def test_it_shows_no_pictures_of_a_set_that_is_not_there_and_says_how_to_get_it(
    whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    pretend(tmp_path, monkeypatch)
    page, shown = PAGE.outputs(*LAB, into=dict(whole[0]))
    assert page["world"] is None
    said = shown["lab-gallery"].text
    assert "No pictures are shown" in said
    assert "hcl data" in said or "download" in said
    assert shown["lab-read"].text.startswith("6 of ")
    assert "5 losses without labels" in shown["lab-order"].text
    assert list(page["lab_shares"].index) == [
        "SimCLR", "Debiased", "HCL β=1", "HCL β=2", "HCL β=4", "SCL"]  # fmt: skip


def pretend(folder, monkeypatch):
    """A store of six Records of the study, with random embeddings."""
    monkeypatch.setenv("HCL_RUNS", str(folder))
    wanted = {("nt_xent", 0.0), ("debiased", 0.0), ("scl", 0.0)} | {("hard", b) for b in (1, 2, 4)}
    for run in study():
        plain = run.digest in {r.digest for r in sweeps.expand(
            {"data": "cifar10", "data_args": {"size": 16}, "encoder": "small", "epochs": 5},
            [{"method": run.method, "beta": run.beta, "tau_plus": run.tau_plus}])}  # fmt: skip
        prior = 0.1 if run.method == "debiased" else 0.0
        if plain and (run.method, run.beta) in wanted and run.tau_plus == prior:
            record(run)


def record(run, n=130):
    generator = torch.Generator().manual_seed(int(run.digest[:4], 16))
    z = F.normalize(torch.randn(n, 8, generator=generator), dim=1).numpy()
    labels = torch.randint(10, (n,), generator=torch.Generator().manual_seed(0)).numpy()
    numbers = torch.rand(4, generator=generator).tolist()
    metrics = dict(zip(("knn", "linear", "overlap", "alignment"), numbers, strict=True))
    found = made_up_record(run, metrics | {"uniformity": -1.0})
    return runs.save(found, arrays={"z": z.astype(np.float16), "labels": labels, "of": n})


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_weights_shown_are_the_librarys(whole):
    assert "def negative_weights" in whole[1]["weights-source"].text
