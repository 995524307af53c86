"""The page on the six tasks: its small task, its counts, and what it says of any Records."""

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from scipy import optimize
from sklearn.linear_model import LogisticRegression

from hcl import compare, runs, sentence_tasks

PAGE = Page("sentences/tasks")
TABLES = ("named", "paired", "paired-figure", "verdict", "lab-paired", "lab-each")
LAB = [name for name in PAGE.code if name.startswith(("lab-", "paper-"))] + ["records"]
TINY = {
    "n_train": 200, "max_words": 6, "encoders": ["quickthoughts", "bag"], "width": 4, "hidden": 2,
    "hidden_dim": 4, "out_dim": 3, "epochs": 1, "batch": 50, "betas": [1.0], "temperatures": [0.2],
    "seeds": [0, 1], "largest": 2,
}  # fmt: skip
TASKS = list(sentence_tasks.NAMES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page in a tiny form, where nothing is recorded and no task is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("HCL_DATA", str(tmp_path_factory.mktemp("data")))
        return PAGE.outputs(*PAGE.body, **TINY)


@pytest.fixture(scope="module")
def page():
    return PAGE.define(*TABLES, "lab-verdict", "lab-training", "paper-words")


def test_the_page_runs_and_every_parameter_is_used(whole):
    variables, shown = whole
    assert not PAGE.unused_parameters()
    assert "not on this machine" in shown["six"].text
    assert "SentEval" in shown["six"].text
    assert set(variables["quick"]["objective"]) == {
        "untrained", "quick-thoughts", "plain", "hard, β = 1", "debiased, τ⁺ = 0.01"
    }  # fmt: skip
    assert shown["paired-figure"].drawn
    assert "0 of " in shown["lab-read"].text
    for name in ("lab-table", "lab-training"):
        assert "no Record yet" in shown[name].text
    for name in ("lab-paired", "lab-each", "lab-verdict"):
        assert "Too little is recorded" in shown[name].text
    assert all(digest in shown["records"].text for digest in variables["df"]["digest"])


def test_the_code_of_the_exercises_runs(whole, capsys):
    snippets = PAGE.solutions()
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, dict(whole[0]))
    said = capsys.readouterr().out
    assert "0.8" in said
    bag = next(line for line in said.splitlines() if line.startswith("bag"))
    assert float(bag.split()[1]) < 1e-6  # a mean knows no order
    gru = next(line for line in said.splitlines() if line.startswith("quickthoughts"))
    assert float(gru.split()[1]) > 1e-4


# --- the six tasks, and the small one


def test_the_six_tasks_are_described_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    folder = tmp_path / "sentences"
    for files in sentence_tasks.TWO_FILES.values():
        for file, lines in zip(files, ("bad <b>\nworse", "good"), strict=True):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(lines)
    for file in sentence_tasks.TREC:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("LOC:city What town ?\nHUM:ind Who ?\n")
    for file in sentence_tasks.MSRP:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("q\ta\tb\tone\ttwo\n1\t2\t3\tIt is so .\tSo it is .\n")
    text = PAGE.outputs("six")[1]["six"].text
    assert "bad &lt;b&gt;" in text
    assert "66.7%" in text  # two of three lines
    assert "It is so . / So it is ." in text
    assert "2 for testing" in text
    assert text.count("ten folds") == 4


def test_the_topic_task_asks_for_held_out_sentences_of_one_topic(whole):
    texts, task = whole[0]["texts"], whole[0]["topic"]
    times = Counter(texts.texts)
    where = {t: texts.classes[texts.book[i]] for i, t in enumerate(texts.texts) if times[t] == 1}
    assert task.n_train == len(task.texts) // 2
    first, second = task.name.split(" / ")
    for text, label in zip(task.texts, task.labels, strict=True):
        assert where[text] == (first, second)[label]
    seen = {texts.classes[k] for k in texts.y_train.tolist()}
    assert not seen & {first, second}
    held = Counter(where[t] for t in (texts.texts[i] for i in texts.x_test.tolist()) if t in where)
    assert {first, second} == {name for name, _ in held.most_common(2)}
    assert len(task.texts) == held[first] + held[second]


