"""A deadline stops training at the end of an epoch; the next call ends as if nothing had happened.

Here a second passes with every epoch and at no other time, so deadlines are exact. In the one test
with worker processes these have the real clock.
"""

import math
import time
from types import SimpleNamespace

import pytest

from hcl import runs, sweeps
from hcl import train as trainer
from hcl.train import OutOfTime, train

SMALL = {"n_train": 96, "n_test": 60, "coarse": 4, "fine": 2}


@pytest.fixture
def clock(monkeypatch):
    """Seconds so far, which is epochs so far, and the epochs that were begun."""
    state = SimpleNamespace(now=0.0, begun=[])
    begin = trainer.Objective.begin

    def watching(self, epoch):
        begin(self, epoch)
        state.begun.append(epoch)
        state.now += 1.0

    monkeypatch.setattr(trainer.Objective, "begin", watching)
    for module in (trainer, sweeps):
        fake = SimpleNamespace(time=lambda: state.now, perf_counter=time.perf_counter)
        monkeypatch.setattr(module, "time", fake)
    return state


def outcome(record):
    return record.run, record.metrics, record.history


def files(store):
    return sorted(p.name for p in store.rglob("*") if p.is_file())


@pytest.fixture
def small(tiny):
    def make(**changes):
        return tiny(**{"data_args": SMALL, "epochs": 5, **changes})

    return make


PICTURES = {"data": "digits", "data_args": {"n_train": 96, "n_test": 60}, "encoder": "small"}
MANY = {  # whatever has a state, or changes from epoch to epoch
    "plain": {},
    "queue": {"queue": 80, "momentum": 0.5, "eval_every": 2},
    "queue, muon, triangle": {"queue": 20, "optimizer": "muon", "schedule": "triangle"},
    "muon, cosine": {"optimizer": "muon", "schedule": "cosine", "weight_decay": 0.1},
    "annealed": {"anneal": "paper", "anneal_steps": 4, "schedule": "cosine"},
    "mates, watched": {"positives": "class", "watch": "losses", "eval_every": 1},
    "apart, threshold": {"separate_views": True, "hardening": "threshold", "eval_every": 3},
    "growing": {**PICTURES, "sides": "growing", "encoder_args": {"whiten": True, "dirac": True}},
    "16 bits": {**PICTURES, "precision": "bfloat16", "encoder_args": {"norm_momentum": 0.4}},
}


@pytest.mark.parametrize("name", MANY)
def test_a_run_that_stopped_ends_as_one_that_did_not(small, tmp_path, clock, name):
    run = small(**MANY[name])
    whole = train(run, store=tmp_path / "whole", progress=False)
    assert clock.begun == [1, 2, 3, 4, 5]
    store, stops = tmp_path / "stopped", []
    for spent in (2, 3):  # stopped twice: after the second epoch and after the third
        clock.now, clock.begun[:] = 0.0, []
        with pytest.raises(OutOfTime, match=rf"epoch {spent + 1} of .*deadline"):
            train(run, store=store, deadline=2.0 if spent == 2 else 1.0, progress=False)
        stops += clock.begun
        assert files(store) == [f"{run.digest}.checkpoint"]
    clock.begun[:] = []
    resumed = train(run, store=store, progress=False)
    assert stops + clock.begun == [1, 2, 3, 4, 5]  # no epoch was trained twice
    assert outcome(resumed) == outcome(whole)
    assert files(store) == [f"{run.digest}.json"]
    if run.eval_every:
        assert [row["epoch"] for row in resumed.history][:2] == [0, run.eval_every]


def test_stopping_after_every_epoch_is_no_different(small, tmp_path, clock):
    run = small(eval_every=1, queue=40)
    whole = train(run, store=tmp_path / "whole", progress=False)
    for epochs in (1, 2, 3, 4):
        clock.now = 0.0
        with pytest.raises(OutOfTime, match=f"epoch {epochs + 1} of"):
            train(run, deadline=1.0, progress=False)
    assert outcome(train(run, progress=False)) == outcome(whole)
    assert clock.begun == 2 * [1, 2, 3, 4, 5]


def test_before_the_first_epoch_and_just_in_time(small, clock):
    run = small(eval_every=1)
    path = runs.path_of(run).with_suffix(".checkpoint")
    clock.now = 10.0
    with pytest.raises(OutOfTime, match="epoch 1 of"):
        train(run, deadline=9.0, progress=False)
    assert clock.begun == []
    assert path.exists()
    record = train(run, deadline=15.0, progress=False)  # five epochs of a second
    assert len(record.history) == 6
    assert not path.exists()


