"""The younger options of a Run: what is refused, which Runs are one, what each does to training.

Losses and queues have tests of their own; here is what the trainer makes of the options.
"""

import copy
import functools
import json
import math
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from hcl import losses, ordering, probe, project_root, runs, sphere, vision
from hcl import measure as measuring
from hcl import run as of_runs
from hcl import train as trainer
from hcl.run import Run
from hcl.train import Mates, Model, Objective, build_model, load_data, train
from hcl.units import placed

FEW = {"n_train": 100, "n_test": 60}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# What is refused ----------------------------------------------------------------------------------

REFUSED = [
    ("encoder_args", [1], {}), ("encoder_args", {"whiten": None}, {}),
    ("encoder_args", {"norm_momentum": math.nan}, {}), ("encoder_args", {1: 2}, {}),
    ("hardening", "sharp", {}), ("threshold", 1.5, {"hardening": "threshold"}),
    ("threshold", -1.5, {"hardening": "threshold"}), ("threshold", math.nan, {}),
    ("threshold", "0.5", {}), ("debias", "twice", {}), ("clamp", "none", {}),
    ("Q", "many", {}), ("Q", "", {}), ("Q", "0", {}), ("Q", "-3", {}), ("Q", "nan", {}),
    ("Q", "inf", {}), ("Q", 1020, {}), ("Q", "negatives", {"method": "hard"}),
    ("positives", "labels", {}), ("queue", -1, {}), ("queue", 2.5, {}), ("queue", True, {}),
    ("momentum", 1.0, {}), ("momentum", -0.1, {"queue": 8}), ("momentum", math.inf, {}),
    ("anneal_steps", 0, {"anneal": "paper"}), ("anneal_steps", 4, {"anneal": "paper"}),
    ("anneal_steps", 1, {"anneal": "released"}), ("anneal_steps", 2.0, {}),
    ("anneal_steps", 1, {"anneal": "paper", "protocol": "released"}),
    ("protocol", "paper", {}), ("separate_views", 1, {}), ("separate_views", "yes", {}),
    ("optimizer", "sgd", {}), ("sides", "shrinking", {}), ("watch", "all", {}),
    ("watch", None, {}), ("normalize", "cube", {}), ("normalize", True, {}),
    ("normalize", "ball", {"tau_plus": 0.1}), ("normalize", "none", {"method": "debiased"}),
    ("sign", "soft", {"method": "infograph"}), ("sign", True, {}),
    ("method_args", {"alpha": 0.7}, {}), ("method_args", {"alpha": 1.5}, {"method": "bayesian"}),
    ("method_args", {"eps": 0}, {"method": "transport"}), ("method_args", [0.7], {}),
    ("method_args", {"anchor": 0, "uncertainty": 0, "representativeness": 0},
     {"method": "unremix"}),
    ("synthetic", {"between": 4}, {}), ("synthetic", {"hardest": 4}, {}),
    ("synthetic", {"hardest": 4, "between": 7}, {}), ("synthetic", {"hardest": 4, "more": 1}, {}),
    ("synthetic", {"hardest": 10**4, "between": 7}, {}),
    ("synthetic", {"hardest": 4, "between": 2, "after": 3}, {"epochs": 3}),
    ("synthetic", {"hardest": 4, "between": 2}, {"method": "supcon"}),
    ("synthetic", {"hardest": 4, "between": 2}, {"queue": 8}), ("head", "linear", {}),
    ("cross_entropy", 1.0, {}),
    ("cross_entropy", -0.1, {}),
    ("start", {"method": "nt_xent"}, {}), ("start", {"epochs": 0}, {}),
    ("start", {"epochs": 1, "seed": 3}, {}), ("start", {"epochs": 1, "beta": -1.0}, {}),
]  # fmt: skip


def test_every_younger_field_is_among_those_that_are_tried():
    assert {name for name, _, _ in REFUSED} == set(of_runs._YOUNGER)


@pytest.mark.parametrize(("field", "value", "others"), REFUSED, ids=str)
def test_a_bad_value_is_refused_with_its_field_and_itself(tiny, field, value, others):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        tiny(**{field: value, **others})
    message = str(refusal.value)
    shown = value if field == "Q" and isinstance(value, str) else repr(value)
    assert message.startswith(f"{field}=")
    assert shown.strip("'") in message
    assert len(message) > len(f"{field}={shown}: ")  # and what would do


@pytest.mark.parametrize(
    ("field", "value"),
    [("hardening", "threshold"), ("debias", "separate"), ("clamp", "unscaled"), ("Q", "3"),
     ("detach_weights", True), ("separate_views", True), ("normalize", "ball")],
)  # fmt: skip
def test_what_does_not_go_with_a_queue_is_refused(tiny, field, value):
    with pytest.raises(ValueError, match=rf"{field}={value!r}: does not go with queue=8"):
        tiny(queue=8, tau_plus=0.0, **{field: value})
    tiny(tau_plus=0.0, **{field: value})


def test_a_queue_goes_with_the_methods_it_has_a_loss_for(tiny):
    for method in losses.METHODS:
        if method in ("nt_xent", "debiased", "hard"):
            assert tiny(queue=8, method=method).queue == 8
        else:
            with pytest.raises(ValueError, match="queue=8: goes with the methods nt_xent, deb"):
                tiny(queue=8, method=method)


