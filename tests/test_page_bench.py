"""The page of all methods on one bench: its choice, its statistics, and what it says of Records."""

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from cells import Page, made_up_record, study
from scipy import stats

from hcl import runs, sweeps

PAGE = Page("beyond/bench")
STUDY, RELATIVES = study("bench-lab"), study("relatives-lab")
TUNING = [run for run in STUDY if run.seed == 10]
LAB = [name for name in PAGE.code if name.startswith(("lab-", "graphs", "paper-", "records"))]
QUICK = [name for name in PAGE.body if name not in LAB]
LAB_FORM = {
    "study": "bench-lab", "missing": "refuse", "data": "cifar10", "size": 16, "n_train": 10000,
    "encoder": "small", "epochs": 10, "batch": 256, "lr": 0.001, "hidden_dim": 512, "out_dim": 128,
    "settings": [], "seeds": [0, 1, 2, 3, 4],
}  # fmt: skip
TINY = {
    "n_train": 256, "epochs": 1, "hidden_dim": 8, "out_dim": 4, "seeds": [0, 1], "kept": 200,
    "settings": [
        {"method": "nt_xent", "temperature": [0.5, 0.2]},
        {"method": "hard", "beta": [1.0, 2.0], "tau_plus": 0.0},
        {"method": "supcon", "temperature": [0.5, 0.2]},
        {"method": "hard_scl", "beta": [1.0, 2.0]},
    ],
}  # fmt: skip
WORTH = {  # made up: what a method adds to SimCLR's accuracy
    "HCL": 0.05, "Ring": -0.04, "UnReMix": 0.01, "SCL": 0.02, "SupCon": 0.1, "H-SCL": 0.14,
    "SCHaNe": 0.08,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page in a tiny form, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        return PAGE.outputs(*PAGE.body, **TINY)


def helpers(**given):
    """The functions of the page, with an empty benchmark."""
    page = PAGE.define(*PAGE.body, **given)
    page["STEPS"] = {"SimCLR": "1", "HCL": "1.02 (1.00 to 1.05)", "Ring": "1.30 (1.20 to 1.40)"}
    setting = {"encoder": "small", "batch": 256, "size": 32}
    page["TIMED"] = {"setting": setting, "provenance": {"device": "CPU"}}
    return page


def name_of(run):
    if run.synthetic:
        return "MoCHi" if run.method == "nt_xent" else "SSCL"
    names = {"nt_xent": "SimCLR", "hard": "HCL", "ring": "Ring", "unremix": "UnReMix", "scl": "SCL",
             "supcon": "SupCon", "hard_scl": "H-SCL", "schane": "SCHaNe"}  # fmt: skip
    return names.get(run.method, run.method)


def store(wanted, *, best=(), noise=0.002):
    """Made-up Records; a setting in `best` is better by 0.03 on the tuning seed."""
    for number, run in enumerate(wanted):
        jitter = np.random.default_rng(number).normal(0, noise)
        knn = 0.4 + 0.01 * run.seed + WORTH.get(name_of(run), 0.0) + jitter
        linear = knn + 0.1 + 0.03 * (run.digest in best)
        metrics = {"knn": knn, "linear": linear, "overlap": 0.3, "svc": linear}
        runs.save(made_up_record(run, metrics))


def full():
    """The whole study recorded: one setting of each method best, judged on five seeds."""
    by_name = {}
    for run in TUNING:
        by_name.setdefault(name_of(run), []).append(run)
    best = [settings[2] for settings in by_name.values()]
    store(TUNING, best={run.digest for run in best})
    judging = [replace(run, seed=seed) for run in best for seed in range(5)]
    store(judging)
    return best, judging


# --- the page


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_study_gives_every_method_six_settings_on_the_tuning_seed():
    page = helpers(**LAB_FORM)
    page["base"] = {}
    wanted = page["tuning_runs"]("bench-lab", [])
    assert wanted == TUNING
    df = page["bench"](wanted, missing="refuse")
    assert set(df.groupby("name")["setting"].nunique()) == {6}
    assert df.groupby("labels")["name"].nunique().to_dict() == {False: 10, True: 4}
    words = df.assign(words=page["in_words"](df)).groupby("name")["words"].unique()
    assert all(len(of_method) == 6 for of_method in words)  # a setting is known by its words
    assert "t = 0.5, hardest = 64, between = 32, with anchor = 16" in words["MoCHi"]
    assert "t = 0.2, α = 0.7, concentration = 1" in words["BCL"]
    same = ("data", "encoder", "epochs", "batch", "lr", "optimizer", "hidden_dim", "out_dim")
    assert all(len({getattr(run, name) for run in wanted}) == 1 for name in same)


def test_the_quick_form_gives_every_method_as_many_settings(whole):
    variables, _ = whole
    given = PAGE.run()
    quick = sweeps.expand(
        {"data": "sphere", "encoder": "mlp", "epochs": 1, "seed": 10}, given["settings"]
    )
    sizes = pd.Series([name_of(run) for run in quick]).value_counts()
    assert set(sizes) == {3}
    assert set(variables["budget"]) == {2}


def test_nothing_recorded_is_said_and_nothing_fails(whole):
    _, shown = whole
    assert shown["lab-read"].text.startswith(
        "*Tuning seed:* 0 of 84 runs are recorded, all settings"
    )
    assert "of 0 of 14 methods" in shown["lab-read"].text
    assert "no method has all its settings recorded yet" in shown["lab-guide"].text
    assert "nothing can be compared yet" in shown["lab-guide"].text
    assert "settings not all recorded: 0 of 6 of all methods" in shown["lab-check"].text
    assert "BCL: printed +1.4; here not recorded yet" in shown["paper-words"].text
    assert shown["graphs"].text == "Nothing is recorded yet."


def test_the_tiny_form_draws_and_judges_on_other_seeds(whole):
    variables, shown = whole
    drawn = ("tuning-figure", "differences-figure", "ranks", "histograms")
    assert all(shown[name].drawn for name in drawn)
    assert set(variables["final"]["seed"]) == {0, 1}
    assert set(variables["tuned"]["seed"]) == {10}
    assert "start with" in shown["guide"].text
    assert "8 of 8 runs." in shown["judge"].text
    tuned, chosen = variables["tuned"], variables["chosen"]
    for name, part in tuned.groupby("name"):
        best = chosen.set_index("name").loc[name, "linear"]
        assert best == max(part["linear"])


def test_the_lab_form_refuses_to_train_and_runs_with_half_of_it():
    store(TUNING[:20])
    page, shown = PAGE.outputs(*QUICK, **LAB_FORM)
    assert len(page["chosen"]) == 3
    assert not page["final"]["recorded"].any()
    assert "20 of 84 runs" in shown["tuning"].text
    assert shown["tuning-figure"].drawn
    assert not shown["differences-figure"].drawn
    assert "0 of 15 runs" in shown["judge"].text
    nothing = PAGE.outputs(*QUICK, **{**LAB_FORM, "study": "relatives-lab", "tuning_seed": 2})
    assert not nothing[0]["tuned"]["recorded"].any()


def test_a_full_study_is_read_chosen_and_compared():
    best, judging = full()
    held = judging[0]
    z = np.random.default_rng(0).normal(size=(20, 4))
    metrics = {"knn": 0.4, "linear": 0.5, "overlap": 0.3}
    arrays = {"z": z, "labels": np.arange(20) % 2, "of": 20}
    runs.save(made_up_record(held, metrics), arrays=arrays)
    page, shown = PAGE.outputs(*PAGE.body, **LAB_FORM)
    assert shown["guide"].text in shown["lab-guide"].text  # one code path
    names = ("ranks", "differences-figure", "histograms")
    assert set(page["lab_chosen"]["setting"]) == {run.digest for run in best}
    assert page["lab_final"]["recorded"].all()
    assert len(page["differences"](page["lab_final"], "linear")) == 13
    assert all(shown[f"lab-{name}"].drawn for name in names)
    text = shown["lab-guide"].text
    assert "13 comparisons" in text
    assert re.search(r"without labels, start with \*\*HCL\*\* \(\+[45]\.\d points, 95", text)
    assert re.search(r"with labels, start with \*\*H-SCL\*\* \(\+[34]\.\d points, 95", text)
    assert "worse: Ring" in text
    assert re.search(r"shown to differ from SimCLR, of 9 others, by linear probe better: HCL", text)
    assert re.search(r"; by kNN better: HCL.*, worse: Ring", text)
    assert "labels in the loss, SupCon minus SimCLR: +" in text
    assert "Debiased minus SimCLR: printed +4.1; here" in shown["paper-words"].text
    assert "not told apart from zero" in shown["paper-words"].text
    assert re.search(
        r"HCL minus SimCLR: printed \+7.3; here \+[45].*: shown, in the same direction",
        shown["paper-words"].text,
    )
    assert "the study file has no lines for judging seeds yet" in shown["lab-check"].text or (
        "of 14 methods: the file has the chosen setting" in shown["lab-check"].text
    )


# --- the choice


def test_what_the_tuning_seed_shows_is_in_no_result():
    """Accuracies of the tuning seed move the choice, never the table of differences."""
    full()
    page = helpers(**LAB_FORM)
    df = page["bench"](TUNING, missing="refuse")
    df["words"] = page["in_words"](df)
    chosen = page["choose"](df, "linear")
    final = page["judge"](chosen, [0, 1, 2, 3, 4], missing="refuse")
    assert 10 not in set(final["seed"])
    higher = df.assign(linear=df["linear"] + np.where(df["name"] == "Ring", 0.3, 0.0))
    again = page["choose"](higher, "linear")
    assert list(again["setting"]) == list(chosen["setting"])
    gains = page["tuning_gains"](df, "linear")
    ring = sorted(df.loc[df["name"] == "Ring", "linear"])
    assert gains["Ring"] == pytest.approx(ring[-1] - (ring[2] + ring[3]) / 2)


def test_a_method_is_chosen_for_only_when_all_its_settings_are_there():
    store([run for run in TUNING if run.method != "ring"])
    store([run for run in TUNING if run.method == "ring"][:5])
    page = helpers()
    df = page["bench"](TUNING, missing="refuse")
    assert set(df["name"]) - set(page["choose"](df, "linear")["name"]) == {"Ring"}
    assert "Ring" not in page["tuning_gains"](df, "linear")


def test_the_file_is_checked_against_the_choice():
    best, judging = full()
    page = helpers()
    df = page["bench"](TUNING, missing="refuse")
    df["words"] = page["in_words"](df)
    chosen = page["choose"](df, "linear")
    assert page["checked"](chosen, judging, df) == [
        "14 of 14 methods: the file has the chosen setting"
    ]
    assert page["checked"](chosen, [], df)[0].startswith("the study file has no lines")
    other = [replace(TUNING[0], seed=0), *judging[5:-5]]
    said = page["checked"](chosen, other, df)
    assert said[0].startswith("12 of 14")
    assert said[1] == "SimCLR: chosen t = 0.5, the file has **t = 1**"
    assert said[2].endswith("the file has **none**")
    early = page["checked"](chosen[chosen["name"] != "SCHaNe"], judging, df)
    assert early[-1] == "listed before all their settings were recorded: SCHaNe"
    missing = page["awaited"](df, chosen, page["judge"](chosen, [4, 5], missing="refuse"))
    assert missing[0] == "settings not all recorded: none"
    assert missing[1] == "judging seeds not all recorded: 1 of 2 of all methods"
    some = page["awaited"](df, chosen[:0], page["judge"](chosen[:2], [4, 5], missing="refuse"))
    assert some[1].endswith("recorded: 1 of 2 of SimCLR, DCL")
    assert {run.digest for run in best} == set(chosen["setting"])


# --- the statistics


@pytest.mark.parametrize(("n", "said"), [(3, "0.85"), (6, "1.27"), (30, "2.04")])
def test_the_luck_of_the_best_of_n(n, said):
    best = np.random.default_rng(n).normal(size=(200_000, n)).max(axis=1).mean()
    assert helpers()["best_of"](n) == pytest.approx(best, abs=0.01)
    assert f"{helpers()['best_of'](n):.2f}" == said
    assert f"${said}\\,\\sigma$" in PAGE.prose


def test_what_one_method_in_twenty_gains_by_luck():
    """Against sorted draws of another generator; the page's prose has no number of it."""
    for n, said in ((3, 2.16), (6, 2.43)):
        draws = np.sort(np.random.RandomState(n).normal(size=(100_000, n)), axis=1)
        middle = (draws[:, (n - 1) // 2] + draws[:, n // 2]) / 2
        found = helpers()["rare_gain"](n)
        assert np.mean(draws[:, -1] - middle > found) == pytest.approx(0.05, abs=0.004)
        assert found == pytest.approx(said, abs=0.02)


def test_holm_is_its_equation():
    p = pd.Series([0.03, 0.001, math.nan, 0.2, 0.004, 0.021], index=list("abcdef"))
    found = helpers()["holm"](p)
    ordered = sorted(p.dropna())
    m = len(ordered)
    for name, value in p.dropna().items():
        i = ordered.index(value) + 1
        assert found[name] == pytest.approx(
            max(min(1, (m - j + 1) * ordered[j - 1]) for j in range(1, i + 1))
        )
    assert math.isnan(found["c"])


def test_holm_rarely_calls_a_difference_where_there_is_none():
    draw, holm = np.random.default_rng(0), helpers()["holm"]
    calls = [(holm(pd.Series(draw.uniform(size=13))) <= 0.05).any() for _ in range(300)]
    assert np.mean(calls) < 0.09
    assert f"{1 - 0.95**13:.2f}" == "0.49"
    assert "0.49$" in PAGE.prose


def test_noise_is_the_residual_of_two_factors():
    """Against least squares on indicators of method and seed."""
    draw = np.random.default_rng(1)
    rows = [
        {"name": m, "seed": s, "linear": 0.1 * i + 0.05 * s + draw.normal(0, 0.01)}
        for i, m in enumerate("abcd")
        for s in range(5)
    ]
    df = pd.DataFrame(rows)
    x = pd.get_dummies(df[["name", "seed"]].astype(str)).to_numpy(float)
    fitted, _, rank, _ = np.linalg.lstsq(x, df["linear"].to_numpy(), rcond=None)
    left = df["linear"] - x @ fitted
    assert helpers()["noise"](df, "linear") == pytest.approx(
        math.sqrt((left**2).sum() / (len(df) - rank))
    )
    assert math.isnan(helpers()["noise"](df[df["seed"] == 0], "linear"))


def test_differences_are_paired_within_groups():
    names = {"SimCLR": 0.0, "HCL": 0.05, "SupCon": 0.1, "SCL": 0.07}
    rows = [
        {"name": n, "labels": n.startswith("S") and n != "SimCLR", "seed": s,
         "linear": 0.5 + worth + 0.1 * s + 0.01 * (s == 1) * (n == "HCL")}
        for n, worth in names.items() for s in range(3)
    ]  # fmt: skip
    found = helpers()["differences"](pd.DataFrame(rows), "linear").set_index(["name", "baseline"])
    assert set(found.index) == {("HCL", "SimCLR"), ("SCL", "SupCon"), ("SupCon", "SimCLR")}
    row = found.loc[("HCL", "SimCLR")]
    d = np.array([0.05, 0.06, 0.05])
    assert row["difference"] == pytest.approx(d.mean())
    assert row["high"] - row["difference"] == pytest.approx(4.302653 * d.std(ddof=1) / 3**0.5)
    one = pd.DataFrame(rows)[lambda df: df["seed"] == 0]
    assert helpers()["differences"](one, "linear")["Holm p"].isna().all()
    assert not len(helpers()["differences"](pd.DataFrame(rows)[:0], "linear"))
    page = helpers()
    assert page["honesty"](page["differences"](one, "linear")).startswith("one seed in common")
    said = page["honesty"](found.reset_index())  # 3 comparisons, 2 degrees of freedom
    t = stats.ttest_1samp([1.0, 2.0, 6.0], 0).confidence_interval(1 - 0.05 / 3)
    half = (t.high - t.low) / 2 / stats.sem([1.0, 2.0, 6.0])
    assert f"With 3 seeds the largest has to be {half:.1f} standard errors from zero" in said


def test_costs_are_read_whatever_is_measured():
    page = helpers()
    result = {"SimCLR_seconds": 1.0, "Ring_ratio": 1.3, "Ring_q1": 1.2, "Ring_q3": 1.4,
              "HCL β=1_ratio": 1.0}  # fmt: skip
    costs = page["step_costs"](result)
    assert costs == {"SimCLR": "1", "Ring": "1.30 (1.20 to 1.40)", "HCL": "1.00 (nan to nan)"}
    said = page["costs_words"](["SimCLR", "Ring", "HCL", "BCL"], page["STEPS"])
    assert "with Ring (1.30) of the 3 methods" in said
    assert said.endswith("not measured: 1 more")


def test_the_guide_calls_nothing_better_without_evidence():
    page = helpers(**LAB_FORM)
    rng = np.random.default_rng(3)
    rows = [
        {"name": n, "labels": n in ("SupCon", "SCL"), "seed": s, "recorded": True,
         "linear": 0.5 + rng.normal(0, 0.01), "knn": 0.4 + rng.normal(0, 0.01)}
        for n in ("SimCLR", "HCL", "Ring", "SupCon", "SCL") for s in range(5)
    ]  # fmt: skip
    tuned = pd.DataFrame({"name": ["SimCLR"] * 3, "linear": [0.4, 0.45, 0.5],
                          "setting": list("abc")})  # fmt: skip
    lines = page["guide"](tuned, pd.DataFrame(rows), "linear")
    text = "\n".join(lines)
    assert "4 comparisons" in text
    assert "start with **SimCLR** (no method is shown to be better than SimCLR)" in text
    assert "start with **SupCon**" in text
    assert "tuning SimCLR gave +5.0 points over its median setting *on the tuning seed" in text
    assert "the largest of 2 differences to a tuned SimCLR *on the judging seeds* is" in text
    assert "seen about half of the time without Holm's rule" in lines[0]


def test_equal_settings_rarely_pass_the_bar_of_luck():
    """Of methods whose settings differ by noise alone, few gain more than the page's bar."""
    page, draw = helpers(**LAB_FORM), np.random.default_rng(5)
    names = [f"m{i}" for i in range(400)]
    sigma = 0.01
    tuned = pd.DataFrame(
        [{"name": m, "linear": draw.normal(0.5, sigma), "setting": f"{m}{k}", "temperature": 0.5}
         for m in names for k in range(6)]
    )  # fmt: skip
    final = pd.DataFrame(
        [{"name": m, "seed": s, "linear": draw.normal(0.5, sigma)} for m in names for s in range(5)]
    )
    said = page["tuning_words"](tuned, tuned[:0], final, "linear")[1]
    passed = int(re.search(r"; (\d+) of 400 methods gained more", said)[1])
    assert 8 <= passed <= 34  # 20 expected, and 180 would gain more than the mean


# --- graphs, exercises


def test_graphs_are_compared_within_a_data_set():
    wanted = [run for run in RELATIVES if run.data in ("mutag", "ptc_mr")]
    assert len(wanted) == 40
    store([run for run in wanted if run.data == "mutag"])
    page = helpers()
    page["lab_tuned"] = page["bench"](TUNING[:1], missing="refuse")
    page, shown = PAGE.outputs("graphs", "graphs-words", into=page)
    assert "20 of 40 are recorded. Of 3 comparisons, the interval lies above zero in 2" in (
        shown["graphs-words"].text
    )
    assert "UnReMix" in shown["graphs"].text
    assert "ptc_mr" not in shown["graphs"].text


def test_solutions_run(whole, capsys):
    variables, _ = whole
    first, second, third = PAGE.solutions()
    for source in (first, second, third):
        exec(source, dict(variables))
    said = capsys.readouterr().out
    assert said.startswith("1.267")
    assert "Bonferroni" in said
