"""The page on learning speed: its formulas, its crossings, and what it says of any Records."""

import ast
import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest
from cells import Page, made_up_record, study

from hcl import notebooks, runs

PAGE = Page("images/learning-speed")
PROSE = " ".join(PAGE.prose.split())
STUDY = study()
LAB = [name for name in PAGE.code if name.startswith(("lab-", "paper-", "records"))]
BLOCK = [r for r in STUDY if r.eval_every]
TINY = {
    "n_train": 64, "batch": 32, "epochs": 2, "hidden_dim": 8, "out_dim": 4, "seeds": [0],
    "faster_lrs": [0.01],
}  # fmt: skip


@pytest.fixture(scope="module")
def page():
    return PAGE.define(
        "crossing", "needed", "verdict", "match", "match-words", "temperature", "vertical"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page in a tiny form, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        return PAGE.show(*PAGE.body, **TINY)


# --- the mathematics


@pytest.mark.parametrize(
    ("bar", "at"),
    [(0.1, 0.0), (0.2, 1.0), (0.25, 1.5), (0.3, 2.0), (0.44, 5.6), (0.5, 6.0), (0.6, math.inf)],
)
def test_a_crossing_is_on_the_line_between_two_looks(page, bar, at):
    epochs, accuracies = np.array([0, 2, 4, 6]), np.array([0.1, 0.3, 0.2, 0.5])
    found = page["crossing"](epochs, accuracies, bar)
    assert found == pytest.approx(at)
    if 0 < at < math.inf:
        assert np.interp(found, epochs, accuracies) == pytest.approx(bar)


def test_a_flat_curve_is_faster_than_itself():
    """Equation speed-noise, and that of the exercise, by counting every order of five looks."""
    from itertools import permutations

    n = 5
    first, good, never_below = [], [], np.zeros(n)
    for order in permutations(range(n)):
        a = np.array(order)
        first.append(1 + int(np.argmax(a >= a[-1])))
        lowest = np.minimum.accumulate(a[::-1])[::-1]
        good.append(1 + int(np.argmax(lowest >= a[-1])))  # from here on nothing is lower
        never_below += [(a[:k] < a[-1]).all() for k in range(n)]
    harmonic = sum(1 / k for k in range(1, n + 1))
    assert np.mean(first) == pytest.approx(harmonic)
    assert np.mean(good) == pytest.approx(n + 1 - harmonic)
    assert never_below / len(first) == pytest.approx([1 / (k + 1) for k in range(n)])
    sixteen = sum(1 / k for k in range(1, 17))
    assert (f"{sixteen:.1f}", f"{16 / sixteen:.1f}", f"{17 - sixteen:.1f}") == (
        "3.4",
        "4.7",
        "13.6",
    )
    for said in ("that is 3.4:", "4.7 times faster than itself", "here 13.6"):
        assert said in PROSE
    assert sixteen == pytest.approx(math.log(16) + 0.58, abs=0.04)


def test_a_higher_plateau_looks_like_speed(page):
    """Equation speed-plateau against the crossing of two curves on a fine grid."""
    C, kappa, gap = 0.5, 30.0, 0.07
    e = np.linspace(0, 500, 100_001)
    hcl = 0.4 + gap - C * np.exp(-e / kappa)
    for E in (100.0, 400.0):
        bar = 0.4 - C * math.exp(-E / kappa)
        formula = -kappa * math.log(gap / C + math.exp(-E / kappa))
        assert page["crossing"](e, hcl, bar) == pytest.approx(formula, abs=1e-2)
    t100, t400 = (-kappa * math.log(gap / C + math.exp(-E / kappa)) for E in (100, 400))
    assert f"that is {t100:.1f} and {t400:.1f} epochs" in PROSE
    assert f"a factor of {100 / t100:.1f} and one of {400 / t400:.1f}" in PROSE
    assert kappa * math.log(C / gap) == pytest.approx(t400, abs=1e-2)


def test_ratios_of_pushes():
    """What cosine 1 gets over cosine 0: e^(1/t), and e^((1 + beta)/t) for r."""
    for said, ratio in (("e^2=7.4", 1 / 0.5), ("e^4=55", 2 / 0.5), ("e^5=148", 1 / 0.2)):
        assert said in PROSE
        value = said.split("=")[1]
        assert float(f"{math.exp(ratio):.{len(value.replace('.', ''))}g}") == float(value)


# --- the tables


def looks(curves):
    """A frame like the page's: {arm: [accuracies by seed]}, looked at every second epoch."""
    return pd.DataFrame(
        {"arm": arm, "seed": k, "epoch": 2 * i, "knn": a}
        for arm, seeds in curves.items()
        for k, values in enumerate(seeds)
        for i, a in enumerate(values)
    )


PLAIN, LOW, HARD = "SimCLR, t = 0.5", "SimCLR, t = 0.2", "HCL β=1, t = 0.5"
CURVES = {
    PLAIN: [[0.1, 0.2, 0.4, 0.3], [0.1, 0.2, 0.3, 0.4]],
    LOW: [[0.1, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.35]],
    HARD: [[0.1, 0.5, 0.2, 0.6], [0.1, 0.3, 0.5, 0.6]],
}


def test_epochs_needed_first_and_for_good(page):
    found = page["needed"](looks(CURVES), PLAIN).set_index(["arm", "seed"])
    assert found["bar"].groupby("seed").first().tolist() == [0.3, 0.4]
    first, good = found["first"], found["for good"]
    assert first[PLAIN].tolist() == pytest.approx([3.0, 6.0])  # 0.3 between 0.2 and 0.4
    assert first[LOW].tolist() == pytest.approx([2.0, math.inf])
    assert first[HARD].tolist() == pytest.approx([1.0, 3.0])
    assert good[HARD].tolist() == pytest.approx([4.5, 3.0])  # falls to 0.2, is at 0.3 again
    assert good[PLAIN, 0] == pytest.approx(3.0)  # from there it is never below
    table = page["summary"](found.reset_index())
    assert table["arrive"].to_dict() == {PLAIN: "2 of 2", LOW: "1 of 2", HARD: "2 of 2"}
    assert table.loc[HARD, "first"] == "2.0 (1.0 to 3.0)"
    assert table.loc[LOW, "first"] == "never (2.0 to never)"


def test_a_factor_is_a_geometric_mean_with_students_interval(page):
    found = page["needed"](looks(CURVES), PLAIN)
    said = page["factor"](found, HARD, PLAIN)
    logs = np.log([3.0 / 1.0, 6.0 / 3.0])
    half = 12.7062 * abs(logs[0] - logs[1]) / 2
    low, high = np.exp([logs.mean() - half, logs.mean() + half])
    assert said.startswith(f"{np.exp(logs.mean()):.2f} times fewer, 95 % interval {low:.2f} to")
    assert f"{high:.2f}" in said
    assert "includes 1" in said
    assert "not every seed arrives" in page["factor"](found, LOW, PLAIN)
    one = found[found["seed"] == 0]
    assert page["factor"](one, HARD, PLAIN) == "3.00 times fewer, one seed"
    apart = found[(found["arm"] == PLAIN) != (found["seed"] == 0)]
    assert "no seed in common" in page["factor"](apart, HARD, PLAIN)


def test_sentences_say_what_the_curves_have(page):
    said = "\n".join(page["verdict"](looks(CURVES), PLAIN, [LOW, HARD]))
    assert f"**{PLAIN}** first reaches its own end after 4.5 (3.0 to 6.0) epochs" in said
    assert f"**{LOW}** gets there in 1 of 2 seeds" in said
    assert f"**{HARD}** gets there after 2.0 (1.0 to 3.0): 3.0 times fewer by the length" in said
    arm = page["temperature_arm"](looks(CURVES), PLAIN, LOW, HARD)
    assert "To the end of SimCLR, t = 0.2, the best SimCLR" in arm[1]
    rows = page["at_epochs"](looks(CURVES), HARD, PLAIN)
    assert rows.index.get_level_values("epoch").tolist() == [2, 4, 6]
    assert rows["difference ± se"].iloc[-1] == "+25.0 ± 5.0"


def test_matches_are_crossings_of_every_height(page):
    table = page["matches"](looks(CURVES), PLAIN)
    two = table[(table["arm"] == HARD) & (table["seed"] == 1)].set_index("E")["match"]
    assert two.to_dict() == pytest.approx({2: 1.0, 4: 2.0, 6: 3.0})
    low = table[table["arm"] == LOW]
    assert sorted(set(low["E"])) == [2, 4]  # a seed never is where SimCLR ends
    own = table[table["arm"] == PLAIN]
    assert (own["match"] <= own["E"]).all()
    said = page["growth"](looks(CURVES), PLAIN, HARD)
    medians = table[table["arm"] == HARD].groupby("E")["match"].median()
    for e in (2, 4, 6):
        assert f"{e / medians[e]:.1f} after {e}" in said


# --- the page as a whole


def test_the_page_runs_and_every_parameter_is_used(whole):
    page, shown = whole
    assert not PAGE.unused_parameters()
    assert len(page["df"]) == 5
    assert sorted(page["looks"]["epoch"].unique()) == [0, 1, 2]
    assert page["looks"]["arm"].nunique() == 5
    assert shown["lab-read"].startswith("0 of ")
    assert "Too little" in shown["lab-verdict"]
    assert "as recalled, unverified" in " ".join(shown["paper-table"].index)
    assert re.search(r"difference is -?\d+% of a step", shown["clock"])
    assert all(digest in shown["records"] for digest in page["df"]["digest"])


def test_the_code_of_the_exercises_runs(whole, capsys):
    snippets = PAGE.solutions()
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, dict(whole[0]))
    assert capsys.readouterr().out


