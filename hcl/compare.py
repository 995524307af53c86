"""From Records to tables: one row a run, means over seeds with their spread, paired differences.

Methods are compared on the same seeds (same data, same batches, same initialisation), so the
difference is taken seed by seed and its standard error is that of the differences. Records of
several versions of the code are said to be such, in :func:`made_by` and in the pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from hcl import project_root, runs, sweeps
from hcl.methods import ARGUMENTS, CROSS_ENTROPY
from hcl.run import Run
from hcl.runs import Record

LABELS = {
    "nt_xent": "SimCLR", "debiased": "Debiased", "hard": "HCL", "decoupled": "DCL", "scl": "SCL",
    "hard_scl": "H-SCL", "supcon": "SupCon", "schane": "SCHaNe", "infograph": "InfoGraph",
    "quick_thoughts": "quick-thoughts", "hard_neighbours": "HCL", "unremix": "UnReMix",
    "ring": "Ring", "bayesian": "BCL", "transport": "OT plan", "cross_entropy": "CE",
}  # fmt: skip
METRICS = (
    "loss", "knn", "linear", "svc", "svc_sd", "svc_scaled", "svc_scaled_sd", "alignment",
    "uniformity", "overlap", "clamp_share",
)  # fmt: skip
COST = ("seconds", "images_per_second", "peak_memory_bytes")
UNKNOWN = "unknown"


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a Record: digest, the Run's fields, metrics, cost and origin.

    Options, as those in ``data_args``, have columns of their own. ``label`` names the method as the
    papers do, with its hardness. The origin is code, commit (with "+" where files were changed
    since), device, torch and date, "unknown" where not recorded.

    Raises: ValueError: no Records.
    """
    if not records:
        raise ValueError("records: none given; is the study recorded? `hcl runs list` says")
    rows = []
    for r in records:
        names = {"digest": r.run.digest, "label": label(r)}
        rows.append({**names, **_spread(r.run), **r.metrics, **r.cost, **_origin(r.provenance)})
    return pd.DataFrame(rows)


def _spread(run: Run) -> dict[str, Any]:
    values = asdict(run)
    values["start"] = _in_text(run.start)
    options = [name for name, value in values.items() if isinstance(value, Mapping)]
    return values | {k: v for name in options for k, v in values.pop(name).items()}


def _in_text(start: Mapping[str, Any]) -> str:
    """Of the Run that an encoder comes from; "" for a new one."""
    return ", ".join(f"{k}={v}" for k, v in start.items())


def _origin(provenance: Mapping[str, Any]) -> dict[str, str]:
    names = ("code", "commit", "device", "torch", "date")
    made = {name: provenance.get(name) or UNKNOWN for name in names}
    changed = provenance.get("commit") and not provenance.get("clean")
    return {**made, "commit": made["commit"][:7] + "+" * bool(changed), "date": made["date"][:10]}


def made_by(df: pd.DataFrame) -> str:
    """A Markdown sentence on a :func:`frame`: how many Records, by what code, on what, when, hours.

    Several versions of the code, or several devices, are called that, with the runs of each.

    Raises: ValueError: a column that is not there.

    >>> row = {"study": "lab", "digest": "a", "code": "451c6ed4a3ee", "device": "CPU, AMD EPYC",
    ...        "date": "2026-11-22", "seconds": 5400.0}
    >>> made_by(pd.DataFrame([row]))
    '1 Record, made by code 451c6ed4a3ee on CPU, AMD EPYC, 2026-11-22, in 1.5 hours of training.'
    """
    _check(df, ["study", "digest", "code", "device", "date", "seconds"])
    if not len(df):
        return "Nothing is recorded yet."
    df = df.drop_duplicates(["study", "digest"])  # a table may have a run twice, once a metric
    code = _each(df["code"], one="code {}", several="versions of the code")
    device = _each(df["device"], one="{}", several="devices")
    dates = " to ".join(sorted({df["date"].min(), df["date"].max()}))
    hours = df["seconds"].sum() / 3600
    took = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    number = f"{len(df)} Record{'s' * (len(df) > 1)}"
    return f"{number}, made by {code} on {device}, {dates}, in {took} of training."


def _each(values: pd.Series, *, one: str, several: str) -> str:
    counts = values.value_counts()
    if len(counts) == 1:
        return one.format(counts.index[0])
    number = {2: "two", 3: "three", 4: "four"}.get(len(counts), len(counts))
    runs_of = (f"{name}: {n} run{'s' * (n > 1)}" for name, n in counts.items())
    return f"**{number} {several}** ({'; '.join(runs_of)})"


