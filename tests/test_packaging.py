"""pyproject.toml, environment.yml and requirements.lock say the same; the front door is whole."""

import ast
import os
import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from hcl import project_root

ROOT = project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def declared() -> dict[str, SpecifierSet]:
    """Name and range of every dependency of pyproject, extras included, hcl itself not."""
    texts = [*PROJECT["dependencies"]]
    texts += [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    found = [Requirement(text) for text in texts]
    return {canonicalize_name(r.name): r.specifier for r in found if r.name != "hcl"}


def locked() -> dict[str, list[Requirement]]:
    """The lock's requirements by name; several where versions differ by platform or Python."""
    lines = re.sub(r"\\\n", " ", LOCK).splitlines()
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line.split(" --hash")[0].strip())
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def conda() -> tuple[str, list[str]]:
    """Python's range and pip's lines in environment.yml."""
    body = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(d for d in body if isinstance(d, str) and d.startswith("python"))
    pip = next(d["pip"] for d in body if isinstance(d, dict))
    return python.removeprefix("python"), pip


@pytest.mark.parametrize("name", sorted(declared()))
def test_every_dependency_is_locked_within_its_range(name):
    versions = [next(iter(r.specifier)) for r in locked()[name]]
    assert versions
    for version in versions:
        assert version.operator == "=="
        assert declared()[name].contains(version.version, prereleases=False), name


def test_the_lock_names_no_address_and_every_requirement_is_hashed():
    assert not re.search(r"://|--index|--find-links|^-e|file:", LOCK, re.MULTILINE)
    requirements = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE).strip())
    assert len(requirements) > 100
    for text in requirements:
        assert re.fullmatch(r"[\w.\[\]-]+==\S+.*?( \\\n +--hash=sha256:[0-9a-f]{64})+\s*", text,
                            re.DOTALL), text  # fmt: skip


def test_jupyter_book_stays_below_two_and_its_theme_where_it_works():
    # 2.x has neither _config.yml nor _toc.yml; later themes show a second search box.
    assert not declared()["jupyter-book"].contains("2.0.0")
    assert declared()["jupyter-book"].contains("1.0.4.post1")
    assert str(declared()["sphinx-book-theme"]) == "==1.2.0"
    assert Version(next(iter(locked()["jupyter-book"][0].specifier)).version) < Version("2")


def test_environment_yml_has_the_same_names_and_ranges():
    python, lines = conda()
    assert SpecifierSet(python) == SpecifierSet(PROJECT["requires-python"])
    assert lines[0] == "--editable ."
    found = [Requirement(line) for line in lines[1:]]
    assert len(found) == len(declared())
    assert {canonicalize_name(r.name): r.specifier for r in found} == declared()


def test_the_python_range_is_what_the_makefile_and_the_linters_say():
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [m for m in range(9, 16) if f"3.{m}" in allowed] == [11, 12, 13]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == "py311"
    assert tools["mypy"]["python_version"] == "3.11"


def imported() -> set[str]:
    """Top-level names of everything that hcl imports, wherever in a module."""
    trees = [ast.parse(p.read_text()) for p in (ROOT / "hcl").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    found |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"hcl"}


def test_what_the_code_imports_is_declared():
    called = {"sklearn": "scikit-learn", "umap": "umap-learn", "yaml": "pyyaml", "PIL": "pillow"}
    brought = {"nbformat": "papermill", "nbclient": "papermill", "traitlets": "papermill",
               "pillow": "torchvision", "scipy": "scikit-learn", "ipython": "ipykernel",
               "matplotlib-inline": "ipykernel", "triton": "torch"}  # fmt: skip
    names = {canonicalize_name(called.get(module, module)) for module in imported()}
    assert {"torch", "papermill"} <= names
    assert {brought.get(name, name) for name in names} <= set(declared())


def test_the_licence_and_the_citation_agree_with_the_project():
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("MIT License\n\nCopyright (c) 2026 The hcl authors\n")
    assert PROJECT["license"] == "MIT"
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0"
    assert cff["license"] == PROJECT["license"]
    assert cff["version"] == PROJECT["version"]
    assert [a["name"] for a in cff["authors"]] == [a["name"] for a in PROJECT["authors"]]


def test_ci_runs_exactly_the_two_commands():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    lines = [x.split("#")[0].strip() for x in path.read_text().splitlines()]
    assert "set -euo pipefail" in lines
    assert sorted(x for x in lines if x.startswith("make")) == ["make book", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^book:.*\n\t.*hcl book", makefile, re.MULTILINE)
    assert re.search(r"^test:.*\n\t.*pytest", makefile, re.MULTILINE)


def test_mathjax_is_bundled_with_its_licence():
    folder = ROOT / "book" / "static" / "mathjax"
    assert (folder / "tex-svg.js").stat().st_size > 1_000_000
    assert "3.2.2" in (folder / "tex-svg.js").read_text()
    assert "Apache License" in (folder / "LICENSE").read_text()