def test_retrieval_is_that_of_the_loop_over_blocks(whole):
    z = torch.randn(230, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    book = torch.arange(230) // 17
    shares = []
    for start in (0, 100):
        found = []
        for i in range(start, start + 100):
            mates = [j for j in (i - 1, i + 1) if start <= j < start + 100 and book[j] == book[i]]
            others = [j for j in range(start, start + 100) if j != i]
            best = max(others, key=lambda j: float(z[i] @ z[j]))
            found += [best in mates] if mates else []
        shares.append(np.mean(found))
    assert whole[0]["retrieval"](z, book) == pytest.approx(np.mean(shares))


def test_features_of_word_counts_ignore_order(whole):
    counter = whole[0]["counter"]
    both = counter.transform(["the loop ends.", "Ends the loop."]).toarray()
    assert both[0] == pytest.approx(both[1])
    assert np.linalg.norm(both[0]) == pytest.approx(1)


@pytest.mark.parametrize("labels", [2, 3])
def test_the_regression_minimises_the_displayed_sum(labels):
    """By scipy's minimiser in float64; for two labels with one weight vector."""
    rng = np.random.default_rng(0)
    x, y, c = rng.normal(size=(60, 3)), np.arange(60) % labels, 0.5
    rows = 1 if labels == 2 else labels

    def aim(flat):
        w, b = flat[: 3 * rows].reshape(rows, 3), flat[3 * rows :]
        s = x @ w.T + b
        if labels == 2:
            loss = np.log1p(np.exp(-(2 * y - 1) * s[:, 0])).sum()
        else:
            loss = (np.log(np.exp(s).sum(axis=1)) - s[np.arange(60), y]).sum()
        return (w**2).sum() / 2 + c * loss

    best = optimize.minimize(aim, np.zeros(4 * rows)).x[: 3 * rows].reshape(rows, 3)
    found = LogisticRegression(C=c, tol=1e-8).fit(x, y).coef_
    np.testing.assert_allclose(found, best, atol=1e-4)
    assert "for two labels" in PAGE.text["judge-text"]


# --- the tables


def frame(gain, tasks=("A", "B", "C"), seeds=(0, 1, 2)):
    """A frame like compare.frame's, of two encoders; gain(encoder, t, beta, task, seed) on 0.5."""
    rows = []
    for encoder, ts in (("quickthoughts", [1.0]), ("bag", [0.1, 0.3])):
        arms = [("hard_neighbours", t, b, 0.0, 1) for t in ts for b in (0.0, 1.0, 2.0)]
        arms += [("quick_thoughts", 1.0, 0.0, 0.0, 1)] if encoder != "bag" else []
        arms += [("hard_neighbours", ts[0], 0.0, 0.0, 0), ("hard_neighbours", ts[0], 1.0, 0.1, 1)]
        for (method, t, b, tau, epochs), seed in itertools.product(arms, seeds):
            row = {"encoder": encoder, "method": method, "temperature": t, "beta": b,
                   "tau_plus": tau, "epochs": epochs, "seed": seed, "code": "x"}  # fmt: skip
            if epochs:
                values = {a: 0.5 + 0.1 * seed + gain(encoder, t, b, a, seed) for a in tasks}
            else:
                values = dict.fromkeys(tasks, 0.3 + 0.1 * seed)
            rows.append(row | values)
    return pd.DataFrame(rows)


def gain(encoder, t, beta, task, seed):
    if encoder == "bag" and t == 0.3:
        return 0.02
    return {0.0: 0.0, 1.0: 0.01 + 0.001 * seed, 2.0: -0.02}[beta] * (-1 if task == "C" else 1)


def test_the_untrained_encoder_stands_in_every_arm(page):
    df = page["named"](frame(gain))
    start = df[df["objective"] == "untrained"]
    assert sorted(set(zip(start["encoder"], start["t"], strict=True))) == [
        ("bag", 0.1), ("bag", 0.3), ("quickthoughts", 1.0)
    ]  # fmt: skip
    assert len(start) == 9
    assert df["encoder"].iloc[0] == "quickthoughts"
    bag = df[(df["encoder"] == "bag") & (df["t"] == 0.1)]["objective"].drop_duplicates().tolist()
    assert bag == ["untrained", "plain", "hard, β = 1", "hard, β = 2", "hard, β = 1, τ⁺ = 0.1"]
    table = page["scores"](df, ["A", "B"])
    assert "setting" not in table
    assert table.iloc[0].tolist() == [
        "quickthoughts",
        1.0,
        "untrained",
        "40.0 ± 10.0",
        "40.0 ± 10.0",
    ]


def test_what_else_varies_makes_a_setting(page):
    df = frame(gain)
    longer = df[df["epochs"] > 0].assign(epochs=2, A=0.9)
    both = page["named"](pd.concat([df, longer], ignore_index=True))
    assert set(both["setting"]) == {"epochs=1", "epochs=2"}
    assert "setting" in page["scores"](both, ["A"])
    assert len(page["gains"](both, "A", "plain")) > 0  # no two runs of one seed in one group


def test_gains_and_counts_are_those_of_the_formulas(page):
    df = page["named"](frame(gain))
    found = page["gains"](df, "A", "plain").set_index(["encoder", "t", "objective"])
    row = found.loc[("bag", 0.1, "hard, β = 1")]
    assert row["difference"] == pytest.approx(0.011)
    assert row["se"] == pytest.approx(0.001 / math.sqrt(3))
    assert row["high"] - row["difference"] == pytest.approx(4.3027 * row["se"], rel=1e-4)
    assert found.loc[("bag", 0.3, "untrained"), "difference"] == pytest.approx(-0.22)
    assert page["gains"](df, "A", "none such").empty
    counts = page["counted"](df, ["A", "B", "C"], "plain").set_index(["encoder", "t", "objective"])
    hard = counts.loc[("quickthoughts", 1.0, "hard, β = 1")]
    assert hard["at least as good"] == "2 of 3"
    assert (hard["interval above 0"], hard["interval below 0"]) == (2, 1)
    assert hard["points, mean ± se"] == "+0.4 ± 0.0"  # (1.1 + 1.1 - 1.1) / 3
    assert counts.loc[("bag", 0.3, "hard, β = 2"), "at least as good"] == "3 of 3"  # all are equal
    each = page["by_task"](df, ["A", "C"], "plain").set_index(["encoder", "t", "objective"])
    assert each.loc[("bag", 0.1, "hard, β = 2")].tolist() == [
        "",
        "-2.0 ± 0.0",
        "+2.0 ± 0.0",
        "plain",
    ]
    shown = page["only"](page["shown"](df, "A"))
    pairs = set(zip(shown["objective"], shown["minus"], strict=True))
    assert ("plain", "quick-thoughts") in pairs
    assert ("quick-thoughts", "plain") not in pairs
    assert ("hard, β = 1", "untrained") not in pairs


def test_sentences_say_what_the_frame_has(page):
    df = page["named"](frame(gain))
    said = page["verdict"](df, ["A", "B", "C"])
    assert len(said) == 4  # GRUs against both, the bag at two temperatures against plain
    bag = next(line for line in said if "bag, t = 0.1" in line)
    assert "at least as good as plain: hard, β = 1: 2 of 3; hard, β = 2: 1 of 3" in bag
    assert "each task with its own β: 3 of 3" in bag
    assert f"by chance: {(2 / 3) ** 3:.0%}); seeds: 3" in bag
    words = page["training_words"](df, "A")
    assert "quick-thoughts training adds +20.0 ± 0.0 points, n = 3" in words[0]
    assert "5 objectives lie 3.1 points apart" in words[0]
    best = page["best_words"](df, "A")
    assert len(best) == 1  # the GRUs have one temperature
    assert "hard, β = 1 at t = 0.3 minus plain at t = 0.3: +0.0" in best[0]
    lab = page["lab_words"](df, ["A", "B", "C"])
    assert "untrained quickthoughts: 40.0 % over 3 tasks, more than 0 of 12 rows" in lab[0]


@pytest.mark.parametrize(("tasks", "least", "choices"), [(6, 5, 2), (6, 4, 1), (3, 3, 4)])
def test_chance_is_that_of_all_orders(page, tasks, least, choices):
    """The plain run is the worst of its task in one of choices + 1 orders."""
    won = [1] * choices + [0]  # is the plain run not the only best? one in choices + 1 it is
    ways = [sum(case) >= least for case in itertools.product(won, repeat=tasks)]
    assert page["by_chance"](tasks, least, choices) == pytest.approx(np.mean(ways))


# --- the paper


def test_the_recalled_counts_fit_the_recalled_table(whole):
    text = whole[1]["paper-words"].text
    assert "in 5 of 6 tasks, as debiased in 4, as both in 3" in text
    p = 2 / 3
    binomial = 6 * p**5 * (1 - p) + p**6
    assert f"with probability {binomial:.0%}" in text
    prose = " ".join(PAGE.prose.split())
    assert "*As recalled, unverified*" in prose
    assert "**swapped**" in prose
    table = whole[0]["RECALLED"]
    assert table.loc["hard, β = 2", "CR"] == 83.6
    assert whole[1]["paper-table"].value.index[0] == ("as recalled, unverified", "quick-thoughts")


# --- the Records


def made_up(run):
    """Hard is better than plain, in MR and CR alone; nobody gets under the untrained encoder."""
    height = 0.5 + 0.1 * bool(run.epochs) + 0.01 * run.seed
    values = {t: height + 0.005 * run.beta * (1 if t in ("MR", "CR") else -1) for t in TASKS}
    return made_up_record(run, values | {"MSRP F1": 0.8, "retrieval": height / 5, "loss": 1.0})


def lab_cells(variables):
    return PAGE.outputs(*LAB, into=dict(variables))[1]


def test_all_records_of_the_study_are_read(whole):
    listed = study("sentences-lab")
    for run in listed:
        runs.save(made_up(run))
    shown = lab_cells(whole[0])
    assert f"{len(listed)} of {len(listed)} are recorded" in shown["lab-read"].text
    assert "MSRP F1" in shown["lab-table"].text
    assert "untrained" in shown["lab-table"].text
    assert "hard, β = 1: 2 of 6" in shown["lab-verdict"].text
    assert "training adds +10.0 ± 0.0 points" in shown["lab-training"].text
    assert "ours, GRUs on novels" in str(shown["paper-table"].value)
    assert listed[0].digest in shown["records"].text


@pytest.mark.parametrize(
    "kept", ["one", "untrained", "one seed", "some", "hard alone", "first block", "apart"]
)
def test_any_part_of_the_records_will_do(whole, kept):
    parts = {
        "one": lambda k, r: k == 0,
        "untrained": lambda k, r: r.epochs == 0,
        "one seed": lambda k, r: r.seed == 1,
        "some": lambda k, r: k % 4 == 1,
        "hard alone": lambda k, r: r.beta > 0,
        "first block": lambda k, r: r.method == "quick_thoughts",
        "apart": lambda k, r: r.tau_plus == 0 and r.seed == (r.beta > 0),
    }
    saved = [r for k, r in enumerate(study("sentences-lab")) if parts[kept](k, r)]
    for run in saved:
        runs.save(made_up(run))
    shown = lab_cells(whole[0])
    assert f"{len(saved)} of" in shown["lab-read"].text


def test_without_the_study_file_the_page_says_so(whole):
    shown = PAGE.outputs(*LAB, into={**whole[0], "recorded": "none-such"})[1]
    assert "no study none-such" in shown["lab-read"].text


def test_records_without_the_tasks_are_no_rows(whole):
    run = study("sentences-lab")[0]
    runs.save(made_up_record(run, {"retrieval": 0.1, "loss": 1.0}))
    assert "no Record yet" in lab_cells(whole[0])["lab-table"].text
    assert compare.recorded("sentences-lab")[0]["retrieval"].tolist() == [0.1]