def record(r, top, rate):
    """A Record of a Run that was never trained, with a smooth history."""
    seen = range(0, r.epochs + 1, r.eval_every)
    history = [{"epoch": e, "knn": top - 0.2 * math.exp(-e / rate) + 0.01 * r.seed} for e in seen]
    return made_up_record(r, {"knn": history[-1]["knn"], "linear": 0.5}, history)


def test_recorded_histories_are_read_and_told(whole):
    assert {r.method for r in BLOCK} == {"nt_xent", "hard"}
    for r in BLOCK:
        top = 0.45 if r.method == "hard" and r.temperature == 0.5 else 0.40
        runs.save(record(r, top, 5.0))
    plain = next(r for r in STUDY if not r.eval_every and r.epochs)
    looked = dataclasses.replace(plain, eval_every=1)
    runs.save(dataclasses.replace(record(looked, 0.4, 5.0), run=plain, history=[]))
    shown = PAGE.show(*LAB, into=dict(whole[0]))[1]
    n = len(BLOCK)
    assert shown["lab-read"].startswith(f"{n} of {n} are recorded")
    assert list(shown["lab-needed"].index)
    E = BLOCK[0].epochs
    formula = -5.0 * math.log(0.05 / 0.2 + math.exp(-E / 5.0))
    hcl = float(shown["paper-table"].loc["ours, CIFAR-10", "HCL's"])
    assert hcl == pytest.approx(formula, rel=0.05)  # the line between two looks
    assert "does not include" in shown["lab-verdict"]
    assert plain.digest not in shown["records"]


