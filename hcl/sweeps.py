"""Grids of Runs: expand them, read them from a study file, record them side by side.

A study file (``book/profiles/*.yml``) names a study, what its Runs share, and grids in order of
priority; a list stands for one Run per element::

    study: cifar10-lab
    base: {data: cifar10, encoder: small, epochs: 20}
    grid:
      - {method: nt_xent, seed: [0, 1, 2]}
      - {method: hard, beta: [0.5, 1.0, 2.0], seed: [0, 1, 2]}
"""

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hcl import runs
from hcl.pools import stop_with_parent
from hcl.runs import Record, Run


def expand(base: Mapping[str, Any], grid: Iterable[Mapping[str, Any]]) -> list[Run]:
    """One Run per point of each grid, in order, each Run once.

    Raises: ValueError: a field that Run does not have, or a value it refuses.

    >>> base = {"data": "sphere", "encoder": "mlp", "epochs": 1}
    >>> [r.beta for r in expand(base, [{"method": "hard", "beta": [0.5, 2.0]}])]
    [0.5, 2.0]
    """
    found: dict[str, Run] = {}
    for point in grid:
        axes = [v if isinstance(v, list | tuple) else [v] for v in point.values()]
        for values in itertools.product(*axes):
            run = _run({**base, **dict(zip(point, values, strict=True))})
            found.setdefault(f"{run.study}/{run.digest}", run)
    return list(found.values())


def _run(values: Mapping[str, Any]) -> Run:
    known = Run.__dataclass_fields__
    if unknown := set(values) - set(known):
        raise ValueError(f"{sorted(unknown)}: a Run has the fields {', '.join(known)}")
    try:
        return Run(**values)
    except TypeError as error:
        raise ValueError(f"a Run needs more than {dict(values)}: {error}") from error


def load_study(path: str | Path) -> list[Run]:
    """The Runs of a study file, highest priority first.

    Raises: ValueError: a key that is missing or unknown, or a Run that is impossible.
    """
    import yaml

    try:
        body = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict) or set(body) - {"about"} != {"study", "base", "grid"}:
        raise ValueError(f"{path}: a study file has the keys study, base and grid (and about)")
    grid = body["grid"]
    lists = isinstance(grid, list) and all(isinstance(point, dict) for point in grid)
    if not (isinstance(body["base"], dict) and lists):
        raise ValueError(f"{path}: base must be a mapping and grid a list of mappings")
    try:
        return expand({"study": body["study"], **body["base"]}, body["grid"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def record(
    wanted: Sequence[Run],
    *,
    workers: int = 1,
    store: Path | None = None,
    budget_s: float = float("inf"),
    embeddings: int = 0,
    compile: bool = False,
    progress: bool = True,
) -> list[Record]:
    """The Records of all Runs, in order; what is not in the store is trained.

    Args: workers: processes, each with its share of the cores; on one GPU they share it, which
    fills it where the Runs are small. budget_s: after so many seconds nothing is begun, and a Run
    in training stops at the end of an epoch with a checkpoint, from which the next call goes on
    (Runs left out are left out of the result). embeddings, compile: see :func:`hcl.runs.get`.

    Raises: what training raises; the Records finished by then stay.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be 1 or more")
    if not budget_s >= 0:
        raise ValueError(f"budget_s={budget_s}: must be 0 seconds or more")
    stop = time.time() + budget_s
    args = {"store": store, "embeddings": embeddings, "compile": compile, "deadline": stop}
    with tqdm(total=len(wanted), desc="runs", disable=not progress, leave=False) as bar:
        if workers == 1:
            return list(_serial(wanted, stop, bar, args))
        return _parallel(wanted, workers, stop, bar, args)


def _serial(wanted: Sequence[Run], stop: float, bar: Any, args: dict[str, Any]) -> Iterable[Record]:
    for run in wanted:
        if time.time() >= stop:
            return
        if record := _get(run, args):
            yield record
            bar.update()


def _parallel(
    wanted: Sequence[Run], workers: int, stop: float, bar: Any, args: dict[str, Any]
) -> list[Record]:
    threads = max(1, (os.cpu_count() or 1) // workers)
    queue = iter(enumerate(wanted))
    busy: dict[Future[Record | None], int] = {}
    found: dict[int, Record] = {}
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(threads,)
    ) as pool:
        try:
            while True:
                while len(busy) < workers and time.time() < stop:
                    if (job := next(queue, None)) is None:
                        break
                    busy[pool.submit(_get, job[1], args)] = job[0]
                if not busy:
                    return [found[i] for i in sorted(found)]
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    place = busy.pop(future)
                    if record := future.result():
                        found[place] = record
                        bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():  # their checkpoints stay
                worker.terminate()
            raise


def _get(run: Run, args: dict[str, Any]) -> Record | None:
    """None where the time was up before the training was done."""
    from hcl.train import OutOfTime

    try:
        return runs.get(run, progress=False, **args)
    except OutOfTime:
        return None


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    stop_with_parent()  # checkpoints let the next sweep continue
