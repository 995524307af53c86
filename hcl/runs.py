"""A Record is what training a Run produced; the store keeps them.

One JSON file a run, ``data/runs/<study>/<digest>.json``, written whole or not at all. ``get`` hands
out the Record of a Run and trains it first if it has to, so a notebook is a view of the store.
The study called ``quick`` is a cache: a Record there that other code or another torch made is made
again. Records of every other study are kept as they were recorded.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hcl import project_root
from hcl.atomic import whole_or_nothing
from hcl.provenance import code_fingerprint
from hcl.run import CACHE_STUDY as CACHE_STUDY
from hcl.run import Run as Run
from hcl.run import sha


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a Run produced.

    Args:
        run: the configuration.
        metrics: final values; accuracies in [0, 1].
        history: one row per evaluated epoch: epoch (0 before training), loss, knn, and what
            ``watch`` adds.
        cost: seconds of training, images_per_second, peak_memory_bytes of the process or GPU.
        provenance: commit, clean tree or not, versions, device, threads, date, code fingerprint.
        kept: of the test embeddings beside it, how many rows of how many, and their SHA-256.
    """

    run: Run
    metrics: dict[str, float]
    history: list[dict[str, float]]
    cost: dict[str, float]
    provenance: dict[str, Any]
    kept: dict[str, Any] | None = None
    path: Path | None = field(default=None, compare=False)

    def embeddings(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept test embeddings: z (m, d) float32 of unit rows, and labels (m,) int64.

        Raises: FileNotFoundError: none were kept with this Record; RecordError: the file beside
        it is not the one that was recorded.
        """
        beside = self.path.with_suffix(".npz") if self.path else None
        if beside is None or self.kept is None or not beside.exists():
            raise FileNotFoundError(
                f"Record {self.run.digest} of study {self.run.study} keeps no embeddings; a run "
                "that is trained by get(run, embeddings=1000) does"
            )
        if _file_sha(beside) != self.kept["sha256"]:
            raise RecordError(f"{beside} was changed after it was recorded: restore it from git")
        with np.load(beside) as arrays:
            return arrays["z"].astype(np.float32), arrays["labels"].astype(np.int64)


class RecordError(ValueError):
    """A Record's file that cannot be trusted: truncated, edited, or of an unknown layout."""


class MissingRecord(LookupError):
    """The store has no Record of a Run; the message says which command makes it."""


def store_root() -> Path:
    """Folder of the recorded runs: $HCL_RUNS, or data/runs of the project."""
    return Path(os.environ.get("HCL_RUNS") or project_root() / "data" / "runs")


def path_of(run: Run, *, store: Path | None = None) -> Path:
    """The file of a Run's Record, whether it exists or not."""
    return (store or store_root()) / run.study / f"{run.digest}.json"


def get(
    run: Run,
    *,
    store: Path | None = None,
    missing: Literal["train", "refuse"] = "train",
    embeddings: int = 0,
    progress: bool = True,
    device: str | None = None,
    compile: bool = False,
    deadline: float = math.inf,
) -> Record:
    """The Record of a Run, from the store if it is there, else trained now and stored.

    Args: embeddings: keep those of so many test points beside the Record, when it is trained now
    (a recorded Record is handed out as it was recorded; in the cache study, one with fewer is made
    again); missing: "refuse" raises instead of training; device, compile, deadline: see
    :func:`hcl.train.train`.

    Raises: MissingRecord: not recorded and ``missing="refuse"``; RecordError: a recorded file is
    damaged (never overwritten, except in the cache study).
    """
    record = _usable(run, path_of(run, store=store))
    if record and (run.study != CACHE_STUDY or _keeps(record, embeddings)):
        return record
    if missing == "refuse":
        raise MissingRecord(
            f"no Record of {run}: `hcl sweep book/profiles/{run.study}.yml` trains its study"
        )
    from hcl.train import train  # heavy, and train itself stores its Records here

    return train(
        run, store=store, embeddings=embeddings, progress=progress, device=device, compile=compile,
        deadline=deadline,
    )  # fmt: skip


def _keeps(record: Record, embeddings: int) -> bool:
    kept = record.kept or {"rows": 0, "of": 1}
    return bool(kept["rows"] >= min(embeddings, kept["of"]))


def _usable(run: Run, path: Path) -> Record | None:
    """The stored Record, or None where it has to be made (again)."""
    if not path.exists():
        return None
    if run.study != CACHE_STUDY:
        return read(path)
    try:
        record = read(path)
    except RecordError:
        return None
    same = all(
        record.provenance.get(k) == v
        for k, v in (("code", code_fingerprint()), ("torch", str(torch.__version__)))
    )
    return record if same else None


def save(
    record: Record, *, store: Path | None = None, arrays: Mapping[str, Any] | None = None
) -> Record:
    """Write a Record (and its arrays) whole or not at all; hands back the Record as it is stored.

    Args: arrays: z (m, d) and labels (m,) to keep beside it, and ``of``, how many there were.

    Raises: OSError: the disk is full or not writable; what was recorded before is untouched.
    """
    path = path_of(record.run, store=store)
    beside = path.with_suffix(".npz")
    if not arrays:
        record = replace(record, kept=None, path=path)
        with whole_or_nothing(path) as part:
            part.write_text(_text(record))
        beside.unlink(missing_ok=True)  # of an earlier Record
        return record
    with whole_or_nothing(beside) as arrays_part, whole_or_nothing(path) as part:
        with arrays_part.open("wb") as file:
            np.savez_compressed(file, z=arrays["z"], labels=arrays["labels"])
        kept = {"rows": len(arrays["z"]), "of": int(arrays["of"]), "sha256": _file_sha(arrays_part)}
        record = replace(record, kept=kept, path=path)
        part.write_text(_text(record))
    return record


def _text(record: Record) -> str:
    body = _body(record)
    return json.dumps({**body, "checksum": sha(body)}, indent=1, allow_nan=False) + "\n"


def _file_sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> Record:
    """A Record from its file.

    Raises: RecordError: truncated, edited by hand (its checksum disagrees), or misplaced.
    """
    remedy = "restore it from git, or delete it and train the run again"
    try:
        body = json.loads(path.read_text())
        checksum = body.pop("checksum")
        run = Run(**body["run"])
        record = Record(**{**body, "run": run, "path": path})
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is truncated or no JSON ({error}): {remedy}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{path} is no Record of this version ({error!r}): {remedy}") from error
    if checksum != sha(body):
        raise RecordError(f"{path} was changed after it was recorded (checksum): {remedy}")
    if (path.parent.name, path.stem) != (run.study, run.digest):
        raise RecordError(
            f"{path} holds the Record of run {run.digest} of study {run.study}: {remedy}"
        )
    return record


def records(study: str | None = None, *, store: Path | None = None) -> list[Record]:
    """Every Record of a study, or of all, oldest first. Raises RecordError on a damaged one."""
    found = [read(path) for path in _files(study, store)]
    return sorted(found, key=lambda r: r.provenance["date"])


def verify(*, store: Path | None = None) -> list[str]:
    """What is wrong with the store, a line each; empty when every Record can be trusted."""
    problems = []
    for path in _files(None, store):
        try:
            record = read(path)
            if record.kept:
                record.embeddings()
        except (RecordError, FileNotFoundError) as error:
            problems.append(str(error))
    return problems


def _files(study: str | None, store: Path | None) -> list[Path]:
    return sorted((store or store_root()).glob(f"{study or '*'}/*.json"))


def _body(record: Record) -> dict[str, Any]:
    return {
        k: asdict(v) if isinstance(v, Run) else v for k, v in vars(record).items() if k != "path"
    }
