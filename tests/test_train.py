"""Training is reproducible, resumes exactly after a kill, and refuses what cannot be trained."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from hcl import runs
from hcl.run import Run, beta_in_epoch
from hcl.train import Model, batches, build_model, load_data, projection_head, train


def outcome(record):
    return record.run, record.metrics, record.history


def test_training_learns(tiny):
    untrained = train(tiny(epochs=0), progress=False)
    trained = train(tiny(epochs=20, eval_every=5), progress=False)
    assert "loss" not in untrained.metrics
    assert [row["epoch"] for row in trained.history] == [0, 5, 10, 15, 20]
    assert trained.history[-1]["loss"] < trained.history[1]["loss"]
    assert trained.metrics["knn"] > untrained.metrics["knn"]
    assert trained.history[-1]["knn"] == trained.metrics["knn"]
    assert trained.cost["images_per_second"] > 0


def test_same_seed_same_result_another_seed_another(tiny, tmp_path):
    one, two = (train(tiny(), store=tmp_path / s, progress=False) for s in "ab")
    assert outcome(one) == outcome(two)
    assert train(tiny(seed=1), progress=False).metrics != one.metrics


def test_training_leaves_the_global_random_state_alone(tiny):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(tiny(), progress=False)
    assert torch.equal(torch.rand(3), wanted)


KILLED = """
import sys
from pathlib import Path
import torch
from hcl.runs import Run
from hcl.train import train
torch.set_num_threads(1)
run = Run(data="digits", encoder="mlp", epochs=40, batch=256, eval_every=10, schedule="cosine",
          anneal="paper", seed=3)
