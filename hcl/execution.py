"""Execute notebooks with papermill, several side by side, each written whole or not at all."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hcl.pools import stop_with_parent

# Quiet, because a kernel that is stopped on purpose complains, and the client raises real errors.
LAUNCHER = "-Xfrozen_modules=off -m ipykernel_launcher -f {connection_file} --log-level=50"


@dataclass(frozen=True)
class Job:
    """One notebook to execute: where from, where to, with which parameters, called what."""

    source: Path
    output: Path
    given: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def failed(self) -> Path:
        """Where the partial output of a failed execution is left."""
        return self.output.with_name(f"{self.output.stem}.failed.ipynb")


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message holds its error and names its output."""


def execute_all(
    jobs: Sequence[Job],
    *,
    root: Path,
    workers: int = 1,
    keep_going: bool = False,
    live: bool = False,
    done: Callable[[Job, float], None] = lambda job, seconds: None,
) -> None:
    """Execute notebooks in a pool of processes; ``done`` is told of each as it is finished.

    Args: root: the kernels' working directory; keep_going: after a failure start the others all
    the same; live: show a notebook's own progress bars (for one long notebook).

    Raises: NotebookError: one or more failed; those that were running then have been finished.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be 1 or more")
    if not jobs:
        return
    failures: list[str] = []
    with _pool(min(workers, len(jobs)), quiet=not live) as pool:
        waiting = {pool.submit(_execute, job, root, live): job for job in jobs}
        with tqdm(total=len(jobs), desc="notebooks", unit="", disable=live) as bar:
            for future in as_completed(waiting):
                job = waiting[future]
                bar.set_postfix_str(job.name)
                if future.cancelled():
                    continue
                if error := _failure(future.exception(), job):
                    failures.append(error)
                    bar.write(error, file=sys.stderr)
                    if not keep_going:
                        pool.shutdown(wait=False, cancel_futures=True)
                else:
                    done(job, future.result())
                bar.update()
    if failures:
        raise NotebookError(f"{len(failures)} of {len(jobs)} notebooks failed (see above)")


def _failure(error: BaseException | None, job: Job) -> str:
    if isinstance(error, BrokenProcessPool):
        return f"{job.name}: its process was killed (out of memory?)"
    if error is not None and not isinstance(error, NotebookError):
        raise error
    return str(error or "")


def _execute(job: Job, root: Path, live: bool) -> float:
    """In a worker: execute one notebook to a temporary name, then rename; hands back seconds."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    part = job.output.with_name(f".{job.output.stem}.part.ipynb")
    start = time.monotonic()
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            str(job.source),
            str(part),
            dict(job.given),
            cwd=str(root),
            kernel_name="python3",
            start_timeout=300,
            progress_bar=live,
            stderr_file=sys.stderr if live else None,
            config=Config({"KernelManager": _socket()}),
        )
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        os.replace(part, job.failed)
        text = str(error).strip()
        raise NotebookError(f"{job.name} failed; partial output: {job.failed}\n{text}") from None
    except OSError as error:
        raise NotebookError(f"{job.name}: could not write {part} ({error})") from None
    os.replace(part, job.output)
    job.failed.unlink(missing_ok=True)
    return time.monotonic() - start


def _socket() -> dict[str, str]:
    """Kernels talk over files (ipykernel warns about TCP), by default of the same name for all."""
    return {"transport": "ipc", "ip": f"{os.environ['JUPYTER_RUNTIME_DIR']}/{os.getpid()}"}


@contextmanager
def _pool(workers: int, *, quiet: bool) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes stop with this one, and at once when it is interrupted."""
    spawn = multiprocessing.get_context("spawn")
    with _kernel_home() as environment:
        if quiet:  # pages show results, not progress bars; threads would fight over the cores
            environment["TQDM_DISABLE"] = "1"
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(
            workers, spawn, initializer=_start_worker, initargs=(environment,)
        )
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown()


def _start_worker(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent terminates us
    stop_with_parent()


@contextmanager
def _kernel_home() -> Iterator[dict[str, str]]:
    """Environment in which "python3" is this interpreter, whatever kernels the user has installed.

    Start-up files and history of the user's IPython are left out. The folder lies in /tmp because
    the path of a socket may have no more than about 100 characters.
    """
    short = "/tmp" if os.access("/tmp", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hcl-", dir=short) as home:
        spec = Path(home, "kernels", "python3")
        spec.mkdir(parents=True)
        argv = [sys.executable, *LAUNCHER.split()]
        kernel = {"argv": argv, "display_name": "Python 3", "language": "python"}
        (spec / "kernel.json").write_text(json.dumps(kernel))
        yield {
            "JUPYTER_PATH": home,
            "JUPYTER_RUNTIME_DIR": home,
            "IPYTHONDIR": str(Path(home, "ipython")),
        }
