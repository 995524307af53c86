"""Build the book: execute what changed, copy book/ with the outputs to a stage, render the stage.

Everything lies under _build/: executed/ (a cache, by profile), stage/ (what Sphinx reads), html/
(the site, swapped in whole when it is complete). Sphinx executes nothing.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat

from hcl import notebooks
from hcl.atomic import whole_or_nothing
from hcl.execution import Job, execute_all

LAST = "practice/status.ipynb"  # reports on the executed others, so it comes after them
JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"  # it has no `python -m` form
STRICT = ("-n", "-W", "--keep-going")  # warnings are errors, all of them listed


class RenderError(RuntimeError):
    """The site could not be rendered; the message lists Sphinx's warnings and errors."""


def build(
    root: Path,
    *,
    profile: str = "quick",
    only: Sequence[str] = (),
    workers: int = 2,
    force: bool = False,
) -> Path:
    """Execute the notebooks whose outputs are out of date, then render; hands back the site.

    Args: profile: a parameter set of book/profiles; only: execute these alone and render the
    others as they last ran (warnings are then shown, not fatal); force: execute all.

    Raises: ValueError, FileNotFoundError: an unknown profile, notebook, parameter or page;
    NotebookError: a notebook failed; RenderError: Sphinx complained.
    """
    wanted = chapters(root)
    if only:
        wanted = [_chapter(root, name, wanted) for name in only]
    others = [name for name in wanted if name != LAST]
    execute_stale(root, others, profile=profile, workers=workers, force=force)
    if LAST in wanted:
        execute_stale(root, [LAST], profile=profile, workers=1, force=force)
    stage(root, profile=profile)
    return render(root, strict=not only)


def pages(root: Path) -> list[str]:
    """Files of _toc.yml, in order, relative to book/.

    Raises: FileNotFoundError: one that does not exist.
    """
    toc = notebooks.load_yaml((root / "_toc.yml").read_text(), "_toc.yml")
    found = []
    for name in _toc_files(toc):
        kinds = [e for e in (".ipynb", ".md") if (root / "book" / f"{name}{e}").is_file()]
        if not kinds:
            raise FileNotFoundError(f"_toc.yml lists {name}: book/ has no such .ipynb or .md")
        found.append(name + kinds[0])
    return found


def _toc_files(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for entry in node:
            yield from _toc_files(entry)
    elif isinstance(node, dict):
        for name in ("root", "file"):
            if name in node:
                yield str(Path(node[name]).with_suffix("").as_posix())
        for name in ("parts", "chapters", "sections"):
            yield from _toc_files(node.get(name, []))


def chapters(root: Path) -> list[str]:
    """The notebooks among the pages."""
    return [name for name in pages(root) if name.endswith(".ipynb")]


def _chapter(root: Path, name: str, known: Sequence[str]) -> str:
    source = notebooks.find(root, name)
    relative = source.relative_to(root.resolve() / "book").as_posix()
    if relative not in known:
        raise ValueError(f"only={name!r}: not in _toc.yml")
    return relative


def execute_stale(
    root: Path, names: Sequence[str], *, profile: str, workers: int, force: bool
) -> list[str]:
    """Execute those notebooks whose cached outputs are missing or out of date; hands back which."""
    given = notebooks.profile(root, profile)
    environment = notebooks.environment_key(root)
    keys, seconds, jobs = {}, {}, []
    for name in names:
        source, output = root / "book" / name, _executed(root, profile, name)
        values = given.get(name) or notebooks.checked(source, {})
        seen = environment + (_reported(root, profile) if name == LAST else "")
        keys[name] = notebooks.key(source, values, seen)
        last = _last(output)
        seconds[name] = last.get("seconds", float("inf"))
        if force or last.get("key") != keys[name]:
            jobs.append(Job(source, output, values, name))
    print(f"{len(jobs)} of {len(names)} notebooks to execute", flush=True)

    def done(job: Job, took: float) -> None:
        state = {"key": keys[job.name], "seconds": round(took, 1)}
        _write(_state(job.output), json.dumps(state))

    jobs.sort(key=lambda job: -seconds[job.name])  # longest first fills the pool best
    execute_all(jobs, root=root, workers=workers, done=done)
    return [job.name for job in jobs]


def _reported(root: Path, profile: str) -> str:
    """What the last page reports on: when the others ran and how long, and the benchmarks."""
    states = [_state(_executed(root, profile, name)) for name in chapters(root) if name != LAST]
    files = [*states, *sorted((root / "benchmarks").glob("*.json"))]
    return "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists())


def _executed(root: Path, profile: str, name: str) -> Path:
    return root / "_build" / "executed" / profile / name


def _state(output: Path) -> Path:
    return output.with_suffix(".json")


def _last(output: Path) -> dict[str, Any]:
    """Key and seconds of the last execution; empty when there was none or it cannot be read."""
    try:
        return dict(json.loads(_state(output).read_text())) if output.exists() else {}
    except (OSError, ValueError):
        return {}


def stage(root: Path, *, profile: str = "quick") -> Path:
    """Copy book/ to _build/stage, each notebook with the outputs of its last execution."""
    target = root / "_build" / "stage"
    shutil.rmtree(target, ignore_errors=True)
    skip = shutil.ignore_patterns("profiles", "*.ipynb", ".ipynb_checkpoints")
    shutil.copytree(root / "book", target, ignore=skip)
    for name in chapters(root):
        notebook = notebooks.with_outputs(root / "book" / name, _executed(root, profile, name))
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target / name)
    return target


