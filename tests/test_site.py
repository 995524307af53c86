"""The committed notebooks and the real site: complete, readable by papermill, no dead end."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
import sitecheck

from hcl import book, notebooks, project_root, sweeps

ROOT = project_root()
SITE = ROOT / "_build" / "html"
NOTEBOOKS = sorted((ROOT / "book").rglob("*.ipynb"))
NAMES = [p.relative_to(ROOT / "book").as_posix() for p in NOTEBOOKS]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def test_there_is_a_book():
    assert len(NOTEBOOKS) >= 5


def test_the_table_of_contents_lists_every_page_that_exists_and_no_other():
    prose = [p for p in (ROOT / "book").rglob("*.md") if "static" not in p.parts]
    there = [*NAMES, *(p.relative_to(ROOT / "book").as_posix() for p in prose)]
    listed = book.pages(ROOT)  # raises where one does not exist
    assert sorted(listed) == sorted(there)
    assert listed[0] == "intro.md"


@each
def test_a_notebook_is_committed_without_outputs(path):
    done = subprocess.run(
        [sys.executable, "-m", "nbstripout", "--keep-id", "--verify", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@each
def test_cells_have_ids_that_stay(path):
    body = json.loads(path.read_text())
    assert (body["nbformat"], body["nbformat_minor"]) >= (4, 5)
    ids = [cell.get("id") for cell in body["cells"]]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    nbformat.validate(nbformat.from_dict(body))
    assert body["metadata"]["kernelspec"]["name"] == "python3"


@each
def test_papermill_reads_every_parameter_and_its_help(path):
    import papermill

    found = notebooks.parameters(path)  # raises where papermill sees another default
    assert found
    cells = nbformat.read(path, as_version=4).cells
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    seen = papermill.inspect_notebook(str(path))
    assert set(seen) == set(found)
    assert all(p["help"].strip() for p in seen.values()), "say in a comment what each is"


@each
def test_a_notebook_is_titled_and_holds_no_output_of_this_machine(path):
    cells = nbformat.read(path, as_version=4).cells
    first = cells[0]
    assert first.cell_type == "markdown"
    assert re.search(r"^# \S", first.source, re.MULTILINE)
    assert not re.search(r"/(?:home|root|work|Users)/", path.read_text())


def test_the_profiles_fit_the_notebooks():
    for path in (ROOT / "book" / "profiles").glob("*.yml"):
        body = notebooks.load_yaml(path.read_text(), path.name)
        if isinstance(body, dict) and "study" in body:
            assert sweeps.load_study(path)
        else:
            notebooks.profile(ROOT, path.stem)
    assert notebooks.profile(ROOT, "lab")
    assert notebooks.profile(ROOT, "paper")


def test_citations_and_references_meet():
    bib = (ROOT / "book" / "references.bib").read_text()
    keys = re.findall(r"^@\w+\{(\w+),", bib, re.MULTILINE)
    assert len(set(keys)) == len(keys)
    pages = "\n".join(
        (ROOT / "book" / name).read_text() for name in book.pages(ROOT) if "references" not in name
    )
    cited = {k for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", pages)
             for k in re.split(r"[,;]\s*", group)}  # fmt: skip
    assert cited
    assert cited <= set(keys)
    for entry in re.split(r"\n(?=@)", bib.strip()):
        assert re.search(r"^  author = ", entry, re.MULTILINE), entry
        assert re.search(r"^  year = \{(19|20)\d\d\}", entry, re.MULTILINE), entry


@pytest.mark.skipif(not SITE.exists(), reason="not built; the tiny book's site is walked elsewhere")
def test_the_site_has_no_dead_end_and_names_no_other_host():
    assert sitecheck.problems(SITE) == []
    rendered = {p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html")}
    for name in book.pages(ROOT):
        assert re.sub(r"\.(md|ipynb)$", ".html", name) in rendered


# --- the walk itself, on pages that fail


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<a href='b.html'>b</a>", "no such file: b.html"),
        ("<a href='a.html#x'>x</a>", "no such anchor: a.html#x"),
        ("<a href='#x'>x</a>", "no such anchor: #x"),
        ("<img src='p.png' alt='p'>", "no such file: p.png"),
        ("<img src='a.html'>", "no alt text: a.html"),
        ("<img src='a.html' alt=' '>", "no alt text: a.html"),
        ("<script src='https://unpkg.com/x.js'></script>", "loads https://unpkg.com/x.js"),
        ("<link rel='stylesheet' href='//fonts.example/x.css'>", "loads //fonts.example/x.css"),
        ("<script>const u = 'https://unpkg.com/x'</script>", "script names unpkg.com"),
        ("<a href='https://arxiv.org/abs/2010.04592'>a</a><a href='#y'>y</a><p id='y'>", ""),
    ],
)
def test_the_walk_finds(tmp_path, body, complaint):
    (tmp_path / "a.html").write_text(f"<html><body>{body}</body></html>")
    found = sitecheck.problems(tmp_path)
    assert found == ([f"a.html: {complaint}"] if complaint else [])
