"""The page on SCHaNe: its formulas are the library's, its sentences follow its tables."""

import math
from unittest import mock

import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import compare, losses, runs, sweeps, train
from hcl.objective import Objective
from hcl.runs import Run

PAGE = Page("supervised/schane")
LAB = [name for name in PAGE.code if name.startswith("lab-")] + ["records", "paper-table"]
LAB_FORM = {  # of book/profiles/lab.yml
    "study": "relatives-lab", "data": "cifar10", "size": 16, "n_train": 10000, "encoder": "small",
    "shots": [1, 5, 25, 0], "epochs": [100, 100, 100, 10], "batch": [10, 50, 125, 256],
    "shares": [0.1, 0.9], "lr": 0.001, "hidden_dim": 512,
    "out_dim": 128, "start_epochs": 10, "arm_shots": 25, "temperatures": [],
    "share_methods": ["schane"], "heads": ["mlp"], "times_longer": [],
}  # fmt: skip


@pytest.fixture
def page():
    """The page's variables, with every helper and nothing trained."""
    return PAGE.define(*PAGE.body)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store."""
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))


def views(seed, images=12, labels=4):
    draw = torch.Generator().manual_seed(seed)
    z1, z2 = F.normalize(torch.randn(2, images, 6, generator=draw, dtype=torch.float64), dim=2)
    return z1, z2, torch.randint(labels, (images,), generator=draw)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the formulas


def anchors(z1, z2, y, beta, t):
    """Of every anchor: eq-schane, SupCon, and H-SCL's mean over positives with |N(i)|."""
    z = torch.cat([z1, z2])
    s, both = (z @ z.T / t).tolist(), y.tolist() * 2
    found = []
    for i, row in enumerate(s):
        p = [x for a, x in enumerate(row) if a != i and both[a] == both[i]]
        n = [x for a, x in enumerate(row) if both[a] != both[i]]
        q = [math.exp(beta * x) for x in n]
        ng = len(n) * sum(w * math.exp(x) for w, x in zip(q, n, strict=True)) / sum(q)
        pull = sum(p) / len(p)
        joint = math.log(sum(map(math.exp, p)) + ng) - pull
        plain = math.log(sum(map(math.exp, p + n))) - pull
        own = sum(math.log1p(ng / math.exp(x)) for x in p) / len(p)
        found.append((joint, plain, own))
    return found


@pytest.mark.parametrize("t", [0.5, 0.1])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_the_loss_and_the_order_of_its_relatives(page, t, beta):
    for seed in range(3):
        z1, z2, y = views(seed)
        found = anchors(z1, z2, y, beta, t)
        mean = sum(joint for joint, _, _ in found) / len(found)
        args = {"temperature": t, "beta": beta}
        assert losses.schane(z1, z2, y, **args).item() == pytest.approx(mean)
        assert page["by_hand"](z1, z2, y, beta, t).item() == pytest.approx(mean)
        for joint, plain, own in found:
            assert joint >= plain - 1e-12
            assert joint >= own - 1e-12  # equal where there is one positive
            assert beta or joint == pytest.approx(plain)


def test_released_h_scl_may_be_the_larger_one_where_classes_differ_in_size():
    """By hand: its mean is over pairs, so the anchors of a large class count more often."""
    draw = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(24, 8, generator=draw, dtype=torch.float64), dim=1)
    y = torch.tensor([0] * 12 + list(range(1, 13)))
    found = anchors(z, z, y, 1.0, 0.5)
    positives = [2 * (y == label).sum().item() - 1 for label in y.tolist() * 2]
    own = [row[2] for row in found]
    over_pairs = sum(n * x for n, x in zip(positives, own, strict=True)) / sum(positives)
    joint = sum(row[0] for row in found) / len(found)
    args = {"temperature": 0.5, "beta": 1.0}
    h_scl = losses.hard_scl(z, z, y, Q="negatives", **args).item()
    assert h_scl == pytest.approx(over_pairs)
    assert losses.schane(z, z, y, **args).item() == pytest.approx(joint)
    assert sum(own) / len(own) <= joint < h_scl
    assert "averages over pairs" in PAGE.prose