def test_a_deadline_that_is_spent_does_not_lose_what_is_done(small, clock, monkeypatch):
    """Nothing is left to train: the measuring that is left is not held up."""
    run, save = small(), runs.save
    monkeypatch.setattr(runs, "save", full_disk)
    with pytest.raises(OSError, match="disk"):
        train(run, checkpoint_every=0.0, progress=False)
    monkeypatch.setattr(runs, "save", save)
    clock.now, clock.begun[:] = 100.0, []
    assert train(run, deadline=1.0, progress=False).metrics["loss"] > 0
    assert clock.begun == []


def full_disk(*args, **options):
    raise OSError("disk full")


def test_seconds_are_summed_over_the_calls(small, monkeypatch):
    now = SimpleNamespace(wall=0.0)
    fake = SimpleNamespace(time=lambda: now.wall, perf_counter=lambda: now.wall)
    begin = trainer.Objective.begin

    def slow(self, epoch):
        begin(self, epoch)
        now.wall += 7.0

    monkeypatch.setattr(trainer.Objective, "begin", slow)
    monkeypatch.setattr(trainer, "time", fake)
    run = small()
    with pytest.raises(OutOfTime):
        train(run, deadline=15.0, progress=False)
    now.wall += 1000.0  # between the calls
    cost = train(run, progress=False).cost
    assert cost["seconds"] == 35.0
    assert cost["images_per_second"] == pytest.approx(5 * 96 / 35, abs=0.1)


def test_get_hands_the_deadline_on_and_a_recorded_run_needs_no_time(small, clock):
    with pytest.raises(OutOfTime):
        runs.get(small(), deadline=0.0, progress=False)
    record = runs.get(small(), progress=False)
    assert runs.get(small(), deadline=-math.inf, progress=False) == record


# Studies ------------------------------------------------------------------------------------------


def test_a_study_stops_with_a_checkpoint_and_goes_on(small, tmp_path, clock):
    wanted = [small(seed=s, study="lab", eval_every=2) for s in (0, 1, 2)]
    whole = sweeps.record(wanted, store=tmp_path / "whole", progress=False)
    store, found = tmp_path / "stopped", []
    for _ in range(5):  # of fifteen epochs, three a call
        clock.now, before = 0.0, len(clock.begun)
        assert len(found) < len(wanted)
        found = sweeps.record(wanted, store=store, budget_s=3.0, progress=False)
        assert len(clock.begun) - before == 3
        names = files(store)
        assert not [n for n in names if n.endswith(".part")]
        assert len([n for n in names if n.endswith(".json")]) == len(found)
        assert len([n for n in names if n.endswith(".checkpoint")]) <= 1
    assert [outcome(r) for r in found] == [outcome(r) for r in whole]
    assert clock.begun == 2 * (3 * [1, 2, 3, 4, 5])
    assert runs.verify(store=store) == []


def test_a_run_that_could_not_be_finished_is_left_out_of_the_result(small, clock):
    """The second needs less than is left: it is not held up by the first, which does not fit."""
    long, short = small(epochs=9), small(epochs=2, seed=1)
    clock.now = 0.0
    assert sweeps.record([long, short], budget_s=4.0, progress=False) == []
    assert clock.begun == [1, 2, 3, 4]
    assert [r.run for r in sweeps.record([short, long], progress=False)] == [short, long]
    assert clock.begun[4:] == [1, 2, 5, 6, 7, 8, 9]


def test_worker_processes_stop_with_a_checkpoint_and_go_on(small, tmp_path, clock):
    """Begun here, stopped by the deadline of a worker, ended by another one."""
    wanted = [small(study="lab", queue=40, eval_every=2)]
    whole = sweeps.record(wanted, store=tmp_path / "whole", progress=False)
    clock.now, store = 0.0, tmp_path / "stopped"
    with pytest.raises(OutOfTime):
        train(wanted[0], store=store, deadline=2.0, progress=False)
    clock.now = time.time()  # the workers' clock is the real one, and this deadline long over
    again = {"workers": 2, "store": store, "progress": False}
    assert sweeps.record(wanted, budget_s=0.001, **again) == []
    assert files(store) == [f"{wanted[0].digest}.checkpoint"]
    found = sweeps.record(wanted, **again)
    assert [outcome(r) for r in found] == [outcome(r) for r in whole]
    assert files(store) == [f"{wanted[0].digest}.json"]
    assert clock.begun == [1, 2, 3, 4, 5, 1, 2]  # the rest by the worker