def test_a_threshold_does_not_go_with_sums_debiased_separately(tiny):
    with pytest.raises(ValueError, match=r"debias='separate'.*threshold"):
        tiny(hardening="threshold", debias="separate")


# Which Runs are one -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [({"momentum": 0.5}, {}), ({"threshold": 0.7}, {}), ({"anneal_steps": 2}, {}),
     ({"beta": 0.0, "anneal": "paper", "anneal_steps": 2}, {"beta": 0.0}),
     ({"beta": 0.0, "detach_weights": True}, {"beta": 0.0}),
     ({"hardening": "threshold", "beta": 7.0}, {"hardening": "threshold", "beta": 0.0}),
     ({"hardening": "threshold", "detach_weights": True}, {"hardening": "threshold"}),
     ({"hardening": "threshold", "anneal": "paper", "anneal_steps": 2}, {"hardening": "threshold"}),
     ({"method": "nt_xent", "hardening": "threshold", "threshold": 0.3}, {"method": "nt_xent"}),
     ({"method": "schane", "hardening": "threshold"}, {"method": "schane"}),
     ({"method": "supcon", "clamp": "unscaled", "debias": "separate", "Q": "3"},
      {"method": "supcon"}),
     ({"method": "schane", "Q": "negatives"}, {"method": "schane"}),
     ({"method": "nt_xent", "anneal": "paper"}, {"method": "nt_xent"}),
     ({"protocol": "released", "probe": "fast"}, {"protocol": "released", "probe": "released"}),
     ({"protocol": "released", "separate_views": True}, {"protocol": "released"}),
     ({"protocol": "released", "anneal": "paper", "anneal_steps": 2},
      {"protocol": "released", "anneal": "released", "anneal_steps": 2}),
     ({"Q": "3"}, {"Q": "3.0"}), ({"Q": " 30"}, {"Q": "3e1"}),
     ({"tau_plus": -0.0}, {"tau_plus": 0.0}), ({"beta": -0.0}, {"beta": 0.0}),
     ({"data_args": {"coarse": 4, "fine": 2}}, {"data_args": {"fine": 2, "coarse": 4}})],
    ids=str,
)  # fmt: skip
def test_what_decides_nothing_does_not_make_another_run(tiny, one, other):
    one, other = tiny(**one), tiny(**other)
    assert one == other
    assert one.digest == other.digest


def test_every_younger_field_makes_another_run_where_it_decides(tiny):
    changes = [
        {}, {"encoder_args": {"whiten": True}}, {"encoder_args": {"whiten": False}},
        {"hardening": "threshold"}, {"hardening": "threshold", "threshold": 0.5},
        {"debias": "separate"}, {"clamp": "unscaled"}, {"Q": "3"}, {"positives": "class"},
        {"queue": 8}, {"queue": 9}, {"queue": 8, "momentum": 0.5},
        {"anneal": "paper", "anneal_steps": 2}, {"anneal": "paper", "anneal_steps": 3},
        {"anneal": "released", "anneal_steps": 3}, {"protocol": "released"},
        {"separate_views": True}, {"separate_views": True, "probe": "released"},
        {"optimizer": "muon"}, {"sides": "growing"}, {"watch": "losses", "eval_every": 1},
        {"eval_every": 1}, {"method": "hard_scl"}, {"method": "hard_scl", "Q": "negatives"},
        {"watch": "collapse", "eval_every": 1}, {"tau_plus": 0.0},
        {"tau_plus": 0.0, "normalize": "ball"}, {"tau_plus": 0.0, "normalize": "none"},
    ]  # fmt: skip
    assert len({tiny(**c).digest for c in changes}) == len(changes)


OLD = {"data": "cifar10", "data_args": {"size": 16}, "encoder": "small", "epochs": 5}
TEN = {**OLD, "data_args": {"size": 16, "n_train": 10000}, "epochs": 10}
RECORDED = {  # Records made before there were younger fields, and since
    "e3a861c41468": {},
    "0127bb46cf36": {"seed": 4},
    "bdf3e7fcb9d3": {"method": "nt_xent"},
    "6b1c77c87202": {"method": "debiased"},
    "40c1d067e480": {"temperature": 0.2, "tau_plus": 0.0},
    "2e177b5edb22": {"encoder": "raw", "method": "nt_xent", "epochs": 0},
    "62b1b7b5035a": {"detach_weights": True},
    "d010a3eb0866": {"method": "nt_xent", "queue": 4096},
    "59fd5033e81b": {"temperature": 0.2, "beta": 0.2, "tau_plus": 0.0, "queue": 4096},
    "92aedba32bbf": {"beta": 4.0, "tau_plus": 0.0, "anneal": "paper", "anneal_steps": 5},
    "926ae3c8c8c5": {"tau_plus": 0.0, "hardening": "threshold", "threshold": 0.5},
    "add86bdc2d08": {"Q": "1020"},
    "146cd4b3af73": {"method": "hard_scl", "Q": "negatives"},
    "d7921e39cad8": {"method": "nt_xent", "encoder_args": {"whiten": True}},
    "27fce5070502": {**TEN, "separate_views": True},
    "ab9eae1d5229": {**TEN, "protocol": "released"},
}


@pytest.mark.parametrize("digest", RECORDED)
def test_a_recorded_run_keeps_its_digest(digest):
    assert Run(**{**OLD, **RECORDED[digest]}).digest == digest


