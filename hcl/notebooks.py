"""Notebooks: parameters checked before anything runs, execution by papermill, a cache of what ran.

papermill only warns about a parameter that the notebook does not have and then runs it with its
defaults; :func:`checked` refuses it. Every notebook runs with the project's root as its working
directory, in a process of its own (papermill's ``cwd`` is not thread-safe).
"""

import ast
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import yaml

INJECTED = "injected-parameters"  # papermill's tag of the cell with the given values


def parameters(path: Path) -> dict[str, Any]:
    """Names and defaults of the cell tagged ``parameters``; empty where there is none.

    Raises: ValueError: a line that is no ``name = literal``, or that papermill would overlook
    (it drops every line with a second '=', a comment such as ``# >= 0`` included).
    """
    import papermill

    cell = next((c for c in _read(path).cells if "parameters" in _tags(c)), None)
    if cell is None:
        return {}
    found = dict(_assignment(path, statement) for statement in ast.parse(cell.source).body)
    seen = {k: v["default"] for k, v in papermill.inspect_notebook(str(path)).items()}
    for name, value in found.items():
        if name not in seen or _literal(seen[name]) != value:
            raise ValueError(
                f"{path}: papermill misreads the parameter {name!r}; its line must hold one '=' "
                "(comment included) and no '#' within the value"
            )
    return found


def _assignment(path: Path, statement: ast.stmt) -> tuple[str, Any]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            default = value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            default = value
        case _:
            raise ValueError(f"{path}: in the parameters cell, not `name = value`: "
                             f"{ast.unparse(statement)}")  # fmt: skip
    try:
        return name, ast.literal_eval(default)
    except ValueError:
        raise ValueError(f"{path}: the default of {name!r} must be a literal: "
                         f"{ast.unparse(statement)}") from None  # fmt: skip


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return NotImplemented  # equal to no default


def typed(name: str, value: Any, default: Any) -> Any:
    """A value (from YAML, or YAML text) as the type of the default; an int will do for a float.

    Raises: ValueError naming the parameter, the value and its default.

    >>> typed("beta", "2", 1.0), typed("lr", "1e-3", 0.1), typed("seeds", "[0, 1]", [0])
    (2.0, 0.001, [0, 1])
    """
    given = value
    if isinstance(value, str) and not isinstance(default, str):
        value = load_yaml(value, name)
    if type(default) is float and type(value) in (int, str):
        try:
            return float(value)  # YAML takes 1e-3 for text
        except ValueError:
            pass
    if isinstance(default, list | tuple) and isinstance(value, list):
        return [typed(name, v, default[0]) if default else v for v in value]
    if default is not None and type(value) is not type(default):
        raise ValueError(
            f"{name}={given!r}: must be of type {type(default).__name__}, like its default "
            f"{default!r}"
        )
    return value


def checked(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters, each known to the notebook and of its default's type.

    Raises: ValueError: an unknown name (with the nearest known one), or an ill-typed value.
    """
    known = parameters(path)
    for name in given:
        if name not in known:
            raise ValueError(f"{path.name} has no parameter {name!r}{_nearest(name, known)}")
    return {name: typed(name, value, known[name]) for name, value in given.items()}


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known) or 'none'}"


def find(root: Path, name: str) -> Path:
    """A notebook by its path, or by its name in book/ ("images/hardness").

    Raises: FileNotFoundError with the nearest name.
    """
    stem = name.removesuffix(".ipynb")
    for path in (Path(f"{stem}.ipynb"), root / f"{stem}.ipynb", root / "book" / f"{stem}.ipynb"):
        if path.is_file():
            return path.resolve()
    known = [p.relative_to(root / "book") for p in sorted((root / "book").rglob("*.ipynb"))]
    names = [p.with_suffix("").as_posix() for p in known]
    raise FileNotFoundError(f"no notebook {name!r}{_nearest(stem.removeprefix('book/'), names)}")


def profile(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """Parameters by notebook of book/profiles/NAME.yml; "quick" is every notebook's defaults.

    Raises: ValueError: no such profile, or one that names a notebook or parameter not there.
    """
    folder = root / "book" / "profiles"
    path = folder / f"{name}.yml"
    if not path.exists():
        if name == "quick":
            return {}
        others = (p for p in folder.glob("*.yml") if "\nstudy:" not in f"\n{p.read_text()}")
        names = sorted({"quick", *(p.stem for p in others)})
        raise ValueError(f"profile={name!r}: choose one of {', '.join(names)}")
    body = load_yaml(path.read_text(), str(path)) or {}
    if not isinstance(body, dict) or not all(isinstance(v, dict) for v in body.values()):
        raise ValueError(f"{path}: must map notebooks to parameters")
    entries = {}
    for key, given in body.items():
        source = root / "book" / f"{key.removesuffix('.ipynb')}.ipynb"
        if not source.is_file():
            raise ValueError(f"{path}: there is no notebook book/{key}")
        try:
            entries[source.relative_to(root / "book").as_posix()] = checked(source, given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return entries


def load_yaml(text: str, name: str) -> Any:
    """What a YAML text holds. Raises: ValueError naming where it stands."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML: {' '.join(str(error).split())}") from error


