"""From Records to tables: one row a run, means over seeds with their spread, paired differences.

Methods are compared on the same seeds (same data, same batches, same initialisation), so the
difference is taken seed by seed and its standard error is that of the differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from hcl.runs import Record

LABELS = {"nt_xent": "SimCLR", "debiased": "Debiased", "hard": "HCL"}


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a Record: the Run's fields, ``data_args`` spread out, the metrics, cost and digest.

    ``label`` names the method as the papers do; for HCL with its beta.

    Raises: ValueError: no Records.
    """
    if not records:
        raise ValueError("records: none given; is the study recorded? `hcl runs list` says")
    rows = []
    for r in records:
        run = asdict(r.run)
        run |= run.pop("data_args")
        rows.append({"digest": r.run.digest, "label": label(r), **run, **r.metrics, **r.cost})
    return pd.DataFrame(rows)


def label(record: Record) -> str:
    """What a table calls the Record's method, e.g. "HCL β=1"."""
    run = record.run
    if run.epochs == 0:
        return "raw input" if run.encoder == "raw" else "untrained encoder"
    name = LABELS.get(run.method, run.method)
    return f"{name} β={run.beta:g}" if run.method == "hard" else name


def summary(df: pd.DataFrame, metric: str, *, by: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation over seeds (ddof=1) and number of runs of a metric, by group.

    Raises: ValueError: a column that is not there.

    >>> df = pd.DataFrame({"label": ["a", "a"], "seed": [0, 1], "knn": [0.5, 0.7]})
    >>> summary(df, "knn", by=["label"]).round(3).values.tolist()
    [['a', 0.6, 0.141, 2]]
    """
    _check(df, [metric, *by])
    return (
        df.groupby(list(by), sort=False, dropna=False)[metric]
        .agg(["mean", "std", "count"])
        .reset_index()
    )


def paired(
    df: pd.DataFrame, metric: str, *, baseline: Mapping[str, object], by: Sequence[str]
) -> pd.DataFrame:
    """Mean difference to a baseline over the seeds both have, with its standard error.

    Args: baseline: values of some of the ``by`` columns that pick the baseline's rows; the other
    ``by`` columns are matched (baseline {"label": "SimCLR"} with by ["label", "temperature"]
    compares at equal temperature). Columns of the result: by, difference, se, n.

    Raises: ValueError: a column that is not there, no baseline row, or two runs of one seed.

    >>> df = pd.DataFrame({"label": list("aabb"), "seed": [0, 1, 0, 1], "knn": [1, 2, 2, 5.0]})
    >>> paired(df, "knn", baseline={"label": "a"}, by=["label"]).values.tolist()
    [['b', 2.0, 1.0, 2]]
    """
    _check(df, [metric, "seed", *by, *baseline])
    if apart := set(baseline) - set(by):
        raise ValueError(f"baseline={dict(baseline)}: {sorted(apart)} must be among by={list(by)}")
    keys = [*by, "seed"]
    if df.duplicated(keys).any():
        raise ValueError(f"by={list(by)}: several runs of one seed fall into one group")
    is_base = (df[list(baseline)] == pd.Series(dict(baseline))).all(axis=1)
    if not is_base.any():
        raise ValueError(f"baseline={dict(baseline)}: no run has these values")
    match = [k for k in keys if k not in baseline]
    base = df[is_base].set_index(match)[metric].rename("base")
    both = df[~is_base].join(base, on=match, how="inner")
    both["difference"] = both[metric] - both["base"]
    groups = both.groupby(list(by), sort=False, dropna=False)["difference"]
    return groups.agg(difference="mean", se="sem", n="count").reset_index()


def percent(table: pd.DataFrame, *, digits: int = 1) -> pd.DataFrame:
    """A :func:`summary` or :func:`paired` table for reading: "71.2 ± 3.8" and "+6.4 ± 0.8" in %."""
    out = table.copy()
    if "mean" in out:
        out["mean ± sd"] = [f"{100 * m:.{digits}f} ± {100 * s:.{digits}f}" for m, s in zip(out.pop("mean"), out.pop("std"), strict=True)]  # noqa: E501 # fmt: skip
        return out.rename(columns={"count": "seeds"})
    out["difference ± se"] = [f"{100 * d:+.{digits}f} ± {100 * s:.{digits}f}" for d, s in zip(out.pop("difference"), out.pop("se"), strict=True)]  # noqa: E501 # fmt: skip
    return out.rename(columns={"n": "seeds"})


def in_columns(table: pd.DataFrame, values: str, *, columns: Sequence[str]) -> pd.DataFrame:
    """A long table as one to read: a row a label, in the order they come, and columns by others.

    >>> long = pd.DataFrame({"label": ["b", "a"], "t": [0.5, 0.5], "x": ["1 ± 2", "3 ± 4"]})
    >>> in_columns(long, "x", columns=["t"]).loc["b", 0.5]
    '1 ± 2'
    """
    wide = table.pivot_table(values, "label", list(columns), aggfunc="first", sort=False)
    order = [True] * (len(columns) - 1) + [False]  # the last one, as the temperature, falling
    return (
        wide.sort_index(axis=1, ascending=order if len(columns) > 1 else False)
        .fillna("")
        .rename_axis(None)
    )


def words(row: pd.Series) -> str:
    """A row of :func:`paired`, of accuracies, as a phrase: how large, and is it beyond 2 se.

    >>> words(pd.Series({"difference": 0.064, "se": 0.008, "n": 5}))
    '+6.4 ± 0.8 points, n = 5 (**beyond** two standard errors)'
    """
    size = f"{100 * row['difference']:+.1f} ± {100 * row['se']:.1f} points, n = {row['n']:.0f}"
    if not row["se"] >= 0:
        return f"{100 * row['difference']:+.1f} points, one seed: no standard error"
    beyond = abs(row["difference"]) > 2 * row["se"]
    return f"{size} ({'**beyond**' if beyond else 'within'} two standard errors)"


def _check(df: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [c for c in columns if c not in df.columns]:
        raise ValueError(f"column {missing[0]!r} is not in the table: {', '.join(df.columns)}")