def test_every_record_of_the_project_is_that_of_its_run():
    for path in (project_root() / "data" / "runs").glob("*/*.json"):
        assert Run(**json.loads(path.read_text())["run"]).digest == path.stem


def numbers(*some):
    return st.sampled_from(some)


CHOICES = {name: numbers(*values) for name, values in of_runs._CHOICES.items()}
options = st.dictionaries(
    st.sampled_from(["whiten", "norm_momentum", "n"]),
    st.one_of(st.booleans(), st.integers(0, 9), st.floats(0, 1), st.sampled_from(["a", "é"])),
    max_size=2,
)
any_run = st.fixed_dictionaries(
    {"data": numbers("sphere", "stl10"), "encoder": numbers("mlp", "small"),
     "epochs": st.integers(0, 30)},
    optional={
        **CHOICES, "data_args": options, "encoder_args": options,
        "temperature": numbers(0.07, 0.5, 1), "beta": numbers(0, 0.1, 2.5, 1e-300),
        "tau_plus": numbers(0, 0.1), "threshold": numbers(-1, 0, 0.1), "lr": numbers(0.001, 1 / 3),
        "queue": numbers(0, 7), "momentum": numbers(0, 0.999), "anneal_steps": st.integers(1, 12),
        "debias": numbers("released", "separate"), "clamp": numbers("scaled", "unscaled"),
        "Q": numbers("released", "negatives", "3", "0.1", "1e300", " 7.50 "),
        "detach_weights": st.booleans(), "separate_views": st.booleans(),
        "eval_every": st.integers(0, 3), "seed": st.integers(0, 2**40),
        "study": numbers("quick", "a-1"),
    },
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(values=any_run)
def test_a_run_comes_back_from_json_as_it_was(values):
    try:
        run = Run(**values)
    except ValueError:
        assume(False)
    back = Run(**json.loads(json.dumps(asdict(run))))
    assert back == run
    assert back.digest == run.digest
    assert Run(**{**asdict(run), "study": "other"}).digest == run.digest
    assert {f.name for f in fields(Run)} == set(asdict(run))


# Before training ----------------------------------------------------------------------------------


@pytest.fixture
def partly_labelled(monkeypatch):
    """Latent classes of which every other training point has lost its label."""

    @functools.wraps(sphere.load)
    def load(*args, **options):
        data = sphere.load(*args, **options)
        data.x_probe, data.y_probe = data.x_train, data.y_train.clone()
        data.y_train[::2] = -1
        return data

    monkeypatch.setitem(trainer.LOADERS, "sphere", load)


@pytest.mark.parametrize(
    ("changes", "named"),
    [*(({"method": m}, f"method='{m}'") for m in ("scl", "hard_scl", "supcon", "schane")),
     ({"positives": "class"}, "positives='class'"),
     ({"watch": "losses", "eval_every": 1}, "watch='losses'")],
    ids=str,
)  # fmt: skip
def test_missing_labels_are_refused_before_training(
    tiny, partly_labelled, monkeypatch, changes, named
):
    monkeypatch.setattr(trainer, "fit", None)  # nothing may come that far
    with pytest.raises(ValueError, match=f"{named}.*100 of sphere's 200 have none.*labelled"):
        train(tiny(**changes), progress=False)
    assert not list(runs.store_root().glob("*/*"))


def test_labels_are_not_missed_where_nothing_needs_them(tiny, partly_labelled):
    assert train(tiny(epochs=1, eval_every=1), progress=False).history
    assert not train(tiny(epochs=0, method="scl", positives="class"), progress=False).history


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sides": "growing"}, "sides='growing': sphere has no pictures"),
     ({"sides": "growing", "epochs": 0}, "sides='growing': sphere"),
     ({"encoder_args": {"whiten": True}}, "encoder_args.*whiten.*sphere"),
     ({"data": "digits", "data_args": FEW, "encoder_args": {"whitten": True}},
      "encoder_args.*whitten.*whiten, dirac, norm_momentum"),
     ({"data": "digits", "data_args": FEW, "encoder_args": {"whiten": True}},
      "whiten.*'mlp' has no convolutions"),
     ({"data": "digits", "data_args": FEW, "encoder": "small",
       "encoder_args": {"whiten": "no"}}, "whiten='no'"),
     ({"data": "digits", "data_args": FEW, "encoder_args": {"norm_momentum": 2.0}},
      "norm_momentum=2.0"),
     ({"data": "digits", "data_args": FEW, "encoder_args": {"norm_momentum": "fast"}},
      "encoder_args.*fast"),
     ({"data": "digits", "data_args": {**FEW, "view_size": 6}}, "'mlp'.*view_size"),
     ({"data": "digits", "data_args": {**FEW, "input_size": 6}}, "'mlp'.*input_size"),
     ({"data": "digits", "data_args": FEW, "sides": "growing"}, "sides='growing'.*'mlp'"),
     ({"data": "digits", "data_args": FEW, "protocol": "released"}, "statistics='released'")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_training(tiny, monkeypatch, changes, message):
    monkeypatch.setattr(trainer, "fit", None)
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes), progress=False)


def test_the_pixels_may_be_read_at_another_size_than_the_views(tiny):
    run = tiny(data="digits", data_args={**FEW, "view_size": 6}, encoder="raw", epochs=0)
    assert 0.5 < train(run, progress=False).metrics["knn"] <= 1.0
    both = tiny(data="digits", data_args={**FEW, "view_size": 6, "input_size": 6}, epochs=1)
    assert train(both, progress=False).metrics["loss"] > 0


