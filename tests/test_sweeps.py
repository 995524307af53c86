"""Grids expand to Runs in order; a study is recorded once, by one process or several."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from hcl import runs, sweeps
from hcl.sweeps import expand, load_study, record

BASE = {"data": "sphere", "encoder": "mlp", "epochs": 2}
STUDY = """
study: latent
about: a test
base:
  data: sphere
  data_args: {n_train: 200, n_test: 100, coarse: 4, fine: 2}
  encoder: mlp
  epochs: 1
  batch: 64
  hidden_dim: 16
  out_dim: 8
grid:
  - {method: nt_xent, seed: [0, 1]}
  - {method: hard, beta: [0.5, 1], seed: 0}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "latent.yml"
    path.write_text(STUDY)
    return path


def test_a_grid_is_a_product_in_order_without_repetition():
    grid = [{"method": "hard", "beta": [0.5, 1], "seed": [0, 1]}, {"method": "hard", "beta": 0.5}]
    made = expand(BASE, grid)
    assert [(r.beta, r.seed) for r in made] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]


def test_hardness_does_not_multiply_methods_without_it():
    made = expand(BASE, [{"method": ["nt_xent", "hard"], "beta": [0.5, 1.0]}])
    assert [r.method for r in made] == ["nt_xent", "hard", "hard"]


def test_bad_grids_name_what_is_wrong(study):
    with pytest.raises(ValueError, match="betta"):
        expand(BASE, [{"betta": 1.0}])
    with pytest.raises(ValueError, match="needs more"):
        expand({"data": "sphere"}, [{"seed": 0}])
    study.write_text(STUDY.replace("grid:", "gird:"))
    with pytest.raises(ValueError, match=r"latent.yml: .*study, base and grid"):
        load_study(study)
    for text, complaint in (("study: s\nbase:\ngrid:\n", "base must"), ("a: {", "not YAML"),
                            ("study: s\nbase: {}\ngrid: [seed]", "list of mappings")):  # fmt: skip
        study.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            load_study(study)
    study.write_text(STUDY.replace("beta: [0.5, 1]", "beta: [-1]"))
    with pytest.raises(ValueError, match=r"latent.yml: beta=-1"):
        load_study(study)


def test_a_study_is_recorded_once(study, monkeypatch):
    wanted = load_study(study)
    first = record(wanted, progress=False)
    assert [r.run for r in first] == wanted
    monkeypatch.setattr("hcl.train.train", None)  # a second time nothing is trained
    assert record(wanted, progress=False) == first
    assert runs.verify() == []


def test_two_processes_record_what_one_does(study, tmp_path):
    wanted = load_study(study)
    one = record(wanted, store=tmp_path / "one", progress=False)
    two = record(wanted, store=tmp_path / "two", workers=2, progress=False)
    assert [r.run for r in two] == wanted
    assert [r.metrics for r in two] == [r.metrics for r in one]


def test_a_spent_budget_starts_nothing_more(study):
    assert record(load_study(study), budget_s=0.0, progress=False) == []
    assert record(load_study(study), budget_s=0.0, workers=2, progress=False) == []


def test_an_error_in_a_worker_reaches_the_caller(tiny):
    with pytest.raises(ValueError, match="batch=500"):
        record([tiny(batch=500), tiny()], workers=2, progress=False)
    with pytest.raises(ValueError, match="workers=0"):
        sweeps.record([], workers=0)


SWEEP = """
import sys
from pathlib import Path
from hcl.runs import Run
from hcl.sweeps import record
if __name__ == "__main__":
    run = Run(data="digits", encoder="mlp", epochs=100000, batch=256)
    record([run], workers=2, store=Path(sys.argv[1]), progress=False)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killing_a_sweep_leaves_no_worker_behind(tmp_path, sign):
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    sweep = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "store")], preexec_fn=heeding_interrupts
    )
    try:
        workers = _until(lambda: _workers(sweep.pid))
        sweep.send_signal(sign)
        sweep.wait(60)
    finally:
        sweep.kill()
    assert _until(lambda: not any(w.is_running() and w.status() != "zombie" for w in workers))


def heeding_interrupts():
    """A shell's background job ignores Ctrl-C, and so would all that the tests start in it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _workers(pid):
    children = psutil.Process(pid).children(recursive=True)
    return [c for c in children if "spawn_main" in " ".join(c.cmdline())]


def _until(found, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"did not happen within {seconds} s")