def recorded(
    study: str, /, *, store: Path | None = None, **filters: object
) -> tuple[pd.DataFrame, int]:
    """The :func:`frame` of what is recorded of book/profiles/STUDY.yml, and how many it should be.

    Args: filters: values of Run's fields, or of options in ``data_args`` (None: the Runs without
    that option); a list means any of them. A field that is not named may have any value.
    Nothing is trained. Without Records the table is empty and has the usual columns.

    Raises: ValueError: a filter that is neither, or that no Run of the study file meets;
    RecordError: a damaged Record; FileNotFoundError: no such study file.

    >>> df, wanted = recorded("cifar10-lab", temperature=0.5, seed=[0, 1], epochs=5)
    >>> len(df) <= wanted
    True
    """
    of_study = sweeps.load_study(project_root() / "book" / "profiles" / f"{study}.yml")
    settings = [{**vars(run), **_spread(run)} for run in of_study]
    kept = set(range(len(of_study)))
    for name, value in filters.items():
        kept &= _meet(settings, name, value)
    wanted = [of_study[i] for i in sorted(kept)]
    found = []
    for run in wanted:
        try:
            found.append(runs.get(run, store=store, missing="refuse"))
        except runs.MissingRecord:
            continue
    return (frame(found) if found else _empty(of_study)), len(wanted)


def _meet(had: Sequence[Mapping[str, Any]], name: str, value: object) -> set[int]:
    """Which of the Runs that have these settings meet a filter."""
    values = value if isinstance(value, list | tuple) else [value]
    if name == "start":
        values = [_in_text(v) if isinstance(v, Mapping) else v for v in values]
    if not any(name in of_run for of_run in had):
        known = ", ".join(dict.fromkeys(key for of_run in had for key in of_run))
        raise ValueError(f"{name}={value!r}: filter by one of {known}")
    keep = {i for i, of_run in enumerate(had) if of_run.get(name) in values}
    if not keep:
        has = ", ".join(dict.fromkeys(repr(of_run.get(name)) for of_run in had))
        raise ValueError(f"{name}={value!r}: the study file has {has}")
    return keep


def _empty(wanted: Sequence[Run]) -> pd.DataFrame:
    """The columns that Records of these Runs would have."""
    metrics = dict.fromkeys(METRICS, math.nan)
    cost = dict.fromkeys(COST, math.nan)
    blank = [Record(run=r, metrics=metrics, history=[], cost=cost, provenance={}) for r in wanted]
    return frame(blank).iloc[:0]


def label(record: Record) -> str:
    """What a table calls the Record's method, e.g. "HCL β=1" or "H-SCL cos≥0.5"."""
    run = record.run
    if run.epochs == 0:
        return "raw input" if run.encoder == "raw" else "untrained encoder"
    name = LABELS[run.method]
    if run.method == "decoupled" and run.method_args:
        name = "DCLW"
    if run.synthetic:  # MoCHi weighs the mixtures as all others, SSCL is HCL over both
        name = "MoCHi" if run.method == "nt_xent" else "SSCL"
    if run.cross_entropy and run.method != CROSS_ENTROPY:
        name = f"CE + {name}"
    if run.hardening == "threshold":
        return f"{name} cos≥{run.threshold:g}"
    easy = " easy" if run.sign == "easy" else ""
    return f"{name} β={run.beta:g}{easy}" if "beta" in ARGUMENTS[run.method] else name


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
    compares at equal temperature). Columns of the result: by, difference, se, n; and ``mixed``, how
    many of the n pairs join two versions of the ``code``, if any does.

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
    base_columns = {metric: "base"}
    if "code" in df and "code" not in by:
        base_columns["code"] = "base code"
    base = df[is_base].set_index(match)[list(base_columns)].rename(columns=base_columns)
    both = df[~is_base].join(base, on=match, how="inner").reset_index(drop=True)
    both["difference"] = both[metric] - both["base"]
    if "base code" in both:
        across = both["code"].fillna(UNKNOWN) != both["base code"].fillna(UNKNOWN)
        both["mixed"] = across & both["difference"].notna()
    groups = both.groupby(list(by), sort=False, dropna=False)
    table = groups["difference"].agg(difference="mean", se="sem", n="count").reset_index()
    if "mixed" in both and both["mixed"].any():
        table["mixed"] = groups["mixed"].sum().to_numpy()
    return table


