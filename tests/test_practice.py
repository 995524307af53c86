"""What the README and the practice pages show runs: every snippet, every command's flags."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import tinybook
import torch
import yaml

from hcl import cli, losses, negatives, notebooks, project_root, runs, sweeps, train

ROOT = project_root()
RERUN, README = ROOT / "book" / "practice" / "rerun.md", ROOT / "README.md"
INTRO = ROOT / "book" / "intro.md"
LOSSES = ROOT / "book" / "practice" / "use-the-losses.ipynb"
STATUS = ROOT / "book" / "practice" / "status.ipynb"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in order."""
    return [text for language, text in FENCE.findall(path.read_text()) if language in languages]


def commands(path: Path, program: str) -> list[list[str]]:
    """The command lines of a page that start with a program, split, without VARIABLE=value."""
    lines = [x for text in blocks(path, "bash") for x in text.splitlines()]
    split = [shlex.split(re.sub(r"^([A-Z_]+=\S*\s+)+", "", x)) for x in lines]
    return [words[1:] for words in split if words[0] == program]


# --- Python


@pytest.fixture
def temperature_study(tmp_path):
    """The page's study, recorded; it is the one that its first snippet reads."""
    path = tmp_path / "temperature.yml"
    text = next(t for t in blocks(RERUN, "yaml") if t.startswith("study:"))
    assert "epochs: 15," in text
    path.write_text(text.replace("epochs: 15", "epochs: 1"))
    assert cli.main(["sweep", str(path), "--embeddings", "500"]) == 0
    return sweeps.load_study(path)


