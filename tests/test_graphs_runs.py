"""Graphs through the trainer: InfoGraph as released and as the equation, and four losses."""

import functools
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC
from test_graphs import MUTAG, as_pyg, generator, needs_mutag
from torch.nn import functional as F
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader
from torch_geometric.nn import global_add_pool

from hcl import cli, compare, graphs, project_root, runs, sweeps
from hcl import train as trainer
from hcl.graphs import GraphBatch, sets
from hcl.graphs.infograph import local_global
from hcl.objective import Objective, steps
from hcl.runs import Run
from hcl.train import build_model, fit, load_data, train

FEW = {"n_graphs": 60, "least": 8, "most": 14}
CPU = torch.device("cpu")


def run_of(**changes):
    values = {"data": "graphs", "data_args": FEW, "encoder": "gin", "method": "infograph",
              "encoder_args": {"hidden": 8}, "epochs": 2, "batch": 16, "hidden_dim": 16,
              "out_dim": 8}  # fmt: skip
    return Run(**{**values, **changes})


def held_out(**changes):
    return run_of(data_args={**FEW, "held_out": 0.3}, **changes)


# --- what a Run says


def test_what_decides_nothing_in_infograph_does_not_make_another_run():
    plain = run_of(beta=0.0, tau_plus=0.0)
    for change in ({"sign": "easy"}, {"temperature": 0.1}, {"hidden_dim": 3}, {"out_dim": 5},
                   {"detach_weights": True}, {"Q": "3"}, {"clamp": "unscaled"},
                   {"separate_views": True}, {"normalize": "none"},
                   {"hardening": "threshold", "threshold": 0.5}):  # fmt: skip
        assert run_of(beta=0.0, tau_plus=0.0, **change).digest == plain.digest
    released = run_of(protocol="released")
    for change in ({"tau_plus": 0.3}, {"weight_decay": 0.1}, {"sign": "easy"},
                   {"detach_weights": True}, {"probe": "released"}):  # fmt: skip
        assert run_of(protocol="released", **change) == released


def test_the_released_protocol_is_the_released_codes():
    run = run_of(protocol="released", tau_plus=0.1)
    assert (run.tau_plus, run.weight_decay, run.sign) == (0.5, 0.0, "easy")
    sound = run_of(tau_plus=0.1)
    assert (sound.tau_plus, sound.weight_decay, sound.sign) == (0.1, 1e-6, "hard")
    assert run_of(protocol="released", sign="hard").sign == "hard"
    assert run_of(sign="easy").sign == "easy"


def test_what_decides_makes_another_run():
    changes = [
        {}, {"beta": 2.0}, {"tau_plus": 0.2}, {"sign": "easy"}, {"protocol": "released"},
        {"protocol": "released", "sign": "hard"}, {"detach_weights": True}, {"beta": 0.0},
        {"data": "mutag", "data_args": {}}, {"encoder_args": {"hidden": 9}}, {"method": "hard"},
    ]  # fmt: skip
    assert len({run_of(**c).digest for c in changes}) == len(changes)


def test_other_methods_have_no_sign():
    for method in ("hard", "scl", "nt_xent"):
        assert run_of(method=method, sign="easy") == run_of(method=method)
        assert run_of(method=method).sign == "own"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"beta": -1.0}, "beta=-1.0"), ({"tau_plus": 1.0}, "tau_plus=1.0"),
     ({"sign": "minus"}, "sign='minus': choose one of own, hard, easy"),
     ({"positives": "class"}, "positives='class': does not go with method='infograph'"),
     ({"watch": "losses"}, "watch='losses': does not go with method='infograph'"),
     ({"watch": "collapse"}, "watch='collapse': does not go with method='infograph'"),
     ({"queue": 8}, "queue=8: goes with the methods nt_xent, debiased, hard"),
     ({"method": "infomax"}, r"method='infomax': choose one of .*, infograph")],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_with_infograph_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run_of(**change)


def test_hardness_may_be_annealed():
    run = run_of(epochs=10, anneal="paper", anneal_steps=2, beta=2.0)
    objective = Objective(run, build_model(run, load_data(run)), load_data(run))
    betas = []
    for epoch in (1, 10):
        objective.begin(epoch)
        betas.append(objective.loss.beta)
    assert betas[0] == 2.0 > betas[1]