def test_one_picture_a_class_cannot_tell_the_terms_apart():
    z1, z2, _ = views(3)
    y = torch.arange(len(z1))
    for t in (0.5, 0.2):
        hcl = losses.hard(z1, z2, temperature=t, beta=1.0, tau_plus=0.0)
        for loss in (losses.schane, losses.hard_scl):
            torch.testing.assert_close(loss(z1, z2, y, temperature=t, beta=1.0), hcl)
        simclr = losses.nt_xent(z1, z2, temperature=t)
        torch.testing.assert_close(losses.supcon(z1, z2, y, temperature=t), simclr)


@pytest.mark.parametrize("head", ["mlp", "none"])
def test_the_joint_loss_is_as_displayed(head):
    """eq-schane-joint on one batch of digits, the term put together by hand."""
    share = 0.3
    run = Run(data="digits", data_args={"shots": 2}, encoder="mlp", method="schane", epochs=1,
              batch=20, cross_entropy=share, head=head, hidden_dim=8, out_dim=4)  # fmt: skip
    world = train.load_data(run)
    model = train.build_model(run, world)
    objective = Objective(run, model, world)
    objective.begin(1)
    rows = torch.arange(20)
    found = objective(rows, torch.Generator().manual_seed(0))
    v1, v2 = world.views(world.x_train, torch.Generator().manual_seed(0))
    h = model.encoder(torch.cat([v1, v2]))
    y = world.y_train.repeat(2)
    log_p = torch.log_softmax(model.classifier(h), dim=1)
    ce = -sum(log_p[i, y[i]] for i in range(40)) / 40
    z1, z2 = F.normalize(model.head(h), dim=1).detach().double().chunk(2)
    term = sum(joint for joint, _, _ in anchors(z1, z2, world.y_train, 1.0, 0.5)) / 40
    assert found.item() == pytest.approx(share * ce.item() + (1 - share) * term, rel=1e-5)


def test_the_checks_of_the_page():
    found = PAGE.run("by-hand")["terms"]
    assert found["SupCon"] < found["SCHaNe"]
    assert found["H-SCL, weight |N|"] < found["SCHaNe"]


def test_solutions_run_and_hardness_pushes_fewer_positives(capsys):
    constant, push, _ = PAGE.solutions()
    found = PAGE.run("by-hand")
    exec(constant, found)
    exec(push, found)
    z1, z2, y = found["z1"], found["z2"], found["labels"]
    counts = [found["pushed"](beta) for beta in (0.0, 1.0, 4.0)]
    assert capsys.readouterr().out.strip() == str(counts)
    assert counts[0] > counts[1] >= counts[2]
    s = torch.cat([z1, z2]) @ torch.cat([z1, z2]).T / 0.2
    both, pushed = y.repeat(2), 0
    for i in range(len(both)):
        row = s[i].clone().requires_grad_()
        p, n = both == both[i], both != both[i]
        p[i] = False
        q = row[n].softmax(0)
        ((row[p].exp().sum() + n.sum() * (q * row[n].exp()).sum()).log() - row[p].mean()).backward()
        pushed += (row.grad[p] > 0).sum().item()
    assert pushed == counts[1]


def test_the_effective_dimension(page):
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([[3.0, 4.0, 0.0]])
    assert page["dimension"](line) == pytest.approx(1, abs=1e-6)
    cross = torch.cat([torch.eye(5), -torch.eye(5)])
    assert page["dimension"](cross) == pytest.approx(5)
    uneven = cross * torch.tensor([2.0, 1, 1, 1, 1])
    assert page["dimension"](uneven) == pytest.approx((4 + 4) ** 2 / (16 + 4))


def test_the_shape_of_two_tight_classes(page):
    z = torch.tensor([[1.0, 0.01], [1.0, -0.01], [0.01, 1.0], [-0.01, 1.0]])
    found = page["shape"](z, torch.tensor([0, 0, 1, 1]))
    assert found["cosine, same class"] == pytest.approx(1, abs=0.03)  # half a bin
    assert found["cosine, different class"] == pytest.approx(0, abs=0.03)
    assert found["overlap"] == 0


# --- the grid, and what it says of made-up Records


