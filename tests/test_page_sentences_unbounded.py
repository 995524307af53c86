"""The page on scores without a bound: its threshold, its cliff, its floors, its words on frames."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study

from hcl import neighbours, runs, sentence_tasks

PAGE = Page("sentences/unbounded")
TINY = {
    "n_train": 120, "max_words": 5, "width": 4, "hidden": 2, "epochs": 2, "look_every": 2,
    "batch": 20, "taus": [0.0, 0.2], "seeds": [0, 1],
}  # fmt: skip
FLOORS = {"zero": lambda t: 0.0, "unit": lambda t: math.exp(-1 / t)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page in a tiny form, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        return PAGE.outputs(*PAGE.body, **TINY)


@pytest.fixture(scope="module")
def page():
    names = ("threshold", "curve", "naive", "loop", "training", "table", "verdict", "lab")
    return PAGE.define(*names, batch=12)


def run_of(**changes):
    values = {"data": "pydoc", "encoder": "quickthoughts", "method": "hard_neighbours"}
    return runs.Run(epochs=1, normalize="none", temperature=1.0, **values, **changes)


def random_scores(seed=0, n=12, d=4, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    f, g = scale * torch.randn(2, n, d, generator=draw, dtype=torch.float64)
    return f, g, torch.arange(n) // 5


def pairs_of(f, g, book, t, beta, tau):
    """By loops: p, M, the tilted mean and the estimate, of every pair."""
    n = len(f)
    s = [[float(f[i] @ g[j]) / t for j in range(n)] for i in range(n)]
    for i in range(n):
        mates = [j for j in (i - 1, i + 1) if 0 <= j < n and book[j] == book[i]]
        others = [j for j in range(n) if j != i and j not in mates]
        top = sum(math.exp((1 + beta) * s[i][j]) for j in others)
        mean = top / sum(math.exp(beta * s[i][j]) for j in others)
        for j in mates:
            estimate = (mean - tau * math.exp(s[i][j])) / (1 - tau)
            yield i, len(mates), s[i][j], len(others), mean, estimate


# --- the mathematics


@pytest.mark.parametrize(("tau", "m"), [(0.01, 397), (0.1, 97), (0.3, 5)])
def test_the_share_where_the_estimate_is_zero(page, tau, m):
    g = 1.7
    p = math.log(g) + math.log(1 / tau)
    assert (g - tau * math.exp(p)) / (1 - tau) == pytest.approx(0, abs=1e-12)
    softmax = math.exp(p) / (math.exp(p) + m * g)
    assert page["share_at_threshold"](tau, m) == pytest.approx(softmax)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("floor", FLOORS)
def test_the_loss_is_the_formula_with_its_floor(beta, floor):
    """Equation unb-loss by loops, on scores where some pairs are past the threshold."""
    f, g, book = random_scores(scale=1.3)
    t, tau = (1.0, 0.15) if floor == "zero" else (0.4, 0.15)
    if floor == "unit":
        f, g = (torch.nn.functional.normalize(z, dim=1) for z in (f, f.roll(1, 0) + 0.3 * g))
    total, anchors, below = 0.0, set(), 0
    for i, mates, p, m, _, estimate in pairs_of(f, g, book, t, beta, tau):
        kept = max(estimate, FLOORS[floor](t))
        below += estimate < kept
        total += math.log(1 + m * kept * math.exp(-p)) / mates
        anchors.add(i)
    found = neighbours.hard_neighbours(
        f, g, book, temperature=t, beta=beta, tau_plus=tau, bounded=floor == "unit"
    )
    assert found.item() == pytest.approx(total / len(anchors), rel=1e-10)
    assert below > 0


@pytest.mark.parametrize(("tau", "bounded"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("p", [-1.0, 1.5, 2.2, 2.5, 4.0])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_loss_pull_and_push_at_a_score(page, p, tau, bounded, beta):
    """All negatives at score 0: g = 1; M is 10 for the anchors at both ends, 9 for the others."""
    loss, pull, push = 0.0, 0.0, 0.0
    for m, share in ((10, 2 / 12), (9, 10 / 12)):
        ng = m * max((1 - tau * math.exp(p)) / (1 - tau), math.exp(-1) if bounded else 0.0)
        free = ng > m * (math.exp(-1) if bounded else 0.0)
        loss += share * math.log(1 + ng * math.exp(-p))
        both = math.exp(p) + ng
        pull += share * (ng + free * m * tau / (1 - tau) * math.exp(p)) / both
        push += share * free * m / (1 - tau) / both
    found = page["at_score"](p, tau, bounded=bounded, beta=beta)
    assert found["loss"] == pytest.approx(loss, abs=1e-12)
    assert found["pull"] == pytest.approx(pull, abs=1e-12)
    assert found["push"] == pytest.approx(push, abs=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.05])
def test_the_cliff_has_the_height_of_the_formula(page, tau):
    found = page["at_score"](math.log(1 / tau) - 1e-7, tau, bounded=False)
    height = (2 / 12 * 10 + 10 / 12 * 9) * tau / (1 - tau)
    assert found["pull"] == pytest.approx(height, rel=1e-4)
    assert found["push"] == pytest.approx(height, rel=1e-4)
    behind = page["at_score"](math.log(1 / tau) + 1e-9, tau, bounded=False)
    assert set(map(abs, behind.values())) == {0.0}
    assert round(397 * 0.1 / 0.9) == 44  # as the text says


def test_the_estimate_of_unit_rows_is_negative_only_above_a_prior():
    for t, said in ((0.5, 0.018), (0.1, 2e-9)):
        assert math.exp(-2 / t) == pytest.approx(said, rel=0.04)
    assert "0.018 at $t=0.5$, but $2\\cdot10^{-9}$ at $t=0.1$" in " ".join(PAGE.prose.split())


# --- no floor


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_naive_is_the_library_where_all_estimates_are_positive(page, beta):
    f, g, book = random_scores(scale=0.3)
    run = run_of(beta=beta, tau_plus=0.05)
    assert all(x[-1] > 0 for x in pairs_of(f, g, book, 1.0, beta, 0.05))
    losses = page["naive"](*page["parts_of"](f, g, book, run), beta, 0.05)
    share = [1 / x[1] for x in pairs_of(f, g, book, 1.0, beta, 0.05)]
    mean = (losses * torch.tensor(share, dtype=torch.float64)).sum() / sum(share)
    library = neighbours.hard_neighbours(f, g, book, beta=beta, tau_plus=0.05)
    assert mean.item() == pytest.approx(library.item(), rel=1e-10)
    assert page["past"](f, g, book, run) == 0.0


def test_naive_is_negative_then_no_number(page):
    edge = math.log(1 / 0.2) + math.log(9 * 0.25 / (9 * 0.25 - 1))  # M tau / (1 - tau) is 2.25
    before, pull = page["pull_of_naive"](edge - 1e-4, 0.2, 9)
    assert before < 0
    assert pull > 1000
    after, wrong = page["pull_of_naive"](edge + 1e-4, 0.2, 9)
    assert math.isnan(after)
    assert wrong < -1000


@pytest.mark.parametrize(
    ("top", "beta", "fits"), [(50, 0.0, True), (50, 1.0, False), (35, 2.0, False)]
)
def test_a_tilt_overflows_sooner(page, top, beta, fits):
    s = torch.linspace(0, top, 20)[None, :]
    found = page["naive"](torch.tensor([top - 1.0]), s, s >= 0, beta, 0.01)
    assert bool(found.isfinite().all()) == fits
    assert ((1 + beta) * top < 88.7) == fits


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_share_past_the_threshold_is_a_count(page, beta):
    f, g, book = random_scores(seed=3, scale=1.4)
    estimates = [x[-1] for x in pairs_of(f, g, book, 1.0, beta, 0.2)]
    share = np.mean([x < 0 for x in estimates])
    assert 0 < share < 1
    assert page["past"](f, g, book, run_of(beta=beta, tau_plus=0.2)) == pytest.approx(share)
    assert page["past"](f, g, book, run_of(beta=beta, tau_plus=0.0)) == 0.0


# --- tables and sentences


def test_sentences_say_what_the_frame_has(page):
    rows = []
    for way in (page["ZERO"], page["UNIT"], page["BARE"]):
        for tau in (0.0, 0.1) if way != page["BARE"] else (0.1,):
            for beta in (0.0, 1.0):
                for seed in (0, 1):
                    bad = 3 * (way == page["BARE"]) * (seed == 1)
                    rows.append(
                        {"way": way, "tau": tau, "beta": beta, "seed": seed,
                         "retrieval": 0.05 + 0.01 * seed - tau * (0.1 + 0.02 * seed),
                         "past": 5 * tau, "largest": 9.0, "longest": 2 + 40 * tau * (1 + bad),
                         "NaN": bad, "steps": 10, "first": 7 if bad else math.nan}
                    )  # fmt: skip
    ended = pd.DataFrame(rows)
    said = page["verdict"](ended)
    assert "0 of 8 trainings had a loss that is no number; all gradients were finite" in said[0]
    assert "2 of 4 trainings had a loss that is no number, the first at step 7" in said[2]
    assert "past the threshold: 50% with β = 0, 50% with β = 1" in said[0]
    lengths = page["gradients"](ended)
    assert "3.0 to 3.0 times" in lengths[0]
    assert "9.0 to 9.0 times" in lengths[2]  # beside the floor of zero, which has a τ⁺ of 0
    found = page["retrieval_words"](ended)
    assert len(found) == 4
    assert "β = 1, retrieval with τ⁺ = 0.1 minus without: -1.1 ± 0.1 points, n = 2" in found[1]
    table = page["table_of"](ended)
    assert table["steps with NaN"].tolist() == ["0 of 20"] * 8 + ["3 of 20"] * 2


def test_the_page_runs_and_every_parameter_is_used(whole):
    variables, shown = whole
    assert not PAGE.unused_parameters()
    ended = variables["ended"]
    assert len(ended) == 2 * 2 * 2 * 2 + 2 * 2
    assert set(variables["watched"]["epoch"]) == {0, 2}
    assert ended["longest"].gt(0).all()
    assert (ended.loc[ended["way"] == variables["UNIT"], "largest"] <= 10.001).all()
    assert shown["curve-figure"].drawn
    assert shown["figure"].drawn
    assert "0 of " in shown["lab"].text
    assert shown["overflow"].text.count("no") > 3


def test_the_loop_trains_as_the_library_does(whole):
    """The same blocks and steps: the gradient of the last step is that of the library's trainer."""
    from hcl import train

    variables = whole[0]
    run = runs.Run(**variables["base"], **variables["raw"], beta=1.0, tau_plus=0.2, seed=1)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        build = train.build_model
        patch.setattr(train, "build_model", lambda *a: made.append(build(*a)) or made[-1])
        variables["fit"](run, variables["with_floor"](False))
    model = build(run, variables["texts"])
    train.fit(run, model, variables["texts"], runs.path_of(run), progress=False)
    for mine, his in zip(made[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-6)


def test_the_code_of_the_exercises_runs(whole, capsys):
    snippets = PAGE.solutions()
    assert len(snippets) == 3
    outputs = []
    for snippet in snippets:
        exec(snippet, dict(whole[0]))
        outputs.append(capsys.readouterr().out)
    lines = [line.rsplit("tensor(", 1)[1].split(",")[0] for line in outputs[1].splitlines()]
    zero, borrowed, zero_shifted, borrowed_shifted = map(float, lines)
    assert zero == pytest.approx(zero_shifted, abs=1e-9)
    assert borrowed != pytest.approx(borrowed_shifted, rel=1e-3)


# --- the Records


def lab(whole):
    return PAGE.outputs("lab", into=dict(whole[0]))[1]["lab"].text


def test_records_with_raw_scores_are_shown(whole):
    listed = study("sentences-lab")
    tasks = dict.fromkeys(sentence_tasks.NAMES, 0.7)
    for run in listed:
        runs.save(made_up_record(run, {"retrieval": 0.2 - run.tau_plus, "loss": 1.0} | tasks))
    assert f"{len(listed)} of {len(listed)} are recorded" in lab(whole)
    df, _ = PAGE.define("lab")["compare"].recorded("sentences-lab")
    table = PAGE.define("lab")["lab_table"](df)
    raw = [r for r in listed if r.normalize == "none" and r.epochs]
    assert table["runs"].sum() == len(raw)
    priors = table.index.get_level_values("τ⁺")
    assert set(priors) == {r.tau_plus for r in raw}
    assert table.loc[("hard, β = 1", 0.1), "retrieval, %"] == "10.0 ± 0.0"
    assert set(table["mean of six tasks, %"]) == {"70.0 ± 0.0"}
    said = PAGE.define("lab")["lab_words"](df)
    assert any("hard, β = 1, retrieval with τ⁺ = 0.1 minus without: -10.0 ± 0.0" in x for x in said)
    assert len(said) == len({(r.beta, r.tau_plus) for r in raw if r.tau_plus})


@pytest.mark.parametrize("part", [slice(0, 1), slice(3, 6), slice(20, 22)])
def test_any_part_of_the_records_will_do(whole, part):
    saved = study("sentences-lab")[part]
    for run in saved:
        runs.save(made_up_record(run, {"retrieval": 0.1, "loss": 1.0}))
    assert f"{len(saved)} of" in lab(whole)


def test_without_the_study_file_the_page_says_so(whole):
    text = PAGE.outputs("lab", into={**whole[0], "recorded": "none-such"})[1]["lab"].text
    assert "no study none-such" in text