# Mates --------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_a_mate_has_the_label_of_its_row(labels, seed):
    y = torch.tensor(labels)
    rows = torch.randint(0, len(y), (40,), generator=generator(seed))
    assert torch.equal(y[Mates(y)(rows, generator(seed))], y[rows])


def test_mates_are_all_of_the_label_alike_the_row_itself_among_them():
    y = torch.tensor([7, 3, 7, 7, 3, 9])
    found = Mates(y)(torch.arange(6).repeat(6000), generator())
    counts = torch.zeros(6, 6).index_put_(
        (torch.arange(6).repeat(6000), found), torch.ones(36000), accumulate=True
    )
    wanted = (y[:, None] == y).double()
    wanted = 6000 * wanted / wanted.sum(dim=1, keepdim=True)
    assert ((counts - wanted).abs() <= 4 * wanted.sqrt()).all()  # four deviations, or 0 exactly


@pytest.mark.parametrize("data", ["sphere", "digits"])
def test_positives_of_the_class_are_views_of_mates(tiny, monkeypatch, data):
    """The first view is of the row itself, the second of another of its label, mostly."""
    args = {} if data == "sphere" else {"data": data, "data_args": FEW}
    run = tiny(positives="class", epochs=1, **args)
    made, seen = load_data(run), []
    views = type(made).views

    def watching(self, x, generator, mate=None):
        seen.append((x, mate))
        return views(self, x, generator, mate)

    monkeypatch.setattr(type(made), "views", watching)
    objective = Objective(run, build_model(run, made), made)
    objective.begin(1)
    rows = torch.arange(32)
    objective(rows, generator())
    ((x, mate),) = seen
    assert torch.equal(x, made.x_train[rows])
    same = (mate[:, None].flatten(2) == made.x_train.flatten(1)).all(dim=2)
    assert same.any(dim=1).all()  # mates are training points
    labels = made.y_train[same.int().argmax(dim=1)]
    assert torch.equal(labels, made.y_train[rows])
    assert (mate != x).flatten(1).any(dim=1).sum() > 16
    plain = Objective(tiny(epochs=1, **args), build_model(run, made), made)
    plain.begin(1)
    plain(rows, generator())
    assert seen[-1][1] is None


# Views apart, growing, sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_views_encoded_apart_differ_by_batchnorm_alone(tiny, norm):
    data, found = load_data(tiny()), []
    for separate in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(128, 16), nn.BatchNorm1d(16)] if norm else [nn.Linear(128, 16)]
        model = Model(nn.Sequential(*layers, nn.ReLU()), nn.Linear(16, 8)).double()
        objective = Objective(tiny(separate_views=separate), model, data)
        objective.begin(1)
        objective.view_data = SimpleNamespace(
            views=lambda *args: [v.double() for v in data.views(*args)]
        )
        loss = objective(torch.arange(32), generator())
        loss.backward()
        found.append((loss.item(), model.encoder[0].weight.grad))
    if norm:
        assert abs(found[0][0] - found[1][0]) > 1e-4
    else:
        torch.testing.assert_close(found[0], found[1])


def test_each_pass_of_its_own_has_its_own_statistics(tiny):
    data, sizes = load_data(tiny()), []
    model = build_model(tiny(), data)
    model.register_forward_hook(lambda module, given, made: sizes.append(len(made)))
    for separate in (False, True):
        objective = Objective(tiny(separate_views=separate), model, data)
        objective.begin(1)
        objective(torch.arange(32), generator())
    assert sizes == [64, 32, 32]


def test_growing_views_grow_to_their_full_side_and_the_rest_stays_full(tiny, monkeypatch):
    sides = []
    views = vision.Images.views

    def watching(self, *args):
        found = views(self, *args)
        sides.append(found[0].shape[-1])
        return found

    monkeypatch.setattr(vision.Images, "views", watching)
    args = {"data": "digits", "data_args": {**FEW, "size": 16}, "encoder": "small"}
    train(tiny(**args, sides="growing", epochs=5, batch=100), progress=False)
    assert sides == [12, 13, 14, 15, 16, 16]  # the last: measured
    sides.clear()
    args["data_args"] = {**FEW, "view_size": 12}
    train(tiny(**args, sides="growing", epochs=2, batch=100), progress=False)
    assert sides == [9, 11, 12]


# Sphere, ball, or neither -------------------------------------------------------------------------


def in_a_ball(z):
    """Each row by itself: as it is, or divided by its length where that is above 1."""
    lengths = [math.sqrt(sum(x * x for x in row.tolist())) for row in z]
    return torch.stack([row / max(1.0, n) for row, n in zip(z, lengths, strict=True)])