def wanted_runs(**given):
    """The Runs that the two grids of the page ask for, and the page's variables."""
    asked = []

    def record(wanted, **_):
        asked.extend(wanted)
        return [made_up_record(run, metrics_of(run)) for run in wanted]

    with mock.patch.object(sweeps, "record", record):
        found = PAGE.run("train-grid", "table", "arms", **given)
    return asked, found


def metrics_of(run, schane=0.02, noise=0.001):
    """Accuracies in which SCHaNe gains on CE, SupCon half of it, H-SCL a quarter."""
    part = {"schane": 1, "supcon": 0.5, "hard_scl": 0.25, "cross_entropy": 0}[run.method]
    shake = noise * math.sin(7 * run.seed + 3 * len(run.method) + run.data_args.get("shots", 0))
    top1 = 0.5 + 0.01 * run.seed + 0.1 * bool(run.start) + part * schane + shake
    return {"top1": top1, "linear": top1 + 0.1}


def test_the_lab_form_reads_recorded_runs_only():
    asked, _ = wanted_runs(**LAB_FORM)
    recorded = {run.digest for run in study("relatives-lab")}
    assert {run.digest for run in asked} <= recorded
    assert {run.study for run in asked} == {"relatives-lab"}
    of_page = {run.digest for run in study("relatives-lab") if run.cross_entropy}
    assert {run.digest for run in asked} == of_page


def test_the_quick_form_has_every_arm():
    asked, found = wanted_runs()
    assert len(found["df"]) == 3 * 4 * 2 * 3
    assert set(found["arm_df"]["head"]) == {"mlp", "none"}
    assert set(found["arm_df"]["cross_entropy"]) == {0.1, 0.5, 1.0}
    assert {run.data_args.get("shots") for run in asked} == {1, 5, None}
    for run in asked:
        labelled = 10 * run.data_args["shots"] if run.data_args else 1257
        assert run.batch <= labelled


def test_tables_and_sentences_of_the_quick_form(page):
    _, found = wanted_runs()
    df, arm_df = found["df"], found["arm_df"]
    table = page["accuracies"](df, "top1")
    assert table.shape == (6, 4)
    assert table.columns[0] == "CE"
    assert list(table.index[:2]) == [("1 a class", "scratch"), ("1 a class", "SimCLR")]
    gains = page["gains"](df, "top1")
    assert len(gains) == 18
    mine = gains[gains["label"] == "CE + SCHaNe β=1"]["difference"]
    assert (mine - 0.02).abs().max() < 0.0025
    page["H_SCL"] = "CE + H-SCL β=1"
    said = page["verdict"](df, "top1")
    assert said[0].startswith(
        "Does the term help? CE + SCHaNe β=1 minus CE: the mean is above zero in 6 of 6 tasks; "
        "6 have a 95 % interval above zero, 0 one below. Largest at "
    )
    assert f"Mean of the tasks: {100 * mine.mean():+.1f} ± 0.0 points" in said[0]
    assert said[1].startswith("Does a term without hardness help? CE + SupCon minus CE: the mean")
    assert said[2].startswith("Does hardness add to SupCon? CE + SCHaNe β=1 minus CE + SupCon:")
    half = gains[gains["label"] == "CE + SupCon"]["difference"]
    assert f"Mean of the tasks: {100 * (mine.mean() - half.mean()):+.1f} ± 0.0" in said[2]
    assert "minus CE + H-SCL β=1: the mean is above zero in 6 of 6" in said[3]
    best = page["at_best"](arm_df, "top1")
    assert best.loc["CE", "settings tried"] == 2
    assert best.loc["CE + SCHaNe β=1", "settings tried"] == 1 + 1 + 1 + 1
    words = page["best_words"](arm_df, "top1")
    assert words[0].startswith("Everyone at its best, SCHaNe minus CE: +1.9 ± 0.0 points")
    assert sum("CE with 60 epochs instead of 30" in line for line in words) == 1
    assert sum("features instead of the head's" in line for line in words) == 3
    for cell in ("paired-figure", "arms-figure"):
        assert PAGE.outputs(cell, into={**found, **page, "df": df, "arm_df": arm_df})[1][cell].drawn


