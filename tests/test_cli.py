"""The command line: what it refuses before anything runs, and what it does."""

import itertools
import json
import sys
from pathlib import Path

import nbformat
import pytest
import tinybook

from hcl import arguments, cli, notebooks
from hcl.runs import Record, Run, save


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A tiny book as the project of the command line."""
    tinybook.write(tmp_path)
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of two Records."""
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    kept = []
    for method, knn in (("nt_xent", 0.5), ("hard", 0.625)):
        run = Run(study="lab", data="sphere", encoder="mlp", method=method, epochs=1)
        provenance = {"code": "451c6ed4a3ee", "device": "CPU"}
        provenance["date"] = f"2026-11-22T00:00:0{len(kept)}+00:00"
        record = Record(
            run=run, metrics={"knn": knn}, history=[], cost={"seconds": 1.0}, provenance=provenance
        )
        kept.append(save(record))
    return kept


def outputs(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


# --- parameters


def test_defaults_are_read_from_the_parameters_cell(root):
    found = notebooks.parameters(root / "book" / "one.ipynb")
    expected = {"beta": 1.0, "epochs": 3, "name": "digits", "flags": [0.0, 0.5], "verbose": False}
    assert found == expected


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("beta = 1.0  # >= 0", "misreads the parameter 'beta'"),  # papermill drops the line
        ("name = 'a=b'", "misreads the parameter 'name'"),
        ("name = 'a # b'", "misreads the parameter 'name'"),
        ("beta = 2 ** 3", "default of 'beta' must be a literal"),
        ("import os", "not `name = value`: import os"),
        ("a = b = 1", "not `name = value`"),
    ],
)
def test_a_parameters_cell_that_papermill_misreads_is_refused(tmp_path, line, complaint):
    path = tinybook.save(tmp_path / "n.ipynb", tinybook.code(f"seed = 0\n{line}", ("parameters",)))
    with pytest.raises(ValueError, match=complaint):
        notebooks.parameters(path)


def test_annotations_comments_and_several_lines_are_fine(tmp_path):
    source = "# the grid\nbetas: list = [\n    0.0,\n    1.0,\n]  # hardness\n\nseed: int = 0"
    path = tinybook.save(tmp_path / "n.ipynb", tinybook.code(source, ("parameters",)))
    assert notebooks.parameters(path) == {"betas": [0.0, 1.0], "seed": 0}
    assert notebooks.parameters(tinybook.save(tmp_path / "m.ipynb", tinybook.code("1"))) == {}


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        ("2", 1.0, 2.0),
        ("1e-3", 1.0, 1e-3),  # YAML alone takes this for text
        (2, 1.0, 2.0),
        ("2", 1, 2),
        ("true", False, True),
        ("2", "digits", "2"),  # text stays as it was typed
        ("on", "digits", "on"),
        ("[0, 0.5]", [1.0], [0.0, 0.5]),
        ("[]", [1.0], []),
        ("[a, b]", ["c"], ["a", "b"]),
        ([1, 2], (3,), [1, 2]),
        ("{a: 1}", {}, {"a": 1}),
        ("7", None, 7),
    ],
)
def test_values_take_the_type_of_their_default(value, default, expected):
    found = notebooks.typed("x", value, default)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "default"),
    [
        ("two", 1.0),
        ("true", 1.0),
        ("true", 1),
        ("1.5", 1),
        ("1", True),
        ("1", [1.0]),
        ("[x]", [1.0]),
        ("[1.5]", [1]),
        ("", 1.0),
        ("[1", [1]),
        (3, "digits"),
    ],
)
def test_ill_typed_values_are_refused_with_their_name(value, default):
    with pytest.raises(ValueError, match=r"^x"):
        notebooks.typed("x", value, default)


