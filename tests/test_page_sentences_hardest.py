"""The page on the hardest negatives of a sentence: its counts on hand-made data, its words."""

import functools
import itertools
import math
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page

from hcl import corpus, neighbours
from hcl.corpus import words

PAGE = Page("sentences/hardest")
TINY = {
    "epochs": 2, "seeds": [0], "width": 8, "temperatures": [0.1], "betas": [0.0, 2.0],
    "all_betas": [0.0, 2.0], "tops": [1, 20],
}  # fmt: skip


@pytest.fixture(scope="module")
def page():
    """The texts and the proxies; nothing is trained."""
    return PAGE.run("proxies", "shares")


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the mathematics


def test_the_slope_of_the_mass():
    """The text below eq-hardest-mass, by automatic differentiation."""
    draw = torch.Generator().manual_seed(0)
    s = torch.randn(12, generator=draw, dtype=torch.float64)
    false = torch.tensor([True] * 4 + [False] * 8)
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    q = (beta * s).softmax(0)
    m = q[false].sum()
    (slope,) = torch.autograd.grad(m, beta)
    apart = (q * s)[false].sum() / m - (q * s)[~false].sum() / (1 - m)
    torch.testing.assert_close(slope, m * (1 - m) * apart)


def test_masses_are_as_displayed():
    draw = torch.Generator().manual_seed(1)
    z = torch.nn.functional.normalize(torch.randn(6, 3, generator=draw).double(), dim=1)
    negative = ~torch.eye(6, dtype=torch.bool)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[0, 3] = mask[2, 5] = True
    found = PAGE.define("mass")["masses"](z, {"some": mask}, negative, 2.0, 0.5)
    shares, effective = [], []
    for i in range(6):
        w = {j: math.exp(2.0 * float(z[i] @ z[j]) / 0.5) for j in range(6) if j != i}
        shares.append(sum(x for j, x in w.items() if mask[i, j]) / sum(w.values()))
        effective.append(sum(w.values()) ** 2 / sum(x * x for x in w.values()))
    assert found["some"] == pytest.approx(np.mean(shares))
    assert found["effective number"] == pytest.approx(np.mean(effective))


