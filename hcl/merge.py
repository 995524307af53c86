"""Records made on another machine, brought into the store: all checked first, then copied whole.

Nothing in the store is ever overwritten. Embeddings are copied before the Record that names them,
so a merge that is interrupted leaves only whole Records, and the next one does the rest.
"""

import shutil
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from hcl import runs
from hcl.atomic import whole_or_nothing
from hcl.runs import CACHE_STUDY, Record

ORIGIN = ("code", "device", "date")  # what a Record must say of itself to be shown as what it is


class Merged(NamedTuple):
    """What a merge did: files of the store, files of the source, and why each was refused."""

    added: list[Path]
    already_there: list[Path]
    refused: dict[Path, str]
    skipped: list[Path]


def merge(
    source: Path, *, study: str | None = None, store: Path | None = None, dry_run: bool = False
) -> Merged:
    """Copy the Records of another store, or of one study's folder, that this store does not have.

    A damaged or foreign file is refused, and so is a Record that does not say what made it, and one
    of which the store has another; the rest is copied. The cache study "quick" is skipped,
    checkpoints are left alone.

    Args: study: only this one; dry_run: say what would be done, write nothing.

    Raises: FileNotFoundError: no such source; ValueError: it is the store itself, or has no Record
    (of the study); OSError: the disk is full, and the Records copied by then stay.

    >>> import tempfile
    >>> from hcl.runs import Run, save
    >>> here, there = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    >>> run = Run(study="lab", data="sphere", encoder="mlp", epochs=1)
    >>> made = {"code": "451c6ed4a3ee", "device": "CPU", "date": "2026-11-22T10:07:12+00:00"}
    >>> _ = save(Record(run=run, metrics={}, history=[], cost={}, provenance=made), store=there)
    >>> [len(files) for files in merge(there, store=here)]
    [1, 0, 0, 0]
    """
    source, store = Path(source).resolve(), (store or runs.store_root()).resolve()
    files = _files(source, study, store)
    cached = [path for path in files if path.parent.name == CACHE_STUDY]
    records, refused = _read_all(path for path in files if path.parent.name != CACHE_STUDY)
    done = Merged([], [], refused, cached)
    for path, record in records.items():  # nothing is written before every file was read
        target = runs.path_of(record.run, store=store)
        try:
            there = _is_there(record, target)
        except (ValueError, OSError) as error:
            refused[path] = f"{path} stays out: {error}"
            continue
        if not (there or dry_run):
            _copy(path, target, arrays=bool(record.kept))
        (done.already_there if there else done.added).append(target)
    return done


def _files(source: Path, study: str | None, store: Path) -> list[Path]:
    """Every Record's file of the source, and arrays that have none."""
    if not source.exists():
        raise FileNotFoundError(f"source={str(source)!r}: there is no such folder")
    if not source.is_dir():
        raise ValueError(f"source={str(source)!r}: a file; name the store or the study it is in")
    if store in (source, source.parent):
        raise ValueError(
            f"source={str(source)!r}: this is the store itself; name a folder from elsewhere"
        )
    if study == CACHE_STUDY:
        raise ValueError(f"study={study!r}: a cache, which is never merged; name another")
    found = sorted([*source.glob("*.json"), *source.glob("*/*.json")])
    studies = {path.parent.name for path in found}
    if not studies:
        raise ValueError(
            f"source={str(source)!r}: no Record in it; name a store, as data/runs, or one of its "
            "studies' folders"
        )
    if study and study not in studies:
        raise ValueError(f"study={study!r}: the source has {', '.join(sorted(studies))}")
    arrays = sorted([*source.glob("*.npz"), *source.glob("*/*.npz")])
    alone = [path for path in arrays if not path.with_suffix(".json").exists()]
    return [path for path in [*found, *alone] if study in (None, path.parent.name)]


def _read_all(files: Iterable[Path]) -> tuple[dict[Path, Record], dict[Path, str]]:
    """The Records that can be trusted, with their arrays; of the others, why not."""
    records, refused = {}, {}
    for path in files:
        try:
            records[path] = _read(path)
        except (ValueError, OSError) as error:
            refused[path] = str(error)
    return records, refused


def _read(path: Path) -> Record:
    if path.suffix == ".npz":
        raise ValueError(f"{path} has no Record beside it")
    record = runs.read(path)
    if unsaid := [name for name in ORIGIN if not record.provenance.get(name)]:
        raise ValueError(f"{path} does not say what made it: its {', '.join(unsaid)}")
    if record.kept:
        if not path.with_suffix(".npz").exists():
            raise ValueError(f"{path} keeps embeddings, but {path.stem}.npz is not beside it")
        record.embeddings()
    return record


def _is_there(record: Record, target: Path) -> bool:
    """Does the store have this very Record? Raises ValueError if it has another in its place."""
    if not target.exists():
        return False
    ours = runs.read(target)
    if ours != record:
        raise ValueError(f"the store has another (store | source): {_differences(ours, record)}")
    if not ours.kept:
        return True
    if not target.with_suffix(".npz").exists():
        return False  # only the Record came, or was committed: complete it
    ours.embeddings()
    return True


def _differences(ours: Record, theirs: Record) -> str:
    """Origin and metrics where they differ; if they do not, which parts of the Records do."""
    a = {**{k: ours.provenance.get(k) for k in ORIGIN}, **ours.metrics}
    b = {**{k: theirs.provenance.get(k) for k in ORIGIN}, **theirs.metrics}
    said = [f"{k} {a.get(k)} | {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k)]
    parts = [f.name for f in fields(Record) if f.compare]
    parts = [name for name in parts if getattr(ours, name) != getattr(theirs, name)]
    return "; ".join(said) or f"same origin and metrics, other {', '.join(parts)}"


def _copy(path: Path, target: Path, *, arrays: bool) -> None:
    for suffix in (".npz", ".json") if arrays else (".json",):
        beside = target.with_suffix(suffix)
        if suffix == ".npz" or not beside.exists():  # arrays without a Record are nobody's
            with whole_or_nothing(beside) as part:
                shutil.copyfile(path.with_suffix(suffix), part)