# --- hcl run


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("betta=2", "one.ipynb has no parameter 'betta'; did you mean 'beta'?"),
        ("zzz=2", "has no parameter 'zzz'; it has beta, epochs, name, flags, verbose"),
        ("beta=two", "beta='two': must be of type float, like its default 1.0"),
        ("epochs=1.5", "epochs='1.5': must be of type int"),
        ("beta", "'beta': write NAME=VALUE"),
    ],
)
def test_run_refuses_before_anything_executes(root, capsys, given, complaint):
    assert cli.main(["run", "book/one.ipynb", "-p", given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hcl: ")
    assert said.count("\n") == 1
    assert complaint in said
    assert not (root / "_build").exists()


def test_run_executes_with_the_values_in_their_place(root, capsys):
    assert cli.main(["run", "one", "-p", "beta=2", "-p", "flags=[1, 2]"]) == 0
    out = root / "_build" / "runs" / "one-beta=2.0-flags=1.0,2.0.ipynb"
    assert outputs(out).startswith("beta is 2.0\nTrue")
    assert str(out) in capsys.readouterr().out
    assert not list(out.parent.glob(".*"))


def test_run_reports_a_failing_cell_and_keeps_what_was_there(root, capsys):
    bad = tinybook.code("assert limit < 1, 'limit too large'")
    tinybook.save(root / "bad.ipynb", tinybook.code("limit = 0", ("parameters",)), bad)
    out = root / "out.ipynb"
    out.write_text("an older result")
    assert cli.main(["run", "bad.ipynb", "-p", "limit=1", "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert "AssertionError: limit too large" in said
    assert str(root / "out.failed.ipynb") in said
    assert out.read_text() == "an older result"
    assert cli.main(["run", "bad.ipynb", "-o", str(root / "bad.ipynb")]) == 2
    assert "overwrite the notebook itself" in capsys.readouterr().err


def test_run_starts_from_a_profile(root, capsys):
    (root / "book" / "profiles").mkdir()
    (root / "book" / "profiles" / "lab.yml").write_text("one.ipynb: {beta: 7, epochs: 9}\n")
    assert cli.main(["run", "one", "--profile", "lab", "-p", "beta=8"]) == 0
    assert (root / "_build" / "runs" / "one-beta=8.0-epochs=9.ipynb").exists()
    assert cli.main(["run", "sub/two", "--profile", "lab"]) == 2
    assert "has no entry for sub/two.ipynb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("three: {beta: 1}", "there is no notebook book/three"),
        ("one: {betta: 1}", "did you mean 'beta'"),
        ("one: {epochs: much}", "epochs='much': must be of type int"),
        ("one: 3", "must map notebooks to parameters"),
        ("one: [", "not YAML"),
    ],
)
def test_a_profile_that_fits_no_notebook_is_refused(root, body, complaint):
    (root / "book" / "profiles").mkdir()
    (root / "book" / "profiles" / "lab.yml").write_text(body)
    with pytest.raises(ValueError, match=complaint):
        notebooks.profile(root, "lab")
    with pytest.raises(ValueError, match="'labb': choose one of lab, quick"):
        notebooks.profile(root, "labb")
    assert notebooks.profile(root, "quick") == {}


def test_file_names_say_the_parameters_and_stay_short():
    assert notebooks.slug({"data": "../x y", "b": [1.0]}) == "-data=..xy-b=1.0"
    long = notebooks.slug({"values": list(range(100))})
    assert len(long) == 13
    assert long != notebooks.slug({"values": list(range(101))})


# --- hcl sweep


def test_sweep_executes_the_product(root, capsys):
    grid = ["--grid", "beta=0.5,2", "--grid", "epochs=4:6", "-p", "name=cifar10"]
    assert cli.main(["sweep", "one", *grid, "--workers", "2"]) == 0
    done = sorted(p.name for p in (root / "_build" / "runs").iterdir())
    points = itertools.product(("0.5", "2.0"), (4, 5))
    assert done == [f"one-name=cifar10-beta={b}-epochs={e}.ipynb" for b, e in points]
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert outputs(root / "_build" / "runs" / done[-1]).startswith("beta is 2.0")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "give at least one --grid"),
        (["--grid", "betta=1"], "no parameter 'betta'"),
        (["--grid", "beta=1,two"], "beta='two'"),
        (["--grid", "epochs=3:3"], "no values"),
        (["--grid", "epochs=a:b"], "a range is START:STOP"),
        (["--grid", "beta"], "write NAME=VALUE"),
        (["--grid", "beta=1", "--workers", "0"], "workers=0"),
    ],
)
def test_sweep_refuses_a_bad_grid(root, capsys, words, complaint):
    assert cli.main(["sweep", "one", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not (root / "_build").exists()


def test_sweep_of_a_study_records_its_runs_within_the_budget(root, capsys, monkeypatch):
    from hcl import sweeps

    told = {}
    monkeypatch.setattr(sweeps, "record", lambda wanted, **k: told.update(k) or list(wanted)[:1])
    study = "study: lab\nbase: {data: sphere, encoder: mlp, epochs: 1}\ngrid: [{seed: [0, 1]}]\n"
    (root / "study.yml").write_text(study)
    words = ["--workers", "2", "--budget", "60m", "--embeddings", "5"]
    assert cli.main(["sweep", "study.yml", *words]) == 0
    assert told == {"workers": 2, "budget_s": 3600.0, "embeddings": 5, "compile": False}
    assert "1 of 2 runs" in capsys.readouterr().out
    assert cli.main(["sweep", "study.yml", "--grid", "beta=1"]) == 2
    assert cli.main(["sweep", "study.yml", "--budget", "long"]) == 2
    assert "budget='long'" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("1.5h", 5400), ("7", 7)])
