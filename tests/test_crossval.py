"""The SVC in folds finds what scikit-learn's own search finds, and refuses what it must."""

import time

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from hcl.crossval import C, svc_accuracies, svc_accuracy


def points(n=120, d=6, classes=3, spread=1.5, seed=0):
    """Overlapping classes, in dimensions of very different scales."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    z = rng.normal(size=(classes, d))[y] + spread * rng.normal(size=(n, d))
    return z * np.geomspace(1, 1000, d), y


def searched(z, y, *, folds, scaled, seed):
    """The released evaluation with scikit-learn's search, fold by fold."""
    found = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(z, y):
        steps = [StandardScaler(), SVC()] if scaled else [SVC()]
        grid = {"svc__C": [0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]}
        search = GridSearchCV(make_pipeline(*steps), grid, cv=5, scoring="accuracy")
        found.append(search.fit(z[train], y[train]).score(z[test], y[test]))
    return np.array(found)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("seed", [0, 7])
def test_it_is_what_scikit_learns_search_finds(scaled, seed):
    z, y = points(seed=seed)
    wanted = searched(z, y, folds=4, scaled=scaled, seed=seed)
    found = svc_accuracies(z, y, folds=4, scaled=scaled, seed=seed)
    assert found.shape == (1, 4)
    np.testing.assert_allclose(found[0], wanted, atol=1e-12)


def test_repeats_draw_other_folds_and_begin_with_the_same():
    z, y = points()
    once, twice = (svc_accuracies(z, y, folds=3, repeats=r, seed=5) for r in (1, 2))
    assert twice.shape == (2, 3)
    assert (twice[0] == once[0]).all()
    assert (twice[1] == svc_accuracies(z, y, folds=3, seed=6)[0]).all()


def test_nothing_is_random_but_the_seed():
    z, y = points()
    np.random.seed(0)  # noqa: NPY002
    one = svc_accuracies(z, y, folds=3)
    np.random.seed(1)  # noqa: NPY002
    assert (svc_accuracies(z, y, folds=3) == one).all()


def test_standardising_does_not_care_for_scales_and_the_released_way_does():
    z, y = points(spread=1.0)
    level = z / np.geomspace(1, 1000, z.shape[1])
    scaled = [svc_accuracies(x, y, folds=4, scaled=True).mean() for x in (z, level)]
    raw = [svc_accuracies(x, y, folds=4).mean() for x in (z, level)]
    assert scaled[0] == scaled[1]
    assert raw[0] < raw[1]


def test_labels_that_mean_nothing_give_chance():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(200, 5)), np.arange(200) % 2
    assert svc_accuracies(z, y, scaled=True).mean() == pytest.approx(0.5, abs=0.12)


def test_constant_embeddings_give_the_largest_class():
    z, y = np.ones((60, 4)), np.array([0] * 40 + [1] * 20)
    for scaled in (False, True):
        assert svc_accuracies(z, y, folds=4, scaled=scaled).mean() == pytest.approx(2 / 3)


def test_labels_may_be_words():
    z, y = points()
    words = np.array(["blue", "green", "red"])[y]  # in alphabetical order, as the numbers are
    assert svc_accuracy(z, words, z, words) == svc_accuracy(z, y, z, y)


def test_a_held_out_part_plays_no_role_in_the_choice():
    z, y = points()
    train, test = slice(0, 80), slice(80, None)
    search = GridSearchCV(make_pipeline(StandardScaler(), SVC()), {"svc__C": list(C)}, cv=5)
    wanted = search.fit(z[train], y[train]).score(z[test], y[test])
    assert svc_accuracy(z[train], y[train], z[test], y[test]) == pytest.approx(wanted, abs=1e-12)


def test_few_members_of_a_class_make_fewer_folds_to_choose_c_in():
    z = np.concatenate([np.zeros((20, 2)), np.ones((2, 2))])
    y = np.array([0] * 20 + [1] * 2)
    assert svc_accuracy(z, y, z, y) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"folds": 2}, r"folds=2: at least 3"), ({"repeats": 0}, r"repeats=0: at least 1"),
     ({"y": np.zeros(120)}, r"y has one class only, 0:"),
     ({"y": np.array([1] * 4 + [0] * 116)}, r"y: class 1 has 4 member\(s\), fewer than folds=10"),
     ({"y": np.zeros(7)}, r"z \(120, 6\), y \(7,\)"), ({"z": np.zeros(120)}, r"z \(120,\)"),
     ({"z": np.full((120, 6), np.nan)}, "NaN or infinite values: did the training diverge"),
     ({"z": np.zeros((0, 6)), "y": np.zeros(0)}, r"n >= 1")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_cross_validated_is_refused(change, message):
    z, y = points()
    values = {"z": z, "y": y, **change}
    with pytest.raises(ValueError, match=message):
        svc_accuracies(values.pop("z"), values.pop("y"), **values)


def test_one_member_of_a_class_cannot_choose_c():
    z, y = points()
    with pytest.raises(ValueError, match=r"class 9 has 1 member\(s\), fewer than folds=2"):
        svc_accuracy(z, np.where(np.arange(120) == 0, 9, y), z, y)
    with pytest.raises(ValueError, match="z has NaN"):
        svc_accuracy(z, y, z * np.nan, y)


def test_a_set_of_the_size_of_mutag_takes_seconds():
    z, y = points(n=188, d=96, classes=2)
    start = time.process_time()
    svc_accuracies(z, y)
    assert time.process_time() - start < 20
