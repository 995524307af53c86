"""Six classification tasks that sentence embeddings are judged by: MR, CR, SUBJ, MPQA, TREC, MSRP.

A task is texts and labels; it is judged by logistic regression on frozen embeddings, in ten folds
or on the set's own test part, as skip-thoughts and quick-thoughts were. scikit-learn is imported
where it is used.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hcl.imagesets import data_root

Array = np.ndarray
FOLDS = 10
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, on standardised features
TWO_FILES = {  # one sentence a line; label 0, label 1
    "MR": ("MR/rt-polarity.neg", "MR/rt-polarity.pos"),
    "CR": ("CR/custrev.neg", "CR/custrev.pos"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.neg", "MPQA/mpqa.pos"),
}
TREC = ("TREC/train_5500.label", "TREC/TREC_10.label")  # latin-1: "LOC:city What …"
MSRP = ("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt")  # five columns, a header
NAMES = (*TWO_FILES, "TREC", "MSRP")


@dataclass(frozen=True, eq=False)
class Task:
    """Texts with labels (n,) int64; ``second`` has the other sentences of a task of pairs.

    n_train: how many rows, the first, are for training; 0 where the task has no test part.
    """

    name: str
    texts: tuple[str, ...]
    labels: Array
    second: tuple[str, ...] = ()
    n_train: int = 0


def load(name: str, *, root: str | Path | None = None) -> Task:
    """One of the six tasks, from ``sentences/`` in the data folder, laid out as SentEval has it.

    Raises: ValueError: an unknown name, or a line that is not as it should be (the message names
    file and line); FileNotFoundError: a file is missing (it says which, and where sets come from).
    """
    if name not in NAMES:
        raise ValueError(f"name is {name!r}: choose one of {', '.join(NAMES)}")
    folder = data_root(root) / "sentences"
    if name in TWO_FILES:
        parts = [_lines(folder / file) for file in TWO_FILES[name]]
        texts = [text for part in parts for _, text in part]
        return Task(name, tuple(texts), np.repeat([0, 1], [len(part) for part in parts]))
    return _trec(folder) if name == "TREC" else _msrp(folder)


def check(task: Task) -> None:
    """Refuse a task that no regression could be fitted on: before an encoder is trained for it.

    Raises: ValueError naming the task and how many rows of its labels there are.
    """
    has_test = bool(task.second) or task.name == "TREC"
    labels = task.labels[: task.n_train] if has_test else task.labels
    counts = np.unique(labels, return_counts=True)[1]
    least = 2 if has_test else 2 * FOLDS
    if len(counts) < 2 or counts.min() < least or (has_test and task.n_train == len(task.labels)):
        raise ValueError(
            f"{task.name} has {counts.tolist()} rows of its labels to train on and "
            f"{len(task.labels) - task.n_train if has_test else 0} to test on; two labels, "
            f"{least} of each, and where there is a test part a row of it, would do"
        )


def _lines(path: Path, encoding: str = "utf-8-sig") -> list[tuple[int, str]]:
    """Lines of a file that are not empty, with their numbers."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(
            f"{path}: is missing; SentEval's data script makes CR, MR, MPQA, SUBJ, TREC, MRPC; "
            "put these folders into sentences/ of the data folder (HCL_DATA)"
        ) from None
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not {encoding.removesuffix('-sig')} ({error.reason}); convert it"
        ) from None
    found = [(k, line.strip()) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found:
        raise ValueError(f"{path}: is empty; a sentence a line would do")
    return found


def _trec(folder: Path) -> Task:
    rows = []
    for file in TREC:
        for k, line in _lines(folder / file, "latin-1"):
            label, _, question = line.partition(" ")
            if ":" not in label or not question:
                raise ValueError(
                    f"{folder / file}, line {k}: is {line[:40]!r}, not 'LABEL:fine text'"
                )
            rows.append((file, label.split(":")[0], question))
    classes = sorted({label for _, label, _ in rows})
    return Task(
        "TREC",
        tuple(question for _, _, question in rows),
        np.array([classes.index(label) for _, label, _ in rows]),
        n_train=sum(file == TREC[0] for file, _, _ in rows),
    )


def _msrp(folder: Path) -> Task:
    rows = []
    for file in MSRP:
        for k, line in _lines(folder / file)[1:]:
            cells = line.split("\t")
            if len(cells) != 5 or cells[0] not in ("0", "1"):
                raise ValueError(
                    f"{folder / file}, line {k}: has {len(cells)} columns and begins with "
                    f"{cells[0][:10]!r}; five, the first 0 or 1, would do"
                )
            rows.append((file, int(cells[0]), cells[3], cells[4]))
    return Task(
        "MSRP",
        tuple(row[2] for row in rows),
        np.array([row[1] for row in rows]),
        second=tuple(row[3] for row in rows),
        n_train=sum(row[0] == MSRP[0] for row in rows),
    )


def features(task: Task, embed: Callable[[Sequence[str]], Array]) -> Array:
    """Embeddings (n, d) of a task's texts, or of a pair u, v its |u - v| and u v, (n, 2d).

    Source: the features of a pair are those of skip-thoughts (Kiros et al. 2015).
    """
    u = np.asarray(embed(task.texts), np.float64)
    if not task.second:
        return u
    v = np.asarray(embed(task.second), np.float64)
    return np.hstack([abs(u - v), u * v])


def judge(task: Task, x: Array, *, seed: int = 0) -> dict[str, float]:
    """Accuracy, as a share, of logistic regression on features x (n, d); for pairs also F1.

    Ten stratified folds, drawn by ``seed``, or the task's own test part. Features are standardised
    on the training part; the fit ends after 300 steps at the latest; the penalty is the best of
    four on a tenth of that part that is held out. (The papers' scripts choose it by a
    cross-validation within each fold: ten times as dear.)

    Raises: ValueError for rows that do not fit, or NaN.
    """
    if len(x) != len(task.labels):
        raise ValueError(
            f"x has {len(x)} rows and {task.name} {len(task.labels)}: as many would do"
        )
    if not np.isfinite(x).all():
        raise ValueError("x has NaN or infinite entries: did training diverge?")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.model_selection import StratifiedKFold

    y = task.labels
    if task.n_train:
        rows = np.arange(len(y))
        splits = [(rows[: task.n_train], rows[task.n_train :])]
    else:
        splits = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y))
    found: dict[str, list[float]] = {"accuracy": [], "f1": []}
    for train, test in splits:
        with warnings.catch_warnings():  # its few hundred steps are part of the yardstick
            warnings.simplefilter("ignore", ConvergenceWarning)
            predicted = _regression(seed).fit(x[train], y[train]).predict(x[test])
        found["accuracy"].append(accuracy_score(y[test], predicted))
        if task.second:
            found["f1"].append(f1_score(y[test], predicted))
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _regression(seed: int):  # type: ignore[no-untyped-def]
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        {"logisticregression__C": PENALTIES},
        cv=StratifiedShuffleSplit(1, test_size=0.1, random_state=seed),
    )