# --- what the trainer refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [({"data": "mutagg", "data_args": {}}, r"data='mutagg': choose one of sphere, graphs, mutag,"),
     ({"data": "sphere", "data_args": {}, "encoder": "mlp", "encoder_args": {}},
      "compares nodes with graphs, and sphere has none"),
     ({"method": "scl"}, r"method='scl': trains on the labels .* held_out=0\.3"),
     ({"method": "hard", "positives": "class"}, "positives='class': trains on the labels"),
     ({"batch": 61}, "batch=61: graphs has 60 training samples"),
     ({"method": "hard", "queue": 32}, "queue=32: goes with pictures .* not with graphs"),
     ({"sides": "growing"}, "sides='growing': graphs has no pictures"),
     ({"encoder": "small"}, "encoder='small': graphs have gin, raw"),
     ({"encoder_args": {"width": 3}}, r"encoder_args \['width'\]: 'graphs' takes layers, hidden"),
     ({"data_args": {"n": 3}}, r"data_args \['n'\]: 'graphs' takes augmentation, held_out"),
     ({"data_args": {**FEW, "augmentation": "crop"}}, "augmentation='crop'"),
     ({"data": "proteins", "data_args": {"features": "label"}}, "features='label'")],
    ids=str,
)  # fmt: skip
def test_what_graphs_cannot_give_is_refused_before_training(change, message):
    with pytest.raises(ValueError, match=message):
        train(run_of(**change), progress=False)


def test_graphs_are_not_compiled():
    with pytest.raises(ValueError, match="compile: graphs has graphs"):
        train(run_of(), progress=False, compile=True)


def test_fewer_graphs_of_a_class_than_folds():
    run = run_of(data_args={**FEW, "n_graphs": 30}, epochs=0)
    with pytest.raises(ValueError, match=r"class 0 has 5 member\(s\), fewer than folds=10"):
        train(run, progress=False)


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(FloatingPointError, match="epoch"):
        train(run_of(lr=1e30, epochs=5), progress=False)


# --- batches


def batches(run, epoch):
    objective = Objective(run, build_model(run, load_data(run)), load_data(run))
    seed = run.seed * 1_000_003 + epoch
    return [rows.tolist() for rows in objective.batches(generator(seed))]


def test_infographs_last_batch_is_smaller_and_every_graph_is_seen():
    run = run_of(batch=16)
    found = batches(run, 1)
    assert [len(rows) for rows in found] == [16, 16, 16, 12]
    assert sorted(row for rows in found for row in rows) == list(range(60))
    assert batches(run, 2) != found
    assert steps(run, 60) == 4


def test_a_last_batch_of_a_single_graph_is_left_out():
    run = run_of(batch=59)
    assert [len(rows) for rows in batches(run, 1)] == [59]
    assert steps(run, 60) == 1
    assert [len(rows) for rows in batches(run_of(batch=58), 1)] == [58, 2]
    train(run, progress=False)


def test_infograph_in_bfloat16_is_near_that_in_float32():
    wide, narrow = (train(run_of(precision=p), progress=False).metrics["loss"]
                    for p in ("float32", "bfloat16"))  # fmt: skip
    assert narrow == pytest.approx(wide, rel=0.1)


def test_the_released_code_shuffles_once():
    run = run_of(protocol="released")
    assert batches(run, 1) == batches(run, 2)
    assert batches(run_of(protocol="released", seed=1), 1) != batches(run, 1)


def test_other_methods_leave_the_last_batch_out():
    assert [len(rows) for rows in batches(run_of(method="nt_xent"), 1)] == [16, 16, 16]
    assert steps(run_of(method="nt_xent"), 60) == 3


# --- training