def interval(table: pd.DataFrame) -> pd.DataFrame:
    """A :func:`paired` table with the 95 % confidence interval of each difference, low to high.

    difference ± t(0.975, n - 1) * se, Student's t with n - 1 degrees of freedom; NaN for one seed.
    It assumes differences that are normal over seeds, and speaks of one comparison at a time.

    Raises: ValueError: a column that is not there.

    >>> row = {"difference": 0.06, "se": 0.01, "n": 5}
    >>> interval(pd.DataFrame([row]))[["low", "high"]].round(3).values.tolist()
    [[0.032, 0.088]]
    """
    from scipy import stats  # heavy

    _check(table, ["difference", "se", "n"])
    half = stats.t.ppf(0.975, table["n"] - 1) * table["se"]
    return table.assign(low=table["difference"] - half, high=table["difference"] + half)


def best_over(
    df: pd.DataFrame, metric: str, *, over: str | Sequence[str], by: str | Sequence[str]
) -> pd.DataFrame:
    """The rows of each group at its setting of ``over`` with the highest mean metric over seeds.

    So ``over="temperature", by="label"`` is each method at its best temperature. The choice is
    made on the metric that is then shown, on test data: the winner's value is too high, the more so
    the more settings a group has and the fewer seeds a setting has. Of equal settings the first.

    Raises: ValueError: a column that is not there, or one in both ``over`` and ``by``.

    >>> df = pd.DataFrame({"label": list("aabb"), "t": [0.2, 0.5] * 2, "knn": [4, 5, 7, 6]})
    >>> best_over(df, "knn", over="t", by="label").values.tolist()
    [['a', 0.5, 5], ['b', 0.2, 7]]
    """
    over, by = ([c] if isinstance(c, str) else list(c) for c in (over, by))
    _check(df, [metric, *over, *by])
    if twice := set(over) & set(by):
        raise ValueError(f"over={over}: {sorted(twice)} must not be among by={by}")
    groups = df.groupby([*by, *over], sort=False, dropna=False)
    means = groups[metric].mean().reset_index().dropna(subset=[metric])
    top = means.groupby(by, sort=False, dropna=False)[metric].idxmax()
    return df.merge(means.loc[top, [*by, *over]])


def percent(table: pd.DataFrame, *, digits: int = 1) -> pd.DataFrame:
    """A :func:`summary` or :func:`paired` table for reading: "71.2 ± 3.8" and "+6.4 ± 0.8" in %.

    Pairs that join two versions of the code are marked; an :func:`interval` is shown beside. One
    seed alone has neither spread nor interval.
    """
    out = table.copy()
    if "mean" in out:
        spread = zip(out.pop("mean"), out.pop("std"), strict=True)
        out["mean ± sd"] = [_with_spread(m, s, f".{digits}f") for m, s in spread]
        return out.rename(columns={"count": "seeds"})
    marks = map(_across, out.pop("mixed")) if "mixed" in out else [""] * len(out)
    pairs = zip(out.pop("difference"), out.pop("se"), marks, strict=True)
    out["difference ± se"] = [_with_spread(d, s, f"+.{digits}f") + mark for d, s, mark in pairs]
    if "low" in out:
        ends = zip(out.pop("low"), out.pop("high"), strict=True)
        out["95 % interval"] = [
            "" if math.isnan(a) else f"{100 * a:+.{digits}f} to {100 * b:+.{digits}f}"
            for a, b in ends
        ]
    return out.rename(columns={"n": "seeds"})


def _with_spread(value: float, spread: float, form: str) -> str:
    """A share and its spread in percent; one seed alone has no spread."""
    return f"{100 * value:{form}}" + (
        "" if math.isnan(spread) else f" ± {100 * spread:{form.removeprefix('+')}}"
    )


def _across(pairs: float) -> str:
    plural = "pair" if pairs == 1 else "pairs"
    return f" ({pairs:.0f} {plural} across code versions)" if pairs > 0 else ""


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
    mark = _across(row.get("mixed", 0))
    size = f"{100 * row['difference']:+.1f} ± {100 * row['se']:.1f} points, n = {row['n']:.0f}"
    if not row["se"] >= 0:
        return f"{100 * row['difference']:+.1f} points, one seed: no standard error{mark}"
    beyond = abs(row["difference"]) > 2 * row["se"]
    return f"{size} ({'**beyond**' if beyond else 'within'} two standard errors){mark}"


def _check(df: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [c for c in columns if c not in df.columns]:
        raise ValueError(f"column {missing[0]!r} is not in the table: {', '.join(df.columns)}")
