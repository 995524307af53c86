"""Tables against the textbook formulas."""

import math
import statistics

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from hcl import compare
from hcl.compare import (
    best_over,
    frame,
    in_columns,
    interval,
    label,
    made_by,
    paired,
    percent,
    recorded,
    summary,
    words,
)
from hcl.runs import Record, RecordError, save

MADE = {"code": "1" * 12, "commit": "abcdef0123", "clean": True, "device": "CPU, A",
        "torch": "2.15", "date": "2026-11-22T10:07:12+00:00"}  # fmt: skip


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


def record_of(run, **provenance):
    return Record(
        run=run, metrics={"knn": 0.5}, history=[], cost={"seconds": 1.0}, provenance=provenance
    )


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


def test_runs_of_other_hardness_have_other_labels(tiny):
    runs = [tiny(method="hard_scl", beta=b) for b in (1.0, 2.0)]
    runs += [tiny(method=m, hardening="threshold", threshold=0.5) for m in ("hard", "hard_scl")]
    runs += [tiny(method="supcon", beta=2.0)]
    assert [label(record_of(r)) for r in runs] == [
        "H-SCL β=1", "H-SCL β=2", "HCL cos≥0.5", "H-SCL cos≥0.5", "SupCon",
    ]  # fmt: skip


def test_options_of_data_and_encoder_have_columns(tiny):
    df = frame([record_of(tiny(encoder_args={"whiten": True})), record_of(tiny())])
    assert df["whiten"].isna().tolist() == [False, True]
    assert not {"data_args", "encoder_args"} & set(df)


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


# Where the numbers come from


def test_frame_says_what_made_each_record(tiny):
    records = [record_of(tiny(), **MADE), record_of(tiny(), **{**MADE, "clean": False}),
               record_of(tiny(), **{**MADE, "commit": None, "clean": False}),
               record_of(tiny())]  # fmt: skip
    df = frame(records)
    assert df["commit"].tolist() == ["abcdef0", "abcdef0+", "unknown", "unknown"]
    assert df["code"].tolist() == ["1" * 12] * 3 + ["unknown"]
    assert df.loc[0, ["device", "torch", "date"]].tolist() == ["CPU, A", "2.15", "2026-11-22"]


def test_made_by_counts_versions_devices_days_and_hours(tiny):
    one = [record_of(tiny(seed=s), **MADE) for s in range(3)]
    assert made_by(frame(one)) == (
        "3 Records, made by code 111111111111 on CPU, A, 2026-11-22, in 0.1 minutes of training."
    )
    other = {**MADE, "code": "2" * 12, "device": "GPU, H", "date": "2026-11-24T00:00:00+00:00"}
    df = frame([*one, record_of(tiny(seed=3), **other)])
    df["seconds"] = 3600.0
    assert made_by(df) == (
        "4 Records, made by **two versions of the code** (111111111111: 3 runs; 222222222222: 1 "
        "run) on **two devices** (CPU, A: 3 runs; GPU, H: 1 run), 2026-11-22 to 2026-11-24, in "
        "4.0 hours of training."
    )
    assert made_by(pd.concat([df, df])) == made_by(df)  # a row a metric counts a run once
    assert made_by(df.iloc[:0]) == "Nothing is recorded yet."
    with pytest.raises(ValueError, match="'device' is not in the table"):
        made_by(df.drop(columns="device"))


def test_pairs_across_code_versions_are_counted_and_said(table):
    whole = {"baseline": {"label": "SimCLR"}, "by": ["label", "temperature"]}
    as_ever = paired(table, "knn", **whole)
    same = paired(table.assign(code="1"), "knn", **whole)
    pd.testing.assert_frame_equal(same, as_ever)
    newer = (table.label == "HCL β=1") & (table.temperature == 0.5) & (table.seed > 0)
    mixed = paired(table.assign(code=np.where(newer, "2", "1")), "knn", **whole)
    assert mixed.pop("mixed").tolist() == [0, 2, 0, 0]
    pd.testing.assert_frame_equal(mixed, as_ever)
    alike = table.assign(code=np.where(table.seed > 0, "2", "1"))  # each pair of one version
    pd.testing.assert_frame_equal(paired(alike, "knn", **whole), as_ever)