def test_the_page_on_rerunning_runs(temperature_study, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOADERS", dict(train.LOADERS))
    assert len(temperature_study) == 8
    kept = [runs.get(run, missing="refuse") for run in temperature_study]
    assert all(len(r.embeddings()[0]) == 500 for r in kept)
    page: dict[str, object] = {}
    for text in blocks(RERUN, "python"):
        exec(compile(text, str(RERUN), "exec"), page)
    said = capsys.readouterr().out
    for part in ("SimCLR", "HCL β=1", "raw input", "untrained encoder"):
        assert part in said
    score = page["waves"].groupby("label")["linear"].mean()
    assert score["raw input"] < 0.3  # "the linear probe can do little with the raw waves"
    assert score["SimCLR"] > 0.95  # "and gets nearly all of them right after training"
    assert score["HCL β=1"] > 0.95
    assert page["loss"].isfinite()
    check_the_exercise(page, score["SimCLR"])


def check_the_exercise(page, before):
    """The solution's change, and its claim that the probe falls."""
    changed = type("Gain", (page["Waves"],), {"changed": gain})
    train.LOADERS["waves"] = lambda name, *, device, seed: changed(512, seed, device)
    again = {**page["base"], "study": "waves-gain", "encoder": "mlp", "epochs": 10}
    found = sweeps.record(sweeps.expand(again, [{"method": "nt_xent", "seed": [0, 1]}]))
    assert sum(r.metrics["linear"] for r in found) / 2 < before - 0.1


def gain(self, x, generator):
    return (0.5 + torch.rand(len(x), 1, generator=generator, device=x.device)) * x


def test_the_readme_trains_with_a_loss_of_ours():
    page: dict[str, object] = {}
    for text in blocks(README, "python"):
        exec(compile(text, str(README), "exec"), page)
    assert page["loss"].isfinite()
    assert blocks(README, "python")[0] in blocks(RERUN, "python")  # one text, in two places


def test_the_losses_need_torch_alone(tmp_path):
    """As both pages say: nothing of the trainer and the book, and no package of the study."""
    study = {"torchvision", "sklearn", "pandas", "matplotlib", "seaborn", "umap"}
    engine = {
        "losses", "annealing", "debiasing", "negatives", "units", "checks", "rowstats", "tiles",
        "kernels", "distributed", "unremix", "relatives", "synthetic",
    }  # fmt: skip
    code = "import sys, hcl.unremix, hcl.relatives, hcl.synthetic; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not study & loaded
    assert {m for m in loaded if m.split(".")[0] == "hcl"} <= {"hcl"} | {
        f"hcl.{name}" for name in engine
    }


def test_the_methods_on_the_pages_are_those_there_are():
    for page in (README, LOSSES, INTRO):
        text = page.read_text()
        named = {name for name in losses.METHODS if re.search(rf'`"?{name}\b', text)}
        assert named == set(losses.METHODS), page.name
    table = INTRO.read_text().split("| method |")[1].split("\n\n")[0]
    cells = [line.split("|")[2] for line in table.splitlines()[2:]]
    assert len(cells) == 9
    assert "`unremix.unremix`" in cells[6]
    for name in {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}:
        assert callable(getattr(losses, name, None)) or name in negatives.DEFAULTS, name
    assert "`method` is a name in the table of\n`hcl.methods`" in RERUN.read_text()
    assert all(accepted(m) for m in losses.METHODS)


def accepted(method):
    try:
        runs.Run(study="s", data="sphere", encoder="mlp", method=method, epochs=1)
    except ValueError:
        return False
    return True


# --- commands


@pytest.mark.parametrize("path", [README, RERUN], ids=["README", "rerun"])
def test_every_hcl_command_is_one(path):
    found = commands(path, "hcl")
    assert len(found) >= 2
    for words in found:
        args = cli._parser().parse_args(words)  # exits where a flag is unknown
        if "notebook" in args and not args.notebook.endswith(".yml"):
            source = notebooks.find(ROOT, args.notebook)
            given = dict(map(cli.assignment, args.given))
            if given.keys() & {"betta"} or given == {"seeds": "3"}:
                continue  # refused, as the page says; below
            notebooks.checked(source, given)
            for text in getattr(args, "grid", []):
                name, values = cli.grid_axis(text, notebooks.parameters(source))
                assert len(values) > 1
                for value in values:
                    notebooks.checked(source, {name: value})
            cli._profile_entry(ROOT, source, args.profile)  # raises where there is none
        elif "notebook" in args:
            assert "temperature" in args.notebook or (ROOT / args.notebook).is_file()
        elif "only" in args:
            assert all(notebooks.find(ROOT, name) for name in args.only)


@pytest.mark.parametrize("path", [README, RERUN], ids=["README", "rerun"])
def test_every_papermill_command_names_a_notebook_and_its_parameters(path):
    found = commands(path, "papermill")
    assert found
    for words in found:
        source = ROOT / next(w for w in words if w.startswith("book/"))
        known = notebooks.parameters(source)
        given = {words[i + 1]: words[i + 2] for i, w in enumerate(words) if w == "-p"}
        for i, w in enumerate(words):
            given |= yaml.safe_load(words[i + 1]) if w == "-y" else {}
        assert set(given) <= set(known)


def test_the_refusals_are_those_on_the_page(capsys):
    pairs = re.findall(
        r"```bash\n(hcl [^\n]*)\n```\n+```text\n(.*?)```", RERUN.read_text(), re.DOTALL
    )
    assert len(pairs) == 2
    for command, expected in pairs:
        assert cli.main(shlex.split(command)[1:]) == 2
        assert capsys.readouterr().err == expected


def test_the_named_output_is_where_the_page_says(monkeypatch):
    jobs = []
    monkeypatch.setattr("hcl.execution.execute_all", lambda found, **_: jobs.extend(found))
    words = next(x for x in commands(RERUN, "hcl") if "seeds=[0, 1]" in x and "epochs=5" in x)
    assert cli.main(words) == 0
    assert jobs[0].output.relative_to(ROOT).as_posix() in RERUN.read_text()
    assert jobs[0].failed.name.endswith(".failed.ipynb")


def test_targets_and_files_that_are_named_are_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in (README, RERUN, STATUS):
        text = page.read_text()
        assert set(re.findall(r"\bmake (book|test|bench|lint|lock|clean)\b", text)) <= set(targets)
        for name in re.findall(r"`((?:hcl|benchmarks|data)/\w+\.(?:py|md))`", text):
            assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", README.read_text()):
        assert (ROOT / name).exists(), name


# --- the status page


def status(root, monkeypatch, **parameters):
    """The page's code, executed as if ``root`` were the project; hands back its variables."""
    shown = []
    monkeypatch.setattr("hcl.project_root", lambda: root)
    monkeypatch.setattr("IPython.display.display", lambda html: shown.append(html.data))
    page: dict[str, object] = {"shown": shown}
    for cell in nbformat.read(STATUS, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), page)
            if cell.id == "parameters":
                page.update(parameters)
    return page