def test_the_mean_over_tasks_leaves_out_seeds_without_all_of_them(page):
    _, found = wanted_runs()
    df = found["df"]
    lost = (df["label"] == "CE + SupCon") & (df["seed"] == 2) & (df["shots"] == 5)
    table = page["over_tasks"](df[~lost], "top1", "CE").set_index("label")
    assert table.loc["CE + SupCon", "n"] == 2
    assert table.loc["CE + SCHaNe β=1", "n"] == 3
    assert page["over_tasks"](df, "top1", "another").empty


def test_one_picture_a_class_in_words(page):
    _, found = wanted_runs()
    page["H_SCL"] = "CE + H-SCL β=1"
    df = found["df"]
    said = page["same_loss"](df, "top1")
    assert "largest mean difference is 1." in said  # as made up, three quarters of two points
    assert "not recorded" in page["same_loss"](df[df["shots"] != 1], "top1")
    assert "not recorded" in page["same_loss"](df[df["method"] != "hard_scl"], "top1")


def test_a_single_seed_has_no_interval(page):
    row = pd.Series({"difference": 0.01, "se": math.nan, "n": 1})
    assert page["size_of"](row) == compare.words(row)


def test_features_in_words(page):
    rows = [
        {"label": label, "seed": seed, "overlap": 0.3 + shift + 0.01 * seed + 0.001 * seed * shift,
         "uniformity": -2.0, "effective dimension": 4.0 + 10 * shift}
        for label, shift in (("SimCLR, before", 0.1), ("CE", 0.0), ("CE + SCHaNe", -0.05))
        for seed in range(3)
    ]  # fmt: skip
    said = page["shape_words"](pd.DataFrame(rows))
    assert said[0].startswith("Overlap, minus CE's: CE + SCHaNe -0.05 ± 0.00. 1 of 1")
    assert said[1].endswith("0 of 1 95 % intervals leave out zero.")
    assert "SimCLR" not in "".join(said)


# --- the recorded study: nothing, some of it, all


def of_page():
    return [run for run in study("relatives-lab") if run.cross_entropy]


def lab(kept):
    for run in kept:
        runs.save(made_up_record(run, metrics_of(run)))
    found = PAGE.define(*PAGE.body)
    found["H_SCL"] = "CE + H-SCL β=1"
    return PAGE.outputs(*LAB, into=PAGE.run() | found)[1]


def test_nothing_recorded(store):
    shown = lab([])
    assert shown["lab-read"].text.startswith(f"0 of {len(of_page())} are recorded")
    assert not shown["lab-figure"].drawn
    assert set(shown["paper-table"].value["ours, CIFAR-10"]) == {"–"}


@pytest.mark.parametrize(
    "keep",
    [
        lambda run: run.seed == 0,
        lambda run: run.method == "cross_entropy",
        lambda run: run.method == "schane",
        lambda run: run.data_args.get("shots") == 1,
        lambda run: run.seed < 2 and run.method != "supcon",
    ],
)
def test_some_recorded(store, keep):
    kept = [run for run in of_page() if keep(run)]
    assert lab(kept)["lab-read"].text.startswith(f"{len(kept)} of {len(of_page())} are recorded")


def test_all_recorded(store):
    shown = lab(of_page())
    assert shown["lab-figure"].drawn
    assert "3 seeds can be compared" in shown["lab-read"].text
    assert "minus CE: the mean is above zero in 8 of 8 tasks" in shown["lab-verdict"].text
    shares = shown["lab-share"].value
    assert list(shares.index) == [0.1, 0.5, 0.9, 1.0]
    assert shares.loc[1.0, "minus CE"] == ""
    ours = shown["paper-table"].value["ours, CIFAR-10"]
    assert ours["few-shot gain on CE, up to"].startswith("+2.")
    assert ours["ImageNet-1k top-1"] == "–"
    assert len(shown["records"].value) == len(of_page())


def test_bad_input_is_refused_before_training():
    with mock.patch.object(train, "fit", side_effect=AssertionError("trained")):
        found = PAGE.run("by-hand")
        PAGE.run("bad-input", into=found)
    for attempt in found["attempts"].values():
        with pytest.raises((ValueError, TypeError)):
            attempt()


def test_no_number_of_the_paper_but_the_abstracts():
    for number in ("86.14", "3.32", "3.41"):
        assert number in PAGE.code["paper-table"]
    assert "our reading" in PAGE.prose
    assert "As recalled, unverified" in PAGE.prose
