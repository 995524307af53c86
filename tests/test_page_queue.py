"""The page on queues: its formulas hold, its loop is the trainer's, its sentences count right."""

import math
import warnings

import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import runs, sweeps, train
from hcl.moco import MomentumQueue, queue_loss
from hcl.runs import Run

PAGE = Page("images/queue")
TINY = {"page_epochs": 1, "momenta": [0.5, 0.9], "seeds": [0, 1, 2], "queue": 256, "batch": 128}
LAB = {
    "study": "cifar10-lab", "data": "cifar10", "size": 16, "n_train": 10_000, "encoder": "small",
    "epochs": 10, "batch": 256, "lr": 0.001, "hidden_dim": 512, "out_dim": 128, "queue": 4096,
    "betas_batch": [1.0], "half_epochs": 0,
}  # fmt: skip


def made_up(run):
    """A Record with a kNN accuracy of known effects: +4 β, with a queue +1 β - 5, in points."""
    effect = (0.01 * run.beta - 0.05) if run.queue else 0.04 * run.beta
    noise = int(run.digest[:4], 16) / 65535 * 0.002
    knn = 0.5 + 0.02 * run.seed + 0.03 * (run.temperature == 0.2) + effect + noise
    names = ("loss", "linear", "alignment", "uniformity", "overlap", "clamp_share")
    history = [{"epoch": e, "knn": 0.1 * e, "loss": 1.0} for e in range(0, 8, 2)] * bool(
        run.eval_every
    )
    return made_up_record(run, {**dict.fromkeys(names, knn), "knn": knn}, history)


