"""The page on the losses in one's own trainer: its cells run, its claims hold, its peers agree.

The frameworks that it speaks of are no requirement: where one is installed, it is compared with.
"""

import ast
import contextlib
import io
import math
import os
import re
import socket
import subprocess
import sys
import textwrap

import nbformat
import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from hcl import losses, notebooks, project_root
from hcl.losses import ContrastiveLoss, hard, hard_scl, nt_xent, scl, supcon, weighted

ROOT = project_root()
PAGE = ROOT / "book" / "practice" / "use-the-losses.ipynb"
CELLS = nbformat.read(PAGE, as_version=4).cells
PROSE = "\n".join(c.source for c in CELLS if c.cell_type == "markdown")
SCRIPT = re.search(r"^```python\n(import os\n.*?)^```$", PROSE, re.MULTILINE | re.DOTALL)[1]
KEYS = re.search(r"( +with torch.no_grad\(\):  # gather is .*?) +```", PROSE, re.DOTALL)[1]


def execute(**parameters):
    """The page's code, executed; its variables, and what it printed as ``said[cell id]``."""
    page: dict = {"__name__": "page"}
    said = {}
    with torch.random.fork_rng():
        for cell in CELLS:
            if cell.cell_type == "code":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(cell.source, cell.id, "exec"), page)
                said[cell.id] = out.getvalue()
                if cell.id == "parameters":
                    assert set(parameters) <= set(page)
                    page.update(parameters)
    return {**page, "printed": said}


@pytest.fixture(scope="module")
def page():
    return execute()


def source(cell_id):
    return next(c.source for c in CELLS if c.id == cell_id)


def batch(b=32, d=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(b, d, generator=g).to(dtype).requires_grad_() for _ in range(2)]