def test_a_pair_without_a_value_is_not_counted_and_versions_may_be_what_is_compared(table):
    part = table[table.temperature == 0.5].assign(code="1")
    part.loc[part.label == "HCL β=1", "code"] = "2"
    part.loc[(part.label == "HCL β=1") & (part.seed == 0), "knn"] = math.nan
    got = paired(part, "knn", baseline={"label": "SimCLR"}, by=["label"]).set_index("label")
    assert got.loc["HCL β=1", ["n", "mixed"]].tolist() == [2, 2]
    asked = part[part.label != "raw input"]
    got = paired(asked, "knn", baseline={"code": "1"}, by=["code"])
    assert got.columns.tolist() == ["code", "difference", "se", "n"]


def test_readers_are_told_of_mixed_pairs():
    rows = pd.DataFrame({"label": list("abc"), "difference": 0.064, "se": 0.008, "n": 5,
                         "mixed": [0, 1, 2]})  # fmt: skip
    shown = percent(rows)
    assert shown.columns.tolist() == ["label", "seeds", "difference ± se"]
    assert shown["difference ± se"].tolist() == [
        "+6.4 ± 0.8", "+6.4 ± 0.8 (1 pair across code versions)",
        "+6.4 ± 0.8 (2 pairs across code versions)",
    ]  # fmt: skip
    assert words(rows.iloc[2]) == (
        "+6.4 ± 0.8 points, n = 5 (**beyond** two standard errors) (2 pairs across code versions)"
    )
    joined = pd.concat([rows.drop(columns="mixed"), rows])  # NaN where no pair was mixed
    assert percent(joined)["difference ± se"].iloc[0] == "+6.4 ± 0.8"
    assert "across" not in words(joined.iloc[0])


# Intervals and best settings


def test_the_interval_is_scipys_of_the_differences(table):
    row = interval(paired(table, "knn", baseline={"label": "SimCLR"}, by=["label", "temperature"]))
    row = row[(row.label == "HCL β=1") & (row.temperature == 0.5)].iloc[0]
    expected = stats.ttest_1samp([0.06, 0.07, 0.05], 0).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval_and_percent_shows_the_others():
    rows = pd.DataFrame({"difference": [0.2, 0.02], "se": [math.nan, 0.01], "n": [1, 3]})
    got = interval(rows)
    assert got[["low", "high"]].isna().all(axis=1).tolist() == [True, False]
    shown = percent(got)
    assert shown.columns.tolist() == ["seeds", "difference ± se", "95 % interval"]
    assert shown["95 % interval"].tolist()[1] == "-2.3 to +6.3"  # t(0.975, 2) = 4.303
    with pytest.raises(ValueError, match="'se' is not in the table"):
        interval(rows.drop(columns="se"))


def test_best_over_takes_each_groups_best_setting_with_all_its_seeds():
    values = {("a", 0.2): [1, 5], ("a", 0.5): [4, 4], ("b", 0.2): [3, 3], ("b", 0.5): [0, 2]}
    df = pd.DataFrame(
        [
            {"label": name, "t": t, "size": math.nan, "seed": seed, "knn": v}
            for (name, t), row in values.items()
            for seed, v in enumerate(row)
        ]
    )
    got = best_over(df, "knn", over=["t", "size"], by="label")  # the mean, not the best seed
    assert got[["label", "t", "seed", "knn"]].to_numpy().tolist() == [
        ["a", 0.5, 0, 4], ["a", 0.5, 1, 4], ["b", 0.2, 0, 3], ["b", 0.2, 1, 3],
    ]  # fmt: skip
    one = paired(got, "knn", baseline={"label": "b"}, by=["label"])
    assert one.difference.tolist() == [1.0]
    unfinished = df.assign(knn=df["knn"].where(df["label"] == "b"))
    assert set(best_over(unfinished, "knn", over="t", by="label")["label"]) == {"b"}
    with pytest.raises(ValueError, match=r"over=\['t'\]: \['t'\] must not be among"):
        best_over(df, "knn", over="t", by=["label", "t"])
    with pytest.raises(ValueError, match="'temp' is not in the table"):
        best_over(df, "knn", over="temp", by="label")