@pytest.mark.parametrize("keep", [("hard", 0.5), ("nt_xent", 0.5), ("nt_xent", 0.2)])
def test_some_records_do_for_some_of_the_sentences(whole, keep):
    for r in BLOCK:
        if (r.method, r.temperature) == keep and r.seed < 2:
            runs.save(record(r, 0.4, 5.0))
    shown = PAGE.show(*LAB, into=dict(whole[0]))[1]
    assert shown["lab-read"].startswith("2 of ")
    own = keep == ("nt_xent", 0.5)
    assert ("Too little" in str(shown["lab-verdict"])) != own


LAB_FORM = {
    "study": "cifar10-lab", "data": "cifar10", "n_train": 10000, "size": 16, "encoder": "small",
    "epochs": 20, "eval_every": 2, "watch": "losses", "batch": 256, "lr": 0.001, "faster_lrs": [],
    "hidden_dim": 512, "out_dim": 128, "seeds": [0, 1, 2],
}  # fmt: skip
PAPER_FORM = {
    "study": "cifar10-paper", "data": "cifar10", "encoder": "resnet50", "epochs": 200,
    "eval_every": 5, "batch": 256, "lr": 0.001, "faster_lrs": [], "hidden_dim": 512,
    "out_dim": 128, "temperatures": [0.5], "seeds": [0, 1, 2], "precision": "bfloat16",
    "protocol": "released",
}  # fmt: skip


@pytest.mark.parametrize(("form", "n"), [(LAB_FORM, 12), (PAPER_FORM, 6)])
def test_the_larger_forms_read_runs_of_their_study(form, n):
    """With these parameters every Run of the page is one of the study, so nothing is trained."""
    page = PAGE.run(**notebooks.checked(PAGE.path, form))
    tree = ast.parse(PAGE.code["train"])
    exec(compile(ast.Module(tree.body[:-2], []), "train", "exec"), page)
    assert len(page["asked"]) == n
    looked_at = {r.digest for r in study(form["study"]) if r.eval_every}
    assert {r.digest for r in page["asked"]} <= looked_at
