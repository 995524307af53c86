"""The book's build on a tiny book: what is executed, what is kept, what is left when it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import sitecheck
import tinybook

from hcl import book, execution, notebooks
from hcl.execution import Job, NotebookError, execute_all
from hcl.notebooks import environment_key


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny book, built once, and the names of what was executed."""
    root = tinybook.write(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:  # the library may be edited while tests run
        patch.setattr(notebooks, "environment_key", lambda root: "frozen")
        book.build(root, workers=2)
        yield root


def stale(root: Path, **options: object) -> list[str]:
    defaults = {"profile": "quick", "workers": 2, "force": False}
    return book.execute_stale(root, book.chapters(root), **{**defaults, **options})


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def kept(built, tmp_path):
    """A copy of the built book that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "kept"))


# --- what a build gives


def test_the_site_is_whole_and_names_no_other_host(built):
    site = built / "_build" / "html"
    assert (site / "index.html").exists()
    assert (site / "sub" / "two.html").exists()
    assert sitecheck.problems(site) == []
    pages = " ".join(p.read_text() for p in site.glob("*.html"))
    assert "thebe" not in pages
    assert "_static/mathjax/tex-svg.js" in pages
    assert "favicon.svg" in pages


def test_outputs_are_on_the_pages_and_the_working_directory_is_the_root(built):
    page = (built / "_build" / "html" / "one.html").read_text()
    assert "beta is 1.0" in page
    assert f"True {built.name}" in page  # relative data/ resolves from the repository's root
    figure = (built / "_build" / "html" / "sub" / "two.html").read_text()
    assert 'alt="A line"' in figure
    assert "A line." in figure


def test_nothing_but_results_lies_about(built):
    assert sorted(p.name for p in built.iterdir()) == ["_build", "_config.yml", "_toc.yml", "book"]
    assert not list(built.rglob("*.part*"))
    assert not (built / "_build" / "render").exists()
    for name in book.chapters(built):
        cells = nbformat.read(built / "book" / name, as_version=4).cells
        assert not any(c.get("outputs") for c in cells)
        text = (built / "_build" / "html" / "_sources" / name).read_text()
        assert str(built) not in text  # no path of this machine in what is downloaded


def test_an_unchanged_book_is_neither_executed_nor_rendered_again(built, capsys):
    before = (built / "_build" / "html" / "index.html").stat().st_mtime_ns
    start = time.monotonic()
    book.build(built)
    assert time.monotonic() - start < 10
    assert (built / "_build" / "html" / "index.html").stat().st_mtime_ns == before
    said = capsys.readouterr().out
    assert "0 of 2 notebooks" in said
    assert "nothing changed" in said


# --- what is executed again


def test_prose_executes_nothing_and_code_only_its_own_notebook(kept):
    edit(kept / "book" / "one.ipynb", "# One", "# First")
    assert stale(kept) == []
    staged = nbformat.read(book.stage(kept) / "one.ipynb", as_version=4)
    assert staged.cells[0].source == "# First"
    assert staged.cells[2].outputs[0].text == "beta is 1.0\n"
    edit(kept / "book" / "one.ipynb", "beta is", "now beta is")
    stage = book.stage(kept)  # not executed yet: no output that another code has made
    assert not any(c.get("outputs") for c in nbformat.read(stage / "one.ipynb", 4).cells)
    assert stale(kept) == ["one.ipynb"]
    assert stale(kept) == []


def test_the_key_depends_on_code_tags_parameters_and_environment(tmp_path):
    def key(*cells, given=None, environment="e"):
        return notebooks.key(tinybook.save(tmp_path / "n.ipynb", *cells), given or {}, environment)

    one = tinybook.code("beta = 1", ("parameters",))
    base = key(one)
    assert key(one, tinybook.new_markdown_cell("prose")) == base
    others = [
        key(tinybook.code("beta = 2", ("parameters",))),
        key(tinybook.code("beta = 1", ("parameters", "raises-exception"))),
        key(one, given={"beta": 2}),
        key(one, environment="other"),
    ]
    assert len({base, *others}) == 5


def test_the_environment_is_library_records_profiles_and_versions(tmp_path, monkeypatch):
    root = tinybook.write(tmp_path)
    monkeypatch.delenv("HCL_RUNS", raising=False)
    base = environment_key(root)
    quick = root / "data" / "runs" / "quick" / "a.json"
    lab = root / "data" / "runs" / "lab" / "a.json"
    for path in (quick, lab):
        path.parent.mkdir(parents=True)
    quick.write_text("{}")
    assert environment_key(root) == base  # a cache, made again by whoever builds
    lab.write_text("{}")
    recorded = environment_key(root)
    assert recorded != base
    (root / "book" / "profiles").mkdir()
    (root / "book" / "profiles" / "lab.yml").write_text("{}")
    profiled = environment_key(root)
    assert profiled != recorded
    library = tmp_path / "library"
    library.mkdir()
    (library / "notebooks.py").write_text("")
    monkeypatch.setattr(notebooks, "__file__", str(library / "notebooks.py"))
    other = environment_key(root)
    assert other != profiled
    monkeypatch.setattr(notebooks, "version", lambda name: "0")
    assert environment_key(root) != other


def test_a_profile_has_outputs_of_its_own(kept):
    profiles = kept / "book" / "profiles"
    profiles.mkdir()
    (profiles / "lab.yml").write_text("one: {beta: 7}\n")
    assert "one.ipynb" in stale(kept, profile="lab")
    staged = nbformat.read(book.stage(kept, profile="lab") / "one.ipynb", as_version=4)
    tags = [c.metadata.get("tags") for c in staged.cells[1:3]]
    assert tags == [["parameters"], ["injected-parameters"]]
    assert staged.cells[3].outputs[0].text == "beta is 7.0\n"
    quick = nbformat.read(book.stage(kept) / "one.ipynb", as_version=4)
    assert quick.cells[2].outputs[0].text == "beta is 1.0\n"


def test_only_executes_that_one_and_finds_it_by_any_of_its_names(kept, capsys):
    for name in ("sub/two", "sub/two.ipynb", "book/sub/two.ipynb"):
        assert book._chapter(kept, name, book.chapters(kept)) == "sub/two.ipynb"
    with pytest.raises(FileNotFoundError, match=r"sub/tow.*did you mean 'sub/two'"):
        book.build(kept, only=["sub/tow"])
    with pytest.raises(ValueError, match="not in _toc"):
        book._chapter(kept, "sub/two", ["one.ipynb"])
    edit(kept / "book" / "one.ipynb", "beta is", "changed: beta is")
    edit(kept / "book" / "intro.md", "Equation", "{ref}`nowhere` Equation")
    book.build(kept, only=["sub/two"])  # one.ipynb is out of date and not executed
    said = capsys.readouterr().out
    assert "0 of 1 notebooks" in said
    assert "book/intro.md" in said  # the warning is shown, not fatal
    assert "changed: beta is" in (kept / "_build" / "html" / "one.html").read_text()


# --- what happens when it fails


def test_a_failing_notebook_names_itself_its_error_and_its_output(kept, capsys):
    site = (kept / "_build" / "html" / "index.html").stat().st_mtime_ns
    edit(kept / "book" / "one.ipynb", "beta is', beta", "half', 1 / 0")
    edit(kept / "book" / "sub" / "two.ipynb", "i / 7", "i / 8")
    with pytest.raises(NotebookError, match="1 of 2 notebooks failed"):
        book.build(kept)
    said = capsys.readouterr().err
    left = kept / "_build" / "executed" / "quick" / "one.failed.ipynb"
    for part in ("one.ipynb failed", str(left), "ZeroDivisionError", "1 / 0"):
        assert part in said
    cells = nbformat.read(left, as_version=4).cells
    assert "An Exception was encountered" in cells[0].source
    assert (kept / "_build" / "html" / "index.html").stat().st_mtime_ns == site
    edit(kept / "book" / "one.ipynb", "half', 1 / 0", "beta is', beta")
    assert stale(kept) == []  # the other one was finished and kept, this one's cache still holds


def test_a_warning_is_an_error_and_the_old_site_stays(kept):
    before = (kept / "_build" / "html" / "index.html").read_bytes()
    edit(kept / "book" / "intro.md", "Equation", "{ref}`nowhere` Equation")
    book.stage(kept)
    with pytest.raises(book.RenderError, match=r"(?m)^book/intro.md:\d+: WARNING.*nowhere"):
        book.render(kept)
    assert (kept / "_build" / "html" / "index.html").read_bytes() == before
    assert "nowhere" in (kept / "_build" / "render.log").read_text()


def test_a_page_that_is_not_there_is_named(tmp_path):
    root = tinybook.write(tmp_path)
    edit(root / "_toc.yml", "sub/two", "sub/three")
    with pytest.raises(FileNotFoundError, match="sub/three"):
        book.build(root)


SLEEP = """import os, time
from pathlib import Path
Path("kernel").write_text(str(os.getpid()))
time.sleep(100)"""
MAIN = "import sys; from pathlib import Path; import hcl.cli as c; "
MAIN += "c.project_root = lambda: Path(sys.argv[1]); sys.exit(c.main(['book']))"


def gone(pid: int, within: float = 20) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize("how", ["ctrl-c", "SIGKILL"])
def test_a_stopped_build_stops_its_kernels_and_leaves_no_result(tmp_path, how):
    root = tinybook.write(tmp_path, figure="pass")
    tinybook.save(root / "book" / "one.ipynb", tinybook.code(SLEEP))
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(root)], start_new_session=True, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # if we ignore Ctrl-C
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (root / "kernel").exists() or not (root / "kernel").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, said = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130)
    assert how == "SIGKILL" or said.decode().strip().endswith("hcl: stopped"), said.decode()
    assert gone(int((root / "kernel").read_text()))
    assert not (root / "_build" / "executed" / "quick" / "one.ipynb").exists()
    assert not (root / "_build" / "html").exists()


def test_a_killed_kernel_is_an_error_of_its_notebook(tmp_path):
    dies = tinybook.save(tmp_path / "dies.ipynb", tinybook.code("import os; os._exit(9)"))
    job = Job(dies, tmp_path / "out" / "dies.ipynb", {}, "dies")
    with pytest.raises(NotebookError, match="1 of 1"):
        execute_all([job], root=tmp_path)
    assert not job.output.exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    source = tinybook.save(tmp_path / "n.ipynb", tinybook.code("1"))
    job = Job(source, source / "out.ipynb", {}, "n")  # a file where a folder should be
    with pytest.raises(NotebookError):
        execute_all([job], root=tmp_path)
    said = capsys.readouterr().err
    assert "n: could not write" in said
    assert ".out.part.ipynb" in said


def test_workers_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="workers=0"):
        execute_all([], root=tmp_path, workers=0)


def test_a_users_own_kernel_does_not_shadow_ours(tmp_path, monkeypatch):
    """A kernelspec called python3 in the user's path would run another interpreter."""
    theirs = tmp_path / "theirs" / "kernels" / "python3"
    theirs.mkdir(parents=True)
    argv = ["/bin/false", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (theirs / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "theirs"))
    ask = tinybook.code("import sys, os; print(sys.executable, os.environ['TQDM_DISABLE'])")
    job = Job(tinybook.save(tmp_path / "ask.ipynb", ask), tmp_path / "asked.ipynb", {}, "ask")
    execute_all([job], root=tmp_path)
    cell = nbformat.read(job.output, as_version=4).cells[0]
    assert cell.outputs[0].text == f"{sys.executable} 1\n"
    assert not job.failed.exists()
    assert execution.Job(job.source, job.output).name == ""
