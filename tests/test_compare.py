"""Tables against the textbook formulas."""

import math
import statistics

import pandas as pd
import pytest

from hcl.compare import frame, in_columns, label, paired, percent, summary, words
from hcl.runs import Record


@pytest.fixture
def table():
    values = {"SimCLR": [0.60, 0.64, 0.61], "HCL β=1": [0.66, 0.71, 0.66], "raw input": [0.3, 0.2]}
    return pd.DataFrame(
        [
            {"label": name, "temperature": t, "seed": seed, "knn": v - t / 100}
            for name, row in values.items()
            for t in (0.2, 0.5)
            for seed, v in enumerate(row)
        ]
    )


def record_of(run):
    return Record(run=run, metrics={"knn": 0.5}, history=[], cost={"seconds": 1.0}, provenance={})


def test_frame_has_a_row_a_record_with_fields_and_metrics(tiny):
    df = frame([record_of(tiny(seed=s)) for s in (0, 1)])
    assert df["seed"].tolist() == [0, 1]
    assert df.loc[0, ["knn", "seconds", "fine", "method"]].tolist() == [0.5, 1.0, 2, "hard"]
    with pytest.raises(ValueError, match="none given"):
        frame([])


def test_labels_are_the_papers(tiny):
    runs = [tiny(method="nt_xent"), tiny(method="debiased"), tiny(beta=0.5),
            tiny(epochs=0), tiny(encoder="raw", epochs=0)]  # fmt: skip
    assert [label(record_of(r)) for r in runs] == [
        "SimCLR", "Debiased", "HCL β=0.5", "untrained encoder", "raw input",
    ]  # fmt: skip


def test_summary_is_mean_and_sample_deviation(table):
    got = summary(table[table.temperature == 0.5], "knn", by=["label"]).set_index("label")
    values = [0.595, 0.635, 0.605]
    assert got.loc["SimCLR", "mean"] == pytest.approx(statistics.mean(values))
    assert got.loc["SimCLR", "std"] == pytest.approx(statistics.stdev(values))
    assert got.loc["SimCLR", "count"] == 3


def test_paired_differences_are_taken_seed_by_seed(table):
    got = paired(table, "knn", baseline={"label": "SimCLR"}, by=["label", "temperature"])
    row = got[(got.label == "HCL β=1") & (got.temperature == 0.5)].iloc[0]
    differences = [0.06, 0.07, 0.05]
    assert row.difference == pytest.approx(statistics.mean(differences))
    assert row.se == pytest.approx(statistics.stdev(differences) / math.sqrt(3))
    assert row.n == 3
    assert got[got.label == "raw input"].n.tolist() == [2, 2]  # the seeds both have


def test_paired_refuses_what_cannot_be_paired(table):
    with pytest.raises(ValueError, match="no run has these values"):
        paired(table, "knn", baseline={"label": "SupCon"}, by=["label", "temperature"])
    with pytest.raises(ValueError, match="several runs of one seed"):
        paired(table, "knn", baseline={"label": "SimCLR"}, by=["label"])
    with pytest.raises(ValueError, match="'accuracy' is not in the table"):
        summary(table, "accuracy", by=["label"])


def test_percent_is_for_reading(table):
    shown = percent(summary(table, "knn", by=["label", "temperature"]))
    assert shown.loc[1, "mean ± sd"] == "61.2 ± 2.1"
    assert shown.columns.tolist() == ["label", "temperature", "seeds", "mean ± sd"]
    gains = percent(paired(table, "knn", baseline={"label": "SimCLR"}, by=["label", "temperature"]))
    assert gains["difference ± se"].iloc[0] == "+6.0 ± 0.6"


def test_in_columns_keeps_the_order_of_labels_and_puts_high_temperatures_first(table):
    long = percent(summary(table, "knn", by=["label", "temperature"]))
    wide = in_columns(long, "mean ± sd", columns=["temperature"])
    assert wide.index.tolist() == ["SimCLR", "HCL β=1", "raw input"]
    assert wide.columns.tolist() == [0.5, 0.2]
    assert wide.loc["SimCLR", 0.2] == "61.5 ± 2.1"
    missing = long[~((long.label == "raw input") & (long.temperature == 0.2))]
    assert in_columns(missing, "mean ± sd", columns=["temperature"]).loc["raw input", 0.2] == ""


def test_words_call_a_difference_what_it_is():
    row = pd.Series({"difference": -0.012, "se": 0.007, "n": 3})
    assert words(row) == "-1.2 ± 0.7 points, n = 3 (within two standard errors)"
    assert "**beyond**" in words(row.replace(-0.012, -0.015))


def test_one_seed_gets_no_verdict():
    assert words(pd.Series({"difference": 0.2, "se": math.nan, "n": 1})) == (
        "+20.0 points, one seed: no standard error"
    )


def test_groups_without_a_value_are_kept_and_a_baseline_must_be_a_group():
    df = pd.DataFrame({"label": ["a", "b"], "size": [8, math.nan], "seed": 0, "knn": [0.5, 0.6]})
    assert summary(df, "knn", by=["label", "size"])["label"].tolist() == ["a", "b"]
    with pytest.raises(ValueError, match=r"\['size'\] must be among by"):
        paired(df, "knn", baseline={"size": 8}, by=["label"])
