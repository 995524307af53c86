"""The page on the number of negatives: its formulas, its loop, and what it says of any Records."""

import ast
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import compare, losses, notebooks, runs, train

PAGE = Page("images/negatives")
STUDY = study()
LAB = [name for name in PAGE.code if name.startswith(("lab-", "paper-", "records"))]
TINY = {
    "n_train": 64, "batches": [4, 8], "matched_epochs": [1, 2], "groups": [4], "epochs": 1,
    "page_epochs": 2, "hidden_dim": 8, "out_dim": 4, "seeds": [0],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page in a tiny form, where nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_RUNS", str(tmp_path_factory.mktemp("runs")))
        return PAGE.show(*PAGE.body, **TINY)


def record(run, **metrics):
    """A Record of a Run that was never trained."""
    return made_up_record(run, {"knn": 0.5, "linear": 0.5, **metrics})


# --- the mathematics


def loss_of(s, p, beta):
    """Equation neg-loss of one anchor, by sums."""
    tilt = sum(torch.exp(beta * x) for x in s)
    g = sum(torch.exp(beta * x) / tilt * torch.exp(x) for x in s)
    return torch.log(1 + len(s) * g * torch.exp(-p))


@pytest.mark.parametrize(("t", "beta"), [(0.5, 0.0), (0.2, 0.0), (0.5, 1.0), (0.3, 2.5)])
def test_push_and_share_are_the_gradient_of_the_loss(t, beta):
    page = PAGE.define("measure")
    z1, z2 = (F.normalize(torch.randn(6, 5).double(), dim=1) for _ in range(2))
    push, hardest = page["gradient"](z1, z2, t, beta)
    z, values = torch.cat([z1, z2]), []
    for i in range(12):
        mate = (i + 6) % 12
        p = (z[i] @ z[mate] / t).requires_grad_()
        s = [(z[i] @ z[j] / t).requires_grad_() for j in range(12) if j not in (i, mate)]
        loss = loss_of(s, p, beta)
        values.append(loss.item())
        pull, *pushes = torch.autograd.grad(loss, [p, *s])
        assert push[i].item() == pytest.approx(-pull.item(), rel=1e-9)
        assert push[i].item() == pytest.approx(sum(pushes).item(), rel=1e-9)
        assert hardest[i].item() == pytest.approx((max(pushes) / sum(pushes)).item(), rel=1e-9)
        assert max(pushes) == pushes[int(np.argmax([x.item() for x in s]))]
    library = losses.hard(z1, z2, temperature=t, beta=beta, tau_plus=0.0)
    assert library.item() == pytest.approx(np.mean(values), rel=1e-9)


def test_what_the_text_says_of_n():
    """One half at e^(1/t); one negative has no hardness; normal scores; the value's log N."""
    for t, n in ((0.5, 7), (0.2, 148), (0.1, 22026)):
        assert round(math.exp(1 / t)) == n
        assert n / (math.exp(1 / t) + n) == pytest.approx(0.5, abs=0.02)
    text = " ".join(PAGE.prose.split())  # wherever the lines end
    assert "7 at $t=0.5$, but 148 at $t=0.2$" in text
    assert "about 7, 148 and 22,026" in text
    one, p = [torch.tensor(0.3)], torch.tensor(1.0)
    assert loss_of(one, p, 0.0) == loss_of(one, p, 5.0)
    s = 0.6 * torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.softmax(1.5 * s, dim=0)
    worth = (1 / q.square().sum()).item() / len(s)
    assert worth == pytest.approx(math.exp(-((1.5 * 0.6) ** 2)), rel=0.03)
    n, log_g, p = 30, 0.2, 1.4
    split = math.log(n) + log_g - p + math.log1p(math.exp(p) / (n * math.exp(log_g)))
    assert split == pytest.approx(math.log1p(n * math.exp(log_g - p)))


# --- the loop


def random_pairs(n, d=5):
    return (torch.randn(n, d, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("method", ["nt_xent", "debiased", "hard", "decoupled"])
def test_groups_are_one_anothers_negatives_and_nobody_elses(whole, tiny, method):
    """By sums over each anchor's group, with the clamp of debiasing binding somewhere."""
    one = tiny(method=method, temperature=0.4, beta=1.5, tau_plus=0.3)
    z1, z2 = random_pairs(12)
    z2 = z1 + 0.8 * z2
    found = whole[0]["loss_in_groups"](z1, z2, 3, one)
    a, b = (F.normalize(z, dim=1) for z in (z1, z2))
    total, floors = 0.0, 0
    for i in range(12):
        group = [j for j in range(12) if j // 3 == i // 3 and j != i]
        for x, y in ((a, b), (b, a)):
            p = math.exp(x[i] @ y[i] / 0.4)
            u = [math.exp(x[i] @ z[j] / 0.4) for z in (x, y) for j in group]
            w = [v**one.beta for v in u]
            g = sum(v * e for v, e in zip(u, w, strict=True)) / sum(w)
            if method == "decoupled":
                total += math.log(4 * g / p)
                continue
            ng = (g - one.tau_plus * p) / (1 - one.tau_plus)
            floors += ng < math.exp(-1 / 0.4)
            total += math.log(1 + 4 * max(ng, math.exp(-1 / 0.4)) / p)
    assert found.item() == pytest.approx(total / 24, rel=1e-9)
    assert (floors > 0) == (one.tau_plus > 0)
    z2[4] += 1.0  # touches its own group of three alone
    z = torch.cat([z1, z2]).requires_grad_()
    whole[0]["loss_in_groups"](*z.chunk(2), 3, one).backward()
    changed = z.grad.clone()
    z2[4] += 1.0
    z = torch.cat([z1, z2]).requires_grad_()
    whole[0]["loss_in_groups"](*z.chunk(2), 3, one).backward()
    rows = (changed - z.grad).abs().sum(1).view(2, 4, 3).sum((0, 2)) > 1e-12
    assert rows.tolist() == [False, True, False, False]


def test_with_one_group_the_loop_is_the_trainer(whole, tiny):
    """To rounding: the two sum in different orders."""
    for changes in ({"method": "hard", "tau_plus": 0.05}, {"method": "decoupled"}):
        one = tiny(epochs=2, batch=16, **changes)
        model, data = whole[0]["fit_in_groups"](one, 16)
        theirs = train.build_model(one, data)
        train.fit(one, theirs, data, runs.path_of(one).with_suffix(".part"), progress=False)
        inputs = data.inputs(data.x_test)
        with torch.no_grad():
            mine, his = (m.train()(inputs) for m in (model, theirs))  # biases before BatchNorm,
        assert F.cosine_similarity(mine, his).min() > 0.9999  # which only rounding moves, cancel
        start = train.build_model(one, data).train()(inputs)
        assert F.cosine_similarity(mine, start).mean() < 0.9


def test_three_designs_hold_fixed_what_they_say():
    given = notebooks.parameters(PAGE.path)
    n, sizes = given["n_train"], given["batches"]
    updates = {b: n // b for b in sizes}
    assert [e * updates[b] for b, e in zip(sizes, given["matched_epochs"], strict=True)] == [48] * 3
    assert {b * updates[b] for b in sizes} == {n}  # no batch drops any point
    assert all(sizes[-1] % group == 0 for group in given["groups"])


# --- the tables


def rows(accuracy, seeds=(0, 1), design="equal epochs"):
    """A frame like the page's: accuracy(method, t, N, seed)."""
    label = {"nt_xent": "SimCLR", "hard": "HCL β=1"}
    return pd.DataFrame(
        {
            "method": m, "temperature": t, "N": n, "seed": k, "label": label[m], "design": design,
            "arm": f"{label[m]}, t = {t:g}", "knn": accuracy(m, t, n, k),
        }
        for m, t, n, k in itertools.product(label, (0.5, 0.2), (30, 510), seeds)
    )  # fmt: skip


def accuracy(method, t, n, seed):
    gain = {30: 0.04, 510: 0.01 + 0.02 * seed}[n] if t == 0.5 else -0.05
    plain = 0.5 + 0.1 * seed + (0.03 if t == 0.2 else 0.0) + (0.02 + 0.01 * seed) * (n == 510)
    return plain + gain * (method == "hard")


def test_differences_gains_and_their_change_are_those_of_the_formulas():
    page = PAGE.define("fewer", "gains")
    df = rows(accuracy)
    most = page["against_most"](df, "knn", ["design", "arm"]).set_index("arm")
    assert len(most) == 4
    assert set(most["N"]) == {30}
    assert most.loc["SimCLR, t = 0.5", "difference"] == pytest.approx(-(0.02 + 0.03) / 2)
    assert most.loc["SimCLR, t = 0.5", "se"] == pytest.approx(0.01 / 2)  # |d1 - d2| / 2
    gains = page["gains"](df, "knn").set_index(["temperature", "N"])["difference"]
    assert gains.to_dict() == pytest.approx(
        {(0.5, 30): 0.04, (0.5, 510): 0.02, (0.2, 30): -0.05, (0.2, 510): -0.05}
    )
    change = page["change_of_gain"](df, "knn").set_index("temperature")
    assert change.loc[0.5, "difference"] == pytest.approx(0.02)
    assert change.loc[0.5, "se"] == pytest.approx(0.01)
    assert change.loc[0.2, "difference"] == pytest.approx(0, abs=1e-12)
    half = 12.7062 * 0.01  # Student's t, one degree of freedom
    assert change.loc[0.5, "high"] - change.loc[0.5, "low"] == pytest.approx(2 * half, rel=1e-3)
    for part in (df[df["method"] == "hard"], df[df["N"] == 30], df[:0]):
        assert page["change_of_gain"](part, "knn").empty
    assert page["against_most"](df[df["N"] == 30], "knn", ["design", "arm"]).empty


def test_sentences_say_what_the_frame_has():
    page = PAGE.define("fewer", "gains", "verdict", "best")
    df = rows(accuracy)
    said = "\n".join(page["verdict"](df, "knn"))
    assert "N = 30 against 510: of 4 losses, 3 are lower and 0 higher" in said
    assert "the differences are from -2.5 to -0.5 points" in said
    assert "gain of HCL at t = 0.5, with N = 30 minus with 510: +2.0 ± 1.0 points, n = 2" in said
    best = page["at_best"](df, "knn").set_index("N").astype(str)
    assert best["t of HCL"].to_dict() == {30: "0.5", 510: "0.5"}
    assert best["t of SimCLR"].to_dict() == {30: "0.2", 510: "0.2"}
    assert best.loc[30, "difference ± se"] == "+1.0 ± 0.0"  # 0.54 against 0.53, each seed
    single = page["at_best"](df[df["seed"] == 0], "knn").set_index("N")
    assert single.loc[30, ["difference ± se", "95 % interval"]].tolist() == ["+1.0", ""]
    alone = page["verdict"](df[df["seed"] == 0], "knn")
    assert "of 4 losses (4 with one seed), 0 are lower and 0 higher" in alone[0]
    assert "one seed: no standard error" in alone[-1]
    table = page["spread"](page["gains"](df[df["seed"] == 0], "knn"), ["temperature"])
    assert table.loc[0.5, 30] == "+4.0"


def test_one_drop_minus_another():
    page = PAGE.define("why")
    df = rows(lambda m, t, n, k: (n == 510) * (0.05 if t == 0.2 else 0.02 + 0.02 * k))
    table = page["drop_minus_drop"](df, "knn", "SimCLR, t = 0.2", "SimCLR, t = 0.5")
    assert len(table) == 1
    assert table["N"].item() == 30
    assert table["difference"].item() == pytest.approx(0.05 - 0.03)
    assert table["se"].item() == pytest.approx(0.01)


# --- the page as a whole


def test_the_page_runs_and_every_parameter_is_used(whole):
    page, shown = whole
    assert not PAGE.unused_parameters()
    df = page["df"]
    assert set(df["design"]) == {"equal epochs", "equal updates", "N alone"}
    assert set(df.loc[df["design"] == "N alone", "N"]) == {6, 14}
    assert shown["lab-read"].startswith("0 of ")
    assert "Nothing is recorded yet" in shown["lab-table"]
    assert "87.44" in shown["paper-table"].to_string()
    assert all(digest in shown["records"] for digest in df["digest"])


def test_the_code_of_the_exercises_runs(whole, capsys):
    snippets = PAGE.solutions()
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, dict(whole[0]))
    assert capsys.readouterr().out


def lab_cells(page):
    return PAGE.show(*LAB, into=dict(page))[1]


def asked():
    """The Runs of the block, found as the page does not: by what they are."""
    return [
        r for r in STUDY
        if r.epochs and r.data_args.get("n_train") and not r.eval_every and r.beta in (0.0, 1.0)
        and r == runs.Run(
            study=r.study, data=r.data, data_args={"size": 16, "n_train": r.data_args["n_train"]},
            encoder=r.encoder, epochs=r.epochs, batch=r.batch, method=r.method, beta=r.beta,
            tau_plus=r.tau_plus, temperature=r.temperature, seed=r.seed,
        )
        and (r.method, r.temperature, r.tau_plus) in (
            ("nt_xent", 0.5, 0.0), ("nt_xent", 0.2, 0.0), ("debiased", 0.5, 0.1),
            ("hard", 0.5, 0.1), ("hard", 0.2, 0.0),
        )
    ]  # fmt: skip


def test_all_records_of_the_block_are_read_and_no_other(whole):
    block = asked()
    assert len({r.batch for r in block}) >= 3
    for k, r in enumerate(block):
        height = {"nt_xent": 0.40, "debiased": 0.41, "hard": 0.42}[r.method]
        noise = 0.004 * np.sin(7 * k)
        runs.save(record(r, linear=height + 0.01 * math.log2(r.batch) + noise, knn=height + noise))
    other = next(r for r in STUDY if r.method == "scl")
    runs.save(record(other))
    shown = lab_cells(whole[0])
    assert f"{len(block)} of {len(block)} are recorded" in shown["lab-read"]
    table = shown["lab-table"]
    assert list(table.columns) == sorted({2 * r.batch - 2 for r in block})
    few = min(block, key=lambda r: r.batch)
    updates = few.epochs * (few.data_args["n_train"] // few.batch)
    assert table.loc[("updates", ""), 2 * few.batch - 2] == f"{updates:,}"
    assert "gain of HCL at t = 0.2, with N = 30" in shown["lab-verdict"]
    assert "HCL" in " ".join(shown["lab-best"].columns)
    assert "SimCLR < Debiased < HCL β=1" in shown["paper-words"]
    assert "+" in shown["lab-gains"].to_string()
    assert other.digest not in shown["records"]


@pytest.mark.parametrize("part", [2, 7])
def test_some_records_do_for_some_of_the_sentences(whole, part):
    for r in asked()[::part][: 60 // part]:
        runs.save(record(r, linear=0.4 + 0.01 * r.seed, knn=0.4))
    shown = lab_cells(whole[0])
    assert "Nothing" not in shown["lab-read"]


@pytest.mark.parametrize("known", ["one run", "one batch", "one batch, SimCLR"])
def test_without_a_second_batch_nothing_is_said_of_n(whole, known):
    block = [r for r in asked() if r.batch == 256]
    for r in block[:1] if known == "one run" else block:
        if known != "one batch, SimCLR" or r.method == "nt_xent":
            runs.save(record(r))
    shown = lab_cells(whole[0])
    assert "Nothing" not in shown["lab-read"]
    assert "Too little" in shown["lab-verdict"]
    assert "minus the largest N" not in shown["paper-words"]


def planned(form):
    """The Runs that the page would ask for with other parameters, and its page's variables."""
    page = PAGE.run(**notebooks.checked(PAGE.path, form))
    for name, last in (("network", 3), ("designs", -2)):
        tree = ast.parse(PAGE.code[name])
        exec(compile(ast.Module(tree.body[:last], []), name, "exec"), page)
    return [r for part in page["planned"].values() for r in part], page


def test_the_lab_form_reads_the_block():
    """With these parameters every Run of the page is one of the study, so nothing is trained."""
    wanted, page = planned(
        {
            "study": "cifar10-lab", "data": "cifar10", "n_train": 10000, "size": 16,
            "encoder": "small", "epochs": 10, "batches": [16, 64, 256], "matched_epochs": [],
            "groups": [], "page_epochs": 1, "lr": 0.001, "hidden_dim": 512, "out_dim": 128,
            "tau_plus": 0.1, "seeds": [0, 1, 2], "metric": "linear",
        }
    )  # fmt: skip
    assert len(wanted) == 5 * 3 * 3
    assert {r.digest for r in wanted} <= {r.digest for r in STUDY}
    assert page["to_split"] == []
    assert {compare.label(record(r)) for r in wanted} == {"SimCLR", "Debiased", "HCL β=1"}


def test_the_paper_form_reads_what_its_study_has():
    wanted, _ = planned(
        {
            "study": "cifar10-paper", "data": "cifar10", "n_train": 0, "encoder": "resnet50",
            "epochs": 400, "batches": [16, 32, 64, 128, 256], "matched_epochs": [], "groups": [],
            "page_epochs": 1, "lr": 0.001, "hidden_dim": 512, "out_dim": 128, "tau_plus": 0.1,
            "temperatures": [0.5], "seeds": [0], "metric": "linear", "precision": "bfloat16",
            "protocol": "released",
        }
    )  # fmt: skip
    there = {r.digest for r in study("cifar10-paper")}
    missing = {(r.method, r.batch) for r in wanted if r.digest not in there}
    assert missing <= {("debiased", b) for b in (16, 32, 64, 128)}  # the study has it at 256 alone
