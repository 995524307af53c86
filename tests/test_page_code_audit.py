"""The page on the papers and their code: transcriptions, the rule, and what it reads of Records."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch import nn
from torch.nn import functional as F

from hcl import compare, losses, probe, runs, train, vision

PAGE = Page("hardness/code-audit")
STUDY = study()
TINY = {
    "seeds": [0, 1], "probe_seeds": [0, 1], "epochs": 1, "page_epochs": 1, "probe_epochs": 2,
    "n_train": 256, "batch": 64,
}  # fmt: skip


def execute(*names, **given):
    """Cells of the page where there are no pictures; its variables and what each said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "load", absent)
        page, shown = PAGE.outputs(*names, **given)
    return page, {name: output.text for name, output in shown.items()}


def absent(name, **_):
    raise FileNotFoundError(name)


def fake_record(run, store):
    """A Record of made-up numbers that follow from the Run."""
    draw = random.Random(run.digest)
    metrics = {name: 0.4 + draw.random() / 10 for name in compare.METRICS}
    return runs.save(made_up_record(run, metrics), store=store)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page in a tiny form, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        return execute(*PAGE.body, **TINY)


@pytest.fixture
def formulas():
    """Cells that compute on a batch, on a random one; the anchors gather in five places."""
    page, _ = execute("overview", "rule")
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (24,), generator=draw)
    centres = torch.randn(5, 16, generator=draw, dtype=torch.float64)
    noise = torch.randn(2, 24, 16, generator=draw, dtype=torch.float64)
    z1, z2 = F.normalize(centres[labels] + 0.4 * noise, dim=2)
    page |= {"z1": z1, "z2": z2, "labels": labels, "batch": 24}
    return execute("scores", into=page)[0]


