"""Runs refuse the impossible; Records are written whole, read back exactly, and checked."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from hcl import runs
from hcl.runs import MissingRecord, Record, RecordError, Run, get, read, records, save, verify


def record_of(run, **changes):
    values = {
        "metrics": {"knn": 0.5, "loss": 1 / 3},
        "history": [{"epoch": 1, "loss": 2.0, "knn": 0.25}],
        "cost": {"seconds": 1.5, "images_per_second": 10.0, "peak_memory_bytes": 1000},
        "provenance": {"commit": "abc", "date": "2026-01-01T00:00:00+00:00"},
    }
    return Record(run=run, **{**values, **changes})


def arrays_of(z):
    z = np.asarray(z, dtype=np.float16)
    return {"z": z, "labels": np.arange(len(z))[::-1], "of": 10}


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta", -1.0), ("tau_plus", 1.0), ("temperature", 0.0), ("method", "triplet"),
     ("epochs", -1), ("batch", 1), ("lr", 0.0), ("schedule", "linear"), ("precision", "int8"),
     ("probe", "svm"), ("anneal", "yes"), ("seed", -1), ("study", "Lab 1"), ("study", "../x")],
)  # fmt: skip
def test_an_impossible_value_is_refused_with_its_name(tiny, field, value):
    with pytest.raises(ValueError, match=rf"{field}=.*{str(value).split('/')[0]}"):
        tiny(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 2.5), ("epochs", True), ("beta", "1"), ("detach_weights", 1), ("data", 3),
     ("beta", float("nan")), ("lr", float("inf")), ("data_args", [1])],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused(tiny, field, value):
    with pytest.raises(ValueError, match=f"{field}=.*must be"):
        tiny(**{field: value})


def test_raw_input_cannot_be_trained(tiny):
    with pytest.raises(ValueError, match="'raw' has nothing to train"):
        tiny(encoder="raw", epochs=1)


def test_the_digest_names_the_configuration_and_not_the_study(tiny):
    assert tiny().digest == tiny(study="other").digest == tiny(beta=1).digest
    digests = {tiny(**c).digest for c in ({}, {"beta": 2.0}, {"seed": 1}, {"data_args": {}})}
    assert len(digests) == 4


def test_a_digest_is_the_same_in_another_process(tiny):
    run = Run(data="sphere", encoder="mlp", epochs=3, data_args={"fine": 2, "coarse": 4})
    code = (
        "from hcl.runs import Run; "
        "args = {'coarse': 4, 'fine': 2}; "
        "print(Run(epochs=3, encoder='mlp', data='sphere', data_args=args).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == run.digest


def test_parameters_the_method_does_not_have_do_not_make_another_run(tiny):
    assert tiny(method="nt_xent", beta=1.0).digest == tiny(method="nt_xent", tau_plus=0.0).digest
    assert tiny(method="debiased", beta=2.0).digest == tiny(method="debiased").digest
    assert tiny(method="debiased", tau_plus=0.2).digest != tiny(method="debiased").digest


# The store ----------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was(tiny):
    saved = save(record_of(tiny(study="s")))
    assert read(saved.path) == saved
    assert saved.path == runs.store_root() / "s" / f"{saved.run.digest}.json"
    assert records("s") == [saved]
    assert verify() == []


def test_embeddings_come_back_in_float32(tiny):
    z = np.array([[0.6, 0.8], [1.0, 0.0]])
    saved = save(record_of(tiny(study="s")), arrays=arrays_of(z))
    back, labels = read(saved.path).embeddings()
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, z, atol=1e-3)
    assert labels.tolist() == [1, 0]
    with pytest.raises(FileNotFoundError, match="keeps no embeddings"):
        save(record_of(tiny(study="other"))).embeddings()


def test_a_record_edited_by_hand_is_refused_and_named(tiny):
    path = save(record_of(tiny(study="s"))).path
    body = json.loads(path.read_text())
    body["metrics"]["knn"] = 0.99
    path.write_text(json.dumps(body))
    with pytest.raises(RecordError, match=rf"{path.name} was changed after it was recorded"):
        read(path)
    assert len(verify()) == 1
    with pytest.raises(RecordError):  # never silently trained over
        get(tiny(study="s"))


def test_a_truncated_record_is_refused_and_named(tiny):
    path = save(record_of(tiny(study="s"))).path
    path.write_text(path.read_text()[:100])
    with pytest.raises(RecordError, match=rf"{path.name} is truncated"):
        read(path)


@pytest.mark.parametrize("change", [{"extra": 1}, {"run": {"data": "sphere"}}, {"run": None}])
def test_a_record_of_another_layout_is_refused(tiny, change):
    path = save(record_of(tiny(study="s"))).path
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecordError, match=r"no Record of this version|was changed"):
        read(path)


def test_a_record_under_anothers_name_is_refused(tiny):
    path = save(record_of(tiny(study="s"))).path
    path.rename(path.with_name("000000000000.json"))
    assert "holds the Record of run" in verify()[0]


def test_a_metric_that_is_no_number_is_not_recorded(tiny):
    with pytest.raises(ValueError, match="JSON"):
        save(record_of(tiny(), metrics={"knn": float("nan")}))
    assert list(runs.store_root().glob("*/*")) == []


def test_a_full_disk_leaves_what_was_recorded(tiny):
    """The file-size limit makes the write itself fail, as a full disk does."""
    first = save(record_of(tiny(study="s")))
    bigger = record_of(tiny(study="s"), history=[{"epoch": e, "loss": 1.0} for e in range(5000)])
    before = first.path.read_bytes()
    soft, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        with pytest.raises(OSError, match="nothing recorded was changed"):
            save(bigger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))
    assert first.path.read_bytes() == before
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


# get ----------------------------------------------------------------------------------------------


def test_a_recorded_run_is_not_trained_again(tiny):
    save(record_of(tiny(study="s")))
    assert get(tiny(study="s")).metrics["knn"] == 0.5


def test_a_missing_run_names_the_command(tiny):
    with pytest.raises(MissingRecord, match=r"hcl sweep book/profiles/s\.yml"):
        get(tiny(study="s"), missing="refuse")


def test_a_cached_run_of_other_code_is_made_again(tiny):
    save(record_of(tiny(study="quick"), provenance={"code": "other", "date": "2026"}))
    fresh = get(tiny(study="quick"), progress=False)
    assert fresh.provenance["code"] != "other"
    assert get(tiny(study="quick"), progress=False) == fresh


def test_a_damaged_cached_run_is_made_again(tiny):
    path = save(record_of(tiny(study="quick"))).path
    path.write_text("{")
    assert get(tiny(study="quick"), progress=False).metrics["loss"] > 0
    assert verify() == []


def test_asking_for_embeddings_trains_a_record_without_them(tiny):
    plain = get(tiny(study="quick"), progress=False)
    kept = get(tiny(study="quick"), progress=False, embeddings=50)
    z, labels = kept.embeddings()
    assert z.shape == (50, 8)
    assert labels.shape == (50,)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-3)
    assert kept.metrics == plain.metrics


def test_provenance_says_what_made_it(tiny):
    made = get(tiny(), progress=False).provenance
    assert {"commit", "clean", "code", "python", "torch", "device", "threads", "date"} <= set(made)


# Embeddings beside a Record -----------------------------------------------------------------------


def test_embeddings_that_are_not_the_recorded_ones_are_refused(tiny):
    saved = save(record_of(tiny(study="s")), arrays=arrays_of([[1, 0], [0, 1]]))
    saved.path.with_suffix(".npz").write_bytes(b"PK junk")
    with pytest.raises(RecordError, match="npz was changed"):
        read(saved.path).embeddings()
    assert "npz was changed" in verify()[0]
    saved.path.with_suffix(".npz").unlink()
    assert "keeps no embeddings" in verify()[0]


def test_a_record_made_again_without_embeddings_leaves_no_old_ones(tiny):
    old = save(record_of(tiny(study="quick")), arrays=arrays_of([[1, 0], [0, 1]]))
    assert get(tiny(study="quick"), progress=False).kept is None  # made by other code: made again
    assert not old.path.with_suffix(".npz").exists()


def test_more_embeddings_than_kept_are_made_in_the_cache_and_never_elsewhere(tiny):
    few = get(tiny(study="quick"), progress=False, embeddings=20)
    assert few.embeddings()[0].shape == (20, 8)
    assert get(tiny(study="quick"), progress=False, embeddings=10) == few
    assert get(tiny(study="quick"), progress=False, embeddings=50).kept["rows"] == 50
    assert get(tiny(study="quick"), progress=False, embeddings=5000).kept["rows"] == 100  # all
    recorded = save(record_of(tiny(study="s")))
    before = recorded.path.read_bytes()
    assert get(tiny(study="s"), embeddings=20).metrics == recorded.metrics
    assert recorded.path.read_bytes() == before


def test_a_full_disk_keeps_the_old_embeddings_too(tiny):
    first = save(record_of(tiny(study="s")), arrays=arrays_of([[1, 0], [0, 1]]))
    bigger = record_of(tiny(study="s"), history=[{"epoch": e, "loss": 1.0} for e in range(5000)])
    soft, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        with pytest.raises(OSError, match="nothing recorded was changed"):
            save(bigger, arrays=arrays_of([[0, 1]]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))
    assert read(first.path).embeddings()[0].tolist() == [[1, 0], [0, 1]]
    assert len(list(first.path.parent.iterdir())) == 2


def test_a_record_of_another_study_is_refused(tiny):
    path = save(record_of(tiny(study="quick"))).path
    other = path.parent.with_name("lab") / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(RecordError, match="of study quick"):
        get(tiny(study="lab"))


def test_runs_that_cannot_end_are_refused_and_equal_runs_are_one(tiny):
    with pytest.raises(ValueError, match="steps=9"):
        tiny(anneal="paper", epochs=5)
    plain = tiny(method="nt_xent", epochs=20).digest
    assert tiny(method="nt_xent", epochs=20, anneal="paper").digest == plain
    assert tiny(method="nt_xent", epochs=20, detach_weights=True).digest == plain
    for args in ({"n_train": np.int64(200)}, {1: 2}, {"noise": float("nan")}):
        with pytest.raises(ValueError, match="data_args="):
            tiny(data_args=args)


def test_a_machine_without_git_still_records(tiny, monkeypatch):
    from hcl import provenance

    provenance._git.cache_clear()
    monkeypatch.setenv("PATH", "")
    try:
        assert get(tiny(), progress=False).provenance["commit"] is None
    finally:
        provenance._git.cache_clear()