def environment_key(root: Path) -> str:
    """SHA-256 of all that a notebook's outputs depend on beside itself.

    The library's source, the recorded runs (not the quick ones, a cache), the profiles, the
    benchmarks with their results, and the versions of Python and torch.
    """
    store = Path(os.environ.get("HCL_RUNS") or root / "data" / "runs")
    recorded = [p for p in store.rglob("*.json") if p.relative_to(store).parts[0] != "quick"]
    files = [
        *(("hcl", p) for p in Path(__file__).parent.rglob("*.py")),
        *(("runs", p) for p in recorded),
        *(("profiles", p) for p in (root / "book" / "profiles").glob("*.yml")),
        *(("benchmarks", p) for p in (root / "benchmarks").glob("*.*")),
    ]
    sums = sorted((kind, p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for kind, p in files)
    return _sha([sums, sys.version, version("torch")])


def key(source: Path, given: Mapping[str, Any], environment: str) -> str:
    """SHA-256 of what decides a notebook's outputs: code cells, parameters, environment.

    Prose and captions are not among it, so rewording a page executes nothing.
    """
    cells = [(c.source, _tags(c)) for c in _read(source).cells if c.cell_type == "code"]
    return _sha([cells, dict(given), environment])


def with_outputs(source: Path, executed: Path) -> nbformat.NotebookNode:
    """The notebook as written, with the outputs of an execution of the same code cells.

    Without any output where the code has changed since, or was never executed.
    """
    notebook = _read(source)
    if not executed.exists():
        return notebook
    ran = [c for c in _read(executed).cells if c.cell_type == "code"]
    injected = [c for c in ran if INJECTED in _tags(c)]
    ran = [c for c in ran if INJECTED not in _tags(c)]
    code = [c for c in notebook.cells if c.cell_type == "code"]
    if [c.source for c in code] != [c.source for c in ran]:
        return notebook
    for cell, result in zip(code, ran, strict=True):
        cell.outputs, cell.execution_count = result.outputs, result.execution_count
    if injected:
        after = next(i for i, c in enumerate(notebook.cells) if "parameters" in _tags(c))
        notebook.cells.insert(after + 1, injected[0])
        injected[0].metadata = {"tags": [INJECTED]}
    return notebook


def slug(given: Mapping[str, Any]) -> str:
    """Parameters as a part of a file name: "-beta=2.0-seed=1", shortened by a digest.

    >>> slug({"beta": 2.0, "methods": ["hard", "debiased"]})
    '-beta=2.0-methods=hard,debiased'
    """
    text = "".join(f"-{k}={v}" for k, v in given.items())
    text = re.sub(r"[^\w=.,+-]", "", text.replace(", ", ",").replace("'", ""))
    return text if len(text) <= 100 else f"-{_sha(dict(given))[:12]}"


def _read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