def patched(monkeypatch, store):
    monkeypatch.setenv("HCL_RUNS", str(store))
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: [made_up(r) for r in wanted])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page with made-up Records of its runs and of the recorded study; a short loop."""
    store = tmp_path_factory.mktemp("runs")
    for wanted in study():
        if wanted.method in ("nt_xent", "hard"):
            runs.save(made_up(wanted), store=store)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        patched(patch, store)
        return PAGE.show(*PAGE.body, **TINY)


# --- the mathematics


def rows(*sizes, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=generator), dim=1) for n in sizes]


@pytest.mark.parametrize("beta", [0.0, 0.2, 2.5])
@pytest.mark.parametrize("t", [0.2, 0.5])
def test_the_loss_is_the_page_s(beta, t):
    """Equation eq-queue-loss, a float64 loop."""
    query, key, queue = rows(5, 5, 9)
    losses = []
    for z, positive in zip(query.double(), key.double(), strict=True):
        s = [float(z @ k) / t for k in queue.double()]
        total = sum(math.exp(beta * x) for x in s)
        g = sum(math.exp(beta * x) / total * math.exp(x) for x in s)
        losses.append(math.log(1 + len(s) * g / math.exp(float(z @ positive) / t)))
    found = queue_loss(query, key, queue, temperature=t, beta=beta).item()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.2, 2.5])
def test_the_gradient_is_the_page_s_and_reaches_the_query_alone(beta):
    """Equation eq-queue-gradient, in the tangent of the sphere, against autograd."""
    t = 0.3
    query, key, queue = (x.requires_grad_() for x in rows(4, 4, 11))
    queue_loss(query, key, queue.detach(), temperature=t, beta=beta).backward()
    assert key.grad is None
    z, positive, keys = (x.detach().double() for x in (query, key, queue))
    s, p = z @ keys.T / t, (z * positive).sum(1) / t
    q, r = (beta * s).softmax(1), ((1 + beta) * s).softmax(1)
    weights = (1 + beta) * r - beta * q
    torch.testing.assert_close(weights.sum(1), torch.ones(4).double())
    g = (q * s.exp()).sum(1)
    pull = len(keys) * g / (p.exp() + len(keys) * g)
    downhill = (pull / t)[:, None] * (positive - weights @ keys)
    downhill = downhill - (downhill * z).sum(1, keepdim=True) * z
    torch.testing.assert_close(-4 * query.grad.double(), downhill, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("K", "n"), [(40, 100), (100, 100), (130, 100), (250, 100)])
def test_own_pictures_are_counted_right(whole, K, n):
    """Against a simulation of epochs in random order, picture by picture."""
    generator = torch.Generator().manual_seed(K)
    shown = torch.cat([torch.randperm(n, generator=generator) for _ in range(200)]).tolist()
    counts = [shown[i - K : i].count(shown[i]) for i in range(3 * n, len(shown))]
    assert whole[0]["own_pictures"](K, n) == pytest.approx(sum(counts) / len(counts), abs=0.02)


def test_the_effective_share(whole):
    """Equal weights use all keys; keys put in twice change nothing; a loop; the reckoning."""
    share = whole[0]["effective_share"]
    generator = torch.Generator().manual_seed(0)
    cosine = 0.1 * torch.randn(8, 4096, generator=generator)  # normal, variance 1 / 100
    assert share(cosine, 0.0, 0.2) == pytest.approx(1)
    assert share(cosine.repeat(1, 2), 3.0, 0.2) == pytest.approx(share(cosine, 3.0, 0.2))
    loop = []
    for row in cosine.double().tolist():
        w = [math.exp(1.5 * c / 0.2) for c in row]
        loop.append(sum(w) ** 2 / sum(x * x for x in w) / len(w))
    assert share(cosine, 1.5, 0.2) == pytest.approx(sum(loop) / len(loop), rel=1e-4)
    assert share(cosine, 1.5, 0.2) == pytest.approx(math.exp(-(1.5**2) / (100 * 0.2**2)), rel=0.05)


def test_more_keys_change_the_share_of_a_large_hardness_alone(whole):
    shares = whole[0]["shares"].set_index(["points", "beta", "K"])["share"]["uniform points"]
    assert shares[0.2, 16384] == pytest.approx(shares[0.2, 256], rel=0.02)
    assert shares[8.0, 16384] < 0.2 * shares[8.0, 256]


# --- the loop


def test_the_loop_is_the_trainer_s(tmp_path, whole):
    """The same accuracy as a Run of the same settings, to the last digit."""
    page = whole[0]
    for m in TINY["momenta"]:
        run = Run(**page["shared"], method="nt_xent", temperature=0.2, queue=256, momentum=m,
                  epochs=1, seed=1)  # fmt: skip
        found = train.train(run, store=tmp_path, device="cpu", progress=False)
        mine = page["by_momentum"].set_index(["momentum", "seed"]).loc[(m, 1), "knn"]
        assert found.metrics["knn"] == mine


def test_what_the_page_remembers_is_what_the_queue_holds(whole):
    _, _, keys, past, _ = whole[0]["kept"]
    bank = torch.cat([key for _, _, key in past])[-256:]
    place = int(keys.place)
    torch.testing.assert_close(bank, keys.queue.roll(-place, dims=0))


def test_keys_of_a_model_that_stands_still_do_not_drift(whole):
    """Without BatchNorm and without a step, old and new keys are the same."""
    page = whole[0]
    model = torch.nn.Linear(3, page["out_dim"])
    keys = MomentumQueue(model, size=8, dim=page["out_dim"], momentum=0.9)
    views = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0))
    past = [(None, v, keys.keys(v, torch.Generator())) for v in views]
    found = page["drift"](model, keys, past, {"seed": 5})
    assert [row["age"] for row in found] == [1, 1, 2, 2, 4, 4]
    assert all(row["cosine"] == pytest.approx(1, abs=1e-6) for row in found)
    with torch.no_grad():
        model.weight.neg_()
        model.bias.neg_()  # the encoder turns round, the copy stays
    now = {
        (row["age"], row["now by"]): row["cosine"] for row in page["drift"](model, keys, past, {})
    }
    assert now[4, "the slow copy"] == pytest.approx(1, abs=1e-6)
    assert now[4, "the encoder"] == pytest.approx(-1, abs=1e-6)


# --- the sentences and tables


def test_the_verdict_tells_the_effects_that_were_put_in(whole):
    page, shown = whole
    said = shown["verdict"]
    assert "Of 4 comparisons of the queue with the batch, 0 have" in said
    assert "4 one below" in said
    gains = page["differences"](page["df"], "knn", {"label": "SimCLR"}).set_index(page["BY"])
    assert gains.loc[("HCL β=1", "batch", 0.5), "difference"] == pytest.approx(0.04, abs=0.003)
    assert gains.loc[("HCL β=1", "queue", 0.5), "difference"] == pytest.approx(0.01, abs=0.003)
    more = list(page["more_in_the_queue"](page["df"], "knn"))
    assert len(more) == 2
    assert all("HCL β=1" in line and ("-3." in line or "-2." in line) for line in more)
    best = list(page["best_temperatures"](page["df"], "knn"))
    assert any(
        line.startswith("batch, HCL β=1 at t = 0.2 against SimCLR at t = 0.2") for line in best
    )


def test_the_recorded_part_reads_the_block_of_the_study_and_no_more(whole):
    page, shown = whole
    lab = page["lab"]
    assert shown["lab-read"].startswith(f"{len(lab)} of {page['wanted']} are recorded, 18 of them")
    assert set(lab["queue"]) == {0, 4096}
    assert set(lab["epochs"]) == {10}
    assert set(lab["label"]) == {"SimCLR", "HCL β=0.2", "HCL β=1"}
    assert not lab.duplicated(["label", "temperature", "negatives", "seed"]).any()
    assert "batch, epoch 4 minus queue, kNN" in shown["lab-half"]
    assert "The recalled gain is +0.39 points" in shown["paper-words"]
    assert len(shown["records"]) == len(lab)


def test_the_page_can_be_read_where_nothing_is_recorded(tmp_path, monkeypatch):
    patched(monkeypatch, tmp_path)
    skipped = {"loop", "by-hand", "own", "own-weights", "half", "half-gains"}
    names = [n for n in PAGE.body if n not in skipped and "drift" not in n and "effective" not in n]
    given = {**TINY, "half_epochs": 0}
    code = PAGE.code["loop"].split("AGES =")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        monkeypatch.setitem(PAGE.code, "loop", code)
        _, shown = PAGE.show(*names[:2], "loop", *names[2:], **given)
    assert shown["lab-read"].startswith("0 of ")
    assert "Nothing is recorded yet." in shown["lab-read"]
    assert "not both recorded" in shown["lab-verdict"]
    assert "cannot be said yet" in shown["paper-words"]
    assert (shown["paper-table"].iloc[:, 1:] == "not recorded").all(axis=None)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_lab_form_asks_for_runs_of_the_study_alone(monkeypatch, tmp_path):
    """So that its Records are read and nothing is trained."""
    patched(monkeypatch, tmp_path)
    asked = []
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: asked.extend(wanted) or
                        [made_up(r) for r in wanted])  # fmt: skip
    monkeypatch.setitem(PAGE.code, "loop", PAGE.code["loop"].split("AGES =")[0])
    PAGE.run("loop", "train-arms", **LAB)
    assert len(asked) == 30
    assert {r.digest for r in asked} <= {r.digest for r in study()}