def test_lengths_of_time(text, expected):
    assert arguments.seconds(text) == expected


# --- hcl runs, data, book


def test_runs_lists_shows_tabulates_and_verifies(store, capsys):
    assert cli.main(["runs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [r.run.digest for r in store]
    assert "knn 0.625" in lines[1]
    assert " 451c6ed " in lines[1]  # the version of the code
    digest = store[1].run.digest
    assert cli.main(["runs", "show", digest[:8]]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown.partition("\n")[2])["metrics"] == {"knn": 0.625}
    assert cli.main(["runs", "table", "lab"]) == 0
    table = capsys.readouterr().out
    assert "SimCLR" in table
    assert "0.625" in table
    assert "sphere" not in table  # what all share is left out
    assert cli.main(["runs", "verify"]) == 0
    store[1].path.write_text(store[1].path.read_text().replace("0.625", "0.999"))
    assert cli.main(["runs", "verify"]) == 1
    assert f"{digest}.json" in capsys.readouterr().out
    assert cli.main(["runs", "show", digest]) == 2
    assert cli.main(["runs", "show", "nothing"]) == 2
    assert cli.main(["runs", "table", "other"]) == 2


def test_runs_merge_says_what_came_and_what_did_not(store, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path / "here"))
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "0.json").write_text("{}")
    names = sorted(f"lab/{r.path.name}" for r in store)
    words = ["runs", "merge", str(tmp_path)]
    assert cli.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("would be added: ")] == [
        f"would be added: {name}" for name in names
    ]
    assert "skipped: 1 files" in said
    assert not (tmp_path / "here").exists()
    assert cli.main([*words, "--study", "lab"]) == 0
    assert "2 added, 0 already there, 0 refused" in capsys.readouterr().out
    store[1].path.write_text("{")
    assert cli.main(words) == 1
    said = capsys.readouterr().out
    assert f"refused: {store[1].path} is " in said
    assert "0 added, 1 already there, 1 refused" in said
    for wrong in (tmp_path / "here", tmp_path / "nowhere"):
        assert cli.main(["runs", "merge", str(wrong)]) == 2
        assert f"hcl: source='{wrong}'" in capsys.readouterr().err


def test_data_downloads_and_an_unknown_name_is_refused(capsys, monkeypatch, tmp_path):
    from hcl import vision

    monkeypatch.setattr(vision, "download", lambda name: tmp_path / name)
    assert cli.main(["data", "cifar10"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cifar10'}\n"
    monkeypatch.undo()
    assert cli.main(["data", "cifar12"]) == 2
    assert capsys.readouterr().err.startswith("hcl: ")


def test_book_hands_its_options_over(root, monkeypatch):
    from hcl import book

    told = []
    monkeypatch.setattr(book, "build", lambda root, **k: told.append((root, k)))
    words = ["--profile", "lab", "--only", "one", "--only", "sub/two", "--workers", "3", "--force"]
    assert cli.main(["book", *words]) == 0
    options = {"profile": "lab", "only": ["one", "sub/two"], "workers": 3, "force": True}
    assert told == [(root, options)]


def test_errors_of_ours_are_not_dressed_up_as_the_users(root, monkeypatch):
    from hcl import book

    for error in (KeyError("x"), RuntimeError("x")):
        monkeypatch.setattr(book, "build", lambda *a, e=error, **k: (_ for _ in ()).throw(e))
        with pytest.raises(type(error)):
            cli.main(["book"])
    monkeypatch.setattr(book, "build", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
    assert cli.main(["book"]) == 2


@pytest.mark.parametrize("words", [[], *([c] for c in ("book", "run", "sweep", "runs", "data"))])
def test_help_is_there_and_needs_no_torch(words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: hcl {' '.join(words)}".rstrip())
    assert max(map(len, said.splitlines())) < 100
