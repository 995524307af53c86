"""Merging: everything is checked first, nothing is overwritten, and only whole Records arrive."""

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from hcl import runs
from hcl.merge import merge
from hcl.runs import Record, save, verify

MADE = {"code": "1" * 12, "commit": "a" * 40, "clean": True, "device": "GPU, H", "torch": "2.15",
        "date": "2026-11-22T10:00:00+00:00"}  # fmt: skip
ARRAYS = {"z": np.eye(2, dtype=np.float16), "labels": np.arange(2), "of": 10}


@pytest.fixture
def there(tmp_path):
    """The other machine's store."""
    return tmp_path / "there"


@pytest.fixture
def put(tiny):
    """Writes a Record into a store."""

    def make(store, *, knn=0.5, arrays=None, made=None, cost=1.0, **changes):
        run = tiny(**{"study": "lab", **changes})
        record = Record(
            run=run, metrics={"knn": knn}, history=[], cost={"seconds": cost},
            provenance={**MADE, **(made or {})},
        )  # fmt: skip
        return save(record, store=store, arrays=arrays)

    return make


def contents(folder):
    """Every file below a folder with the SHA-256 of its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_store_arrives_byte_for_byte_and_a_second_time_nothing_happens(there, own_store, put):
    for seed in (0, 1):
        put(there, seed=seed, arrays=ARRAYS if seed else None)
    put(there, study="other")
    done = merge(there)
    assert (len(done.added), done.already_there, done.refused, done.skipped) == (3, [], {}, [])
    assert contents(own_store) == contents(there)
    assert verify() == []
    again = merge(there)
    assert again.already_there == done.added
    assert again.added == []


def test_one_studys_folder_or_one_study_of_a_store(there, own_store, put):
    first, other = put(there), put(there, study="other")
    assert [p.name for p in merge(first.path.parent).added] == [first.path.name]
    assert [p.parent.name for p in merge(there, study="other").added] == ["other"]
    assert [p.read_bytes() for p in sorted(own_store.glob("*/*"))] == [
        first.path.read_bytes(), other.path.read_bytes(),
    ]  # fmt: skip


def test_a_folder_named_relatively_is_the_same_folder(there, own_store, put, monkeypatch):
    monkeypatch.chdir(put(there).path.parent)
    assert len(merge(Path("."), store=own_store).added) == 1


def test_a_dry_run_says_the_same_and_writes_nothing(there, own_store, put):
    put(there, seed=0)
    put(there, seed=1).path.write_text("{")
    tried = merge(there, dry_run=True)
    assert not own_store.exists()
    assert tried == merge(there)


def test_an_edited_a_truncated_and_a_misplaced_record_are_refused_by_name(there, own_store, put):
    edited, cut, moved, good = (put(there, seed=seed).path for seed in range(4))
    edited.write_text(edited.read_text().replace("0.5", "0.9"))
    cut.write_text(cut.read_text()[:50])
    moved = moved.rename(moved.with_name("000000000000.json"))
    strange = good.with_name("settings.json")
    strange.write_text('{"theme": "dark"}')
    done = merge(there)
    assert set(done.refused) == {edited, cut, moved, strange}
    assert all(str(path) in why for path, why in done.refused.items())
    assert [why.split(" ", 1)[1][:11] for why in map(done.refused.get, (edited, cut))] == [
        "was changed", "is truncate",
    ]  # fmt: skip
    assert contents(own_store) == {f"lab/{good.name}": contents(there)[f"lab/{good.name}"]}


def test_embeddings_that_are_missing_changed_or_alone_are_refused(there, own_store, put):
    lost, changed, orphan = (put(there, seed=seed, arrays=ARRAYS).path for seed in range(3))
    lost.with_suffix(".npz").unlink()
    changed.with_suffix(".npz").write_bytes(b"PK junk")
    orphan.unlink()
    refused = merge(there).refused
    assert f"{lost.stem}.npz is not beside it" in refused[lost]
    assert "npz was changed" in refused[changed]
    assert "no Record beside it" in refused[orphan.with_suffix(".npz")]
    assert len(refused) == 3
    assert not own_store.exists()


def test_a_record_that_does_not_say_what_made_it_is_refused(there, put):
    path = put(there, made={"code": None, "device": ""}).path
    assert "what made it: its code, device" in merge(there).refused[path]


def test_another_record_of_the_same_run_is_a_conflict_and_the_store_stays(there, own_store, put):
    put(own_store, arrays=ARRAYS)
    theirs = put(there, knn=0.75, made={"code": "2" * 12, "date": "2026-11-23"}, arrays=ARRAYS)
    timed = put(there, seed=1, cost=2.0)
    put(own_store, seed=1)
    before = contents(own_store)
    done = merge(there)
    assert contents(own_store) == before
    assert done.added == done.already_there == []
    why = done.refused[theirs.path]
    assert f"code {'1' * 12} | {'2' * 12}; date 2026-11-22T10:00:00+00:00 | 2026-11-23" in why
    assert why.endswith("knn 0.5 | 0.75")  # the device is the same and is not listed
    assert done.refused[timed.path].endswith("same origin and metrics, other cost")


def test_a_damaged_file_of_the_store_is_not_overwritten(there, own_store, put):
    put(there)
    ours = put(own_store).path
    ours.write_text("{")
    done = merge(there)
    assert ours.read_text() == "{"
    assert str(ours) in next(iter(done.refused.values()))


def test_embeddings_the_store_lost_come_back_and_changed_ones_are_told(there, own_store, put):
    put(there, arrays=ARRAYS)
    ours = put(own_store, arrays=ARRAYS).path
    assert merge(there).already_there == [ours]
    ours.with_suffix(".npz").unlink()
    assert merge(there).added == [ours]
    assert verify() == []
    ours.with_suffix(".npz").write_bytes(b"junk")
    assert "npz was changed" in next(iter(merge(there).refused.values()))
    assert ours.with_suffix(".npz").read_bytes() == b"junk"


def test_the_same_content_with_other_line_ends_is_already_there(there, own_store, put):
    ours, theirs = put(own_store).path, put(there).path
    theirs.write_bytes(theirs.read_bytes().replace(b"\n", b"\r\n"))
    before = ours.read_bytes()
    assert merge(there).already_there == [ours]
    assert ours.read_bytes() == before


def test_the_cache_is_skipped_and_checkpoints_are_left_alone(there, own_store, put):
    cached, made = put(there, study="quick"), put(there)
    cached.path.write_text("{")  # not even read
    made.path.with_suffix(".checkpoint").write_bytes(b"half a run")
    done = merge(there)
    assert done.skipped == [cached.path]
    assert done.refused == {}
    assert set(contents(own_store)) == {f"lab/{made.path.name}"}
    with pytest.raises(ValueError, match="study='quick': a cache"):
        merge(there, study="quick")


def test_sources_that_cannot_be_merged(there, own_store, put, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source=.*there.*no such folder"):
        merge(there)
    there.mkdir()
    with pytest.raises(ValueError, match=r"source=.*no Record in it"):
        merge(there)
    path = put(there).path
    with pytest.raises(ValueError, match="a file; name the store"):
        merge(path)
    with pytest.raises(ValueError, match="study='labb': the source has lab"):
        merge(there, study="labb")
    put(own_store)
    link = tmp_path / "link"
    link.symlink_to(own_store)
    for same in (own_store, own_store / "lab", link):
        with pytest.raises(ValueError, match="the store itself"):
            merge(same)


@pytest.mark.parametrize("step", range(6))
def test_an_interruption_leaves_whole_records_and_the_next_merge_does_the_rest(
    there, own_store, put, monkeypatch, step
):
    """Ctrl-C before and after each of the three renames."""
    put(there, arrays=ARRAYS)
    put(there, seed=1)
    made, replace = [], os.replace

    def interrupted(source, target):
        if len(made) == step // 2 and step % 2 == 0:
            raise KeyboardInterrupt
        replace(source, target)
        made.append(target)
        if len(made) == step // 2 + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hcl.atomic.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(there)
    assert verify() == []
    merge(there)
    assert {k: v for k, v in contents(own_store).items() if ".part" not in k} == contents(there)


def test_a_full_disk_leaves_what_was_there_and_whole_records(there, own_store, put):
    """The file-size limit makes the write itself fail, as a full disk does."""
    small, large = put(there, seed=0).path, put(there, seed=1)
    save(Record(**{**vars(large), "history": [{"epoch": e} for e in range(5000)]}), store=there)
    soft, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        with pytest.raises(OSError, match="nothing recorded was changed"):
            merge(there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))
    assert verify() == []
    assert {p.name for p in own_store.glob("*/*")} <= {small.name}


def test_every_file_is_read_before_any_is_written(there, put, monkeypatch):
    """A copy may only begin when the last Record has been read."""
    paths = [put(there, seed=seed, arrays=ARRAYS).path for seed in range(3)]
    said, read, copy = [], runs.read, shutil.copyfile
    monkeypatch.setattr(runs, "read", lambda path: said.append(path) or read(path))
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: said.append("copy") or copy(a, b))
    merge(there)
    assert said == [*sorted(paths), *["copy"] * 6]


def test_the_numbers_of_a_merged_record_are_the_sources(there, put):
    theirs = put(there, knn=0.625, arrays=ARRAYS)
    record = runs.read(merge(there).added[0])
    assert record.metrics == json.loads(theirs.path.read_text())["metrics"] == {"knn": 0.625}
    assert record.embeddings()[0].tolist() == [[1, 0], [0, 1]]