@pytest.mark.parametrize("method", ["nt_xent", "hard", "hard_scl"])
@pytest.mark.parametrize("normalize", ["sphere", "ball", "none"])
def test_the_loss_of_a_step_is_that_of_embeddings_placed_so(tiny, normalize, method):
    run = tiny(method=method, normalize=normalize, tau_plus=0.0, temperature=1.0, epochs=1)
    data, model = load_data(run), build_model(tiny(), load_data(run)).double()
    model.head[-1].weight.data *= 4  # lengths on both sides of 1
    model.head[-1].bias.data.zero_()
    objective, rows = Objective(run, model, data), torch.arange(32)
    objective.begin(1)
    objective.view_data = SimpleNamespace(views=lambda *a: [v.double() for v in data.views(*a)])
    found = objective(rows, generator())
    views = objective.view_data.views(data.x_train[rows], generator())
    raw = model(torch.cat(views))
    lengths = raw.norm(dim=1)
    assert lengths.min() < 1 < lengths.max()
    z = {"sphere": raw / lengths[:, None], "ball": in_a_ball(raw), "none": raw}[normalize]
    options = {k: getattr(run, k) for k in losses.ARGUMENTS[method] if k in ("beta", "tau_plus")}
    labels = [data.y_train[rows]] if method == "hard_scl" else []
    wanted = getattr(losses, method)(
        *z.chunk(2), *labels, temperature=1.0, normalize=False, **options
    )
    torch.testing.assert_close(found, wanted)


def test_rows_of_length_zero_stay_where_they_are_in_the_ball():
    z = torch.tensor([[0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    placed(z, "ball").sum().backward()
    assert torch.equal(placed(z.detach(), "ball"), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["sphere", "ball", "none"])
def test_watching_the_collapse_adds_its_numbers_and_changes_nothing(tiny, normalize):
    options = {"normalize": normalize, "tau_plus": 0.0, "epochs": 2, "eval_every": 1}
    plain = train(tiny(**options), progress=False)
    record = train(tiny(**options, watch="collapse"), progress=False)
    assert record.metrics == plain.metrics
    assert [row["epoch"] for row in record.history] == [0, 1, 2]
    for row, without in zip(record.history, plain.history, strict=True):
        assert {k: row[k] for k in without} == without
        more = set(row) - set(without)
        assert {"zero_sum", "dimensions", "nearest_mean", "singular_7"} <= more  # 8 classes
        assert "singular_8" not in more
    assert runs.read(record.path) == record


def test_the_collapse_is_that_of_training_points_without_views(tiny):
    for normalize in ("sphere", "ball", "none"):
        run = tiny(normalize=normalize, tau_plus=0.0, watch="collapse")
        data = load_data(run)
        model = build_model(run, data).eval()
        with torch.no_grad():
            z = model(data.inputs(data.x_train)).double()
        z = {"sphere": nn.functional.normalize(z, dim=1), "ball": in_a_ball(z), "none": z}[
            normalize
        ]
        means = torch.stack([z[data.y_train == c].mean(dim=0) for c in range(8)])
        found = measuring.watched(run, model, data)
        assert found["zero_sum"] == pytest.approx(means.mean(dim=0).norm().item(), rel=1e-5)
        off = (means.norm(dim=1) - 1).abs().mean().item()
        assert found["unit_norm"] == pytest.approx(off, rel=1e-5)


# The released protocol ----------------------------------------------------------------------------


def test_the_released_protocol_has_its_pixel_statistics_and_its_views_of_stl10(tiny, monkeypatch):
    asked = []

    def load(name, *, device, seed, statistics="own", view_size=None):
        asked.append((name, statistics, view_size))

    for name in ("cifar10", "stl10"):
        monkeypatch.setitem(trainer.LOADERS, name, load)
        for changes in ({}, {"protocol": "released"}):
            load_data(tiny(data=name, data_args={}, **changes))
        args = {"statistics": "own", "view_size": 48}
        load_data(tiny(data=name, data_args=args, protocol="released"))
    assert asked == [
        ("cifar10", "own", None), ("cifar10", "released", None), ("cifar10", "own", 48),
        ("stl10", "own", None), ("stl10", "released", 32), ("stl10", "own", 48),
    ]  # fmt: skip


def test_the_released_protocol_is_views_apart_the_released_probe_and_annealing(tiny, monkeypatch):
    whole = functools.partial(probe.linear_probe_released, epochs=2)
    monkeypatch.setattr(probe, "linear_probe_released", whole)
    released = tiny(protocol="released", anneal="paper", anneal_steps=2)
    spelt = tiny(separate_views=True, probe="released", anneal="released", anneal_steps=2)
    assert released.separate_views
    assert released.probe == released.anneal == "released"
    one, two = (train(run, progress=False) for run in (released, spelt))
    assert one.metrics == two.metrics  # the sphere has no pixels whose statistics could differ
    assert one.run.digest != two.run.digest


# What is looked at while training goes on ---------------------------------------------------------

WATCH = {"watch": "losses", "eval_every": 2, "epochs": 4}


def test_the_history_begins_before_training(tiny):
    untrained = train(tiny(epochs=0), progress=False)
    record = train(tiny(epochs=5, eval_every=2), progress=False)
    assert [row["epoch"] for row in record.history] == [0, 2, 4]
    assert set(record.history[0]) == {"epoch", "knn"}
    assert all(set(row) == {"epoch", "knn", "loss"} for row in record.history[1:])
    assert record.history[0]["knn"] == untrained.metrics["knn"]
    assert train(tiny(epochs=0, eval_every=1), progress=False).history == []
    assert [r["epoch"] for r in train(tiny(eval_every=9), progress=False).history] == [0]


def test_watching_adds_four_losses_and_an_assumption_and_changes_nothing(tiny):
    plain = train(tiny(**{**WATCH, "watch": "none"}), progress=False)
    record = train(tiny(**WATCH), progress=False)
    assert record.metrics == plain.metrics
    more = {"ucl", "h_ucl", "scl", "h_scl", "assumption"}
    for row, without in zip(record.history, plain.history, strict=True):
        assert set(row) - set(without) == more
        assert {k: row[k] for k in without} == without
        assert 0 <= row["assumption"] <= 1
        assert row["h_ucl"] >= row["ucl"] - 1e-9  # the tilted mean is the larger
        assert row["h_scl"] >= row["scl"] - 1e-9
        most = math.log(1 + 62 * math.exp(2 / 0.5))
        assert all(0 < row[name] < most for name in more - {"assumption"})


def test_the_same_batches_are_watched_each_time(tiny):
    run = tiny(watch="losses")
    data = load_data(run)
    model = build_model(run, data)
    one, two = (trainer.watched(run, model, data) for _ in range(2))
    assert one == two


def test_the_watched_losses_are_those_of_views_of_training_batches(tiny, monkeypatch):
    """Their mean over the batches, of hardness 1 where the method has none."""
    asked = []

    def recording(z1, z2, labels, **args):
        asked.append((z1, z2, labels, args))
        return {"ucl": float(len(asked)), "h_ucl": 0.0, "scl": 0.0, "h_scl": 0.0}

    monkeypatch.setattr(ordering, "four_losses", recording)
    run = tiny(method="nt_xent", temperature=0.2, watch="losses", eval_every=1, epochs=0)
    data = load_data(run)
    row = trainer.watched(run, build_model(run, data), data)
    assert row["ucl"] == 2.5
    assert len(asked) == 4
    for z1, z2, labels, args in asked:
        assert z1.shape == z2.shape == (32, 8)
        torch.testing.assert_close(z1.norm(dim=1), torch.ones(32))
        assert labels.shape == (32,)
        assert args == {"temperature": 0.2, "beta": 1.0}


def test_batches_that_cannot_tell_do_not_lose_the_run(tiny):
    """The assumption is of anchors with a negative of their own label: few batches of three."""
    record = train(tiny(**WATCH, batch=3, data_args=FEW), progress=False)
    assert [row["epoch"] for row in record.history] == [0, 2, 4]
    assert runs.read(record.path) == record


def clamped_by_hand(run, z1, z2):
    """Share of anchors whose Ng, in float64 and from the formula, lies below its floor."""
    t, tau, bound = run.temperature, run.tau_plus, []
    for a, b in zip(z1.double().split(32), z2.double().split(32), strict=True):
        z = torch.cat([a, b])
        cosine = z @ z.T
        for i in range(64):
            mate = (i + 32) % 64
            c = cosine[i][[j for j in range(64) if j not in (i, mate)]]
            if run.hardening == "threshold":
                c = c[(c >= run.threshold) | (c == c.max())]
            q = torch.softmax(run.beta * c / t, dim=0)
            weight = 62 if run.Q == "released" else float(run.Q)
            ng = weight * ((q * torch.exp(c / t)).sum() - tau * torch.exp(cosine[i, mate] / t))
            floor = math.exp(-1 / t) * (weight if run.clamp == "scaled" else 1)
            bound.append(bool(ng / (1 - tau) < floor))
    return sum(bound) / len(bound)


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.5}, {"clamp": "unscaled", "Q": "2"}, {"clamp": "unscaled", "Q": "500"},
     {"hardening": "threshold", "threshold": -0.3, "tau_plus": 0.4}],
    ids=str,
)  # fmt: skip
def test_the_share_of_clamped_anchors_is_that_of_the_trained_loss(tiny, changes):
    """With a weight of one's own the unscaled floor lies elsewhere; a threshold moves Ng."""
    z1 = nn.functional.normalize(torch.randn(64, 8, generator=generator()), dim=1)
    z2 = nn.functional.normalize(z1 + 0.2 * torch.randn(64, 8, generator=generator(1)), dim=1)
    run = tiny(**{"tau_plus": 0.3, "beta": 0.0, **changes})
    share = measuring._clamp_share(run, z1, z2)
    assert share == pytest.approx(clamped_by_hand(run, z1, z2))
    assert 0 < share < 1