def render(root: Path, *, strict: bool = True) -> Path:
    """Render _build/stage into _build/html, unless nothing changed since the last time.

    Raises: RenderError; the site that was there before stays.
    """
    site, state = root / "_build" / "html", _stage_key(root, strict)
    if (site / ".stage").exists() and (site / ".stage").read_text() == state:
        print(f"nothing changed: {site / 'index.html'}")
        return site
    start = time.monotonic()
    work = root / "_build" / "render"
    shutil.rmtree(work, ignore_errors=True)
    _jupyter_book(root, work, strict)
    _write(work / "_build" / "html" / ".stage", state)
    old = work / "old"
    if site.exists():
        os.replace(site, old)
    os.replace(work / "_build" / "html", site)
    shutil.rmtree(work)
    print(f"rendered in {time.monotonic() - start:.0f} s: {site / 'index.html'}")
    return site


def _jupyter_book(root: Path, work: Path, strict: bool) -> None:
    """Run jupyter-book; it writes to WORK/_build/html and exits 1 on any warning if strict."""
    # fmt: off
    command = [
        sys.executable, "-c", JUPYTER_BOOK, "build", str(root / "_build" / "stage"),
        "--config", str(root / "_config.yml"), "--toc", str(root.resolve() / "_toc.yml"),
        "--path-output", str(work), *(STRICT if strict else ()),
    ]
    # fmt: on
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)  # colours
    text = text.replace(f"{root.resolve() / '_build' / 'stage'}", "book")
    log = root / "_build" / "render.log"
    _write(log, text)
    complaints = [x for x in text.splitlines() if "WARNING" in x or "ERROR" in x]
    if done.returncode:
        lines = complaints or text.splitlines()[-15:]
        raise RenderError("\n".join([f"the render failed; all of its output: {log}", *lines]))
    print("\n".join(complaints), end="\n" if complaints else "")


def _stage_key(root: Path, strict: bool) -> str:
    """SHA-256 of what the site is made of: the stage, the configuration, the renderers."""
    stage_files = [p for p in sorted((root / "_build" / "stage").rglob("*")) if p.is_file()]
    own = Path(__file__).with_name("sphinx_offline.py")
    digest = hashlib.sha256(repr((strict, _versions())).encode())
    for path in [*stage_files, root / "_config.yml", root / "_toc.yml", own]:
        digest.update(f"{path.name}\0{path.parent.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _versions() -> Mapping[str, str]:
    return {name: version(name) for name in ("jupyter-book", "sphinx", "sphinx-book-theme")}


def _write(path: Path, text: str) -> None:
    with whole_or_nothing(path) as part:
        part.write_text(text)
