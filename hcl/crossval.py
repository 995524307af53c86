"""Support vector machines on frozen embeddings, cross-validated as the graph papers do.

Ten folds; in each, C is chosen by cross-validation within the other nine. Two protocols differ in
two habits. The released one fits the RBF kernel to the embeddings as they are and draws the folds
once. Sums over nodes have scales that differ by orders of magnitude between dimensions, and which
of 19 graphs of MUTAG are a fold moves the accuracy by points: so ``scaled`` standardises within
each fit, and ``repeats`` draws the folds several times.

The kernel of a fold is computed once for all C; scikit-learn's GridSearchCV would find the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

C = tuple(10.0**k for k in range(-3, 4))  # 0.001 to 1000
FOLDS = 10
INNER = 5  # folds in which C is chosen


def svc_accuracies(
    z: np.ndarray, y: np.ndarray, *, folds: int = FOLDS, repeats: int = 1, scaled: bool = False,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Accuracies in [0, 1] of an SVC in each fold of each repeat, (repeats, folds).

    z: (n, d) embeddings; y: (n,) labels. RBF kernel with scikit-learn's default gamma; C from 0.001
    to 1000. Folds keep the classes' proportions; repeat r draws them with seed + r.

    Source: Sun et al. 2020 and Robinson et al. 2021, `evaluate_embedding.py` (folds=10, repeats=1,
    scaled=False, without a seed); scaled and repeats are ours.
    Raises: ValueError: shapes that do not fit, values that are not finite, one class alone, or a
    class with fewer members than folds.

    >>> z = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]).repeat(6, axis=0)
    >>> svc_accuracies(z, (z[:, 0] > 3).astype(int), folds=3)
    array([[1., 1., 1.]])
    """
    from sklearn.model_selection import StratifiedKFold

    _check_rows(z, y)
    for name, value, least in (("folds", folds, 3), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: at least {least} would do")
    check_classes(y, folds)
    found = np.empty((repeats, folds))
    for r in range(repeats):
        split = StratifiedKFold(folds, shuffle=True, random_state=seed + r).split(z, y)
        for k, (train, test) in enumerate(split):
            found[r, k] = svc_accuracy(z[train], y[train], z[test], y[test], scaled=scaled)
    return found


def svc_accuracy(
    z_train: np.ndarray, y_train: np.ndarray, z_test: np.ndarray, y_test: np.ndarray, *,
    scaled: bool = True,
) -> float:  # fmt: skip
    """Test accuracy in [0, 1] of an SVC whose C was chosen within the training part.

    C is the smallest of those that do best in five folds, fewer where a class has fewer members.

    Source, raises: as :func:`svc_accuracies`; here for a test part of your own.

    >>> z = np.array([[0.0], [5.0]]).repeat(8, axis=0)
    >>> svc_accuracy(z, z[:, 0] > 3, z + 0.1, z[:, 0] > 3)
    1.0
    """
    from sklearn.model_selection import StratifiedKFold

    _check_rows(z_train, y_train)
    _check_rows(z_test, y_test)
    check_classes(y_train, 2)
    least = np.unique(y_train, return_counts=True)[1].min()
    inner = StratifiedKFold(min(INNER, int(least))).split(z_train, y_train)
    scores = [
        _accuracies(z_train[a], y_train[a], z_train[b], y_train[b], C, scaled) for a, b in inner
    ]
    best = C[int(np.mean(scores, axis=0).argmax())]
    return _accuracies(z_train, y_train, z_test, y_test, (best,), scaled)[0]


def _accuracies(
    z_train: np.ndarray, y_train: np.ndarray, z_test: np.ndarray, y_test: np.ndarray,
    penalties: Sequence[float], scaled: bool,
) -> list[float]:  # fmt: skip
    """Test accuracy with each C."""
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    if scaled:
        scaler = StandardScaler().fit(z_train)
        z_train, z_test = scaler.transform(z_train), scaler.transform(z_test)
    spread = z_train.shape[1] * z_train.var()
    gamma = 1 / spread if spread else 1.0  # scikit-learn's "scale"
    k_train, k_test = (rbf_kernel(part, z_train, gamma=gamma) for part in (z_train, z_test))
    machines = (SVC(C=penalty, kernel="precomputed").fit(k_train, y_train) for penalty in penalties)
    return [float((svc.predict(k_test) == y_test).mean()) for svc in machines]


def check_classes(y: np.ndarray, folds: int) -> None:
    """Raise ValueError for labels y (n,) of one class, or a class with fewer members than folds."""
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"y has one class only, {classes[0]:g}: two or more would do")
    if counts.min() < folds:
        raise ValueError(
            f"y: class {classes[counts.argmin()]:g} has {counts.min()} member(s), fewer than "
            f"folds={folds}; give fewer folds, or leave the class out"
        )


def _check_rows(z: np.ndarray, y: np.ndarray) -> None:
    if z.ndim != 2 or len(z) != len(y) or not len(y):
        raise ValueError(f"z {z.shape}, y {y.shape}: must be (n, d) and (n,), n >= 1")
    if not np.isfinite(z).all():
        raise ValueError("z has NaN or infinite values: did the training diverge?")
