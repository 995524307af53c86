"""The page on hardness: its sentences tell what was put in, its filter finds its own Records."""

import math
import re
import warnings

import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study

from hcl import compare, losses, runs, sweeps

PAGE = Page("images/hardness")
STUDY = study()
RISES = {0.0: 0.0, 0.5: 0.02, 1.0: 0.04, 2.0: 0.03, 4.0: 0.02, 8.0: -0.01}  # by beta, at t = 0.5


def made_up(run):
    """A Record with a peak at beta = 1 for t = 0.5, and at lower t a gain of 3 points, no peak."""
    effect = RISES.get(run.beta, 0.0) if run.temperature == 0.5 else 0.03 - 0.01 * run.beta
    noise = int(run.digest[:4], 16) / 65535 * 0.001
    value = 0.5 + 0.02 * run.seed + effect + noise - 0.2 * (run.epochs == 0)
    names = ("loss", "knn", "linear", "alignment", "uniformity", "overlap", "clamp_share")
    return made_up_record(run, dict.fromkeys(names, value))


def read(monkeypatch, store, recorded=()):
    """The page, its runs made up, with a store of some of the study's Records."""
    for run in recorded:
        runs.save(made_up(run), store=store)
    monkeypatch.setenv("HCL_RUNS", str(store))
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: [made_up(r) for r in wanted])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        return PAGE.show(*PAGE.body)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        few = [r for r in STUDY if r.method in ("nt_xent", "debiased", "hard")]
        return read(patch, tmp_path_factory.mktemp("runs"), few)


# --- the mathematics


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
def test_the_objective_is_the_page_s(tau_plus):
    """Equation eq-sweep-objective, a float64 loop over anchors."""
    t, beta = 0.5, 1.7
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(10, 4, generator=generator).double(), dim=1)
    total = 0.0
    for i in range(10):
        other = (i + 5) % 10
        s = [float(z[i] @ z[j]) / t for j in range(10) if j not in (i, other)]
        p, weight = float(z[i] @ z[other]) / t, sum(math.exp(beta * x) for x in s)
        g = sum(math.exp(beta * x) / weight * math.exp(x) for x in s)
        negatives = (len(s) * g - tau_plus * len(s) * math.exp(p)) / (1 - tau_plus)
        total += math.log1p(max(negatives, len(s) * math.exp(-1 / t)) * math.exp(-p)) / 10
    found = losses.hard(z[:5], z[5:], temperature=t, beta=beta, tau_plus=tau_plus)
    assert found.item() == pytest.approx(total)


def test_the_floor_is_where_the_page_says():
    said = re.search(r"which is ([\d.]+) at \$t = 0.5\$ but ([\d.]+) at \$t = 0.2\$", PAGE.prose)
    for t, at in ((0.5, said[1]), (0.2, said[2])):
        floor = 0.1 * math.exp(1 / t) + 0.9 * math.exp(-1 / t)
        assert float(at) == pytest.approx(floor, abs=0.05)


# --- the sentences


def test_the_verdict_tells_the_rise_and_the_fall_that_were_put_in(whole):
    said = whole[1]["verdict"]
    assert "At t = 0.5, rise from β = 0 to 1: +4." in said or "to 1: +3.9" in said
    assert "At t = 0.5, fall from β = 1 to 4: -2.0" in said or "to 4: -1.9" in said
    assert "At t = 0.2, no rise up to β = 4" in said
    assert "SimCLR, t from 0.5 to 0.2: +3.0" in said or "to 0.2: +2.9" in said
    assert "Best over temperature, HCL β=1 at t = 0.5 against SimCLR at t = 0.2" in said
    assert "0.2, the best temperature of SimCLR, is the lowest" in said


def test_each_row_is_at_the_better_of_its_temperatures(whole):
    table = whole[1]["best-table"]["best t"]
    assert table.to_dict() == {
        "SimCLR": 0.2, "HCL β=0.5": 0.2, "HCL β=1": 0.5, "HCL β=2": 0.5, "HCL β=4": 0.5,
    }  # fmt: skip


