"""The page on the loss engine: its code runs with and without a record, and says what is so."""

import contextlib
import importlib.util
import io
import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from cells import Page
from torch.nn import functional as F

from hcl import losses, project_root, rowstats, tiles
from hcl.provenance import provenance

ROOT = project_root()
PAGE = Page("practice/engine", start=("parameters", "setup"))
# the section on the record, by itself
RECORD = ["matrix", *(name for name in PAGE.code if name.startswith("record-"))]
SIZES = [256, 1024, 4096, 16384]


def execute(*names, **given):
    """Cells of the page in order: its variables, what they said, and which of them drew."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        page, shown = PAGE.outputs(*names, **given)
    said = [printed.getvalue(), *(output.text for output in shown.values() if output.text)]
    return page, "\n".join(said), [name for name, output in shown.items() if output.drawn]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the page, where nothing is recorded."""
    nothing = str(tmp_path_factory.mktemp("none") / "loss.json")
    return execute(*PAGE.body, record=nothing, gpu_record=nothing, views=256, rounds=2)


# --- the mathematics


def scores(n, t, seed=0):
    """x (N, d) with pairs side by side, and the scores of its negatives (N, N), -inf elsewhere."""
    x = F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)).double())
    group = torch.arange(n // 2).repeat_interleave(2)
    return x, group, (x @ x.T / t).masked_fill(group[:, None] == group, -math.inf)


@pytest.mark.parametrize("beta", [0.7, 2.0])
def test_the_matrix_of_row_numbers_is_the_gradient(beta):
    """Equations H and a, c of the page, from its gamma, against autograd of the formula."""
    t, tau, n = 0.4, 0.03, 24
    x, _, s = scores(n, t)
    s, q = s.requires_grad_(), n - 2
    p = (x[0::2] * x[1::2]).sum(1).repeat_interleave(2) / t
    high, low = ((k * s).logsumexp(1) for k in (1 + beta, beta))
    ng = q * ((high - low).exp() - tau * p.exp()) / (1 - tau)
    assert (ng > q * math.exp(-1 / t)).all()
    torch.log1p(ng / p.exp()).mean().backward()
    gamma = q * (high - low).exp() / ((1 - tau) * (p.exp() + ng))
    a, c = (1 + beta) * gamma / n * (-high).exp(), -beta * gamma / n * (-low).exp()
    h = (a[:, None] + a) * torch.exp((1 + beta) * s) + (c[:, None] + c) * torch.exp(beta * s)
    torch.testing.assert_close(h, s.grad + s.grad.T, rtol=1e-12, atol=1e-15)


def test_gamma_near_the_clamp_and_what_multiplies_its_error(whole):
    page = whole[0]
    q, tau, p = page["Q"], 0.08, 3.0

    def loss(log_g):
        return math.log1p(q * (math.exp(log_g) - tau * math.exp(p)) / (1 - tau) / math.exp(p))

    def gamma_at(log_g):
        return (loss(log_g + 1e-6) - loss(log_g - 1e-6)) / 2e-6

    for eps in (0.5, 0.1, 0.01):
        log_g = math.log(tau) + p - math.log(1 - eps)
        gamma = 1 / (eps + (1 - eps) * (1 - tau) / (q * tau))
        assert gamma_at(log_g) == pytest.approx(gamma, rel=1e-4)
        slope = (gamma_at(log_g + 1e-4) - gamma_at(log_g - 1e-4)) / 2e-4 / gamma
        assert slope == pytest.approx(1 - gamma, rel=1e-2)
    table = page["near_clamp"]
    assert (table["multiplier"] <= 1 / table["ε"]).all()
    ours = table[(table["code"] == "hcl") & (table["multiplier"] > 3)]
    assert len(ours) >= 4
    quotient = ours["gradient"] / ours["multiplier"]  # "their quotient stays between"
    assert quotient.max() < 2 * quotient.min()
    assert ours["gradient"].max() > 10 * ours["gradient"].min()
    released = table[table["code"] == "released"].set_index("ε")["gradient"]
    assert (released.loc[ours["ε"]] > 2 * ours.set_index("ε")["gradient"]).all()


def test_the_matrix_is_not_there(whole):
    seen = whole[0]["seen"].set_index(["loss", "N"])
    largest, forward, backward = (seen[column] for column in seen.columns)
    assert (largest["formula"] == 1).all()
    for name in ("this page", "hcl.losses"):
        tile = 256 * (256 if name == "this page" else 1024)
        assert largest[name, 2048] * 2048**2 == max(tile, 2048 * 128)  # or the embeddings
        assert 0.5 < forward[name, 2048] < 0.6
    assert 1.5 < backward["this page", 2048] < 1.6
    assert backward["hcl.losses", 2048] == 1  # the tiles were kept
    assert (forward["formula"] + backward["formula"] == 3).all()


def test_where_the_clamp_binds_the_positive_is_pulled_by_what_is_printed(whole):
    """By differences of the library's loss: longer rows have a larger p and the same Ng."""
    page = whole[0]
    z = torch.eye(page["batch"], dtype=torch.float64)  # g = 1, less than tau_plus e^p
    for t in page["temperatures"]:
        options = {"temperature": t, "tau_plus": 0.9, "normalize": False}
        less, more = (losses.hard(z, (1 + h) * z, **options).item() for h in (-1e-4, 1e-4))
        assert page["pulls"][f"t = {t:g}"] == pytest.approx((less - more) / (2e-4 / t), rel=1e-4)
    assert [f"{page['pulls'][f't = {t:g}']:.2g}" for t in (0.5, 0.2)] == ["0.82", "0.011"]


@pytest.mark.parametrize("ranks", [1, 4])
def test_products_without_tiles_that_were_kept(whole, monkeypatch, ranks):
    """The table on processes: 2 units alone, 4 / W for each of W; here from the library itself."""
    watch, n = whole[0]["Watch"], 4096
    monkeypatch.setattr(tiles, "KEEP", 0)
    x = F.normalize(torch.randn(n, 8)).requires_grad_()
    group, mine = torch.arange(n // 2).repeat_interleave(2), slice(0, n // ranks)
    y, other = (None, None) if ranks == 1 else (x, group)
    with watch() as forward:
        rows, _ = rowstats.logsumexps(
            x[mine], y, group[mine], other, powers=(2.0, 1.0), scale=2.0, bound=2.0
        )
    with watch() as backward:
        rows.sum().backward()
    units = (forward.multiplied + backward.multiplied) / (n * n * 8)
    assert units == pytest.approx(2 if ranks == 1 else 4 / ranks, rel=0.1)
    table = whole[0]["spread"].set_index("processes")
    assert table["products / N²d"][ranks] == (2 if ranks == 1 else 4 / ranks)


@pytest.mark.parametrize(("temperature", "starred"), [(0.051, False), (0.05, True)])
def test_a_star_is_where_whole_rows_are_shifted(monkeypatch, temperature, starred):
    used = []
    forward = tiles.Shifted.forward
    monkeypatch.setattr(
        tiles.Shifted, "forward", lambda self, **k: used.append(1) or forward(self, **k)
    )
    losses.hard(torch.randn(8, 4), torch.randn(8, 4), temperature=temperature, beta=1.0)
    assert bool(used) == starred == (2 / temperature >= tiles.SAFE)


def test_sums_without_a_shift_stay_in_float32():
    limits = np.finfo(np.float32)
    assert 1e6 * math.exp(tiles.SAFE) < limits.max
    assert math.exp(-tiles.SAFE) > limits.tiny
    assert np.spacing(np.float32(tiles.SAFE)) / 2 == pytest.approx(2e-6, rel=0.1)  # "two parts"


def test_sorting_leaves_the_mask_to_the_diagonal(whole):
    pairs, unsorted, by_label = whole[0]["masks"]
    assert pairs == 8  # the tiles on the diagonal of 8 x 8
    assert unsorted == 36  # all of the triangle
    assert by_label < unsorted / 2


# --- how exact


def test_the_table_of_errors_says_who_loses_the_gradient(whole):
    page, told, _ = whole
    table = page["exact"]
    ours, released = (table[table["code"] == name] for name in ("hcl", "released"))
    assert ours["gradient"].max() < 2e-6
    assert ours["loss"].max() < 1e-6
    lost = released[released["gradient"] > 0.5]
    assert set(lost["τ⁺"]) == {page["tau_plus"]}
    assert set(lost["t"]) == {0.07, 0.05}
    assert "loses its gradient (error above 0.5) at τ⁺ = 0.1, t = 0.07, 0.05" in told
    z1, z2 = page["near"]  # "the clamp binds" there
    assert losses.clamp_share(z1, z2, temperature=0.07, tau_plus=0.1) == 1
    assert 0.9 < F.cosine_similarity(z1, z2).mean() < 1


def test_sentences_follow_from_the_tables(whole):
    page, told, _ = whole
    assert "first 32 MiB of tiles" in told
    assert "up to about N = 4,096" in told
    last = page["near_clamp"].iloc[-1]
    assert f"to {last['ε']:g}, γ rises" in told
    assert f"to {last['multiplier']:.0f} and" in told


def test_what_bfloat16_loses_is_the_cast(whole):
    page = whole[0]
    low = page["low"]
    assert (low["before the cast"]["gradient"] > 2 * low["after it"]["gradient"]).all()
    assert low["after it"]["loss"].max() < 1e-6
    z = [z.double().requires_grad_() for z in page["half"]]
    losses.hard(*z, temperature=0.5, beta=1.0, tau_plus=0.0).backward()
    exact = torch.cat([each.grad for each in z])
    rounding = ((exact.bfloat16() - exact).norm() / exact.norm()).item()
    assert low["after it"]["gradient"].loc[0.5] == pytest.approx(rounding, rel=0.02)


# --- without a record


def test_without_a_record_the_page_says_so(whole):
    page, said, drawn = whole
    assert page["made"] is None
    assert page["gpu"] is None
    assert said.count("ot recorded yet") == 2
    assert "No benchmark on a GPU has been recorded yet" in said
    assert drawn == ["sorted-figure", "clamp"]
    captioned = {c.id for c in PAGE.cells if "figure" in c.metadata.get("mystnb", {})}
    assert set(drawn) < captioned
    for cell in PAGE.cells:  # a figure that may be missing cannot be referred to by number
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        assert not (name and cell.id not in drawn and f"`{name}`" in PAGE.prose)


def test_the_live_measurement_compares_all_in_turn(whole):
    page, said, _ = whole
    live = page["live"]
    assert len(live) == len(page["entrants"]) == 7
    assert (live.loc["ours, HCL", ["ratio", "least", "most"]] == 1).all()
    assert (live["ms"] > 0).all()
    assert "N = 256, d = 128, 2 rounds" in said
    z1, z2, labels = page["bench"].batch(64, 16, torch.device("cpu"))
    values = {name: loss(z1, z2, labels).item() for name, loss in page["entrants"].items()}
    same = ("ours, HCL", "ours, HCL through weighted", "dense, HCL", "released, HCL")
    for name in same:
        assert values[name] == pytest.approx(values["ours, HCL"], rel=1e-5)


# --- with one


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "benchmarks" / "loss.py"
    spec = importlib.util.spec_from_file_location("loss_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def factor(contender, views):
    """Its time in units of our HCL's."""
    if contender.implementation == "ours":
        return 0.8 if contender.loss == "NT-Xent" else 1.0
    start = {"dense": 2.0, "compiled": 0.7, "released": 4.0}.get(contender.implementation, 3.0)
    return start * (views / 256) ** 0.2


def row_of(bench, contender, views, installed):
    name, loss, *_ = contender
    row = {**dict.fromkeys(bench.FIELDS), "views": views, "implementation": name, "loss": loss}
    library = name not in ("ours", "dense", "compiled", "released")
    reason = "not here" if library and not installed else None
    if not reason and views > 4096 and name != "ours":
        reason = "too large"
    if reason:
        return row | {"time_skipped": reason, "memory_skipped": reason}
    row |= {"rounds": 3, "seconds": 1e-8 * views**2 * factor(contender, views)}
    for field, unit in (("ratio", 1.0), ("nt_xent_ratio", 0.8)):
        middle = factor(contender, views) / unit
        row |= {field: middle, f"{field}_q1": 0.98 * middle, f"{field}_q3": 1.02 * middle}
    matrices = 7 * 4 * views**2
    return row | {"peak_bytes": 3 * 4 * views * 128 if name == "ours" else matrices}


def write(bench, path, device="CPU, of the test", installed=True):
    """A record in the benchmark's own form, of numbers that are known."""
    setting = {"sizes": SIZES, "rounds": 3, "dim": 128, "precision": "high", "clock": "a sundial"}
    where = provenance(torch.device("cpu"))
    where |= {"device": device, "clean": True, "commit": "abcdef0123", "date": "2026-01-02T03"}
    rows = [row_of(bench, c, views, installed) for views in SIZES for c in bench.CONTENDERS]
    made = {"setting": setting, "losses": bench.LOSSES, "fields": bench.FIELDS, "rows": rows}
    path.write_text(json.dumps(made | {"provenance": where, "versions": bench.versions()}))
    return str(path)


def test_a_record_is_drawn_and_told(bench, tmp_path):
    path = write(bench, tmp_path / "loss.json")
    _, said, drawn = execute(*RECORD, record=path, gpu_record=str(tmp_path / "none.json"))
    assert drawn == ["record-time", "record-memory"]
    for part in ("2026-01-02", "CPU, of the test", "a sundial", "commit abcdef0", "Not recorded"):
        assert (part in said) == (part != "Not recorded")
    assert "No benchmark on a GPU" in said
    # compiled: 0.7 and 0.92 of our time at 256 and 1024, 1.22 at 4096; dense is slower throughout
    assert "`compiled` takes 0.7 times our time at N = 256 and 1.2 times at N = 4,096" in said
    assert "**ours loses** at N = 256 (0.70) and 1,024 (0.92)." in said
    assert "`dense` takes 2 times our time at N = 256 and 3.5 times at N = 4,096; ours is" in said
    assert said.count("ours loses") == 1
    # 3 / 0.8 of our NT-Xent
    assert "`lightly NTXentLoss` takes 3.8 times our time at N = 256" in said
    assert "`released` needs 448 MiB (7 N × N matrices), 74.7 times our 6 MiB" in said
    assert "At N = 16,384, ours needs 24 MiB; the matrix would be 1 GiB." in said
    table = said[said.index("<table") :]
    assert "<td>1.25</td>" in table  # HCL over NT-Xent
    assert "at most 4% of the median apart" in said


def test_the_command_it_names_makes_that_record(bench, tmp_path):
    path = write(bench, tmp_path / "other.json")
    _, said, _ = execute(*RECORD, record=path, gpu_record=path)
    command = re.search(r"python (benchmarks/loss\.py [^`]*)```", said)[1]
    words = shlex.split(command.replace("\\\n", " "))
    assert (ROOT / words[0]).is_file()
    args = bench.arguments(words[1:])
    assert (args.sizes, args.rounds, args.dim, args.precision) == (SIZES, 3, 128, "high")
    assert str(args.out) == path


def test_a_tie_is_called_one(bench, tmp_path):
    path = tmp_path / "loss.json"
    write(bench, path)
    made = json.loads(path.read_text())
    for row in made["rows"]:
        if row["implementation"] == "dense" and row["views"] == 256:
            row |= {"ratio": 0.99, "ratio_q1": 0.9, "ratio_q3": 1.1}
    path.write_text(json.dumps(made))
    _, said, _ = execute(*RECORD, record=str(path), gpu_record="none.json")
    assert "at N = 4,096; the quartiles include 1 at N = 256." in said


def test_libraries_that_were_not_installed_are_named(bench, tmp_path):
    path = write(bench, tmp_path / "loss.json", installed=False)
    _, said, drawn = execute(*RECORD, record=path, gpu_record="none.json")
    assert drawn == ["record-time", "record-memory"]
    assert "`lightly DCLLoss` was not timed: not here." in said
    assert "`lightly DCLLoss` takes" not in said


def test_a_gpu_record_is_drawn_too_and_nothing_else_passes_for_one(bench, tmp_path):
    cpu = write(bench, tmp_path / "loss.json")
    gpu = write(bench, tmp_path / "loss-gpu.json", device="NVIDIA of the test")
    page, said, drawn = execute(*RECORD, record=cpu, gpu_record=gpu)
    assert drawn == ["record-time", "record-memory", "record-gpu-time", "record-gpu-memory"]
    assert "NVIDIA of the test" in said
    assert "No benchmark on a GPU" not in said
    page, said, drawn = execute(*RECORD, record=cpu, gpu_record=cpu)
    assert page["gpu"] is None
    assert "was not recorded on a GPU, but on CPU, of the test" in said
    assert drawn == ["record-time", "record-memory"]


def test_what_is_recorded_today_is_shown():
    page, said, drawn = execute(*RECORD)
    there = (ROOT / page["record"]).exists()
    assert ("record-time" in drawn) == there
    assert (page["made"] is None) != there
    assert ("Recorded on" in said) >= there