# Checkpoints --------------------------------------------------------------------------------------


def checkpoint_of(run, change):
    """That of a run of one epoch fewer to go, changed."""
    path = runs.path_of(run).with_suffix(".checkpoint")
    with pytest.raises(trainer.OutOfTime):
        train(run, progress=False, deadline=0.0)
    state = torch.load(path)
    state["made_by"] = change(list(state["made_by"]))
    torch.save(state, path)
    return path


OTHERS = {
    "run": lambda made_by: ["0" * 12, *made_by[1:]],
    "code": lambda made_by: [made_by[0], "other", made_by[2]],
    "torch": lambda made_by: [*made_by[:2], "1.0"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_is_refused_in_a_study_and_passed_over_in_the_cache(
    tiny, tmp_path, what
):
    path = checkpoint_of(tiny(study="lab"), OTHERS[what])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path.name}: checkpoint of another {what}.*delete it"):
        train(tiny(study="lab"), progress=False, checkpoint_every=0.0)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    path = checkpoint_of(tiny(), OTHERS[what])
    wanted = train(tiny(), store=tmp_path / "fresh", progress=False)
    assert train(tiny(), progress=False).metrics == wanted.metrics
    assert not path.exists()


@pytest.mark.parametrize("damage", [b"", b"half a file", None])
def test_a_damaged_checkpoint_of_a_study_is_refused_and_kept(tiny, damage):
    run = tiny(study="lab")
    path = checkpoint_of(run, list)
    damage = path.read_bytes()[:-200] if damage is None else damage
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{path.name}: checkpoint is damaged.*delete it"):
        train(run, progress=False, checkpoint_every=0.0)
    assert path.read_bytes() == damage
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# The same few pictures of each class --------------------------------------------------------------

DIGITS = {"data": "digits", "batch": 10}


def pictures(x):
    """Each picture as bytes."""
    return [bytes(row.flatten().tolist()) for row in x]


@pytest.mark.parametrize("shots", [1, 3])
def test_shots_are_so_many_pictures_of_each_class_out_of_those_there_were(shots):
    few = vision.load("digits", n_train=200, n_test=60, shots=shots)
    whole = vision.load("digits", n_train=200, n_test=60)
    assert few.y_train.bincount().tolist() == [shots] * 10
    left = dict(zip(pictures(whole.x_train), whole.y_train.tolist(), strict=True))
    assert len(left) == 200  # no two alike
    assert [left[x] for x in pictures(few.x_train)] == few.y_train.tolist()
    assert len(set(pictures(few.x_train))) == 10 * shots
    assert torch.equal(few.x_probe, few.x_train)
    assert torch.equal(few.y_probe, few.y_train)
    assert torch.equal(few.x_test, whole.x_test)
    assert torch.equal(few.mean, whole.mean)  # of all: a start sees the same pictures
    assert torch.equal(few.std, whole.std)


def test_shots_are_drawn_by_the_seed(monkeypatch):
    read = vision.read  # one split of the digits for all seeds
    monkeypatch.setattr(vision, "read", lambda name, root, seed: read(name, root, 0))
    one, again, other = (vision.load("digits", shots=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.x_train, again.x_train)
    assert torch.equal(one.x_test, other.x_test)
    assert not torch.equal(one.x_train, other.x_train)


@pytest.mark.parametrize(
    ("args", "message"),
    [({"shots": 0}, "shots=0: give at least 1"), ({"shots": -1}, "shots=-1"),
     ({"shots": 300}, r"shots=300: class '0' has 1\d\d training pictures"),
     ({"shots": 3, "n_train": 20}, "shots=3: class '[0-9]' has 2 training pictures")],
    ids=str,
)  # fmt: skip
def test_fewer_pictures_than_shots_are_refused_before_training(tiny, monkeypatch, args, message):
    monkeypatch.setattr(trainer, "fit", None)
    with pytest.raises(ValueError, match=message):
        train(tiny(**DIGITS, data_args=args), progress=False)


def test_as_many_shots_as_there_are_will_do():
    assert len(vision.load("digits", n_train=20, shots=2).x_train) == 20


def test_shots_of_partly_unlabelled_pictures_are_labelled_ones(monkeypatch):
    """As STL-10: most training pictures have no label, and the probe has all that do."""
    read = vision.read

    def unlabelled(name, root, seed):
        splits = read(name, root, seed)
        y = splits.y_train.copy()
        y[np.arange(len(y)) % 3 > 0] = -1
        return splits._replace(y_train=y)

    monkeypatch.setattr(vision, "read", unlabelled)
    whole = vision.load("digits")
    assert (whole.y_train < 0).sum() > 800
    few = vision.load("digits", shots=4)
    assert few.y_train.bincount().tolist() == [4] * 10
    labels = dict(zip(pictures(whole.x_train), whole.y_train.tolist(), strict=True))
    assert [labels[x] for x in pictures(few.x_train)] == few.y_train.tolist()
    assert torch.equal(few.y_probe, few.y_train)
    with pytest.raises(ValueError, match=r"shots=100: class '\d' has \d\d training pictures"):
        vision.load("digits", shots=100)


def test_few_shots_are_trained_and_measured(tiny):
    run = tiny(**DIGITS, data_args={"shots": 2}, method="cross_entropy", epochs=20, lr=0.01)
    metrics = train(run, progress=False).metrics
    assert 0.3 < metrics["top1"] < 0.9  # two of each class; chance is 0.1
    assert 0.3 < metrics["linear"] < 0.9


# A start ------------------------------------------------------------------------------------------

START = {"method": "nt_xent", "epochs": 2, "batch": 32}


def first_weights(monkeypatch, run):
    """Record, and the model as it was before its first step."""
    seen, fit = [], trainer.fit

    def looking(its, model, *args, **options):
        seen.append((its, copy.deepcopy(model.state_dict())))
        return fit(its, model, *args, **options)

    monkeypatch.setattr(trainer, "fit", looking)
    record = train(run, progress=False)
    monkeypatch.setattr(trainer, "fit", fit)
    return record, seen


def test_the_run_that_a_run_starts_from(tiny):
    args = {"n_train": 300, "shots": 2}
    run = tiny(study="a-study", data="digits", data_args=args, seed=4, temperature=0.1, lr=0.5,
               method="cross_entropy", batch=10, start={**START, "temperature": 0.2})  # fmt: skip
    began = Run(study="a-study", data="digits", data_args={"n_train": 300}, encoder="mlp", seed=4,
                temperature=0.2, **START)  # fmt: skip
    assert run.starts_from() == began
    assert "shots" not in began.data_args
    assert not began.start
    assert tiny(start=START).digest != tiny().digest


def test_an_encoder_starts_with_the_weights_of_that_run_and_the_head_anew(tiny, monkeypatch):
    run = tiny(start=START, cross_entropy=0.5)
    _, ((first, _), (second, began)) = first_weights(monkeypatch, run)
    assert (first, second) == (run.starts_from(), run)
    kept = torch.load(trainer.weights_path(first))["encoder"]
    fresh = build_model(run, load_data(run)).state_dict()
    for name, value in began.items():
        part, _, rest = name.partition(".")
        assert torch.equal(value, kept[rest] if part == "encoder" else fresh[name]), name
    assert any(not torch.equal(kept[name], fresh[f"encoder.{name}"]) for name in kept)


def test_the_weights_are_those_at_the_end_of_its_training(tiny, monkeypatch):
    """Continued by one more epoch or measured at once: its own metrics of the encoder."""
    began = train(tiny(start=START).starts_from(), store=runs.store_root() / "b", progress=False)
    metrics = train(tiny(start=START, epochs=0), progress=False).metrics
    assert (metrics["knn"], metrics["linear"]) == (began.metrics["knn"], began.metrics["linear"])
    assert metrics["knn"] != train(tiny(epochs=0), progress=False).metrics["knn"]


def test_a_start_is_trained_once_and_kept(tiny, monkeypatch):
    run = tiny(start=START)
    record, seen = first_weights(monkeypatch, run)
    path = trainer.weights_path(run.starts_from())
    assert path.suffix == ".pt"
    assert runs.read(path.with_suffix(".json")).run == run.starts_from()
    assert not list(path.parent.glob("*.checkpoint"))
    before = path.read_bytes()
    again, seen = first_weights(monkeypatch, tiny(start=START, seed=0, lr=0.01))
    assert [its for its, _ in seen] == [again.run]
    assert path.read_bytes() == before
    same, seen = first_weights(monkeypatch, run)
    assert same.metrics == record.metrics


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b"half a file"), lambda path: path.write_bytes(b""),
     lambda path: path.write_bytes(path.read_bytes()[:-100]),
     lambda path: torch.save({"encoder": torch.load(path)["encoder"]}, path),
     lambda path: torch.save(torch.load(path) | {"made_by": ["a", "b", "c"]}, path),
     lambda path: torch.save([1, 2], path), lambda path: path.unlink()],
    ids=["no file of torch", "empty", "cut", "by nobody", "by other code", "a list", "missing"],
)  # fmt: skip
def test_damaged_weights_are_made_again_and_the_record_stays(tiny, monkeypatch, damage):
    run = tiny(start=START, epochs=1)
    record = train(run, progress=False)
    path = trainer.weights_path(run.starts_from())
    wanted = torch.load(path)
    kept = path.with_suffix(".json").read_bytes()
    damage(path)
    again, seen = first_weights(monkeypatch, run)
    assert [its for its, _ in seen] == [run.starts_from(), run]
    assert again.metrics == record.metrics
    made = torch.load(path)
    assert made["made_by"] == wanted["made_by"]
    assert all(torch.equal(made["encoder"][k], v) for k, v in wanted["encoder"].items())
    assert path.with_suffix(".json").read_bytes() == kept