def agree(theirs, ours, *inputs):
    """Two losses of the same tensors, in value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    wanted, found = (torch.autograd.grad(v, inputs, retain_graph=True) for v in (theirs, ours))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


# --- what the cells show


def test_the_plain_loop_learns_and_is_annealed(page):
    history = page["history"]
    assert list(history["beta"]) == pytest.approx([1, 1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2])
    guessing = math.log(2 * page["batch"] - 1)  # of 2B - 1 equal choices
    assert f"{guessing:.3f}" in page["printed"]["loop-words"]
    assert history["nt_xent"].iloc[-1] < history["nt_xent"].iloc[0] - 0.3 < guessing - 0.3
    assert (history["clamp share"] < 0.05).all()


def test_the_clamp_binds_at_low_temperature_with_a_large_prior(page):
    share = page["clamped"]
    assert (share[0.5] == 0).all()
    assert share.loc[("coinciding", 0.1), 0.1] > 0.95
    assert (share.loc[("coinciding", 0.1)].diff().dropna() <= 0).all()  # columns from 0.1 to 0.5
    assert (share.loc["coinciding"] >= share.loc["as they are"]).all(axis=None)


def test_an_unlabelled_image_is_a_class_of_its_own_or_left_out(page):
    z1, z2 = batch(12)
    y = torch.arange(12) % 3
    some = torch.where(torch.arange(12) < 5, y, -1)
    own = torch.where(some < 0, 100 + torch.arange(12), some)
    for loss in (supcon, hard_scl, scl):
        torch.testing.assert_close(loss(z1, z2, some), loss(z1, z2, own))
        left = loss(z1, z2, some, unlabelled="ignore")
        torch.testing.assert_close(left, loss(z1[:5], z2[:5], y[:5]))
        assert loss(z1, z2, torch.full_like(y, -1), unlabelled="ignore") == 0
    assert "no label occurs twice: 0.000" in page["printed"]["labels-check"]
    assert page["no_pairs"] == 0 < page["one_view"]


def test_frameworks_steps_and_stand_ins_ran(page):
    first, second = page["printed"]["lightly"].splitlines()
    assert first.split(", ")[0] == second.split(", ")[0]
    steps = [float(v) for v in first.split(", ")]
    assert steps == sorted(steps, reverse=True)
    logged = page["printed"]["lightning-code"]
    assert "epoch 0: beta 1.000" in logged
    assert "epoch 1: beta 0.500" in logged
    assert page["losses"][-1] < page["losses"][0] / 2


def test_the_queue_has_the_newest_keys_and_a_query_finds_its_own(page):
    assert page["queue"].shape == (1024, page["out_dim"])
    assert not page["keys"].requires_grad
    torch.testing.assert_close(page["queue"][: page["batch"]], page["keys"])
    found = re.search(r"([\d.]+)%, by chance ([\d.]+)%", page["printed"]["moco-code"])
    assert float(found[1]) > 5 * float(found[2])


def test_the_temperature_learns(page):
    assert page["log_scale"].item() != pytest.approx(math.log(1 / 0.07), abs=1e-4)
    assert page["log_scale"] <= math.log(100)
    found = re.search(r"([\d.]+)%, by chance ([\d.]+)%", page["printed"]["clip-code"])
    assert float(found[1]) > 5 * float(found[2])


def test_the_gradient_of_the_temperature_is_that_of_clips_loss():
    a, b = batch()
    log_scale = torch.tensor(2.0, requires_grad=True)
    ours = nt_xent(a, b, temperature=(-log_scale).exp(), cross_modal=True)
    scores = log_scale.exp() * normalize(a, dim=1) @ normalize(b, dim=1).T
    own = torch.arange(len(a))
    theirs = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    agree(theirs, ours, a, b, log_scale)


def test_log_weights_do_what_they_are_named_for():
    z1, z2 = batch(6, 4, torch.float64)
    z1 = torch.cat([z1[:5], z1[:1] + 0.01])  # image 5 looks like image 0
    scope = {"torch": torch, "math": math, "t": 0.5, "z1": z1}
    functions = [
        n for n in ast.parse(source("weights-code")).body if isinstance(n, ast.FunctionDef)
    ]
    exec(compile(ast.Module(functions, []), "weights", "exec"), scope)
    z = normalize(torch.cat([z1, z2]), dim=1)
    cosine = z @ z.T
    place = torch.arange(12)
    negative = (place[:, None] - place) % 6 != 0
    for log_weights, wanted in (
        (scope["no_lookalikes"], negative & (cosine <= 0.9)),
        (scope["hardest"](3), negative & top(cosine.masked_fill(~negative, -2), 3)),
        (scope["hardest"](10), negative),
        (scope["hardest"](50), negative),  # more than there are
    ):
        s = (cosine / 0.5).masked_fill(~wanted, -math.inf)
        positive = cosine[place, (place + 6) % 12] / 0.5
        expected = F.softplus(s.logsumexp(dim=1) - positive).mean()
        torch.testing.assert_close(weighted(z1, z2, log_weights), expected)


def top(x, k):
    return x >= x.sort(dim=1, descending=True).values[:, k - 1 : k]


def test_every_mistake_that_is_listed_is_refused_and_named(page):
    assert list(page["said"]) == list(page["MISTAKES"])
    names = ["temperature=0.0", "tau_plus=10", "1 row(s)", "z2 (6, 16)", "labels (16,)",
             "integers", "row(s) [3]", "'crossmodal'", "labels=None", "require grad",
             "second time"]  # fmt: skip
    for text, name in zip(page["said"].values(), names, strict=True):
        assert name in text
        assert len(text) < 200


def test_silent_mistakes_show_in_the_loss(page):
    loss, guessing = page["silent"], math.log(2 * page["batch"] - 1)
    assert loss["right"] < guessing - 0.5
    assert loss["rows 0 and 1, 2 and 3, ... as pairs"] > guessing
    assert loss["second view in another order"] > guessing
    assert loss["a quarter of the batch"] < loss["right"] < loss["the same images twice"]
    assert loss["rows not normalised"] != pytest.approx(loss["right"], rel=0.01)


def test_a_detached_view_loses_part_of_the_gradient():
    z1, z2 = batch()
    through_both = torch.autograd.grad(hard(z1, z2), [z1, z2])
    (through_one,) = torch.autograd.grad(hard(z1, z2.detach()), [z1])
    torch.testing.assert_close(through_one, through_both[0])
    assert through_both[1].norm() > 0.1 * through_one.norm()


def test_a_smaller_form_of_the_page_runs():
    page = execute(epochs=1, batch=64, large=64, out_dim=8, seed=1)
    assert len(page["history"]) == 1


# --- what the prose says


def test_every_loss_and_option_that_is_named_exists():
    for name in re.findall(r"(?<!})`(\w+)`", "\n".join(tables())):  # not a citation
        assert name in losses.__dict__ or name in ("beta", "tau_plus"), name
    z, labels, z1, z2, t = torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), *batch(4, 3), 0.5
    scope = {**losses.__dict__, "z": z, "labels": labels, "z1": z1, "z2": z2, "t": t}
    calls = [c for row in tables() if (c := re.findall(r"`(\w+\([^`]*\))`", row)[-1:])]
    assert len(calls) >= 6
    for (call,) in calls:
        made = eval(call, scope)
        assert made.isfinite() if isinstance(made, torch.Tensor) else made(z1, z2).isfinite()


def tables():
    """The rows of the page's tables."""
    rows = [line for line in PROSE.splitlines() if line.startswith("| ")]
    return [r for r in rows if not r.startswith(("| you have", "| in "))]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", PROSE):
        if "." in target:
            assert (PAGE.parent / target).is_file(), target
        else:
            assert f"({target})=" in PROSE, target
    for name in re.findall(r"`(hcl/\w+\.py)`", PROSE):
        assert (ROOT / name).is_file()


