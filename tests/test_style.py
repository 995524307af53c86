"""The linters are part of the suite: one command, notebooks and types included."""

import subprocess
import sys

import pytest

from hcl import project_root

LINTERS = {
    "ruff check": [sys.executable, "-m", "ruff", "check", "."],
    "ruff format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "mypy": [sys.executable, "-m", "mypy"],
}


@pytest.mark.parametrize("name", LINTERS)
def test_linter_is_content(name):
    done = subprocess.run(LINTERS[name], cwd=project_root(), capture_output=True, text=True)
    assert done.returncode == 0, f"{name}:\n{done.stdout}{done.stderr}"


def test_there_are_at_least_as_many_lines_of_tests_as_of_source():
    root = project_root()
    source, tests = (
        sum(len(p.read_text().splitlines()) for p in (root / folder).rglob("*.py"))
        for folder in ("hcl", "tests")
    )
    assert tests >= source, f"{tests} lines of tests, {source} of source"
