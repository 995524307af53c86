"""What is measured of a model: at the end of a Run, and while it trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcl import collapse, crossval, geometry, losses, neighbours, ordering, probe, sentence_tasks
from hcl.graphs import Graphs, Heads
from hcl.methods import INFOGRAPH
from hcl.objective import Objective, batches, halves
from hcl.run import Run
from hcl.sentences import Sentences
from hcl.units import placed

if TYPE_CHECKING:
    from hcl.train import Data, Model

KNN_TEMPERATURE = 0.5  # one yardstick for all runs; the released code has that of the loss
SVC = {"svc": False, "svc_scaled": True}  # metric: is each fit standardised
AMONG = 100  # consecutive held-out sentences that a neighbour is looked for in
WATCHED = 4  # batches of training data whose losses are watched


def measure(
    run: Run, model: Model, data: Data, embeddings: int = 0
) -> tuple[dict[str, float], dict[str, Any]]:
    """The final metrics, and the test embeddings to keep with the Record."""
    generator = torch.Generator(data.x_test.device).manual_seed(run.seed)
    metrics = _accuracy(run, model, data, linear=run.probe == "fast")
    z1, z2 = (_embed(model, view) for view in data.views(data.x_test, generator))
    z = _embed(model, data.inputs(data.x_test))
    metrics |= {
        "alignment": float(geometry.alignment(z1, z2)),
        "uniformity": float(geometry.uniformity(z)),
    }
    if not isinstance(data, Sentences):  # a book is no class
        edges, same, different = geometry.similarity_histograms(z, data.y_test)
        metrics["overlap"] = float(geometry.overlap(same, different, edges))
    if run.method == INFOGRAPH:
        metrics |= _floor_share(run, model, data)
    elif _has_clamp_share(run):
        metrics["clamp_share"] = _clamp_share(run, z1, z2)
    if getattr(model, "classifier", None) is not None:
        metrics["top1"] = _top1(model, data)
    if run.probe == "released" and not _is_cross_validated(data):
        metrics["linear"] = probe.linear_probe_released(model.encoder, data, generator=generator)
    kept = slice(0, min(embeddings, len(z)))
    labels = data.y_test[kept].cpu().numpy()
    arrays = {"z": z[kept].half().cpu().numpy(), "labels": labels, "of": len(z)}
    return metrics, arrays if embeddings else {}


def watched(run: Run, model: Model, data: Data) -> dict[str, float]:
    """A row of the history: kNN accuracy and, if the Run says so, losses of the same few batches.

    Their hardness is the Run's, 1 where the method has none; encoder in eval mode. Or what becomes
    of the classes: the embeddings of the probe's training points and of the test points, no views.
    """
    row = _accuracy(run, model, data)
    if run.watch == "none":
        return row
    if run.watch == "collapse":
        train_z, test_z = (
            placed(probe.features(model, x, data.inputs), run.normalize)
            for x in (data.x_probe, data.x_test)
        )
        try:
            return row | collapse.metrics(train_z, data.y_probe, test_z, data.y_test)
        except ValueError:  # means that coincide or vanish: there is no geometry to tell
            return row
    generator = torch.Generator(data.x_train.device).manual_seed(run.seed)
    args = {"temperature": run.temperature, "beta": run.beta or 1.0}
    found = []
    for rows in list(batches(len(data.x_train), run.batch, generator))[:WATCHED]:
        z1, z2 = (_embed(model, view) for view in data.views(data.x_train[rows], generator))
        labels = data.y_train[rows]
        share = ordering.assumption_share(z1, z2, labels, **args)
        found.append({**ordering.four_losses(z1, z2, labels, **args), "assumption": share})
    known = {name: [f[name] for f in found if not math.isnan(f[name])] for name in found[0]}
    return row | {name: sum(values) / len(values) for name, values in known.items() if values}


def _accuracy(run: Run, model: Model, data: Data, *, linear: bool = False) -> dict[str, float]:
    if _is_cross_validated(data):
        return _cross_validated(run, model, data)
    if isinstance(data, Sentences):
        return _of_sentences(run, model, data, tasks=linear)
    train_h = probe.features(model.encoder, data.x_probe, data.inputs)
    test_h = probe.features(model.encoder, data.x_test, data.inputs)
    votes = run.temperature if run.protocol == "released" else KNN_TEMPERATURE
    found = {"knn": probe.knn(train_h, data.y_probe, test_h, data.y_test, temperature=votes)}
    if linear:
        found["linear"] = probe.linear_probe(train_h, data.y_probe, test_h, data.y_test)
    if isinstance(data, Graphs):
        parts = [train_h, data.y_probe, test_h, data.y_test]
        z, y, test_z, test_y = (part.cpu().double().numpy() for part in parts)
        for name, scaled in SVC.items():
            found[name] = crossval.svc_accuracy(z, y, test_z, test_y, scaled=scaled)
    return found


def _of_sentences(run: Run, model: Model, data: Sentences, *, tasks: bool) -> dict[str, float]:
    """How often a held-out sentence is nearest to a neighbour, and the six tasks' accuracies."""
    found = {"retrieval": _retrieval(run, model, data)}
    for task in data.tasks if tasks else ():
        x = sentence_tasks.features(task, lambda texts: data.embed(model.encoder, texts))
        judged = sentence_tasks.judge(task, x, seed=run.seed)
        found |= {f"{task.name}{'' if k == 'accuracy' else ' F1'}": v for k, v in judged.items()}
    return found