# What is recorded of a study file


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study file of nine Runs, in a project of its own."""
    body = {
        "study": "lab",
        "base": {"data": "sphere", "encoder": "mlp", "epochs": 5},
        "grid": [
            {"method": ["nt_xent", "hard"], "temperature": [0.2, 0.5], "seed": [0, 1]},
            {"method": "nt_xent", "epochs": 0, "data_args": {"fine": 2}},
        ],
    }
    path = tmp_path / "book" / "profiles" / "lab.yml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(body))
    monkeypatch.setattr(compare, "project_root", lambda: tmp_path)
    return compare.sweeps.load_study(path)


def test_recorded_counts_what_is_wanted_and_reads_what_is_there(study, monkeypatch):
    monkeypatch.setattr("hcl.train.train", None)  # nothing is trained
    for run in study[:3]:
        save(record_of(run, **MADE))
    df, wanted = recorded("lab")
    assert (len(df), wanted) == (3, 9)
    assert df["digest"].tolist() == [run.digest for run in study[:3]]
    df, wanted = recorded("lab", temperature=0.5, epochs=5)
    assert (df["temperature"].tolist(), wanted) == ([0.5], 4)
    assert recorded("lab", seed=[0, 7], method="hard")[1] == 2
    assert recorded("lab", fine=2)[1] == recorded("lab", data_args={"fine": 2})[1] == 1
    assert recorded("lab", fine=None)[1] == recorded("lab", data_args={})[1] == 8
    assert recorded("lab", epochs=0, method="hard")[1] == 0  # each is there, not together


def test_without_records_the_columns_are_there(study):
    df, wanted = recorded("lab", temperature=0.2)
    assert (len(df), wanted) == (0, 4)
    assert {"label", "temperature", "seed", "knn", "linear", "fine", "seconds", "code"} <= {*df}
    assert df[(df["epochs"] > 0) & (df["label"] == "SimCLR")]["linear"].empty
    assert summary(df, "knn", by=["label", "temperature"]).empty
    assert made_by(df) == "Nothing is recorded yet."


def test_an_empty_table_has_the_columns_that_training_records(study, tiny):
    from hcl.runs import get

    trained = frame([get(tiny(epochs=1), progress=False)])
    assert set(trained) - {"n_train", "n_test", "coarse"} <= set(recorded("lab")[0])


def test_recorded_refuses_filters_that_mean_nothing_and_damaged_records(study):
    with pytest.raises(ValueError, match=r"temprature=0.5: filter by one of study, .*, fine"):
        recorded("lab", temprature=0.5)
    with pytest.raises(ValueError, match=r"temperature=\[0.3\]: the study file has 0.2, 0.5"):
        recorded("lab", temperature=[0.3])
    with pytest.raises(FileNotFoundError, match=r"labb\.yml"):
        recorded("labb")
    save(record_of(study[0])).path.write_text("{")
    with pytest.raises(RecordError):
        recorded("lab")


def test_recorded_of_another_store(study, tmp_path):
    save(record_of(study[0]), store=tmp_path / "elsewhere")
    assert len(recorded("lab", store=tmp_path / "elsewhere")[0]) == 1
    assert len(recorded("lab")[0]) == 0


def test_a_baseline_that_stands_alone_has_no_differences():
    df = pd.DataFrame({"label": ["a", "a"], "seed": [0, 1], "knn": [0.5, 0.7]})
    table = compare.paired(df, "knn", baseline={"label": "a"}, by=["label"])
    assert len(table) == 0
    assert {"label", "difference", "se", "n"} <= set(table.columns)


def test_one_seed_is_shown_without_spread_and_interval():
    pairs = pd.DataFrame({"difference": [0.02, 0.03], "se": [math.nan, 0.01], "n": [1, 3],
                          "low": [math.nan, 0.01], "high": [math.nan, 0.05]})  # fmt: skip
    shown = percent(pairs)
    assert list(shown["difference ± se"]) == ["+2.0", "+3.0 ± 1.0"]
    assert list(shown["95 % interval"]) == ["", "+1.0 to +5.0"]
    means = percent(pd.DataFrame({"mean": [0.512], "std": [math.nan], "count": [1]}), digits=0)
    assert list(means["mean ± sd"]) == ["51"]


def test_a_filter_by_where_an_encoder_starts_takes_the_field_or_its_text():
    simclr = {"method": "nt_xent", "epochs": 10}
    for new, tuned in (({}, simclr), ("", "method=nt_xent, epochs=10")):
        counts = [
            compare.recorded("relatives-lab", cross_entropy=0.5, start=start)[1]
            for start in (new, tuned, [new, tuned])
        ]
        assert counts[0] > 0
        assert sum(counts[:2]) == counts[2]