def test_a_record_that_is_there_stays_when_its_weights_are_made(tiny, monkeypatch):
    began = tiny(start=START, study="lab").starts_from()
    record = train(began, progress=False, embeddings=5)
    assert not trainer.weights_path(began).exists()
    files = {p: p.read_bytes() for p in record.path.parent.iterdir()}
    assert len(files) == 2
    train(tiny(start=START, study="lab"), progress=False)
    assert {p: p.read_bytes() for p in files} == files
    assert trainer.weights_path(began).exists()
    assert runs.verify() == []


def test_a_start_that_cannot_be_trained_is_refused_before_training(tiny, monkeypatch):
    monkeypatch.setattr(trainer, "fit", None)
    with pytest.raises(ValueError, match="batch=300: sphere has 200"):
        train(tiny(start={**START, "batch": 300}), progress=False)
    with pytest.raises(ValueError, match=r"start=\{'epochs': 2, 'shots': 1\}: takes batch, beta"):
        tiny(start={"epochs": 2, "shots": 1})


def test_an_interrupted_run_with_a_start_ends_as_if_it_had_not_been(tiny, tmp_path, monkeypatch):
    run = tiny(start=START, epochs=4, eval_every=1)
    whole = train(run, store=tmp_path / "whole", progress=False)
    begin = Objective.begin

    def dying(self, epoch):
        if self.run == run and epoch == 3:
            raise KeyboardInterrupt
        begin(self, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "begin", dying)
        with pytest.raises(KeyboardInterrupt):
            train(run, store=tmp_path / "cut", checkpoint_every=0.0, progress=False)
    again = train(run, store=tmp_path / "cut", progress=False)
    assert (again.metrics, again.history) == (whole.metrics, whole.history)


def test_sentences_start_from_sentences():
    run = Run(data="pydoc", data_args={"n_train": 100, "n_test": 60, "vocabulary": 200},
              encoder="bag", encoder_args={"width": 8}, method="hard_neighbours", tau_plus=0.0,
              batch=20, epochs=1, start={"method": "quick_thoughts", "epochs": 1, "batch": 20},
              )  # fmt: skip
    assert train(run, progress=False).metrics["loss"] > 0