def _retrieval(run: Run, model: Model, data: Sentences) -> float:
    """Mean over blocks of held-out sentences of :func:`hcl.neighbours.found_share`."""
    z = probe.features(model, data.x_test, data.inputs)
    f, g = halves(model, z, run.normalize)
    blocks = zip(*(part.split(AMONG) for part in (f, g, data.y_test)), strict=True)
    shares = [
        neighbours.found_share(f, g, book)
        for f, g, book in blocks
        if len(f) == AMONG and (book[1:] == book[:-1]).any()
    ]
    return sum(shares) / len(shares) if shares else neighbours.found_share(f, g, data.y_test)


def _top1(model: Model, data: Data) -> float:
    """Test accuracy of the classifier that was trained."""
    assert model.classifier is not None
    both = nn.Sequential(model.encoder, model.classifier)
    predicted = probe.features(both, data.x_test, data.inputs).argmax(dim=1)
    return float((predicted == data.y_test).double().mean())


def _is_cross_validated(data: Data) -> bool:
    return isinstance(data, Graphs) and data.cross_validated


def _cross_validated(run: Run, model: Model, data: Data) -> dict[str, float]:
    """Mean over ten folds, and their standard deviation, of an SVC of either protocol."""
    h = probe.features(model.encoder, data.x_probe, data.inputs)
    z, y = h.cpu().double().numpy(), data.y_probe.cpu().numpy()
    found: dict[str, float] = {}
    for name, scaled in SVC.items():
        folds = crossval.svc_accuracies(z, y, scaled=scaled, seed=run.seed)
        found |= {name: float(folds.mean()), f"{name}_sd": float(folds.std(ddof=1))}
    return found


def _floor_share(run: Run, model: Model, data: Data) -> dict[str, float]:
    """The share of nodes whose floor binds, in one batch of training graphs, in eval mode."""
    if not isinstance(model.head, Heads):  # nothing was trained
        return {}
    generator = torch.Generator(data.x_train.device).manual_seed(run.seed)
    objective = Objective(run, model, data)
    rows = next(objective.batches(generator))
    modes = model.training
    model.eval()
    with torch.no_grad():
        share = objective.floor_share(data.x_train[rows])
    model.train(modes)
    return {"clamp_share": share}


def _embed(model: Model, inputs: Tensor) -> Tensor:
    return F.normalize(probe.features(model, inputs, lambda x: x), dim=1)


def _has_clamp_share(run: Run) -> bool:
    """Whether the negatives of the loss are those of two views alone."""
    return run.method in losses.METHODS and not (run.tau_plus and (run.queue or run.synthetic))


def _clamp_share(run: Run, z1: Tensor, z2: Tensor) -> float:
    """Mean over test batches of the training's size; 0 where the loss has no clamp."""
    if run.tau_plus == 0:
        return 0.0
    args = {k: v for k, v in run.loss_args().items() if k != "detach_weights"}
    size = min(run.batch, len(z1))
    pairs = list(zip(z1.split(size), z2.split(size), strict=True))
    shares = [losses.clamp_share(a, b, **args) for a, b in pairs if len(a) == size]
    return sum(shares) / len(shares)
