"""The first page on sentences: its equations are the library's, its words follow the numbers."""

import functools
import math
import re
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from sklearn.metrics import jaccard_score

from hcl import corpus, neighbours
from hcl.corpus import words

PAGE = Page("sentences/first-look")
TINY = {
    "epochs": 2, "slow_epochs": 1, "seeds": [0], "slow_seeds": [0], "width": 8, "slow_width": 4,
    "slow_hidden": 2, "temperatures": [0.1], "betas": [1.0],
}  # fmt: skip


@pytest.fixture(scope="module")
def page():
    """All but the training and what needs it."""
    return PAGE.run("crops", "corpus", "batch-figure", "source", "check", "yardstick")


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def random_batch(seed, n=10, d=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, d, generator=draw, dtype=torch.float64)


# --- the mathematics


@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
def test_the_objectives_are_as_displayed(beta):
    """eq-sentences-qt and eq-sentences-hcl in plain floats, two books and a lone sentence."""
    f, g = random_batch(0)
    book = [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    quick, hard = [], []
    for i in range(10):
        s = [float(f[i] @ g[j]) for j in range(10)]
        beside = [p for p in (i - 1, i + 1) if 0 <= p < 10 and book[p] == book[i]]
        if not beside:
            continue
        rest = [s[j] for j in range(10) if j != i and j not in beside]
        total = 1.0 + sum(math.exp(s[j]) for j in range(10) if j != i)
        quick.append(math.log(total) - sum(s[p] for p in beside) / len(beside))
        q = [math.exp(beta * x) for x in rest]
        mean = sum(w / sum(q) * math.exp(x) for w, x in zip(q, rest, strict=True))
        each = [math.log(1 + len(rest) * mean / math.exp(s[p])) for p in beside]
        hard.append(sum(each) / len(each))
    books = torch.tensor(book)
    assert len(quick) == 9
    assert neighbours.quick_thoughts(f, g, books).item() == pytest.approx(np.mean(quick))
    found = neighbours.hard_neighbours(f, g, books, beta=beta)
    assert found.item() == pytest.approx(np.mean(hard))


def test_the_loop_of_the_page_is_the_loss(page):
    f, g = random_batch(1)
    book = torch.tensor([0] * 6 + [1] * 4)
    assert page["by_hand"](f @ g.T, book, None) == pytest.approx(
        neighbours.quick_thoughts(f, g, book).item()
    )
    assert page["by_hand"](f @ g.T, book, 1.5) == pytest.approx(
        neighbours.hard_neighbours(f, g, book, beta=1.5).item()
    )


def test_the_order_of_the_two_losses():
    """The first exercise: always one way; with one neighbour the difference is a 1 in the sum."""
    for seed in range(5):
        f, g = 2 * random_batch(seed)
        assert neighbours.quick_thoughts(f, g) > neighbours.hard_neighbours(f, g, beta=0.0)
    f, g = random_batch(9, n=4)
    books = torch.tensor([0, 0, 1, 1])  # every sentence has one neighbour
    s = f @ g.T
    gaps = []
    for i in range(4):
        total = sum(s[i, j].exp() for j in range(4) if j != i)
        gaps.append((1 + total).log() - total.log())
    gap = neighbours.quick_thoughts(f, g, books) - neighbours.hard_neighbours(f, g, books, beta=0)
    assert gap.item() == pytest.approx(torch.stack(gaps).mean().item())
    exec(PAGE.solutions("limits")[0], {"torch": torch, "neighbours": neighbours})


# --- the cells


def test_kinds_of_pairs(page):
    found = page["kinds"](torch.tensor([0, 0, 0, 1]))
    assert found.tolist() == [[0, 1, 2, 3], [1, 0, 1, 3], [2, 1, 0, 3], [3, 3, 3, 0]]


def test_a_window_has_so_many_books(page):
    book = torch.tensor([0] * 9 + [1] * 3 + [2] * 4 + [3] * 8)
    assert page["window"](book, size=9, books=3).tolist() == list(range(6, 15))
    assert len(page["window"](torch.zeros(12), size=5, books=3)) == 5


def test_chance_and_what_is_found(page):
    found, chance = page["found"], page["chance"]
    for function in (found, chance):
        function.__globals__["among"] = 4
    try:
        book = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])  # the last run of one is left out
        assert chance(book) == pytest.approx((1 + 2 + 2 + 1) / 4 / 3)
        z = torch.eye(9)
        assert found(z + z.roll(1, 1), book) == 1
        assert chance(torch.tensor([0, 0, 0, 1])) == pytest.approx((1 + 2 + 1) / 3 / 3)
    finally:
        for function in (found, chance):
            function.__globals__["among"] = 100


def test_crops_drop_words_and_the_sentence_says_not(page):
    whole = page["whole"].split()
    assert "not" in words(page["whole"])
    for crop in page["crops"]:
        rest = iter(whole)
        assert all(word in rest for word in crop.split())


def test_source_is_shown_without_docstrings():
    text = PAGE.show("source")[1]["source"]
    assert '"""' not in text
    assert "def quick_thoughts(" in text
    assert "def hard_neighbours(" in text


@pytest.fixture(scope="module")
def tiny():
    """The page with encoders hardly trained."""
    names = PAGE.body[: PAGE.body.index("solution-border")]
    with mock.patch("hcl.corpus.load", functools.cache(corpus.load)):
        return PAGE.outputs(*names, **TINY)