def dense(page, t):
    """For every anchor, by a loop: scores with its negatives (N,), and with its positive."""
    z = torch.cat([page["z1"], page["z2"]]).numpy()
    for i in range(len(z)):
        partner = (i + len(z) // 2) % len(z)
        yield np.delete(z @ z[i], [i, partner]) / t, z[i] @ z[partner] / t


# --- the whole page


def test_the_page_runs_where_nothing_is_recorded(whole):
    page, told = whole
    overview = page["overview"]
    assert (overview != "…").all(axis=None)  # every row was filled
    assert list(page["SAYS"]) == list(overview.index)
    assert f"0 of the {len(page['asked'])} Records" in told["verdict"]
    waiting = overview.index[overview["matters?"] == "not recorded yet"]
    for key in ("I6 annealing", "I7 resolution", "I10 passes", "protocol", "H-SCL weight"):
        assert key in waiting
    for key in ("I1 weights", "I2 floor", "I4 gradient", "I9 probe"):  # trained on the page
        assert overview.loc[key, "matters?"] in ("yes", "not shown here")
    for key in ("I5 curves", "I8 statistics", "I11 crash", "H-SCL flag", "H-SCL β = 0"):
        assert overview.loc[key, "matters?"] == "–"


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


@pytest.mark.parametrize("every", [1, 3])
def test_records_are_read_in_pairs(own_store, every):
    for run in STUDY[::every]:
        fake_record(run, own_store)
    page, _ = execute("overview", "rule")
    exec(PAGE.code["arms"].rsplit("\n\n", 1)[0], page)  # trains nothing
    page, _ = execute("lab", into=page)
    known_runs = {r.digest: r for r in STUDY}
    pairs = {
        "detach": page["lab"]({"detach_weights": False}, detach_weights=True),
        "clamp": page["lab"]({"clamp": "scaled"}, clamp="unscaled"),
        "Q": page["lab"]({"Q": "released"}, Q="1020"),
        "paper": page["lab"]({"anneal": "paper"}, anneal="released"),
        "none": page["lab"]({"anneal": "none"}, anneal="released"),
        "h_scl": page["lab"]({"Q": "released"}, method="hard_scl", Q="negatives"),
        "passes": page["lab"]({"separate_views": False}, separate_views=True, protocol="sound"),
        "probe": page["lab"]({"probe": "fast"}, probe="released", protocol="sound"),
    }
    for name, (changed, base) in pairs.items():
        for seed in sorted(set(changed["seed"]) & set(base["seed"])):
            digests = [df.set_index("seed").loc[seed, "digest"] for df in (changed, base)]
            one, other = (vars(known_runs[digest]) for digest in digests)
            differ = {field for field in one if one[field] != other[field]}
            assert len(differ - {"anneal_steps"}) == 1, (name, differ)
        if every == 1:
            assert sorted(changed["seed"]) == sorted(base["seed"])
            assert len(changed) >= 3
    assert page["lab"]({}, data="none of these") is None
    assert page["lab"]({"temperature": 0.7}, detach_weights=True) is None  # no such twin
    both = page["lab"]({"clamp": "scaled"}, clamp="unscaled")
    row = page["pair"](*both, "linear")
    means = [df.set_index("seed")["linear"] for df in both]
    known = (means[0] - means[1]).dropna()
    if len(known):
        assert row["difference"] == pytest.approx(known.mean())
        assert row["n"] == len(known)
    else:
        assert row is None


def test_the_recorded_half_says_what_is_there(own_store, whole):
    for run in STUDY:
        fake_record(run, own_store)
    page = dict(whole[0])
    kept = ("overview", "rule", "lab", "i6-found", "i10-found", "i7-found", "protocol-read")
    kept += ("protocol-found", "hscl-q-found", "verdict", "records")
    page, told = execute(*kept, into=page)
    read, store = page["read"], {r.digest: r for r in STUDY}
    assert set(read["digest"]) == set(page["asked"]) <= set(store)  # those of these cells
    assert f"{len(read)} of the {len(read)} Records" in told["verdict"]
    assert "of the test" in told["verdict"]  # by what they were made
    order = page["order"]("linear")
    gains = {
        how: page["cells"]["HCL", how].set_index("seed")["linear"].mean()
        - page["cells"]["SimCLR", how].set_index("seed")["linear"].mean()
        for how in ("sound", "released")
    }
    same = (gains["sound"] > 0) == (gains["released"] > 0)
    assert order.startswith("same" if same else "**another**")
    assert f"{100 * gains['released']:+.1f} released" in order
    tested = page["tested"]
    assert set(tested[0]["input_size"]) == {8}
    assert "input_size" not in tested[1]


# --- the rule


def row(difference, se, n=3):
    return pd.Series({"difference": difference, "se": se, "n": n})


@pytest.mark.parametrize(
    ("difference", "se", "yes"),
    [
        (0.02, 0.005, True),
        (-0.02, 0.005, True),
        (0.02, 0.011, False),  # within two standard errors
        (0.004, 0.001, False),  # beyond them, and less than half a point
        (0.005, 0.001, True),
        (0.02, math.nan, False),  # one seed
    ],
)
def test_what_matters(formulas, difference, se, yes):
    assert formulas["matters"](row(difference, se)) == yes


def test_pairs_are_taken_over_the_seeds_that_both_have(formulas):
    changed = pd.DataFrame({"seed": [0, 1, 2], "knn": [0.5, 0.7, 0.9]})
    base = pd.DataFrame({"seed": [2, 1, 7], "knn": [0.6, 0.5, 0.1]})
    found = formulas["pair"](changed, base, "knn")
    assert (found["difference"], found["n"]) == (pytest.approx(0.25), 2)
    assert found["se"] == pytest.approx(0.05)
    assert formulas["pair"](changed, base[base["seed"] > 6], "knn") is None
    assert formulas["pair"](changed, base.iloc[:0], "knn") is None


def test_a_row_of_the_overview(formulas):
    said = formulas["found"](
        "I4 gradient", "a number",
        {"sphere, a": row(0.01, 0.01), "sphere, b": row(-0.02, 0.001), "CIFAR-10, c": None},
        "and more", {"sphere, d": row(0.3, 0.01)},
    ).data  # fmt: skip
    overview = formulas["overview"].loc["I4 gradient"]
    assert overview["measured"] == "a number"
    assert overview["sphere"].split() == ["-2.0", "±", "0.1"]
    assert (overview["CIFAR-10"], overview["matters?"]) == ("", "yes")
    assert "- a number; and more." in said
    assert "- CIFAR-10, c: not recorded yet." in said
    assert "sphere, d" in said.split("not judged")[1]
    assert set(formulas["comparisons"]) == {
        ("I4 gradient", "sphere, a"), ("I4 gradient", "sphere, b"),
    }  # fmt: skip
    formulas["found"]("I5 curves", "n")
    formulas["found"]("I6 annealing", "n", {"CIFAR-10, c": None})
    formulas["found"]("I3 radius", "n", {"sphere, a": row(0.001, 0.0001)})
    verdicts = formulas["overview"]["matters?"]
    assert verdicts["I5 curves"] == "–"
    assert verdicts["I6 annealing"] == "not recorded yet"
    assert verdicts["I3 radius"] == "not shown here"


# --- the loss


@pytest.mark.parametrize(("hardness", "tau"), [(0.5, 0.0), (2.0, 0.0), (3.0, 0.05), (0.7, 0.3)])
def test_the_pseudo_code_is_a_weight_on_the_negatives(formulas, hardness, tau):
    page, _ = execute("i1-formula", into=formulas)
    t, size = 0.4, 2 * page["batch"] - 2
    total = []
    for s, p in dense(page, t):
        u = np.exp(s)
        ng = ((hardness * u / u.mean() * u).sum() - size * tau * np.exp(p)) / (1 - tau)
        total.append(np.log1p(max(ng, np.exp(-1 / t)) / np.exp(p)))
    assert page["pseudo_code"](t, hardness, tau) == pytest.approx(np.mean(total), rel=1e-12)
    same = losses.hard(  # the exercise's solution
        page["z1"], page["z2"], temperature=t, beta=1.0, clamp="unscaled",
        tau_plus=tau / hardness, Q=size * (hardness - tau) / (1 - tau),
    )  # fmt: skip
    assert page["pseudo_code"](t, hardness, tau) == pytest.approx(same.item(), rel=1e-12)


def test_the_line_as_quoted_clamps_by_n_times_the_prior(formulas):
    page, _ = execute("i1-formula", "i2-shares", into=formulas)
    t, size = 0.5, 2 * page["batch"] - 2
    for prior in (0.001, 0.01, 0.1):
        held = []
        for s, p in dense(page, t):
            reweight = np.exp(s) / np.exp(s).mean()
            total = (-size * prior * np.exp(p) + reweight * np.exp(s)).sum()  # a vector, as quoted
            held.append(total / (1 - prior) < np.exp(-1 / t))
        assert page["quoted_share"](t, prior) == pytest.approx(np.mean(held))
    assert page["quoted_share"](t, 0.1) == 1
    scaled = page["shares"](t, 0.3)["scaled"]
    assert scaled == losses.clamp_share(page["z1"], page["z2"], temperature=t, tau_plus=0.3)


def test_the_push_is_that_of_the_objective(formulas):
    page, _ = execute("i1-formula", "i4-shares", into=formulas)
    for s, want in ((False, lambda s: 2 * soft(2 * s) - soft(s)), (True, lambda s: soft(2 * s))):
        r = page["push"](0.5, s).numpy()
        assert np.allclose(r.sum(1), 1)
        for found, (score, _) in zip(r, dense(page, 0.5), strict=True):
            assert np.allclose(found, want(np.sort(score)[::-1]), atol=1e-12)
    table = page["pushes"]
    assert (table.xs("detached", level=1)["attracted"] == 0).all()
    assert (table.xs("attached", level=1)["attracted"] > 0).all()
    assert np.allclose(table.drop(columns="attracted").sum(axis=1), 1)


def soft(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def test_a_sphere_of_radius_one_over_t(whole):
    """I3: the cell's own assertion ran; its number is the square."""
    assert whole[0]["overview"].loc["I3 radius", "measured"] == "t = 0.5 is t = 0.25 in the code"
    assert f"{math.exp(-4):.3f} and {math.exp(-2):.3f}" in whole[1]["i3-run"]


# --- the training and the pictures


def test_the_annealing_table_is_that_of_an_iterator(whole):
    page, told = whole
    betas, values, now = iter(np.linspace(1, 0, 9)), [], 1.0  # as the released loop
    for epoch in range(1, 401):
        values.append(now)
        if epoch % (400 // 9) == 0:
            now = next(betas)
    assert np.allclose(values, page["plan"]("released", 400, 9))
    assert f"- {values.count(1.0)} of 400 epochs at full β, not 45" in told["i6-found"]
    falls = np.diff(page["plan"]("paper", 400, 9))
    assert np.allclose(falls[falls != 0], -1 / 9)  # "nine equal steps"
    assert len(falls[falls != 0]) == 8


def test_statistics_of_another_set(whole):
    table = whole[0]["normalised"]
    assert list(table.index) == ["photographs"]
    x = whole[0]["sets"]["photographs"].double() / 255
    assert x.shape[1:] == (3, 32, 32)
    mean, std = torch.tensor(vision.RELEASED)[:, None, :, None, None].double()
    y = (x - mean) / std
    assert np.allclose(table.iloc[0, :3].astype(float), y.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(table.iloc[0, 3:6].astype(float), y.std((0, 2, 3)), atol=1e-4)


def test_batchnorm_removes_a_shift_and_a_common_scale_inside():
    """As I8 says: away from the padding."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 12, 12, generator=draw, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5]).double()[:, None, None]
    ratio = torch.tensor([1.0, 2.0, 1.0]).double()[:, None, None]
    conv = nn.Conv2d(3, 4, 3, bias=False).double()

    def norm(y):
        return (y - y.mean((0, 2, 3), keepdim=True)) / y.std((0, 2, 3), keepdim=True)

    inside = norm(conv(x))
    assert torch.allclose(norm(conv(1.7 * x + shift)), inside)
    assert not torch.allclose(norm(conv(x * ratio)), inside, atol=0.1)


# --- the measurement


def test_the_probe_without_its_habits_sees_fixed_features(whole):
    draw = torch.Generator().manual_seed(0)
    f, y = torch.randn(90, 6, generator=draw), torch.arange(90) % 3
    f[torch.arange(90), y] += 4
    page = {**whole[0], "probe_epochs": 60}
    exec(PAGE.code["i9-run"].split("\n\n\n")[0], page)
    assert page["on_features"](f[:60], y[:60], f[60:], y[60:], batch=16) > 0.9


def test_more_votes_than_members_are_weighed_by_the_temperature():
    """The claim on kNN: with k far above a class's size, a lower temperature counts near ones."""
    near, far = torch.tensor([1.0, 0.1]), torch.tensor([0.6, 0.8])
    train_f = torch.stack([near] * 2 + [far] * 6)
    y = torch.tensor([0] * 2 + [1] * 6)
    args = (train_f, y, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert probe.knn(*args, temperature=0.5) == 0.0
    assert probe.knn(*args, temperature=0.1) == 1.0


# --- H-SCL


def by_loop(z1, z2, labels, beta):
    z, y = torch.cat([z1, z2]).numpy(), torch.cat([labels, labels]).numpy()
    each = []
    for i in range(len(z)):
        u = np.exp(z @ z[i] / 0.5)
        other, mine = y != y[i], (y == y[i]) & (np.arange(len(z)) != i)
        mean = (u[other] ** (1 + beta)).sum() / (u[other] ** beta).sum()
        each.append(-np.log(u[mine] / (u[mine] + (len(z) - 2) * mean)))
    return each


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_the_transcribed_h_scl_is_its_formula(formulas, beta):
    page, _ = execute("hscl-transcribed", into=formulas)
    batch = page["z1"], page["z2"], page["labels"]
    want = by_loop(*batch, beta)
    found = page["released_h_scl"](*batch, beta=beta).item()
    assert found == pytest.approx(np.concatenate(want).mean(), rel=1e-12)
    assert page["worst"] < 1e-12
    detached = page["released_h_scl"](*batch, beta=beta, attached=False).item()
    assert math.isnan(detached) if beta == 0 else detached == pytest.approx(found)


def test_pairs_and_anchors_and_the_number_of_negatives(formulas):
    formulas["world"] = SimpleNamespace(classes=tuple(range(5)))
    page, _ = execute("hscl-transcribed", "hscl-q-run", into=formulas)
    z1, z2, labels = page["z1"], page["z2"], page["labels"]
    table = page["merges"]
    for classes, line in table.iterrows():
        merged = labels % classes
        each = by_loop(z1, z2, merged, 1.0)
        assert line["loss"] == pytest.approx(np.concatenate(each).mean(), rel=1e-12)
        assert line["over anchors"] == pytest.approx(np.mean([e.mean() for e in each]), rel=1e-12)
        sizes = np.array([len(e) for e in each])
        largest = merged.bincount().argmax()
        share = sizes[np.concatenate([merged, merged]) == largest.item()].sum() / sizes.sum()
        assert line["of pairs"] == pytest.approx(share, rel=1e-6)
        negatives = [(merged != m).sum().item() * 2 for m in merged]
        assert line["negatives of 2B-2"] == pytest.approx(np.mean(negatives) / (2 * 24 - 2))


def test_a_flag_of_type_bool_is_true(whole):
    assert whole[0]["flag"] is True
    assert whole[0]["overview"].loc["H-SCL flag", "measured"] == "False is read as True"
    assert "nan" in whole[0]["overview"].loc["H-SCL β = 0", "measured"]


# --- the exercise


def test_the_solution_with_two_gpus_runs(whole):
    page = dict(whole[0])
    page["setting"] = {**page["setting"], "epochs": 1}
    (solution,) = PAGE.solutions()
    exec(solution, page)
    assert len(page["two"]) == len(page["one"]) == 2
    assert all(0 <= a <= 1 for a in page["two"] + page["one"])
    run = runs.Run(**{**page["setting"], "seed": 0})
    data = train.load_data(run)
    model = page["Halves"](train.build_model(run, data))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    seen = []
    norms[0].register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    model.train()(data.inputs(data.x_train[:64]))
    model.eval()(data.inputs(data.x_train[:64]))
    assert seen == [32, 32, 64]