def test_status_says_so_where_there_is_nothing(tmp_path, monkeypatch, capsys):
    page = status(tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "0 of 0 notebooks were executed in the quick form." in said
    assert "0 studies with 0 Records; 0 cached." in said
    assert "The benchmark has not been run" in said
    assert len(page["shown"]) == 1  # the versions
    assert "scikit-learn" in page["shown"][0]


def test_status_lists_what_was_executed(tmp_path, monkeypatch, capsys):
    tinybook.write(tmp_path)
    output = tmp_path / "_build" / "executed" / "lab" / "sub" / "two.ipynb"
    ran = nbformat.read(tmp_path / "book" / "sub" / "two.ipynb", as_version=4)
    ran.metadata["papermill"] = {
        "duration": 41.6, "end_time": "2026-11-22T10:00:00.123456+00:00", "parameters": {"seed": 4},
    }  # fmt: skip
    output.parent.mkdir(parents=True)
    nbformat.write(ran, output)
    table = status(tmp_path, monkeypatch, profile="lab")["executed"].set_index("notebook")
    said = capsys.readouterr().out
    assert "1 of 2 notebooks were executed in the lab form." in said
    assert "they took 42 s; the longest, sub/two, 42 s." in said
    assert list(table.loc["sub/two"]) == [41.6, "2026-11-22 10:00:00", "seed=4"]
    assert table.loc["one", "finished (UTC)"] == "not executed"
    assert "0 of 2" in status_text(tmp_path, monkeypatch, capsys)  # nothing in the quick form


def status_text(root, monkeypatch, capsys):
    status(root, monkeypatch)
    return capsys.readouterr().out


def test_status_sums_up_studies_and_names_a_damaged_record(tmp_path, monkeypatch, capsys, tiny):
    kept = sweeps.record([tiny(study="lab", seed=s, epochs=1) for s in (0, 1)], progress=False)
    runs.get(tiny(epochs=1), progress=False)  # of the cache
    page = status(tmp_path, monkeypatch)
    said = capsys.readouterr().out
    row = page["studies"].iloc[0]
    assert (row["study"], row["Records"], row["seeds"]) == ("lab", 2, 2)
    assert row["hours"] == round(sum(r.cost["seconds"] for r in kept) / 3600, 2)
    assert row["devices"] == kept[0].provenance["device"]
    assert row["clean tree"].endswith(" of 2")
    assert "3 Records read, 0 that cannot be trusted." in said
    assert "1 studies with 2 Records; 1 cached." in said
    path = kept[0].path
    path.write_text(path.read_text().replace('"knn": 0.', '"knn": 0.9'))
    page = status(tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "3 Records read, 1 that cannot be trusted." in said
    assert f"{path.name} was changed after it was recorded" in said
    assert page["studies"].iloc[0]["Records"] == 1


def test_status_reads_the_benchmark(tmp_path, monkeypatch, capsys):
    made = json.loads((ROOT / "benchmarks" / "step.json").read_text())
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "step.json").write_text(json.dumps(made))
    table = status(tmp_path, monkeypatch)["ratios"].set_index("loss")
    for loss in ("Debiased", "HCL"):
        low, middle, high = table.loc[loss]
        assert low <= middle == made["result"][f"{loss}_ratio"] <= high
    assert made["provenance"]["date"] in capsys.readouterr().out