def test_the_page_runs_and_draws(tiny):
    _, shown = tiny
    drawn = {name for name, output in shown.items() if output.drawn}
    assert drawn == {"batch-figure", "curves", "scores-figure"}
    assert shown["words"].text.startswith("- training helps, by a 95 % interval above zero, in ")
    assert shown["nearest"].text.count("<table") == 4


def test_splits_add_up_to_the_records_share(tiny):
    """Shares pooled over sentences, beside the Records' mean over runs of 100."""
    page, _ = tiny
    after = page["splits"][page["splits"]["when"] == "after"]
    assert (after["all"] - after["retrieval"]).abs().max() < 2e-3
    low = after[["in training, too", "held out alone"]].min(axis=1)
    high = after[["in training, too", "held out alone"]].max(axis=1)
    assert ((low <= after["all"]) & (after["all"] <= high)).all()


def test_common_words_are_the_jaccard_index(tiny):
    page, _ = tiny
    some, texts = page["jaccard"], page["test_texts"]
    for i, j in ((0, 1), (3, 40), (7, 7)):
        a, b = set(words(texts[i])), set(words(texts[j]))
        both = sorted(a | b)
        one, other = ([w in s for w in both] for s in (a, b))
        assert some[i, j].item() == pytest.approx(jaccard_score(one, other))


def test_a_copy_is_nobodys_nearest(tiny):
    page, _ = tiny
    z = torch.nn.functional.normalize(torch.randn(len(page["test_texts"]), 5), dim=1)
    nearest = (z @ z.T).masked_fill(page["copy"], -torch.inf).argmax(dim=1)
    assert all(page["test_texts"][i] != page["test_texts"][j] for i, j in enumerate(nearest))


def test_a_bag_reads_no_order(tiny):
    page, _ = tiny
    exec(PAGE.solutions("border-after")[0], dict(page))
    text = page["whole"]
    back = " ".join(reversed(words(text)))
    for name, equal in (("bag, untrained", True), ("transformer, quick-thoughts", False)):
        one, other = page["world"].embed(page["models"][name].encoder, [text, back])
        assert np.allclose(one, other, atol=1e-6) == equal


# --- words on made-up frames


def made_up(gain=0.05):
    rows = [
        {"encoder": "bag", "label": label, "temperature": t, "seed": seed,
         "digest": f"{label}{t}{seed}", "epoch": 4 * done,
         "retrieval": 0.1 + gain * done + bonus * done + 0.001 * seed * (done + bonus)}
        for label, bonus in (("quick-thoughts, cosines", 0.0), ("hard, β = 1", 0.02))
        for t in (0.2, 0.1)
        for seed in range(4)
        for done in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_training_in_words():
    found = PAGE.define("frame", "table", "words")
    curve = made_up()
    df = curve[curve["epoch"] == 4]
    said = found["training_words"](df, curve, {"TF-IDF": 0.16})
    assert said[0].endswith("in 4 of 4 rows")
    assert said[1].startswith("2 of 4 rows")
    assert said[2].startswith("each at its best temperature, hard, β = 1 minus quick-thoughts")
    assert "+2.0 points" in said[2]
    worse = made_up(gain=-0.05)
    ends = worse[worse["epoch"] == 4]
    assert "in 0 of 4" in found["training_words"](ends, worse, {"TF-IDF": 1})[0]


def test_objectives_have_one_name():
    df = pd.DataFrame(
        [
            ("quick_thoughts", "quick-thoughts", "none", 1.0),
            ("quick_thoughts", "quick-thoughts", "sphere", 1.0),
            ("hard_neighbours", "HCL β=0", "sphere", 0.0),
            ("hard_neighbours", "HCL β=0.5", "sphere", 0.5),
        ],
        columns=["method", "label", "normalize", "beta"],
    )
    assert PAGE.define("frame")["named"](df)["label"].tolist() == [
        "quick-thoughts, inner products", "quick-thoughts, cosines", "plain", "hard, β = 0.5",
    ]  # fmt: skip


def test_leak_in_words():
    rows = [
        {"encoder": "bag", "label": "x", "temperature": t, "seed": seed, "when": when,
         "all": 0.1 + 0.08 * done + 0.001 * seed * done,
         "held out alone": 0.1 + 0.001 * seed * done}
        for t in (0.1, 0.2) for seed in range(4) for done, when in enumerate(("before", "after"))
    ]  # fmt: skip
    found = PAGE.define("frame", "leak", "table", "leak-words")
    said = found["leak_words"](pd.DataFrame(rows), 0.05)
    assert "adds +8.1 to +8.1" in said[0]
    assert "in 2 of 2" in said[0]
    assert re.match(r"held out alone: training adds \+0\.[12]", said[1])
    assert said[2].startswith("2 of 2 rows do better")


def test_common_in_words():
    names = ["common words", "same book", "at most 3 places apart", "difference in length"]
    values = {
        "chance": (0.1, 0.2, 0.01, 8.0), "TF-IDF": (0.4, 0.7, 0.2, 6.0),
        "bag": (0.3, 0.6, 0.2, 5.0), "GRUs": (0.2, 0.3, 0.05, 5.5),
    }  # fmt: skip
    df = pd.DataFrame(
        [{"encoder": k, **dict(zip(names, v, strict=True))} for k, v in values.items()]
    )
    found = PAGE.define("common-words")
    say = found["common_words"]
    say.__globals__["properties"] = dict.fromkeys(names)
    said = say(df.reset_index())
    assert said[0] == (
        "common words: most for *bag* (30%), least for *GRUs* (20%); chance 10.0%, TF-IDF 40%"
    )
    assert said[3].startswith("length: nearest in length are those of *bag*, 5.0 words apart")