def test_a_hand_made_frame_is_read_right(whole):
    """One seed gets no interval; a method that has one temperature is at no edge."""
    page = whole[0]
    row = {"difference": 0.03, "se": math.nan, "n": 1, "low": math.nan, "high": math.nan}
    assert page["in_words"](pd.Series(row)) == "+3.0 points, one seed: no standard error"
    row |= {"se": 0.01, "n": 5, "low": 0.002, "high": 0.058}
    assert page["in_words"](pd.Series(row)) == (
        "+3.0 ± 1.0 points, 95 % interval +0.2 to +5.8, 5 seeds"
    )
    frame = pd.DataFrame(
        [("nt_xent", "A", t, x) for t, x in ((0.1, 1), (0.2, 3), (0.5, 2))]
        + [("hard", "B", 0.5, 9)],
        columns=["method", "label", "temperature", "knn"],
    )
    assert page["at_an_edge"](frame, "knn") == []
    assert len(page["at_an_edge"](frame[frame["temperature"] != 0.5], "knn")) == 1


# --- what is recorded


def test_the_page_reads_its_own_block_and_no_other(whole):
    """Each cell has each seed once, and no Run with labels, queues or other training is in it."""
    lab = whole[0]["lab"]
    assert len(lab) == whole[0]["wanted"]
    assert not lab.duplicated(["label", "encoder", "temperature", "seed"]).any()
    assert set(lab["epochs"]) == {0, 5}
    assert "n_train" not in lab or lab["n_train"].isna().all()
    plain = {"queue": 0, "positives": "views", "anneal": "none", "optimizer": "adam"}
    assert all((lab[name] == value).all() for name, value in plain.items())
    assert {"HCL β=8", "HCL β=8, τ⁺=0.1", "Debiased", "raw input"} <= set(lab["label"])
    said = whole[1]["lab-verdict"]
    assert "At t = 0.5, fall from β = 1 to 8: -5." in said or "to 8: -4.9" in said
    assert "τ⁺ = 0.1, fall from β = 1 to 8" in said
    assert whole[1]["paper-table"].loc["HCL β=6"].tolist()[:2] == ["–", "–"]
    assert len(whole[1]["records"]) == len(lab)


def test_a_study_that_has_just_begun_can_be_read(monkeypatch, tmp_path):
    """One seed of some cells: shown in the table, and nothing is concluded."""
    begun = [r for r in STUDY if r.seed == 0 and r.method in ("nt_xent", "hard")]
    _, shown = read(monkeypatch, tmp_path, begun)
    assert "±" not in shown["lab-table"].to_string()
    assert shown["lab-table"].loc["SimCLR", ("kNN", 0.2)].startswith("53.")
    assert "Nothing is recorded yet" in shown["lab-verdict"]
    assert shown["lab-paired"] == "Nothing to compare yet."
    assert "cannot be judged" in shown["ordering"]


def test_nothing_recorded_is_said_and_nothing_trained(monkeypatch, tmp_path):
    _, shown = read(monkeypatch, tmp_path)
    assert shown["lab-read"].startswith("0 of ")
    assert shown["lab-table"] == "Nothing is recorded yet."
    assert shown["records"] == "None yet."
    assert (shown["paper-table"]["ours, CIFAR-10"] == "–").all(axis=None)
    assert list(tmp_path.iterdir()) == []


def test_with_a_class_prior_the_page_has_those_arms_too(monkeypatch, tmp_path):
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: [made_up(r) for r in wanted])
    names = [n for n in PAGE.body if n not in ("pairs", "data-figure")]
    given = {"betas": [0.5, 1.0], "betas_debiased": [1.0], "tau_plus": 0.1, "seeds": [0, 1]}
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    page, shown = PAGE.show(*names[: names.index("verdict") + 1], **given)
    assert set(page["df"]["label"]) == {
        "SimCLR", "Debiased", "HCL β=0.5", "HCL β=1", "HCL β=1, τ⁺=0.1",
    }  # fmt: skip
    assert "τ⁺ = 0.1, rise from β = 0 to 1" in shown["verdict"]


def test_one_temperature_and_one_seed_will_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: [made_up(r) for r in wanted])
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    names = [n for n in PAGE.body if n not in ("pairs", "data-figure")]
    upto = names[: names.index("baseline-words") + 1]
    _, shown = PAGE.show(*upto, temperatures=[0.5], seeds=[0])
    assert "one seed: no standard error" in shown["verdict"]


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_page_uses_the_project_s_helpers_and_says_who_made_the_records(whole):
    assert compare.made_by(whole[0]["lab"]) in whole[1]["lab-read"]