def bench():
    path = project_root() / "benchmarks" / "graphs.py"
    spec = importlib.util.spec_from_file_location("graphs_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_released_run_is_the_released_loop_step_by_step():
    """PyTorch Geometric's loader, masks filled node by node, Adam without weight decay."""
    run = run_of(protocol="released", beta=2.0, epochs=3)
    data, looped = load_data(run), bench().looped
    data.graphs.x = data.graphs.x.double()
    model, other = (build_model(run, data).double() for _ in range(2))
    _, _, loss = fit(run, model, data, Path("none"), progress=False)

    order = torch.randperm(60, generator=generator(run.seed)).tolist()
    loader = DataLoader([as_pyg(data.graphs, g) for g in order], batch_size=16)
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    other.train()
    for _ in range(3):
        losses = []
        for batch in loader:
            h, found = batch.x, []
            for conv, norm in zip(other.encoder.convs, other.encoder.norms, strict=True):
                h = norm(conv(h, batch.edge_index).relu())
                found.append(h)
            nodes = torch.cat(found, dim=1)
            pooled = global_add_pool(nodes, batch.batch)
            value = looped(other.head.local(nodes), other.head(pooled), batch.batch, beta=2.0)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_a_sound_run_lowers_the_objective_of_the_equation():
    run = run_of(beta=1.0, tau_plus=0.1, epochs=15)
    data = load_data(run)
    model = build_model(run, data)

    def value():  # as in training: BatchNorm with statistics of the batch
        with torch.no_grad():
            nodes, pooled = model.encoder.both(data.graphs)
            return local_global(model.head.local(nodes), model.head(pooled), data.graphs.batch,
                                beta=1.0, tau_plus=0.1).item()  # fmt: skip

    before = value()
    fit(run, model, data, Path("none"), progress=False)
    assert value() < 0.5 * before


def test_the_same_seed_gives_the_same_record_another_another():
    one, two = (train(run_of(), store=Path(s), progress=False) for s in ("a", "b"))
    assert one.metrics == two.metrics
    assert train(run_of(seed=1), progress=False).metrics["loss"] != one.metrics["loss"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("protocol", ["sound", "released"])
def test_an_interrupted_run_ends_with_the_same_record(protocol, monkeypatch, tmp_path):
    run = run_of(epochs=4, protocol=protocol)
    whole = train(run, store=tmp_path / "whole", progress=False)
    begin = Objective.begin

    def interrupted(self, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        begin(self, epoch)

    monkeypatch.setattr(Objective, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run, store=tmp_path / "cut", progress=False, checkpoint_every=0.0)
    monkeypatch.setattr(Objective, "begin", begin)
    resumed = train(run, store=tmp_path / "cut", progress=False)
    assert resumed.metrics == whole.metrics


METHODS = ["nt_xent", "debiased", "hard", "decoupled", "scl", "hard_scl", "supcon", "schane"]


@pytest.mark.parametrize("method", METHODS)
def test_every_loss_trains_on_whole_graphs(method):
    record = train(held_out(method=method, epochs=3, eval_every=3), progress=False)
    assert {"loss", "knn", "linear", "svc", "svc_scaled", "alignment"} <= set(record.metrics)
    assert all(0 <= record.metrics[m] <= 1 for m in ("knn", "linear", "svc", "svc_scaled"))
    assert [row["epoch"] for row in record.history] == [0, 3]


@pytest.mark.parametrize(
    "change", [{"separate_views": True}, {"positives": "class"},
               {"protocol": "released"}, {"watch": "losses", "eval_every": 2},
               {"watch": "collapse", "eval_every": 2}, {"optimizer": "muon"},
               {"precision": "bfloat16"}], ids=str
)  # fmt: skip
def test_the_options_of_other_data_go_with_graphs(change):
    assert train(held_out(method="hard", **change), progress=False).metrics["loss"] > 0


def test_labels_of_held_out_graphs_do_not_reach_the_training(monkeypatch):
    found = []
    for wrong in (False, True):

        @functools.wraps(graphs.load_families)
        def load(*args, wrong=wrong, **options):
            data = graphs.load_families(*args, **options)
            data.y_test = (data.y_test + wrong) % 6
            return data

        monkeypatch.setitem(trainer.LOADERS, "graphs", load)
        run = held_out(method="hard_scl", epochs=3)
        model, data = build_model(run, load_data(run)), load_data(run)
        found.append(fit(run, model, data, Path("none"), progress=False)[2])
    assert found[0] == found[1]


def test_infograph_sees_no_labels(monkeypatch):
    found = []
    for shift in (0, 1):
        run = run_of()
        data = load_data(run)
        data.y_train = (data.y_train + shift) % 6
        model = build_model(run, data)
        found.append(fit(run, model, data, Path("none"), progress=False)[2])
    assert found[0] == found[1]


# --- what is measured


def test_the_probe_of_all_graphs_is_the_released_evaluation():
    run = run_of(epochs=0, seed=2)
    record = train(run, progress=False)
    data = load_data(run)
    net = build_model(run, data).encoder.eval()
    with torch.no_grad():
        z = net(Batch.from_data_list([as_pyg(data.graphs, g) for g in range(60)])).double().numpy()
    y, scores = data.y_train.numpy(), []
    for fit_on, test in StratifiedKFold(10, shuffle=True, random_state=2).split(z, y):
        search = GridSearchCV(SVC(), {"C": [10.0**k for k in range(-3, 4)]}, cv=5)
        scores.append(search.fit(z[fit_on], y[fit_on]).score(z[test], y[test]))
    assert record.metrics["svc"] == pytest.approx(np.mean(scores), abs=0.02)
    assert record.metrics["svc_sd"] == pytest.approx(np.std(scores, ddof=1), abs=0.02)
    assert "knn" not in record.metrics  # every graph would be its own nearest
    assert "linear" not in train(run_of(epochs=0, protocol="released"), progress=False).metrics


def test_the_floor_share_is_measured_where_there_is_a_floor():
    assert train(run_of(tau_plus=0.9, epochs=3), progress=False).metrics["clamp_share"] > 0
    assert train(run_of(tau_plus=0.0), progress=False).metrics["clamp_share"] == 0
    assert train(run_of(protocol="released"), progress=False).metrics["clamp_share"] == 0
    raw = train(run_of(encoder="raw", encoder_args={}, epochs=0), progress=False)
    assert "clamp_share" not in raw.metrics


def test_embeddings_are_kept_if_asked_for():
    record = train(run_of(), progress=False, embeddings=40)
    z, labels = record.embeddings()
    assert z.shape == (40, 24)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-3)
    assert len(labels) == 40


def test_rates_count_the_graphs_that_are_seen():
    for method, seen in (("infograph", 60), ("nt_xent", 48)):
        cost = train(run_of(method=method), progress=False).cost
        assert cost["images_per_second"] * cost["seconds"] == pytest.approx(2 * seen, rel=0.1)


def test_records_name_pytorch_geometric_and_tables_the_method():
    records = [train(run_of(**c), progress=False)
               for c in ({"beta": 0.0}, {"beta": 2.0}, {"beta": 2.0, "sign": "easy"})]  # fmt: skip
    assert records[0].provenance["torch_geometric"]
    table = compare.frame(records)
    assert table["label"].tolist() == ["InfoGraph β=0", "InfoGraph β=2", "InfoGraph β=2 easy"]
    assert table["sign"].tolist() == ["own", "hard", "easy"]
    assert table["n_graphs"].tolist() == [60] * 3


def test_graphs_of_ones_own_can_be_trained_on(monkeypatch):
    """A point and graphs without edges among them, as the loader of another set."""
    whole = graphs.load_families(n_graphs=30, least=8, most=12).graphs
    points = GraphBatch(torch.zeros(30, 0), torch.zeros(2, 0).long(), torch.arange(30), 30)
    both = GraphBatch(torch.zeros(len(whole.x), 0), whole.edge_index, whole.batch, 30)
    both = both.joined(points)
    both.x = sets.degree_features(both)
    found = sets.GraphSet(both, torch.arange(60) // 30)

    def load(name, *, device, seed, held_out=0.0):
        return graphs.data.of_set(name, found, device=device, seed=seed, held_out=held_out)

    monkeypatch.setitem(trainer.LOADERS, "mine", load)
    record = train(run_of(data="mine", data_args={}), progress=False)
    assert record.metrics["svc_scaled"] > 0.95  # points are told from the rest
    train(run_of(data="mine", data_args={"held_out": 0.3}, method="hard"), progress=False)


def test_the_command_line_fetches_graphs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(graphs, "download", lambda name: tmp_path / name)
    assert cli.main(["data", "mutag"]) in (None, 0)
    assert capsys.readouterr().out.strip() == str(tmp_path / "mutag")


# --- recorded


def test_the_study_has_both_signs_a_plain_baseline_and_enough_seeds():
    study = sweeps.load_study(project_root() / "book" / "profiles" / "tu-lab.yml")
    assert {r.study for r in study} == {"tu-lab"}
    paper = ("mutag", "ptc_mr", "enzymes", "proteins", "imdb-binary", "imdb-multi")
    for name in paper:
        mine = [r for r in study if r.data == name and r.method == "infograph" and r.epochs]
        released = {(r.beta, r.sign) for r in mine if r.protocol == "released"}
        assert released == {(0.0, "own")} | {
            (b, s) for b in (1.0, 2.0, 10.0) for s in ("easy", "hard")
        }
        sound = [r for r in mine if r.protocol == "sound"]
        assert {(0.0, 0.0), (1.0, 0.0)} <= {(r.beta, r.tau_plus) for r in sound}
        prior = {r.tau_plus for r in sound} - {0.0}
        assert len(prior) == 1
        for arm in {(r.protocol, r.beta, r.sign, r.tau_plus) for r in mine}:
            seeds = {r.seed for r in mine if (r.protocol, r.beta, r.sign, r.tau_plus) == arm}
            assert seeds >= set(range(5))
    assert all(r.data_args == {"held_out": 0.3} for r in study if r.method != "infograph")


@needs_mutag
@pytest.mark.parametrize(("name", "folder"), [("mutag", "MUTAG"), ("ptc_mr", "PTC_MR")])
def test_the_studys_prior_is_the_share_of_pairs_of_one_class(name, folder):
    labels = (MUTAG.parent / folder / "raw" / f"{folder}_graph_labels.txt").read_text().split()
    share = sum((labels.count(c) / len(labels)) ** 2 for c in set(labels))
    study = sweeps.load_study(project_root() / "book" / "profiles" / "tu-lab.yml")
    mine = [r for r in study if r.data == name and r.method == "infograph"]
    (prior,) = {r.tau_plus for r in mine if r.protocol == "sound"} - {0.0}
    assert prior == pytest.approx(share, abs=6e-4)


@needs_mutag
def test_a_run_on_mutag_takes_less_than_a_minute(monkeypatch):
    monkeypatch.setenv("HCL_DATA", str(MUTAG.parent.parent))
    start = time.process_time()
    record = train(
        Run(data="mutag", encoder="gin", method="infograph", beta=1.0, epochs=20, batch=128),
        progress=False,
    )
    assert time.process_time() - start + 9 * record.cost["seconds"] < 60
    assert record.metrics["svc_scaled"] > 0.75


# --- the benchmark


def test_what_the_benchmark_compares_with_is_the_same_loss_and_the_same_masks():
    module = bench()
    torch.manual_seed(0)
    nodes, pooled, batch = torch.randn(9, 4), torch.randn(3, 4), torch.arange(9) // 3
    torch.testing.assert_close(
        module.looped(nodes, pooled, batch), graphs.local_global_released(nodes, pooled, batch)
    )
    pos, neg = module.masks(batch, 3)
    assert torch.equal(pos, F.one_hot(batch, 3).float())
    for mine, theirs in zip((pos, neg), module.looped_masks(batch, 3), strict=True):
        assert torch.equal(mine, theirs)


def test_everybody_in_the_benchmark_trains_alike():
    found = bench().entrants("graphs", 128, CPU)["epoch"]
    first = [epoch() for epoch in found.values()]
    assert first[1:] == pytest.approx(first[:1] * 2, rel=1e-4)
    second = [epoch() for epoch in found.values()]
    assert all(b < a for a, b in zip(first, second, strict=True))


def test_the_benchmark_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    out = tmp_path / "graphs.json"
    bench().main(["--data", "graphs,proteins", "--rounds", "2", "--out", str(out)])
    body = json.loads(out.read_text())
    assert "hcl data proteins" in body["data"]["proteins"]["skipped"]
    for what in ("epoch", "masks"):
        row = body["data"]["graphs"][what]["released loop"]
        assert row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
        assert row["ratio"] > 1
    assert body["provenance"]["torch"]
    with pytest.raises(SystemExit):
        bench().arguments(["--rounds", "1"])
    assert "--rounds 1: must be 2 or more" in capsys.readouterr().err


def test_the_recorded_ratios_are_on_file():
    path = project_root() / "benchmarks" / "graphs.json"
    if not path.exists():
        pytest.skip("not measured yet")
    body = json.loads(path.read_text())
    assert body["data"]["mutag"]["masks"]["released loop"]["ratio"] > 10
    assert body["data"]["mutag"]["epoch"]["released loop"]["ratio"] > 1


def test_the_store_reads_a_graph_record_back():
    record = train(run_of(study="trial"), progress=False)
    assert runs.read(record.path).run == record.run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_graphs": 54}, r"class \d has 9 member\(s\), fewer than folds=10"),
        ({"n_graphs": 60, "held_out": 0.9}, r"class \d has 1 member\(s\), fewer than folds=2"),
        ({"n_graphs": 60, "held_out": 0.1}, r"held_out leaves 6 graphs of 6 class\(es\)"),
    ],
)
def test_labels_that_the_probes_cannot_use_are_refused_before_training(
    monkeypatch, options, message
):
    monkeypatch.setattr(trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        train(
            run_of(data="graphs", data_args=options, method="hard", epochs=2, batch=2),
            progress=False,
        )