train(run, store=Path(sys.argv[1]), checkpoint_every=0.0, progress=False)
"""


def test_a_killed_run_resumes_and_ends_with_the_same_record(tmp_path):
    run = Run(data="digits", encoder="mlp", epochs=40, batch=256, eval_every=10, schedule="cosine",
              anneal="paper", seed=3)  # fmt: skip
    checkpoint = runs.path_of(run, store=tmp_path / "killed").with_suffix(".checkpoint")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")])
    until = time.monotonic() + 120
    while time.monotonic() < until and child.poll() is None:
        if checkpoint.exists() and torch.load(checkpoint)["done"]["epoch"] >= 12:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the child ended before it could be killed"
    assert not runs.path_of(run, store=tmp_path / "killed").exists()

    resumed = train(run, store=tmp_path / "killed", progress=False)
    whole = train(run, store=tmp_path / "whole", progress=False)
    assert outcome(resumed) == outcome(whole)
    assert not checkpoint.exists()


def test_a_checkpoint_of_other_code_is_not_continued(tiny, tmp_path):
    run = tiny()
    checkpoint = runs.path_of(run, store=tmp_path / "a").with_suffix(".checkpoint")
    checkpoint.parent.mkdir(parents=True)
    torch.save({"made_by": [run.digest, "other", "torch"], "done": {}, "parts": []}, checkpoint)
    wanted = train(run, store=tmp_path / "b", progress=False)
    assert outcome(train(run, store=tmp_path / "a", progress=False)) == outcome(wanted)


def test_a_damaged_checkpoint_is_named(tiny, tmp_path):
    checkpoint = runs.path_of(tiny(), store=tmp_path).with_suffix(".checkpoint")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=rf"{checkpoint.name}.* damaged"):
        train(tiny(), store=tmp_path, progress=False)


def test_bad_input_is_refused_before_training(tiny):
    with pytest.raises(ValueError, match="batch=500: sphere has 200"):
        train(tiny(batch=500), progress=False)
    with pytest.raises(ValueError, match=r"data_args \['size'\]"):
        train(tiny(data_args={"size": 16}), progress=False)
    with pytest.raises(ValueError, match="resnet18"):
        train(Run(data="digits", encoder="vit", epochs=1), progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(FloatingPointError, match=r"diverged in epoch 1|loss (nan|inf)"):
        train(tiny(lr=1e30), progress=False)
    assert list(runs.store_root().glob("*/*.json")) == []


def test_raw_input_is_measured_without_a_head():
    run = Run(data="digits", encoder="raw", method="nt_xent", epochs=0)
    record = train(run, progress=False)
    assert 0.9 < record.metrics["linear"] <= 1.0  # digits are nearly linearly separable
    assert 0.9 < record.metrics["knn"] <= 1.0
    data = load_data(run)
    assert build_model(run, data)(data.inputs(data.x_test)).shape == (len(data.x_test), 64)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_convolutional_encoder_trains_on_pictures(precision):
    run = Run(data="digits", data_args={"n_train": 128, "n_test": 100}, encoder="small", epochs=1,
              batch=64, precision=precision)  # fmt: skip
    record = train(run, progress=False)
    assert record.metrics["loss"] > 0


def test_the_released_probe_can_be_asked_for(tiny, monkeypatch):
    from hcl import probe

    asked = {}

    def quick(encoder, data, **options):
        asked.update(options)
        return original(encoder, data, epochs=2, **options)

    original = probe.linear_probe_released
    monkeypatch.setattr(probe, "linear_probe_released", quick)
    record = train(tiny(probe="released"), progress=False)
    assert "generator" in asked
    assert 0 <= record.metrics["linear"] <= 1


def test_batches_cover_an_epoch_once():
    rows = list(batches(10, 3, torch.Generator().manual_seed(0)))
    assert [len(r) for r in rows] == [3, 3, 3]
    assert len(set(torch.cat(rows).tolist())) == 9


def test_beta_follows_the_schedule(tiny):
    run = tiny(epochs=90, anneal="paper", beta=2.0)
    assert beta_in_epoch(run, 1) == 2.0
    assert beta_in_epoch(run, 90) == pytest.approx(2 / 9)
    assert beta_in_epoch(tiny(beta=2.0), 3) == 2.0


def test_model_is_encoder_then_head():
    encoder = torch.nn.Linear(4, 6)
    model = Model(encoder, projection_head(6, hidden_dim=8, out_dim=3)).eval()
    x = torch.randn(5, 4)
    assert torch.equal(model(x), model.head(encoder(x)))
    assert model(x).shape == (5, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu_with_the_same_result_twice(tmp_path):
    run = Run(data="digits", encoder="small", epochs=2, batch=64, precision="bfloat16")
    one, two = (train(run, store=tmp_path / s, device="cuda", progress=False) for s in "ab")
    assert outcome(one) == outcome(two)
    assert one.cost["peak_memory_bytes"] > 0


def test_a_failure_after_training_does_not_lose_it(tiny, monkeypatch):
    run = tiny()
    calls = []

    def full(*args, **options):
        calls.append(args)
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(runs, "save", full)
        with pytest.raises(OSError, match="disk full"):
            train(run, checkpoint_every=0.0, progress=False)
    wanted = train(run, store=runs.store_root() / "other", progress=False)
    monkeypatch.setattr("hcl.train.batches", None)  # a second time no batch is drawn
    assert outcome(train(run, progress=False)) == outcome(wanted)
    assert calls


def test_the_released_protocol_votes_at_the_temperature_of_the_loss(tiny, tmp_path, monkeypatch):
    from hcl import probe

    seen = []
    vote = probe.knn
    monkeypatch.setattr(probe, "knn", lambda *f, temperature: seen.append(temperature) or vote(*f))
    monkeypatch.setattr(probe, "linear_probe_released", lambda *a, **k: 0.5)
    for protocol in ("sound", "released"):
        train(tiny(temperature=0.2, protocol=protocol, epochs=1), store=tmp_path, progress=False)
    assert seen == [0.5, 0.2]


def test_the_released_protocol_is_named_where_the_pictures_are_grey():
    run = Run(data="digits", encoder="mlp", epochs=1, protocol="released")
    with pytest.raises(ValueError, match="protocol='released' on digits"):
        load_data(run)