@pytest.mark.parametrize("one_encoder", [True, False])
def test_a_copy_cannot_be_pushed_away_with_one_encoder(one_encoder):
    """At cosine 1 of one encoder with itself the score has no gradient; with two it has."""
    draw = torch.Generator().manual_seed(2)
    h, other = torch.randn(2, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    f, g = (torch.nn.functional.normalize(x, dim=0) for x in (h, h if one_encoder else other))
    (gradient,) = torch.autograd.grad(f @ g, h)
    assert (gradient.abs().max() < 1e-12) == one_encoder


def test_the_expected_share_of_the_own_book(page):
    found = PAGE.run("solution-draw", into=dict(page))
    y = found["world"].y_train
    same = (y[:, None] == y).sum() - len(y)
    assert found["expected"] == pytest.approx(int(same) / len(y) / (len(y) - 1))


def test_reach_in_the_last_exercise():
    """The cell itself compares; a longer reach is another loss."""
    found = PAGE.run("solution-reach")
    shorter = neighbours.hard_neighbours(found["f"], found["g"], beta=2.0, reach=2)
    assert (found["loss"] - shorter).abs() > 1e-3


# --- the cells


def test_proxies_of_a_batch(page):
    rows = torch.arange(300, 360)
    masks, negative = page["proxies"](rows)
    world, texts = page["world"], page["texts"]
    for i in range(0, 60, 7):
        for j in range(60):
            same = world.y_train[rows[i]] == world.y_train[rows[j]]
            a, b = set(words(texts[rows[i]])), set(words(texts[rows[j]]))
            alike, kept = len(a & b) / len(a | b), i != j and not (same and abs(i - j) == 1)
            assert negative[i, j] == kept
            assert masks["same book"][i, j] == (kept and same)
            assert masks["near copy"][i, j] == (kept and alike >= 0.5)
            assert masks["word for word"][i, j] == (kept and texts[rows[i]] == texts[rows[j]])
            assert masks["2 or 3 places away"][i, j] == (kept and same and abs(i - j) in (2, 3))


def test_top_shares_by_hand():
    top_shares = PAGE.define("top")["top_shares"]
    cosine = torch.tensor([[9.0, 0.5, 0.9, 0.1], [0.3, 9.0, 0.2, 0.1]])
    negative = torch.tensor([[False, True, True, True], [True, False, True, True]])
    mask = torch.tensor([[False, False, True, False], [False, False, True, True]])
    found = top_shares(cosine, {"x": mask}, negative, [1, 2, 3])
    assert [row["k"] for row in found] == [1, 2, 3]
    assert [row["x"] for row in found] == pytest.approx([0.5, 0.5, (1 / 3 + 2 / 3) / 2])


def test_shares_of_a_draw(page):
    """A chain drawn whole: every inner sentence occurs twice and meets itself and neighbours."""
    found = PAGE.run("draw", into=dict(page))
    assert set(found["of_text"].columns) <= set(found["of_draw"].columns)
    one = found["pairs_of"](torch.tensor([10, 11, 12]))
    both = [10, 11, 12, 11, 12, 13]
    pairs = [(i, j) for i in range(6) for j in range(6) if i % 3 != j % 3]
    assert one["itself"] == pytest.approx(sum(both[i] == both[j] for i, j in pairs) / len(pairs))
    beside = sum(abs(both[i] - both[j]) == 1 for i, j in pairs) / len(pairs)
    assert one["neighbour"] == pytest.approx(beside)
    assert one["anchors with itself or a neighbour"] == 1


@pytest.fixture(scope="module")
def tiny():
    """The page with encoders hardly trained."""
    names = PAGE.body[: PAGE.body.index("solution-draw")]
    with mock.patch("hcl.corpus.load", functools.cache(corpus.load)):
        return PAGE.outputs(*names, "solution-floor", **TINY)


def test_the_page_runs_and_draws(tiny):
    _, shown = tiny
    drawn = {name for name, output in shown.items() if output.drawn}
    assert drawn == {"top-figure", "mass-figure", "judge-figure"}
    assert shown["as-text"].text.count("<table") == 3
    assert "word-for-word copy among their negatives" in shown["copies"].text.replace("\n", " ")


def test_even_weights_are_the_random_share(tiny):
    page, _ = tiny
    even = page["mass"][page["mass"]["beta"] == 0]
    for kind in page["KINDS"]:
        assert even[kind].to_numpy() == pytest.approx(page["chance"][kind], rel=0.01)
    assert even["effective number"].between(396, 399).all()


def test_draws_cost_as_much_as_text(tiny):
    page, _ = tiny
    run, other = page["consecutive"][0], page["drawn"][0]
    assert other.batch * 2 == run.batch
    assert other.epochs * 2 == run.epochs


def test_without_copies_every_text_is_there_once(tiny):
    page, _ = tiny
    once, world = page["once"], page["world"]
    texts = [once.texts[i] for i in once.x_train.tolist()]
    assert texts == list(dict.fromkeys(page["texts"]))
    for part in (once, world):
        assert [part.texts[i] for i in part.x_test.tolist()] == page["test"]
    own = [once.classes[b] for b in once.y_train.tolist()]
    assert own == [world.classes[world.y_train[page["texts"].index(t)]] for t in texts]
    assert (once.book.diff() >= 0).all()


def test_some_become_neighbours_without_copies(tiny):
    """Counted by places: what was skipped between two sentences that now stand side by side."""
    page, _ = tiny
    texts, book = page["texts"], page["world"].y_train.tolist()
    first = [i for i, text in enumerate(texts) if texts.index(text) == i]
    joined = [(i, j) for i, j in itertools.pairwise(first) if book[i] == book[j]]
    apart = [(texts[i], texts[j]) for i, j in joined if j != i + 1]
    assert len(page["after"]) == len(joined)
    known = {(texts[i], texts[i + 1]) for i in range(len(texts) - 1) if book[i] == book[i + 1]}
    assert page["fresh"] == sum(pair not in known for pair in apart) > 0


def test_judges_know_the_answers(tiny):
    """Embeddings that say the place, or the book, find all that there is to be found."""
    page, _ = tiny
    y, n = page["world"].y_test, len(page["test"])
    angle = math.pi * torch.arange(n) / n
    circle = torch.stack([angle.cos(), angle.sin()], dim=1).double()
    assert page["judge"](circle)["retrieval"] > 0.9
    assert page["judge"](torch.nn.functional.one_hot(y).double())["book"] == 1


# --- words on made-up frames


def test_top_in_words():
    found = PAGE.define("top", "top-words")
    rows = [
        {
            "encoder": name,
            "seed": seed,
            "k": 1,
            **dict.fromkeys(found["KINDS"], x + 0.001 * seed * y),
        }
        for name, x, y in (("untrained", 0.2, 0.0), ("hard, β = 1", 0.3, 1.0))
        for seed in range(4)
    ]  # fmt: skip
    said = found["top_words"](pd.DataFrame(rows), pd.Series(dict.fromkeys(found["KINDS"], 0.01)))
    assert said[0].startswith("the hardest negative is of the kind *near copy*: untrained: 20.0%")
    assert "hard, β = 1: 30.1%" in said[0] or "hard, β = 1: 30.2%" in said[0]
    assert said[0].endswith("for 1 of 1 objectives")


def test_mass_in_words():
    found = PAGE.define("top", "mass-words")
    rows = [
        {"trained with β": own, "t": 0.1, "seed": seed, "beta": beta,
         **dict.fromkeys(found["KINDS"], 0.1 + 0.1 * beta - 0.05 * own + 0.001 * seed * own)}
        for own in (0.0, 2.0) for beta in (0.0, 2.0) for seed in range(4)
    ]  # fmt: skip
    said = found["mass_words"](pd.DataFrame(rows), 0.1)
    assert said[2].startswith("*same book*, weights with β = 2: 20.3% of the mass where")
    assert "30.0% where it was plain (difference -9.7 points" in said[2]


def judged():
    rows = [
        {"batches": batches, "beta": beta, "temperature": t, "seed": seed,
         "retrieval": 0.1 + more + 0.02 * beta + 0.001 * seed * (beta + more),
         "book": 0.5 + t + 0.001 * seed * beta}
        for batches, more in (("text", 0.0), ("draw", 0.05))
        for beta in (0.0, 1.0) for t in (0.1, 0.2) for seed in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_judged_in_words():
    found = PAGE.define("judge-table", "judge-words")
    said = found["judge_words"](judged())
    assert said[0].startswith("*retrieval*, draw minus text at β = 0: +5.0 points")
    assert "(beyond the seeds' spread)" in said[0]
    assert any(line.startswith("*retrieval*, text, β = 1 minus β = 0: +2.") for line in said)
    assert len(said) == 8


def test_once_in_words():
    rows = [
        {"texts": texts, "beta": beta, "seed": seed,
         "book": 0.5 + gain * beta + 0.001 * seed * beta}
        for texts, gain in (("as they are", 0.01), ("each once", 0.04))
        for beta in (0.0, 1.0) for seed in range(4)
    ]  # fmt: skip
    said = PAGE.define("once-words")["once_words"](pd.DataFrame(rows), "book")
    assert said.startswith("*book*: what hardness adds changes at β = 1 by +3.0 points")