def test_every_parameter_is_used():
    code = "\n".join(c.source for c in CELLS if c.cell_type == "code" and c.id != "parameters")
    for name in notebooks.parameters(PAGE):
        assert re.search(rf"\b{name}\b", code), name


# --- many processes


def test_the_script_gives_the_same_losses_on_one_process_and_on_two(tmp_path, monkeypatch, capsys):
    path = tmp_path / "many.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two = subprocess.Popen(
        [*command, "--nproc-per-node", "2", str(path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    try:
        one = alone(monkeypatch, capsys)
        said, _ = two.communicate(timeout=120)
    finally:
        two.terminate()  # it ends its processes too
    assert two.returncode == 0
    found = [re.findall(r"epoch (\d): ([\d.]+)", text) for text in (one, said)]
    assert [e for e, _ in found[0]] == [e for e, _ in found[1]] == ["1", "2", "3"]
    values = [[float(v) for _, v in rows] for rows in found]
    assert values[1] == pytest.approx(values[0], abs=3e-5)
    assert values[0] == sorted(values[0], reverse=True)


def test_keys_that_are_gathered_and_parts_of_a_batch(tmp_path):
    ranks = Ranks(tmp_path / "store", world=2)
    try:
        queues, gradients = ranks.values(the_keys_enter), ranks.values(in_parts)
    finally:
        ranks.stop()
    for queue in queues:
        assert queue[:, 0].tolist() == [0, 0, 1, 1, -1]
    net, x = net_and_views()
    hard(*net(x.flatten(0, 1)).chunk(2)).backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, net.weight.grad)


def the_keys_enter(rank):
    """The page's two lines, with keys that say whose they are."""
    from hcl.distributed import gather

    scope = {"keys": torch.full((2, 3), float(rank)), "queue": -torch.ones(5, 3)}
    exec(textwrap.dedent(KEYS), {"torch": torch, "gather": gather}, scope)
    return scope["queue"]


def net_and_views():
    torch.manual_seed(0)
    return nn.Linear(8, 4).double(), torch.randn(2, 12, 8, dtype=torch.float64)


def in_parts(rank):
    """The first exercise on one of two processes: only the last part sends its gradient."""
    net, x = net_and_views()
    model = DistributedDataParallel(net)
    x = x.chunk(2, dim=1)[rank].flatten(0, 1)
    with torch.no_grad():
        z = torch.cat([model(part) for part in x.split(4)])
    z.requires_grad_()
    hard(*z.chunk(2), gather="averaged").backward()
    *first, (part, gradient) = zip(x.split(4), z.grad.split(4), strict=True)
    with model.no_sync():
        for each, slope in first:
            model(each).backward(slope)
    model(part).backward(gradient)
    return net.weight.grad


def alone(monkeypatch, capsys):
    """What the script prints in a group of one process, this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    try:
        with torch.random.fork_rng():
            exec(compile(SCRIPT, "many.py", "exec"), {})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return capsys.readouterr().out


# --- the frameworks themselves, where they are installed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("t", [0.1, 0.5])
def test_lightly_agrees(t, page):
    theirs = pytest.importorskip("lightly.loss")
    z1, z2 = batch()
    agree(theirs.NTXentLoss(t)(z1, z2), ContrastiveLoss("nt_xent", temperature=t)(z1, z2), z1, z2)
    ours = ContrastiveLoss("decoupled", temperature=t)
    agree(theirs.DCLLoss(t)(z1, z2), ours(z1, z2), z1, z2)
    ours = ContrastiveLoss("decoupled", temperature=t, sigma=0.5)
    agree(theirs.DCLWLoss(t, sigma=0.5)(z1, z2), ours(z1, z2), z1, z2)
    # the memory bank, with the solution of the page's second exercise
    criterion = theirs.NTXentLoss(t, memory_bank_size=(40, 16))
    criterion(z1, z2)
    queue = criterion.memory_bank.bank.clone()
    scope = {"torch": torch, "math": math, "b": len(z1)}
    function = source("solution-moco").split("\n\n\n")[1]
    exec(function, scope)
    value = 2 * weighted(z1, z2, scope["queue_only"], temperature=t, queue=queue)
    agree(criterion(z1, z2), value, z1, z2)


@pytest.mark.parametrize("t", [0.1, 0.5])
def test_pytorch_metric_learning_agrees(t):
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    z, z2 = batch()
    y = torch.arange(len(z)) % 5
    y[0] = 9  # one that has no positive
    agree(theirs.SupConLoss(t)(z, y), supcon(z, None, y, temperature=t), z)
    agree(theirs.NTXentLoss(t)(z, y), scl(z, None, y, temperature=t, Q="negatives"), z)
    selfsupervised = theirs.SelfSupervisedLoss(theirs.NTXentLoss(t))(z, z2)
    agree(selfsupervised, nt_xent(z, z2, temperature=t), z, z2)


def test_sentence_transformers_agrees(page):
    name = "sentence_transformers.sentence_transformer.losses"
    ranking = pytest.importorskip(name).MultipleNegativesRankingLoss
    model, features = page["MeanOfWords"](), page["features"]
    table = model.table.weight
    q, p, n = (model(f)["sentence_embedding"] for f in features)
    options = {"temperature": 0.05, "cross_modal": True}
    one_way = 2 * weighted(q, p, page["queries_only"], queue=n, **options)
    agree(ranking(model)(features, None), one_way, table)
    one_way = 2 * weighted(q, p, page["queries_only"], **options)
    agree(ranking(model, scale=20.0)(features[:2], None), one_way, table)
    both = ranking(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    plain = page["HardRanking"](model, beta=0.0)
    agree(both(features[:2], None), plain(features[:2]), table)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_it(tmp_path):
    lightning = pytest.importorskip("lightning")
    scope = {"StandIn": lightning.LightningModule, "ContrastiveLoss": ContrastiveLoss,
             "anneal_beta": losses.anneal_beta, "torch": torch}  # fmt: skip
    exec(source("lightning-code").split("\n\n\n")[0], scope)
    x1 = torch.randn(64, 8)
    pairs = torch.utils.data.TensorDataset(x1, x1 + 0.1 * torch.randn(64, 8))
    module = scope["Contrast"](nn.Linear(8, 4), epochs=2)
    before = module.net.weight.detach().clone()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(pairs, batch_size=16, drop_last=True))
    assert not torch.equal(module.net.weight, before)
    assert module.loss.beta == 0.5
    assert trainer.callback_metrics["beta"] == 0.5
